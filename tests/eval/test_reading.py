"""Sets of every layout as blocks of pixels: each row once, whatever the processes, and known by what it depends on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.pictures import encoded, photo
from helpers.tars import tar_of

from nev.config.data import Limits
from nev.embed.images import make_units
from nev.eval.suite import collection
from nev.eval.suite.reading import Reading, blocks, make_reading
from nev.eval.suite.schema import Task

SIDE = 16


def task(**settings: object) -> Task:
    return Task.model_validate({"name": "one", "kind": "zero_shot", **settings})


def rows_of(reading: Reading) -> dict[str, list[object]]:
    """All rows of a reading, in the order of the source."""
    parts = [block for unit in reading.units for block in blocks(unit, reading.read, reading.view)]
    found = {name: np.concatenate([block[name] for block in parts]) for name in ("label", "valid", "part", "order")}
    facts = np.concatenate([block["facts"] for block in parts])
    order = np.lexsort((found["order"], found["part"]))
    return {name: column[order].tolist() for name, column in found.items()} | {
        "facts": [json.loads(facts[at]) for at in order]
    }


def read(task: Task, root: Path, processes: int = 2) -> dict[str, list[object]]:
    return rows_of(make_reading(task, str(root), SIDE, Limits(), processes))


def clip_benchmark(root: Path, count: int = 150) -> Path:
    """A set as CLIP_benchmark lays it out, in two tars of keys that go on, with metadata as WILDS has them."""
    for tar, rows in enumerate(np.array_split(np.arange(count), 2)):
        members: dict[str, bytes | str] = {}
        for row in rows:
            buffer = io.BytesIO()
            np.save(buffer, np.array([row % 3, 7, row]))
            members |= {
                f"s{row:07d}.png": encoded(photo(int(row)), "PNG"),
                f"s{row:07d}.cls": str(row % 2),
                f"s{row:07d}.npy": buffer.getvalue(),
            }
        (root / "set/test").mkdir(parents=True, exist_ok=True)
        tar_of(root / f"set/test/{tar}.tar", members)
    (root / "set/classnames.txt").write_text("red_fox\nblue jay\n")
    (root / "set/zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    return root


def test_clip_benchmarks_layout_with_groups(tmp_path: Path) -> None:
    one = task(
        source={"format": "clip-benchmark", "input": "set"},
        metric="worst_group_top1",
        group={"field": "npy", "place": 2},
    )
    reading = make_reading(one, str(clip_benchmark(tmp_path)), SIDE, Limits(), 2)
    assert reading.names == ("red_fox", "blue jay")
    assert reading.templates == ("a photo of a {}.", "the {}")
    rows = rows_of(reading)
    assert rows["label"] == [row % 2 for row in range(150)]
    assert [fact["extra"]["npy"] for fact in rows["facts"]] == [[row % 3, 7, row] for row in range(150)]


@pytest.mark.parametrize(("processes", "sharers"), [(1, 2), (2, 4), (7, 8)])
def test_every_row_is_read_once_whatever_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, sharers: int
) -> None:
    monkeypatch.setattr("nev.eval.suite.reading.UNIT_BYTES", 1)  # the set is small, and shared all the same
    monkeypatch.setattr("nev.eval.suite.reading.BATCH", 10)
    one = task(source={"format": "clip-benchmark", "input": "set"})
    reading = make_reading(one, str(clip_benchmark(tmp_path)), SIDE, Limits(), processes)
    assert {unit.of for unit in reading.units} == {sharers}  # one part: two pieces of work for each process, to 8
    assert [fact["uid"] for fact in rows_of(reading)["facts"]] == [f"s{row:07d}" for row in range(150)]


def test_captions_of_clip_benchmark_stand_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "wds/test").mkdir(parents=True)
    members = {}
    for row in range(3):
        members |= {f"s{row}.jpg": encoded(photo(row)), f"s{row}.txt": f"a dog {row}\nthe same dog\n a cat\n"}
    tar_of(tmp_path / "wds/test/0.tar", members)
    found = read(task(kind="retrieval", source={"format": "clip-benchmark", "input": "wds"}), tmp_path)
    assert [fact["captions"] for fact in found["facts"]] == [
        [f"a dog {row}", "the same dog", "a cat"] for row in range(3)
    ]
    plain = read(task(kind="retrieval", source={"format": "webdataset", "input": "wds/test"}), tmp_path)
    assert [len(fact["captions"]) for fact in plain["facts"]] == [1, 1, 1]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"no array",
        npy(np.zeros(1))[:20],
        npy(np.zeros(0)),
        npy(np.zeros(2, complex)),
        npy(np.zeros(1)).replace(b"(1,)", b"(9,)"),
        npy(np.array([{"a": 1}], object)),
    ],
)
def test_a_group_that_cannot_be_read_is_none(tmp_path: Path, member: bytes) -> None:
    (tmp_path / "set/test").mkdir(parents=True)
    tar_of(tmp_path / "set/test/0.tar", {"s0.png": encoded(photo(0), "PNG"), "s0.cls": "0", "s0.npy": member})
    one = task(source={"format": "clip-benchmark", "input": "set"}, group={"field": "npy"})
    (fact,) = read(one, tmp_path)["facts"]
    assert not isinstance(fact["extra"]["npy"], list) or fact["extra"]["npy"] == []


def test_half_an_emoji_is_a_question_mark(tmp_path: Path) -> None:
    cut = json.dumps({"uid": "a\ud83d", "caption": "a dog \ud83d"})
    tar_of(tmp_path / "0.tar", {"s0.jpg": encoded(photo(0)), "s0.json": cut})
    reading = make_reading(
        task(kind="retrieval", source={"format": "webdataset", "input": "0.tar"}), str(tmp_path), SIDE, Limits(), 1
    )
    (block,) = blocks(reading.units[0], reading.read, reading.view)
    fact = collection.Fact.model_validate_json(block["facts"][0])
    assert (fact.uid, fact.captions) == ("a?", ("a dog ?",))


def test_a_picture_that_is_replaced_under_its_name_is_another_set(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(photo(0)))
    (tmp_path / "captions.csv").write_text("file_name,caption\na.jpg,a dog\n")
    one = task(kind="retrieval", source={"format": "folder-captions", "input": "captions.csv"})
    before = make_reading(one, str(tmp_path), SIDE, Limits(), 1).key
    (tmp_path / "a.jpg").write_bytes(encoded(photo(1), quality=50))
    assert make_reading(one, str(tmp_path), SIDE, Limits(), 1).key != before


def test_no_part_is_read_by_more_than_it_is_worth(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path)
    units = make_reading(task(source={"format": "clip-benchmark", "input": "set"}), str(root), SIDE, Limits(), 64).units
    assert [unit.of for unit in units] == [1]  # some kilobytes in all


def test_a_share_is_the_same_rows_in_any_order(tmp_path: Path) -> None:
    whole = [
        fact["uid"]
        for fact in read(task(source={"format": "clip-benchmark", "input": "set"}), clip_benchmark(tmp_path))["facts"]
    ]
    some = [
        fact["uid"]
        for fact in read(task(source={"format": "clip-benchmark", "input": "set", "share": 0.3}), tmp_path)["facts"]
    ]
    assert 25 < len(some) < 65
    assert set(some) < set(whole)


def test_labels_without_names_or_captions(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": encoded(photo(at))}, "label": at % 2} for at in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    found = read(task(source={"format": "hf-parquet", "input": "set.parquet"}, classes=["a", "b"]), tmp_path)
    assert found["label"] == [0, 1] * 5
    assert all(fact["captions"] == [] for fact in found["facts"])


def test_a_picture_that_cannot_be_decoded_stays_as_a_row(tmp_path: Path) -> None:
    for name, data in (
        ("a/1.png", encoded(photo(1), "PNG")),
        ("b/2.png", b"no picture"),
        ("b/3.png", encoded(photo(3), "PNG")),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found = read(task(source={"format": "folder-classes", "input": "."}), tmp_path)
    assert found["valid"] == [True, False, True]
    assert "not an image" in found["facts"][1]["reason"]


def test_the_key_follows_the_data_and_the_view(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path)
    one = task(source={"format": "clip-benchmark", "input": "set"})

    def key(given: Task, size: int = SIDE, processes: int = 2) -> str:
        return make_reading(given, str(root), size, Limits(), processes).key

    first = key(one)
    assert first == key(one.model_copy(update={"name": "other", "templates": ("the {}",)}))
    assert first == key(one, processes=5)
    assert (
        len({first, key(one, size=32), key(task(source={"format": "clip-benchmark", "input": "set", "share": 0.5}))})
        == 3
    )
    assert first != key(task(kind="robustness", source={"format": "clip-benchmark", "input": "set"}))
    clip_benchmark(tmp_path, 151)
    assert first != key(one)


@pytest.mark.ray
def test_decoded_pictures_come_to_a_gpu_in_blocks_of_a_batch(ray_cluster: None, tmp_path: Path) -> None:
    """What the decoding tasks give: not all that a unit has in one block, which one forward would have to take."""
    import ray
    from ray.data import DataContext

    from nev.embed import images as engine
    from nev.eval.suite.reading import BATCH

    one = task(source={"format": "clip-benchmark", "input": "set"})
    reading = make_reading(one, str(clip_benchmark(tmp_path, 4 * BATCH)), 64, Limits(), 1)
    assert len(reading.units) == 1
    context = engine.make_data_context(BATCH * 64 * 64 * 3)
    with DataContext.current(context):
        source = ray.put(([collection.make_embed_job(reading)], [(0, 0)]))
        found = list(
            make_units(engine.read_unit, 1, source=[source]).iter_batches(batch_size=None, batch_format="numpy")
        )
    assert [len(block["image"]) for block in found] == [BATCH] * 4
    assert [block["place"][0].tolist() for block in found] == [[0, 0, number] for number in range(4)]
