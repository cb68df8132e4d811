"""`nev prepare` as a user runs it: good runs, their report, and errors that name the cause."""

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.prepare_command import prepare
from helpers.tars import tar_of
from PIL import Image

from nev.commands import prepare as prepare_module
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.sources import SOURCES

REAL = os.environ.get("NEV_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="NEV_DATA does not name the folder of real data")


def picture(width: int, height: int, shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height), shade).save(out, "PNG")
    return out.getvalue()


def labelled(path: Path, labels: list[int], names: list[str | None], images: list[bytes | None] | None = None) -> Path:
    images = images or [f"image {k}".encode() for k in range(len(labels))]
    pq.write_table(
        pa.table({"image": [{"bytes": image} for image in images], "label": labels, "label_name": names}), path
    )
    return path


def test_labelled_parquet_becomes_shards_with_captions_and_classes(tmp_path: Path) -> None:
    labelled(tmp_path / "a.parquet", [1, 0, 1, 0], ["dog", "cat", "dog", None], [b"1", b"2", None, b"4"])
    out = prepare(
        "--source", "hf-parquet", "--input", f"{tmp_path}/*.parquet", "--label", "label", "--name", "label_name",
        "--template", "a {}", "--template", "one {}", "--output", tmp_path / "set/train",
    )  # fmt: skip
    for line in ("rows in 4", "kept 2", "dropped: empty caption 1", "dropped: empty image 1", "shards 1"):
        assert line in out
    rows = pq.read_table(tmp_path / "set/train").to_pylist()
    assert {row["label"]: row["caption"] for row in rows} == {0: ["a cat", "one cat"], 1: ["a dog", "one dog"]}
    assert (tmp_path / "set/classes.txt").read_text() == "cat\ndog\n"


def test_splits_of_one_folder_must_agree_on_their_classes(tmp_path: Path) -> None:
    first = labelled(tmp_path / "a.parquet", [0, 1], ["cat", "dog"])
    other = labelled(tmp_path / "b.parquet", [0, 1], ["cat", "ship"])
    args = ("--source", "hf-parquet", "--template", "a {}", "--output")
    prepare("--input", first, *args, tmp_path / "set/train")
    out = prepare("--input", other, *args, tmp_path / "set/val", code=2)
    assert re.search(r"classes\.txt: label 1 is 'dog' there and 'ship' in row b-00000001", out)
    assert not list((tmp_path / "set/val").glob("*.parquet"))
    mixed = labelled(tmp_path / "c.parquet", [0, 0], ["cat", "dog"])
    assert "label 0 is 'dog' here and 'cat' in an earlier row" in prepare(
        "--input", mixed, *args, tmp_path / "new/train", code=2
    )


def test_a_class_name_is_one_line(tmp_path: Path) -> None:
    blank = labelled(tmp_path / "a.parquet", [0, 1], ["  ", "dog"])
    args = ("--source", "hf-parquet", "--label", "label", "--name", "label_name", "--template", "a {}", "--output")
    assert "do not name every label from 0 to the highest" in prepare("--input", blank, *args, tmp_path / "a/train")
    assert not (tmp_path / "a/classes.txt").exists()
    broken = labelled(tmp_path / "b.parquet", [0, 1], ["cat", "dog\nand fox"])
    out = prepare("--input", broken, *args, tmp_path / "b/train", code=2)
    assert "row b-00000001: label 1 is 'dog\\nand fox'" in " ".join(out.split())
    (tmp_path / "c").mkdir()
    (tmp_path / "c/classes.txt").write_text("cat\n\ndog\n")
    assert "classes.txt: line 2 is blank" in prepare("--input", blank, *args, tmp_path / "c/train", code=2)


