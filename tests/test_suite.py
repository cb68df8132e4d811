"""Suites: tasks as data, read from every layout, embedded once, each scored or listed as not run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import encoded, photo
from rich.console import Console
from tar_helpers import tar_of

from nev.config import Experiment
from nev.config_base import ConfigError
from nev.config_data import Limits
from nev.data.storage import filesystem
from nev.eval import collection
from nev.eval.engine import Work, units
from nev.eval.reading import Reading, reading_of
from nev.eval.results import SuiteResult
from nev.eval.suite import Suite, Task, load_suite, shipped
from nev.experiment import run_experiment
from nev.suites import evaluate_suite

if TYPE_CHECKING:
    from s3_server import Proxy

Make = Callable[..., Experiment]
SIDE = 16


def task(**settings: object) -> Task:
    return Task.model_validate({"name": "one", "kind": "zero_shot", **settings})


def rows_of(reading: Reading) -> dict[str, list[object]]:
    """All rows of a reading, in the order of the source."""
    blocks = [block for unit in reading.units for block in reading.read(unit)]
    found = {name: np.concatenate([block[name] for block in blocks]) for name in ("label", "valid", "part", "order")}
    facts = np.concatenate([block["facts"] for block in blocks])
    order = np.lexsort((found["order"], found["part"]))
    return {name: column[order].tolist() for name, column in found.items()} | {
        "facts": [json.loads(facts[at]) for at in order]
    }


def read(task: Task, root: Path, processes: int = 2) -> dict[str, list[object]]:
    return rows_of(reading_of(task, str(root), SIDE, Limits(), processes))


# --- the shipped suites


def test_every_shipped_suite_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_DATA", "/data")
    monkeypatch.setenv("NEV_EVAL_DATA", "/eval")
    assert shipped() == ["coco", "datacomp", "flickr30k", "imagenet", "ood", "quick"]
    for name in shipped():
        assert load_suite(name).tasks
    assert load_suite("quick").root == "/data"
    assert load_suite("imagenet", "s3://bucket/eval").root == "s3://bucket/eval"


def test_datacomp_has_its_38_tasks_and_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_EVAL_DATA", "/eval")
    suite = load_suite("datacomp")
    assert len(suite.tasks) == 38
    judged = {one.name: one.judged_by for one in suite.tasks if one.judged_by != "top1"}
    assert judged == {
        **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), "mean_per_class"),
        **dict.fromkeys(("flickr30k", "mscoco"), "mean_recall_1"),
        **{"winogavil": "jaccard", "iwildcam": "macro_f1", "fmow": "worst_group_top1"},
        **{"dollar_street": "worst_group_top5", "geode": "worst_group_top1"},
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kindd": 1}, "kindd"),
        ({"kind": "guess"}, "kind"),
        ({"metric": "jaccard"}, "zero_shot is judged by"),
        ({"metric": "worst_group_top1"}, "needs `group`"),
        ({"kind": "retrieval", "classes": ["a"]}, "leave classes and templates out"),
        ({"kind": "association"}, "winogavil"),
        ({"source": {"format": "folder-classes", "input": "x", "share": 0}}, "share"),
    ],
)
def test_a_task_that_cannot_be_is_an_error(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    one = {"name": "one", "kind": "zero_shot", "source": {"format": "webdataset", "input": "x"}, **settings}
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({"about": "own", "root": str(tmp_path), "tasks": [one]}))
    with pytest.raises(ConfigError, match=said):
        load_suite(str(file))


def test_an_unknown_suite_a_variable_that_is_not_set_and_names_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no suite is called 'imagenett': give one of coco"):
        load_suite("imagenett")
    monkeypatch.delenv("NEV_EVAL_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"NEV_EVAL_DATA' is not set.*--data"):
        load_suite("imagenet")
    one = {"name": "one", "kind": "retrieval", "source": {"format": "webdataset", "input": "x"}}
    with pytest.raises(ValueError, match="two tasks are called 'one'"):
        Suite.model_validate({"about": "", "root": "/", "tasks": [one, one]})


# --- reading


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
    reading = reading_of(one, str(clip_benchmark(tmp_path)), SIDE, Limits(), 2)
    assert reading.names == ("red_fox", "blue jay")
    assert reading.templates == ("a photo of a {}.", "the {}")
    rows = rows_of(reading)
    assert rows["label"] == [row % 2 for row in range(150)]
    assert [fact["extra"]["npy"] for fact in rows["facts"]] == [[row % 3, 7, row] for row in range(150)]


@pytest.mark.parametrize("processes", [1, 2, 7])
def test_every_row_is_read_once_whatever_the_processes(tmp_path: Path, processes: int) -> None:
    one = task(source={"format": "clip-benchmark", "input": "set"})
    root = clip_benchmark(tmp_path)
    rows = read(one, root, processes)
    assert [fact["uid"] for fact in rows["facts"]] == [f"s{row:07d}" for row in range(150)]


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
    reading = reading_of(
        task(kind="retrieval", source={"format": "webdataset", "input": "0.tar"}), str(tmp_path), SIDE, Limits(), 1
    )
    (block,) = reading.read(reading.units[0])
    fact = collection.Fact.model_validate_json(block["facts"][0])
    assert (fact.uid, fact.captions) == ("a?", ("a dog ?",))


def test_a_picture_that_is_replaced_under_its_name_is_another_set(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(photo(0)))
    (tmp_path / "captions.csv").write_text("file_name,caption\na.jpg,a dog\n")
    one = task(kind="retrieval", source={"format": "folder-captions", "input": "captions.csv"})
    before = reading_of(one, str(tmp_path), SIDE, Limits(), 1).key
    (tmp_path / "a.jpg").write_bytes(encoded(photo(1), quality=50))
    assert reading_of(one, str(tmp_path), SIDE, Limits(), 1).key != before


def test_no_part_is_read_by_more_than_it_is_worth(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path)
    units = reading_of(task(source={"format": "clip-benchmark", "input": "set"}), str(root), SIDE, Limits(), 64).units
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
        return reading_of(given, str(root), size, Limits(), processes).key

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


# --- whole


@pytest.fixture(scope="module")
def trained(ray_cluster: None, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a short run."""
    from nev.config_file import parse

    config = parse(
        Experiment,
        {
            "name": "small",
            "output": str(tmp_path_factory.mktemp("runs")),
            "data": {"train": str(pictures / "train"), "image_size": 32, "block_rows": 32},
            "vision": {
                "trunk": "vit_tiny_patch16_224",
                "trunk_args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
            },
            "optim": {"lr": 1e-3, "warmup_steps": 5},
            "train": {"global_batch": 64, "steps": 20},
            "workers": {"count": 1, "threads": 1},
        },
    )
    return run_experiment(config, Console(quiet=True)).checkpoint


