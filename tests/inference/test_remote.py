"""Models on S3: what is copied, when, and how errors name the place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.models import SIZE, make_experiment, write_bert, write_checkpoint
from helpers.nomic import VisionSizes, write_released_vision
from helpers.s3_server import Proxy

import nev
from nev.config.model_spec import ModelError
from nev.export.export import export
from nev.export.parts import Options, sample_pictures
from nev.storage.files import filesystem, upload

SQUARES = sample_pictures(SIZE)
RELEASED = "s3://bucket/nomic-embed-vision-v1.5"


def test_released_weights_need_no_text_encoder_for_pictures(s3: Proxy, tmp_path: Path) -> None:
    folder = tmp_path / "nomic-embed-vision-v1.5"
    write_released_vision(folder, VisionSizes())
    upload(folder, RELEASED)
    model = nev.load(RELEASED)
    np.testing.assert_array_equal(model.encode_image(SQUARES), nev.load(folder).encode_image(SQUARES))
    with pytest.raises(ModelError, match=r"nomic-embed-text-v1\.5' cannot be loaded"):
        model.encode_text("a dog")
    with pytest.warns(UserWarning, match="Nothing but their width"):
        assert nev.load(RELEASED, text=str(write_bert(tmp_path / "bert"))).encode_text("a dog").shape == (48,)


def test_an_export_without_text_and_one_with_text(s3: Proxy, tmp_path: Path) -> None:
    trained = nev.load(write_checkpoint(make_experiment(tmp_path)))
    export(trained, "hf", str(tmp_path / "alone"), Options(text=False))
    upload(tmp_path / "alone", "s3://bucket/alone")
    model = nev.load("s3://bucket/alone")
    np.testing.assert_array_equal(model.encode_image(SQUARES), trained.encode_image(SQUARES))
    with pytest.raises(ModelError, match=r"text.encoder 'encoder' cannot be loaded"):
        model.encode_text("a dog")
    upload(tmp_path / "encoder", "s3://bucket/alone/text")
    spec = json.loads((tmp_path / "alone" / "nev.json").read_text())
    spec["text"]["encoder"] = "./text"
    fs, _ = filesystem("s3://bucket")
    fs.pipe_file("bucket/alone/nev.json", json.dumps(spec).encode())
    beside = nev.load("s3://bucket/alone")
    np.testing.assert_array_equal(beside.encode_text("a dog"), trained.encode_text("a dog"))
    assert beside.text.name == "s3://bucket/alone/text"
    s3.reset()
    other = nev.load("s3://bucket/alone", text=str(tmp_path / "encoder"))
    assert not s3.count("GET", "text/model.safetensors")  # another place was named
    np.testing.assert_array_equal(other.encode_text("a dog"), trained.encode_text("a dog"))
    assert s3.count("GET", "alone/model.safetensors") == 1


def test_what_is_no_model_is_not_copied(s3: Proxy, tmp_path: Path) -> None:
    upload(write_bert(tmp_path / "bert"), "s3://bucket/bert")
    s3.reset()
    with pytest.raises(ModelError, match=r"^s3://bucket/bert is no model of nev: it is a model of transformers"):
        nev.load("s3://bucket/bert")
    assert not s3.count("GET", "model.safetensors")


def test_errors_name_the_place_on_s3(s3: Proxy, tmp_path: Path) -> None:
    write_released_vision(tmp_path / "model", VisionSizes())
    upload(tmp_path / "model", RELEASED)
    fs, _ = filesystem(RELEASED)

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            nev.load(RELEASED)
        assert "/tmp" not in str(caught.value)

    place = RELEASED.removeprefix("s3://")
    fs.pipe_file(f"{place}/model.safetensors", b"1")
    refused(f"^{RELEASED}/model.safetensors: not readable as weights")
    fs.pipe_file(f"{place}/config.json", b"{")
    refused(f"^{RELEASED}/config.json: damaged")
    fs.pipe_file(f"{place}/nev.json", b"{")
    refused(f"^{RELEASED}/nev.json: damaged")