def test_no_classes_file_where_labels_are_missing(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.parquet", [0, 2], ["cat", "dog"])
    out = prepare("--source", "hf-parquet", "--input", file, "--template", "a {}", "--output", tmp_path / "set/train")
    assert "classes:" not in out
    assert "classes.txt is not written: the rows that were written do not name every label from 0 to the highest" in out
    assert not (tmp_path / "set/classes.txt").exists()


def test_a_label_that_nothing_names_is_missed_even_if_it_is_the_highest(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.parquet", [0, 1, 2], ["cat", "dog", None])
    pq.write_table(pq.read_table(file).append_column("caption", pa.array(["x", "y", "z"])), file)
    out = prepare("--source", "hf-parquet", "--input", file, "--output", tmp_path / "set/train")
    assert "do not name every label from 0 to the highest" in out
    assert not (tmp_path / "set/classes.txt").exists()


@pytest.mark.parametrize("inside", [".", "set/train"])
def test_an_output_inside_the_input_is_refused(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    labelled(folder / "a.parquet", [0], ["cat"])
    args = ("--source", "hf-parquet", "--template", "a {}", "--input")
    assert "in: lies in the input" in prepare(*args, folder, "--output", folder, code=2)
    out = prepare(*args, folder, "--output", folder / inside, code=2)
    assert "so the next prepare would read the output of this one" in out
    assert [path.name for path in folder.iterdir()] == ["a.parquet"]
    prepare(*args, folder, "--output", tmp_path / "in-shards")
    prepare(*args, folder / "*.parquet", "--output", folder / "set/train")


def test_keys_that_repeat_are_dropped_with_a_word_on_what_to_do(tmp_path: Path) -> None:
    for tar in range(2):
        tar_of(tmp_path / f"{tar}.tar", {"a.jpg": b"A", "a.txt": f"in {tar}"})
    args = ("--source", "webdataset", "--input", tmp_path, "--output", tmp_path / "set/train")
    out = prepare(*args)
    assert "dropped: duplicate uid 1" in out
    assert "1 rows have the uid of another row" in out
    out = prepare(*args, "--tar-in-uid", "--overwrite")
    assert "of another row" not in out
    assert sorted(pq.read_table(tmp_path / "set/train")["uid"].to_pylist()) == ["0.tar/a", "1.tar/a"]


def test_webdataset_limit_and_overwrite(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in range(20):
            for end, content in (("jpg", b"image"), ("txt", f"caption {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    args = ("--source", "webdataset", "--input", tmp_path, "--output", tmp_path / "out")
    prepare(*args, "--rows-per-shard", 8, "--row-group-rows", 4)
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out").glob("*"))] == [8, 8, 4]
    assert "already holds 3 shard(s)" in prepare(*args, code=2)
    sidecar = tmp_path / "out/_text/key/00000.parquet"  # vectors of rows that will not be there any more
    sidecar.parent.mkdir(parents=True)
    sidecar.touch()
    assert "rows in 5" in prepare(*args, "--overwrite", "--limit", 5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.parquet"]
    assert pq.read_table(tmp_path / "out").num_rows == 5


def test_synthetic_writes_both_splits(tmp_path: Path) -> None:
    out = prepare("--source", "synthetic", "--train", 40, "--val", 36, "--output", tmp_path / "set")
    assert "kept 40 36" in out
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        *("train", "val", "classes.txt"),
        *("train-samples.png", "val-samples.png"),
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--source", "webdataset", "--input", "nowhere"), "nowhere: no such file or folder"),
        (("--source", "webdataset"), "needs at least one input"),
        (
            ("--source", "webdataset", "--input", ".", "--template", "a {}"),
            "--source webdataset has no use for --template. Its options: --caption, --dedupe, ",
        ),
        (("--source", "hf-parquet", "--input", ".", "--template", "a"), "a template needs exactly one '{}'"),
        (("--source", "hf-parquet", "--input", ".", "--train", "5"), "--source hf-parquet has no use for --train"),
        (("--source", "synthetic", "--input", "."), "has no use for --input. Its options: --processes, --train, --val"),
        (("--source", "synthetic", "--train", "5"), "train: 5 pictures cannot show all 30 classes"),
        (("--source", "hf-parquet", "--input", ".", "--min-score", "0.3"), "min_score needs the score column"),
        (("--source", "folder-classes", "--input", ".", "--score", "s"), "folder-classes has no use for --score"),
        (("--source", "hf-parquet", "--input", ".", "--metadata", "m"), "hf-parquet has no use for --metadata"),
        (("--source", "hf-parquet", "--input", ".", "--quality", "80"), "--quality: only pictures that --resize"),
        (("--source", "hf-parquet", "--input", ".", "--resize", "9", "--quality", "0"), "quality: Input should be"),
        (("--source", "hf-parquet", "--input", ".", "--min-side", "0"), "min_side: Input should be"),
        (("--source", "sky"), "sky"),
    ],
)
def test_wrong_options_end_with_the_cause(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    assert message in prepare(*args, "--output", tmp_path / "out", code=2)
    assert not list(tmp_path.glob("out/*"))


def test_datacomp_with_every_filter(tmp_path: Path) -> None:
    uids = [f"{at:032x}" for at in range(12)]
    members: dict[str, bytes | str | dict[str, str]] = {}
    for at, uid in enumerate(uids):
        image = picture(*{6: (20, 60), 7: (200, 60)}.get(at, (90, 60)), shade=8 if at == 9 else at)
        members |= {f"{at:09d}.jpg": image, f"{at:09d}.json": {"uid": uid}}
    tar_of(tmp_path / "tars/0.tar", members)
    texts = ["hi" if at == 5 else f"caption {at}" for at in range(12)]
    columns = {"uid": uids[1:], "text": texts[1:], "clip": [0.1 if at == 4 else 0.3 for at in range(1, 12)]}
    pq.write_table(pa.table(columns), tmp_path / "meta.parquet")
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids if uid != uids[3]]
    np.save(tmp_path / "dfn.npy", np.array(halves, np.dtype("u8,u8")))
    out = prepare(
        "--source", "datacomp", "--input", tmp_path / "tars", "--metadata", tmp_path / "meta.parquet",
        "--uids", tmp_path / "dfn.npy", "--score", "clip", "--min-score", 0.2, "--min-caption", 3, "--max-caption", 40,
        "--min-side", 30, "--max-aspect", 2.5, "--dedupe", "--resize", 32, "--format", "webp", "--output",
        tmp_path / "set/train",
    )  # fmt: skip
    for line in (
        *("rows in 12", "kept 5", "dropped: uid not in the metadata 1", "dropped: uid not in the list 1"),
        *("dropped: score below 0.2 1", "dropped: caption length 1", "dropped: shorter side below 30 1"),
        *("dropped: aspect above 2.5 1", "dropped: duplicate image 1", f"samples: {tmp_path}/set/train-samples.png"),
    ):
        assert line in out
    rows = {row["uid"]: row for row in pq.read_table(tmp_path / "set/train").to_pylist()}
    assert {uid: row["caption"] for uid, row in rows.items()} == {uids[at]: texts[at] for at in (1, 2, 8, 10, 11)}
    for row in rows.values():
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.format, image.size) == ("WEBP", (48, 32))
    assert len(build_index(str(tmp_path / "set/train"), Columns()).paths) == 1


def test_the_contact_sheet_shows_pictures_with_their_captions(tmp_path: Path) -> None:
    names = [f"{at}.png" for at in range(60)]
    for at, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(40, 30, shade=200) if at % 2 else b"torn")
    lines = [json.dumps({"file_name": name, "text": "a long caption " * 20}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    out = prepare("--source", "folder-captions", "--input", tmp_path, "--output", tmp_path / "out/val")
    assert "kept 60" in out
    sheet = Image.open(tmp_path / "out/val-samples.png").convert("RGB")
    order = [int(uid.removesuffix(".png")) % 2 for uid in pq.read_table(tmp_path / "out/val")["uid"].to_pylist()]
    middles = [sheet.getpixel((8 + at % 8 * 136 + 64, 8 + at // 8 * 172 + 64)) for at in range(48)]
    assert sheet.size == (8 + 8 * 136, 8 + 6 * 172)
    assert middles == [(200, 200, 200) if whole else (211, 211, 211) for whole in order[:48]]
    below = np.asarray(sheet)[8 + 128 : 8 + 128 + 36, 8 : 8 + 136]
    assert (below < 128).any()


def test_help_shows_an_example_and_every_source() -> None:
    out = prepare("--help")
    assert "Example: python pipelines/prepare.py --source webdataset" in out
    assert set(get_args(prepare_module.Kind)) == {*SOURCES, "synthetic"} - {"folder"}  # it has no captions


@needs_data
def test_real_sets_become_shards(tmp_path: Path) -> None:
    prepare(
        "--source", "webdataset", "--input", f"{REAL}/flickr8k/dev", "--output", tmp_path / "flickr", "--limit", 300
    )
    flickr = pq.read_table(tmp_path / "flickr")
    assert flickr.num_rows == 300
    assert {len(captions) for captions in flickr["caption"].to_pylist()} == {5}
    out = prepare(
        "--source", "hf-parquet", "--input", f"{REAL}/cifar10/test-*.parquet", "--template", "a photo of a {}.",
        "--output", tmp_path / "cifar/val", "--limit", 600,
    )  # fmt: skip
    assert "kept 600" in out
    assert len((tmp_path / "cifar/classes.txt").read_text().splitlines()) == 10
    assert pq.read_schema(tmp_path / "cifar/val/00000.parquet").field("caption").type == pa.string()
