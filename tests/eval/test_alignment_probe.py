"""The alignment probe: its sets, its result, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.samples import make_small_set, sample_of
from PIL import Image
from ray.exceptions import RayTaskError
from safetensors.torch import save_file
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import to_yaml
from nev.data.index import Index
from nev.eval.alignment_probe import draw_samples, embed_captions, probe_trunk
from nev.eval.report.alignment_probe import ProbeResult, TrunkResult, draw_probe
from nev.eval.trunk_features import Shown
from nev.models.text import TextTower
from nev.models.trunk_spec import parse_trunk

KEY = "0" * 64


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_small_set(tmp_path_factory.mktemp("small"))


def test_without_a_validation_set_no_scored_row_is_fitted_on(small_set: Index, tiny: Callable[..., Experiment]) -> None:
    config = tiny(data__train=small_set.root, data__val=None)
    fit, score = draw_samples(config, 1000)
    assert (fit.total, score.total) == (65, 13)
    uids = {uid for reader in (fit, score) for part in reader.blocks(99) for uid in reader.read(part)["uid"]}
    assert len(uids) == 78
    same = tiny(data__train=small_set.root, data__val=small_set.root)  # a set that is given twice is divided, too
    assert [reader.drawn[0].tolist() for reader in draw_samples(same, 1000)] == [
        fit.drawn[0].tolist(),
        score.drawn[0].tolist(),
    ]
    with pytest.raises(ConfigError, match="needs at least 20 and 11"):
        draw_samples(config, 30)


def test_a_trunk_that_fails_has_a_reason(tiny: Callable[..., Experiment], tmp_path: Path) -> None:
    save_file({"stem": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "whole.safetensors")
    wrong = {
        "vit_tinny_patch16_224": "no model 'vit_tinny_patch16_224'.*vit_tiny_patch16_224",
        f"test_vit={tmp_path / 'absent.pth'}": "no such file of weights",
        f"test_vit={tmp_path / 'other.safetensors'}": "does not fit",
        "test_vit": "could not be fetched.*NAME=FILE",
        f"test_vit={tmp_path / 'whole.safetensors'}@50": "not usable for pictures of 50 x 50 pixels",
        "local-dir:absent": "could not be fetched",
    }
    for text, reason in wrong.items():
        result = probe_trunk(parse_trunk(text), tiny(), [], Shown(lambda *_: None, 0, 1))
        assert result.reason is not None
        assert np.char.find([result.reason], "Traceback")[0] == -1
        with pytest.raises(ConfigError, match=reason):
            raise ConfigError(result.reason)


def test_an_error_in_a_process_of_ray_is_one_line(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed_sets(*_: object) -> None:
        error = ConfigError("this node has other weights\nFailed to apply UDF transform after 1/1 attempts")
        raise RayTaskError("embed_unit", "Traceback", error).as_instanceof_cause()  # it is a ConfigError, too

    monkeypatch.setattr("nev.eval.alignment_probe.load_trunk", lambda *_: (None, None))
    monkeypatch.setattr("nev.eval.alignment_probe.embed_sets", embed_sets)
    result = probe_trunk(parse_trunk("a"), tiny(), [], Shown(lambda *_: None, 0, 1))
    assert result.reason == "ConfigError: this node has other weights"


def test_the_pace_leaves_the_first_block_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 12.0])  # ten seconds until the processes have started
    monkeypatch.setattr("nev.eval.trunk_features.time.perf_counter", lambda: next(clock))
    lines = []
    shown = Shown(lambda *line: lines.append(line), 1, 3)
    for rows in (0, 50, 40):
        shown.add(rows, 90, "a")
    assert shown.pace() == 20
    assert [line[1:3] for line in lines] == [(90, 270), (140, 270), (180, 270)]


def make_result(*shares: float) -> ProbeResult:
    ways = ("text_to_image_r10", "image_to_text_r10")
    trunks = [
        TrunkResult(
            trunk=f"trunk {number} $x^2$ " + "long/" * 50,
            metrics={"mutual_knn": share / 4, "mutual_knn_chance": 0.01}
            | {
                f"{way}{end}": share + more
                for way in ways
                for end, more in {"": 0, "_low": -0.02, "_high": 0.03}.items()
            }
            | {f"{way}_chance": 0.01 for way in ways},
        )
        for number, share in enumerate(shares)
    ]
    trunks.append(TrunkResult(trunk="absent", reason="no such file"))
    return ProbeResult(experiment="e", text="t", fitted_on="f", scored_on="s", seed=0, k=10, trunks=tuple(trunks))


def test_the_best_trunk_is_first_and_the_figure_shows_all(tmp_path: Path) -> None:
    result = make_result(0.2, 0.6, 0.4)
    assert [trunk.trunk[:7] for trunk in result.ranked()] == ["trunk 1", "trunk 2", "trunk 0"]
    draw_probe(tmp_path / "probe.png", result)
    with Image.open(tmp_path / "probe.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 500
    assert all((pixels == colour).all(axis=2).sum() > 100 for colour in ((0x2F, 0x6D, 0xB3), (0xD9, 0x82, 0x2B)))
    with pytest.raises(ValueError, match="no trunk was scored"):
        draw_probe(tmp_path / "none.png", make_result())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --checkpoint, or --alignment-probe TRUNK with --config"),
        (["--alignment-probe", "resnet18"], "takes --config"),
        (["--alignment-probe", "resnet18", "--config", "quickstart", "--checkpoint", "c"], "no --checkpoint"),
        (["--alignment-probe", "resnet18", "--config", "quickstart", "--suite", "quick"], "leave --suite"),
        (["--checkpoint", "c", "--config", "quickstart"], "are for --alignment-probe"),
        (["--checkpoint", "c", "--sample", "100"], "are for --alignment-probe"),
        (["--alignment-probe", "timm/resnet18", "--config", "quickstart"], "hf-hub:timm/resnet18"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_command_whose_trunks_all_fail_exits_with_1(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nev.eval.alignment_probe.connect", lambda: None)
    output = tmp_path / "out"
    arguments = ["--alignment-probe", "absent_one", "--alignment-probe", "absent_two", "--sample", "60"]
    done = CliRunner().invoke(app, ["evaluate", "--config", base, *arguments, "--output", str(output)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "not probed  absent_one: " in done.stderr
    assert "not probed  absent_two: " in done.stderr
    assert not output.exists()


def test_captions_without_sidecars_are_embedded(
    small_set: Index, text: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    texts = embed_captions(sample_of(small_set, [3, 7, 8]), text, lambda *line: lines.append(line[:3]))
    assert texts.owner is not None
    assert texts.owner.tolist() == [0, 0, 2]
    wanted = text.encode(["caption 3", "more of 3", "caption 8"])
    np.testing.assert_allclose(texts.captions, wanted, atol=1e-5)
    assert lines[-1] == ("captions embedded", 3, 3)


@pytest.mark.ray
def test_the_command_probes_trunks(
    ray_cluster: None, tiny: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ViT with a class token and a network without, weights in files; a third trunk cannot be found."""
    config = tiny(output=str(tmp_path / "runs"))
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    for name in ("test_vit", "test_resnet"):
        save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / f"{name}=1.safetensors")
    monkeypatch.chdir(tmp_path)  # relative paths; Ray's processes have another working folder
    monkeypatch.setattr(TextTower, "encode", None)  # the sidecars have every vector
    trunks = ["test_vit=test_vit=1.safetensors@48", "absent_trunk", "test_resnet=test_resnet=1.safetensors"]
    probes = [part for trunk in trunks for part in ("--alignment-probe", trunk)]
    arguments = ["evaluate", "--config", "mine.yaml", *probes, "--sample", "300", "--set", "seed=1"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs/alignment-probe-tiny"
    assert done.stdout.splitlines()[-2:] == [
        f"numbers     {folder}/alignment-probe.json", f"figure      {folder}/alignment-probe.png",
    ]  # fmt: skip
    assert "not probed  absent_trunk: vision.trunk: timm has no model 'absent_trunk'" in done.stdout
    assert "300 pictures of" in done.stderr
    result = json.loads((folder / "alignment-probe.json").read_text())
    vit, absent, resnet = result["trunks"]
    assert (vit["pool"], vit["width"], vit["image_size"]) == ("cls+mean", 128, 48)
    assert (vit["fitted"], vit["scored"], vit["bad"]) == (300, 60, {})
    assert (resnet["pool"], resnet["image_size"], resnet["mean"]) == ("mean", 32, [0.5, 0.5, 0.5])
    assert config.data.mean != (0.5, 0.5, 0.5)  # the trunk's own is used
    assert absent["reason"]
    for trunk in (vit, resnet):
        assert trunk["metrics"]["text_to_image_r10"] > trunk["metrics"]["text_to_image_r10_chance"]
        assert trunk["seconds"] > 0
        assert trunk["pictures_per_second"] > 0
    assert (folder / "alignment-probe.png").stat().st_size > 10_000
