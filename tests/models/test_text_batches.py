"""How texts are embedded: in chunks and by a budget of tokens; and how long a text may be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import write_bert
from transformers import RobertaConfig, RobertaModel

from nev.config.base import ConfigError
from nev.config.model import Text
from nev.models import text
from nev.models.text import TextTower, load_text


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def write_roberta(folder: Path, bert: Path) -> str:
    """A small RoBERTa with positions for 40 - 2 tokens, and the tokenizer of `bert`."""
    shutil.copytree(bert, folder)
    config = RobertaConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        type_vocab_size=2,
        pad_token_id=1,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_the_longest_text_of_a_roberta(bert: Path, tmp_path: Path) -> None:
    encoder = write_roberta(tmp_path / "roberta", bert)
    tower = load_text(Text(encoder=encoder, max_tokens=38))
    assert tower.longest == 38
    long = "word " * 60
    assert len(tower.tokenizer(long, truncation=True, max_length=38)["input_ids"]) == 38
    assert np.isfinite(tower.encode([long])).all()
    with pytest.raises(ConfigError, match=r"text\.max_tokens \(39\) is more than .* takes \(38\)"):
        load_text(Text(encoder=encoder, max_tokens=39))
    assert load_text(Text(encoder=str(bert))).longest == 96


def watch(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Size], list[int]]:
    """Shapes of the forwards, and the numbers of texts that are tokenised at once, as they come."""
    shapes, tokenised = list[torch.Size](), list[int]()
    embed = TextTower._embed

    def recorded(self: TextTower, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes.append(batch["input_ids"].shape)
        return embed(self, batch)

    call = type(tower.tokenizer).__call__

    def counted(self: object, texts: list[str], **options: object) -> object:
        tokenised.append(len(texts))
        return call(self, texts, **options)

    monkeypatch.setattr(TextTower, "_embed", recorded)
    monkeypatch.setattr(type(tower.tokenizer), "__call__", counted)
    return shapes, tokenised


def test_texts_are_embedded_in_chunks_by_a_budget_of_tokens(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK", 12)
    monkeypatch.setattr(text, "BATCH_TOKENS", 120)
    tower = load_text(Text(encoder=str(bert), max_tokens=96))
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["dog", "cat", "snow"], random.integers(0, 120))) for _ in range(30)]
    single = np.concatenate([tower.encode([sentence]) for sentence in texts])
    shapes, tokenised = watch(tower, monkeypatch)
    progress = list[int]()
    vectors = tower.encode(texts, 8, progress.append)
    np.testing.assert_allclose(vectors, single, rtol=0, atol=1e-6)
    assert np.abs(single[0] - single[1]).max() > 1e-3
    assert tokenised == [12, 12, 6]
    assert all(rows <= 8 and (rows == 1 or rows * width <= 120) for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 1
    assert progress == np.cumsum([rows for rows, _ in shapes]).tolist()
    assert progress[-1] == len(texts)
    assert tower.encode([]).shape == (0, 48)
