"""`nev embed-images`: a locked trunk over shards on S3, on a real Ray; bad pictures, a second start, another node's trunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.frozen import load_trunk, make_frozen
from helpers.pictures import rows_of, write_shard
from helpers.s3_server import Proxy
from rich.console import Console
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import to_yaml
from nev.config.paths import with_absolute_paths
from nev.data.image_sidecar import Features, check_image_sidecars
from nev.data.sidecar import missing_sidecars
from nev.embed.features import (
    TOO_LARGE,
    check_room,
    collect_views,
    embed_features,
    list_feature_sets,
    row_groups,
    warn_of_other_pixels,
)
from nev.models.frozen import FrozenTrunk, load_same_trunk
from nev.models.vision import normalise
from nev.storage.files import filesystem

Make = Callable[..., Experiment]


@pytest.fixture
def frozen(tiny: Make, tmp_path: Path) -> Make:
    return lambda **overrides: make_frozen(tiny, tmp_path, **overrides)


def see(trunk: FrozenTrunk, config: Experiment, images: np.ndarray) -> torch.Tensor:
    return trunk(normalise(torch.from_numpy(images), config.data.mean, config.data.std))


@pytest.mark.ray
def test_features_on_s3_are_those_of_the_trunk(frozen: Make, s3: Proxy, ray_cluster: None, tmp_path: Path) -> None:
    rows = rows_of(23)
    rows[4]["image"] = b"not a picture"
    for split, part in (("train", rows), ("val", rows[:5])):
        folder = tmp_path / split
        write_shard(folder / "a.parquet", part[:3], [3])
        write_shard(folder / "b.parquet", part[3:], [4, len(part) - 7] if len(part) > 7 else [len(part) - 3])
        fs, bucket = filesystem(f"s3://bucket/{split}")
        fs.put(str(folder), bucket, recursive=True)
    config = frozen(
        data__train="s3://bucket/train",
        data__val="s3://bucket/val",
        data__augment={"scale": [0.3, 1.0], "flip": True},
        vision__views=2,
        eval__batch=4,
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    shown = CliRunner().invoke(app, ["embed-images", "--config", str(file)], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "s3://bucket/train: 23 pictures of 2 x 128 numbers, 11.5 KiB" in shown.output
    assert "4 sidecars written, 28 pictures, 2 cannot be used" in shown.output
    assert "2 x not an image in a known format" in shown.output

    trunk = load_trunk(config)
    for each in list_feature_sets(config, trunk.fingerprint, trunk.shape):
        assert each.missing == []
        check_image_sidecars(each.index, each.features, every_row=True)
        segments = [segment for shard in (0, 1) for segment in row_groups(each.index, shard)]
        for epoch in range(2):
            in_epoch = [segment._replace(epoch=epoch) for segment in segments]
            pixels = each.reader.read(in_epoch)
            read = replace(each.reader, features=each.features).read(in_epoch)
            assert read["valid"].tolist() == pixels["valid"].tolist()
            views = [
                see(trunk, config, each.reader.read([segment._replace(epoch=view) for segment in segments])["image"])
                for view in range(each.features.views)
            ]
            drawn = each.features.draw_views(config.seed, epoch, pixels["uid"].tolist())
            for row in np.flatnonzero(pixels["valid"]):
                np.testing.assert_allclose(read["image"][row], views[drawn[row]][row], atol=2e-3)

    # A second start writes what is missing alone: here the sidecar that was lost.
    train = list_feature_sets(config, trunk.fingerprint, trunk.shape)[0]
    lost = train.features.sidecars(train.index).location(1)
    fs, path = filesystem(lost)
    fs.rm_file(path)
    again = embed_features(config, Console(quiet=True))
    assert (again.shards, again.pictures, again.views, again.bad.total()) == (1, 20, 40, 1)
    assert missing_sidecars(train.features.sidecars(train.index)) == []


def test_views_stand_side_by_side_and_reasons_are_counted() -> None:
    rows = {
        "uid": np.array(["a", "b", "c"] * 2 + ["d"] * 2, object),
        "row": np.array([0, 1, 2, 0, 1, 2, 3, 3]),
        "reason": np.array(["", "", "", "", "torn", "", "", ""], object),
        "vector": np.array([[0], [1], [2], [10], [11], [np.inf], [3], [13]], np.float16),
    }
    bad = Counter[str]()
    found = collect_views(rows, Features({}, (1,), 2), bad)
    assert found.uid == ["a", "b", "c", "d"]
    assert found.features[..., 0].tolist() == [[0, 10], [1, 11], [2, np.inf], [3, 13]]
    assert found.reason == ["", "torn", TOO_LARGE, ""]
    assert bad == {"torn": 1, TOO_LARGE: 1}
    with pytest.raises(ConfigError, match="damaged"):
        collect_views(ConfigError("damaged"), Features({}, (1,), 2), bad)


def test_another_node_s_trunk_is_refused(frozen: Make) -> None:
    config = with_absolute_paths(frozen())
    with pytest.raises(ConfigError, match="this node's weights are not the driver's"):
        load_same_trunk(config.vision, config.data.image_size, "0" * 64)


def test_an_experiment_without_a_locked_trunk_is_refused(tiny: Make) -> None:
    with pytest.raises(ConfigError, match=r"give vision\.lock: trunk"):
        embed_features(tiny(), Console(quiet=True))


def test_a_full_disk_is_seen_before_work_starts(frozen: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_absolute_paths(
        frozen(data__val=None, eval={}, seed=77, data__augment={"scale": [0.2, 1.0]}, vision__mode="online")
    )
    (each,) = list_feature_sets(config, "never written", (17, 64))
    console = Console(record=True, width=200)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    with pytest.raises(ConfigError, match=r"take 2\.1 MiB, and the disk has 1\.0 MiB free.*vision\.keep=pooled"):
        check_room([each], console)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3 * 2**20})())
    with pytest.raises(ConfigError, match=r"take 4\.2 MiB"):
        check_room([each, each], console)
    assert "1,024 pictures of 1 x 17 x 64 numbers, 2.1 MiB" in console.export_text()


def test_other_pixels_than_the_trunk_s_are_told(frozen: Make) -> None:
    console = Console(record=True, width=200)
    config = frozen()
    trunk = load_trunk(config)
    trunk.trunk.pretrained_cfg = {"mean": config.data.mean, "std": (0.5, 0.5, 0.5)}
    warn_of_other_pixels(trunk, config, console)
    (line,) = console.export_text().splitlines()
    assert line.startswith("data.std is [0.26862954")
    assert line.endswith("was trained with [0.5, 0.5, 0.5]")
