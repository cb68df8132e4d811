"""The text tower in the training loop (`text.mode: online`): its tokens, its runs, what is cut, empty and kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import rows_of, write_shard
from helpers.training import prepare_job, run_bare, train_reader
from safetensors.torch import save_file

from nev.config.base import ConfigError
from nev.config.data import Columns, Limits
from nev.config.experiment import Experiment
from nev.data.block import BlockReader
from nev.data.block_plan import Segment
from nev.data.index import build_index
from nev.data.text_sidecar import sidecar_key, write_sidecar
from nev.eval.validation.texts import read_captions
from nev.eval.validation.vectors import load_vectors
from nev.models.digests import weight_digests
from nev.models.lock import CANARIES, refuse_other_vectors
from nev.models.text import TextTower, load_text, make_text_encoder
from nev.models.vision import build_vision
from nev.runs.manifest import latest_checkpoint
from nev.train.driver.setup import make_tokenizer

Make = Callable[..., Experiment]
WORLD, STEPS, LONGEST = 2, 3, 7


@pytest.fixture(scope="module")
def text() -> TextTower:
    torch.set_num_threads(1)
    return load_text(Experiment.model_fields["text"].default)


def captions(job: Any) -> list[str]:
    return [caption for of_row in read_captions(job.validation.reader.index) for caption in of_row]


def test_tokens_are_those_of_the_tower(text: TextTower) -> None:
    sentences = [*CANARIES, "a dog", "two dogs " * 60]
    ids = make_tokenizer(text)(sentences)
    expected = text.tokenizer(sentences, truncation=True, max_length=text.max_tokens)["input_ids"]
    assert [row[row >= 0].tolist() for row in ids] == expected
    assert ids.shape == (len(sentences), text.max_tokens)
    found = make_text_encoder(text)(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(found, text.encode(sentences), atol=1e-6)
    nothing = make_text_encoder(text)(torch.full((1, 4), -1, dtype=torch.int32))
    assert nothing.isfinite().all()


def test_an_encoder_that_wants_more_than_ids_is_refused(text: TextTower) -> None:
    refuse_other_vectors(text, make_tokenizer(text))
    with pytest.raises(ConfigError, match=r"cannot run in the training loop: from ids and a mask alone it gives other"):
        refuse_other_vectors(text, lambda sentences: np.roll(make_tokenizer(text)(sentences), 1, axis=0))


@pytest.mark.slow
def test_a_block_has_the_tokens_of_the_captions_whose_vectors_sidecars_give(tmp_path: Path, text: TextTower) -> None:
    rows = rows_of(6)
    sentences = ["a red square", "three of them", "one blue circle", "", " ", "two stars"]
    for row, sentence in zip(rows, sentences, strict=True):
        row["caption"] = [sentence, "green", "one more"] if sentence.startswith("three") else [sentence]
    write_shard(tmp_path / "a.parquet", rows, [6])
    index = build_index(str(tmp_path), Columns())
    key = sidecar_key(text.fingerprint, "caption")
    write_sidecar(index, 0, key, text.width, text.encode)
    settings = {"image_size": 16, "limits": Limits(), "seed": 3, "augment": None, "text_width": text.width}
    vectors, tokens = (
        BlockReader(index, **settings, text_key=key),
        BlockReader(index, **settings, tokenizer=make_tokenizer(text)),
    )
    assert tokens.row_bytes == 16 * 16 * 3 + 4 * text.max_tokens
    chosen = set()
    for epoch in range(16):
        one, other = (reader.read([Segment(0, 0, 6, epoch)]) for reader in (vectors, tokens))
        assert one["valid"].tolist() == other["valid"].tolist() == [True, True, True, False, False, True]
        assert one["reason"].tolist() == other["reason"].tolist()
        assert other["text"].dtype == np.int32
        found = make_text_encoder(text)(torch.from_numpy(other["text"])).detach().numpy()
        np.testing.assert_allclose(found[one["valid"]], one["text"][one["valid"]].astype(np.float32), atol=1e-3)
        assert np.isfinite(found).all()
        chosen.add(other["text"][1].tobytes())
    assert len(chosen) == 3


@pytest.mark.slow
def test_an_online_run_is_the_sidecars_run(tiny: Make, text: TextTower) -> None:
    found = []
    for mode in ("sidecar", "online"):
        config = tiny(name=mode, text__mode=mode, train__steps=6, train__eval_every=3)
        found.append(run_bare(prepare_job(config, text), train_reader(config, text)))
    for step in range(1, 7):
        assert found[1][step]["loss"] == pytest.approx(found[0][step]["loss"], rel=1e-3)
    for name, value in found[0][6].items():
        if name.startswith(("zero_shot", "retrieval")):
            assert found[1][6][name] == pytest.approx(value, abs=0.02), name


@pytest.mark.slow
def test_a_batch_without_any_text_is_a_batch(tmp_path: Path, tiny: Make, text: TextTower) -> None:
    """One of two shards has no caption; blocks are row groups, so that whole batches are without."""
    for name, captions in (("a", True), ("b", False)):
        rows = rows_of(64)
        for number, row in enumerate(rows):
            row["uid"], row["caption"] = f"{name}{number}", f"picture {number}" if captions else ""
        write_shard(tmp_path / "set" / f"{name}.parquet", rows, [32, 32])
    settings = {"data__train": str(tmp_path / "set"), "data__val": None, "eval": {}, "data__max_bad_share": 1.0}
    settings |= {"data__window": 0}
    for lock in ("none", "text"):
        online = {"lock": lock, "text__mode": "online", "name": lock}
        config = tiny(train__steps=8, train__global_batch=32, optim__lr=1e-5, **online, **settings)
        reported = run_bare(prepare_job(config, text), train_reader(config, text))
        assert sorted(reported) == list(range(1, 9))
        assert reported[8]["bad_rows"] == 128
        assert sum(step["loss"] == 0 for step in reported.values()) == 4
        assert not any(step.get("skipped_steps") for step in reported.values())


def test_what_is_cut_is_cut_as_the_tower_cuts_it(text: TextTower) -> None:
    left = copy.deepcopy(text.tokenizer)
    left.truncation_side = "left"
    tower = dataclasses.replace(text, tokenizer=left, max_tokens=12)
    refuse_other_vectors(tower, make_tokenizer(tower))
    right = dataclasses.replace(text, max_tokens=12)
    with pytest.raises(ConfigError, match="gives other vectors"):
        refuse_other_vectors(tower, make_tokenizer(right))


@pytest.mark.slow
def test_kept_texts_are_those_that_are_asked_for(tiny: Make, small_text: dict[str, object]) -> None:
    config = tiny(lock="none", train__steps=1, **small_text)
    text = load_text(config.text)
    job = prepare_job(config, text)
    run_bare(job, train_reader(config, text))
    newest = latest_checkpoint(job.run)
    assert newest
    assert job.validation
    assert load_vectors(newest, job.validation)
    names = tuple(reversed(job.validation.classes.names))  # type: ignore[union-attr]
    others = [
        dataclasses.replace(job.validation, classes=job.validation.classes._replace(names=names)),  # type: ignore[union-attr]
        dataclasses.replace(job.validation, classes=None),
        dataclasses.replace(job.validation, retrieval=False),
    ]
    assert [load_vectors(newest, other) for other in others] == [None] * 3


def test_another_tower_than_the_files_is_refused(tiny: Make, text: TextTower, tmp_path: Path) -> None:
    tower = build_vision(tiny().vision, 32, text.width)
    whole = {f"vision.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(whole, tmp_path / "model.safetensors")
    same = tiny(vision__weights=str(tmp_path / "model.safetensors")).vision
    assert weight_digests(build_vision(same, 32, text.width)) == weight_digests(tower)
    with pytest.raises(ConfigError, match=r"model\.safetensors does not fit the tower of this experiment"):
        build_vision(same.model_copy(update={"pool": "map"}), 32, text.width)