OWN = """
about: Own
root: {root}
average: true
tasks:
  - &drawn
    name: drawn
    kind: zero_shot
    source: &shards {{format: hf-parquet, input: val}}
    classes: classes.txt
    templates: ["a {{}}"]
    published: {{other: 0.5}}
  - {{name: search, kind: retrieval, source: *shards}}
  - {{name: space, kind: alignment, source: *shards}}
  - {{name: small, kind: compression, source: *shards}}
  - {{<<: *drawn, name: small-classes, kind: compression, published: {{}}}}
  - {{<<: *drawn, name: corrupted, kind: robustness, source: {{<<: *shards, share: 0.3}}}}
  - {{name: absent, kind: zero_shot, source: {{format: clip-benchmark, input: nowhere}}}}
  - {{name: unnamed, kind: zero_shot, source: *shards, classes: [only, two]}}
  - {{name: damaged, kind: zero_shot, source: {{format: webdataset, input: "{own}/cut.tar"}}}}
  - {{name: few, kind: zero_shot, metric: top5, source: {{format: folder-classes, input: "{own}/few"}}}}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_suite_from_its_file_to_its_page(
    trained: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN.format(root=pictures, own=tmp_path))
    tar_of(tmp_path / "whole.tar", {"a.jpg": encoded(photo(0)), "a.cls": "0"})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:700])
    for name in ("cat", "dog"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / f"few/{name}/1.jpg").write_bytes(encoded(photo(len(name))))
    embedded: list[int] = []
    embed_all = collection.embed_all

    def counting(works: list[Work], *rest: Any) -> Iterator[Any]:
        embedded.append(len(works))
        yield from embed_all(works, *rest)

    monkeypatch.setattr(collection, "embed_all", counting)
    result, files = evaluate_suite(trained, str(own), Console(quiet=True), output=str(tmp_path / "out"))
    assert embedded == [4]  # five tasks share one set; corrupted pictures, a damaged file and a small set are others
    by_name = {one.name: one for one in result.tasks}
    assert result.not_run == ["absent", "unnamed", "damaged", "few"]
    assert "not a whole tar file" in str(by_name["damaged"].reason)
    assert "top5 is not known of this set" in str(by_name["few"].reason)
    assert result.average is None
    assert "no such file or folder" in str(by_name["absent"].reason)
    assert "there are 2 classes" in str(by_name["unnamed"].reason)

    drawn = by_name["drawn"]
    assert drawn.images == 128
    assert drawn.low is not None
    assert drawn.low <= drawn.value <= drawn.high
    assert {"top1", "top5", "mean_per_class", "macro_f1", "calibration_error", "scale_fitted"} <= drawn.metrics.keys()
    assert by_name["corrupted"].metrics["clean"] > 0
    assert len(by_name["corrupted"].table) == 40
    assert by_name["small"].metrics["float32_384"] == pytest.approx(by_name["search"].value, abs=1e-9)
    assert by_name["small-classes"].metrics["float32_384"] == pytest.approx(drawn.value, abs=1e-9)

    page, numbers = (Path(file) for file in files)
    assert SuiteResult.model_validate_json(numbers.read_text()) == result
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 10  # the loss, and the pictures of six tasks
    assert "http" not in html.replace(str(trained), "")
    assert "not run: " in html

    again, _ = evaluate_suite(trained, str(own), Console(quiet=True), output=str(tmp_path / "out"))
    assert embedded == [4, 1]  # nothing is embedded anew but what cannot be
    assert [one.model_dump() for one in again.tasks] == [one.model_dump() for one in result.tasks]


@pytest.mark.ray
def test_data_and_results_on_s3(s3: Proxy, trained: str, pictures: Path, tmp_path: Path) -> None:
    fs = filesystem("s3://bucket")[0]
    for file in sorted((pictures / "val").glob("*.parquet")):
        fs.put_file(str(file), f"bucket/data/val/{file.name}")
    fs.put_file(str(pictures / "classes.txt"), "bucket/data/classes.txt")
    own = tmp_path / "own.yaml"
    own.write_text(OWN.format(root="/nowhere", own="/nowhere").split("  - {<<: *drawn, name: corrupted")[0])
    result, files = evaluate_suite(
        trained, str(own), Console(quiet=True), data="s3://bucket/data", output="s3://bucket/out"
    )
    assert result.not_run == []
    assert result.average is not None
    assert all(file.startswith("s3://bucket/out/own-") and fs.exists(file) for file in files)
    assert len(fs.glob("bucket/out/embeddings/*.safetensors")) == 3  # pictures, class prompts, captions
    here, _ = evaluate_suite(trained, str(own), Console(quiet=True), data=str(pictures), output=str(tmp_path / "out"))
    assert [one.value for one in here.tasks] == pytest.approx([one.value for one in result.tasks], abs=1e-6)


@pytest.mark.ray
def test_decoded_pictures_come_to_a_gpu_in_blocks_of_a_batch(ray_cluster: None, tmp_path: Path) -> None:
    """What the decoding tasks give: not all that a unit has in one block, which one forward would have to take."""
    import ray
    from ray.data import DataContext

    from nev.eval import engine
    from nev.eval.reading import BATCH

    one = task(source={"format": "clip-benchmark", "input": "set"})
    reading = reading_of(one, str(clip_benchmark(tmp_path, 4 * BATCH)), 64, Limits(), 1)
    assert len(reading.units) == 1
    context = engine.context_for(BATCH * 64 * 64 * 3)
    with DataContext.current(context):
        source = ray.put(([Work(reading.units, reading.read)], [(0, 0)]))
        found = list(units(engine.read_unit, 1, source=[source]).iter_batches(batch_size=None, batch_format="numpy"))
    assert [len(block["image"]) for block in found] == [BATCH] * 4
    assert [block["place"][0].tolist() for block in found] == [[0, 0, number] for number in range(4)]
