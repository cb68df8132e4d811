"""Which of the published nomic-embed-vision a folder is, and the text encoder that this brings."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from helpers.models import write_bert
from helpers.nomic import VisionSizes, write_released_vision

import nev
from nev.config.model_spec import ModelError
from nev.inference.released import find_version

SIZES = VisionSizes(dim=32, hidden=64, depth=1)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "model"
    write_released_vision(folder, SIZES)
    return folder


def encoder_of(folder: Path) -> tuple[str, bool]:
    """The text encoder of the opened model, and whether there was a warning of an unknown version."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = nev.load(folder).spec.text
    assert text.layer_norm == text.encoder.endswith("v1.5")
    return text.encoder.removeprefix("nomic-ai/nomic-embed-text-"), any(
        "is taken for" in str(item.message) for item in caught
    )


@pytest.mark.parametrize(
    ("name", "version", "warned"),
    [
        ("nomic-embed-vision-v1", "v1", False),
        ("nomic-embed-vision-v1.5", "v1.5", False),
        ("models--nomic-ai--nomic-embed-vision-v1/snapshots/0a1b2c", "v1", False),
        ("models--nomic-ai--nomic-embed-vision-v1.5/snapshots/0a1b2c", "v1.5", False),
        ("my-photos-v1", "v1.5", True),
        ("nomic", "v1.5", True),
    ],
)
def test_the_name_tells(name: str, version: str, warned: bool, released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / name)
    assert encoder_of(tmp_path / name) == (version, warned)
    assert find_version(tmp_path, "someone/nomic-embed-vision-v1") == "nomic-embed-vision-v1"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"_name_or_path": "nomic-ai/nomic-embed-vision-v1"}),
        ("README.md", "---\nbase_model: nomic-ai/nomic-embed-vision-v1\n---\n"),
        ("README.md", "---\nbase_model:\n- nomic-ai/nomic-embed-vision-v1\n---\n# Ours\n"),
        ("README.md", "---\nlicense: apache-2.0\n---\n\n# nomic-embed-vision-v1: Expanding the Latent Space\n"),
    ],
)
def test_a_folder_of_another_name_says_what_it_is(file: str, content: object, released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "nomic")
    place = tmp_path / "nomic" / file
    if isinstance(content, dict):
        content = json.dumps({**json.loads(place.read_text()), **content})
    place.write_text(str(content))
    assert encoder_of(tmp_path / "nomic") == ("v1", False)


def test_a_card_that_says_nothing(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "nomic")
    (tmp_path / "nomic" / "README.md").write_bytes(b"---\n: [\n---\n# \xff\n")
    assert encoder_of(tmp_path / "nomic") == ("v1.5", True)


def test_only_the_width_of_an_encoder_can_be_compared(released: Path, tmp_path: Path) -> None:
    model = nev.load(released, text=str(write_bert(tmp_path / "bert", width=32)))
    with pytest.warns(UserWarning, match="Nothing but their width could be compared"):
        assert model.encode_text("a dog").shape == (32,)


def test_a_config_with_null(tmp_path: Path) -> None:
    write_released_vision(tmp_path / "nomic-embed-vision-v1", SIZES, n_head=None)
    with pytest.raises(ModelError, match="is not a whole nomic-embed-vision"):
        nev.load(tmp_path / "nomic-embed-vision-v1")
