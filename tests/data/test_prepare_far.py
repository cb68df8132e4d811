"""Prepare on Ray and from S3 to S3 gives what it gives here, and the same errors."""

import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.prepare import LAYOUT, PARTS, ROWS, SHARDS, Crash, contents, counting, make, source
from helpers.prepare_command import prepare as command
from helpers.s3_server import Proxy
from helpers.tars import tar_of

from nev.cluster.tasks import TaskDied
from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.index import build_index
from nev.data.prepare.filters import Filters
from nev.data.prepare.pipeline import Progress, Run, prepare
from nev.data.prepare.shards import Layout
from nev.data.rows import Row
from nev.data.sources import SOURCES, SourceOptions
from nev.storage.files import filesystem
from nev.storage.reading import DataError


def tars(folder: Path, count: int = 3, rows: int = 20) -> Path:
    for number in range(count):
        members: dict[str, bytes | str] = {}
        for at in range(rows):
            key = f"{number}{at:04d}"
            members |= {f"{key}.jpg": key.encode() * 50, f"{key}.txt": f"caption {key}"}
        tar_of(folder / f"{number:05d}.tar", members)
    return folder


@pytest.fixture
def on_ray(ray_cluster: None) -> Iterator[Run]:
    """Ray's way of running tasks; its processes are sent what these tests define, which they could not import."""
    from ray import cloudpickle

    from nev.cluster.tasks import ray_run

    modules = [sys.modules[name] for name in (__name__, "helpers.prepare")]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield ray_run
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


def failing(numbers: Sequence[int]) -> Iterator[Row]:
    if 40 in numbers:
        raise ConfigError("part of 40: not a whole tar file")
    return source().read(numbers)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_makes_what_one_process_makes(on_ray: Run, tmp_path: Path) -> None:
    listed = tmp_path / "uids.txt"
    listed.write_text("\n".join(f"row-{k}" for k in range(5, 200)))
    told: list[tuple[int, int, int]] = []
    progress = Progress(written=lambda *counts: told.append(counts))
    options = {"filters": Filters(uids=listed, unique=True)}
    here = make(tmp_path / "here/set", **options)
    there = make(tmp_path / "there/set", on_ray, progress=progress, **options)
    assert here.rows_written == there.rows_written == ROWS - 5
    assert here.dropped == there.dropped == {"uid not in the list": 5}
    assert contents(tmp_path / "here/set") == contents(tmp_path / "there/set")
    assert [done for done, _, _ in told] == list(range(SHARDS + 1))
    with pytest.raises(Crash):
        make(tmp_path / "cut/set", counting([], PARTS + 2), **options)
    make(tmp_path / "cut/set", on_ray, **options)
    assert contents(tmp_path / "here/set") == contents(tmp_path / "cut/set")


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_in_a_task_is_the_error_of_the_run(on_ray: Run, tmp_path: Path) -> None:
    broken = source()._replace(read=failing)
    with pytest.raises(ConfigError, match=r"^part of 40: not a whole tar file$") as caught:
        prepare(broken, tmp_path / "set", run=on_ray)
    assert type(caught.value) is ConfigError
    with pytest.raises(ConfigError, match=r"seed"):
        prepare(source(), tmp_path / "set", run=on_ray, seed=1)
    assert list(on_ray(len, [[1], [1, 2]], 2**45)) in ([1, 2], [2, 1])  # more memory than there is


def deadly_once(marker: Path, number: int) -> int:
    if number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_whose_process_dies_is_run_again(on_ray: Run, tmp_path: Path) -> None:
    marker = tmp_path / "died"
    assert sorted(on_ray(partial(deadly_once, marker), range(4), 2**20)) == [0, 1, 2, 3]
    assert marker.exists()


def deadly(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_whose_process_always_dies_ends_the_run(on_ray: Run) -> None:
    with pytest.raises(TaskDied, match=r"the process of a task died 6 times, \d of 4 tasks are done"):
        list(on_ray(deadly, range(4), 2**20))


@pytest.mark.ray
@pytest.mark.slow
def test_a_function_that_ray_cannot_import_ends_the_run(
    on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def double(number):\n    return 2 * number\n")
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("only_here").double
    with pytest.raises(RuntimeError, match="only_here"):
        list(on_ray(double, [1, 2], 2**20))


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_takes_ray_for_several_parts(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nev.cluster import tasks as ray_run
    from nev.commands import prepare as prepare_module

    asked: list[int] = []
    own = ray_run.ray_run
    monkeypatch.setattr(ray_run, "ray_run", lambda *args: (asked.append(len(args[1])), own(*args))[1])
    folder = tars(tmp_path / "tars")
    parse: Any = prepare_module.parse

    def small_parts(kind: Any, raw: dict[str, Any], **more: Any) -> Any:
        return parse(kind, {**raw, "part_bytes": 1} if kind is SourceOptions else raw, **more)

    monkeypatch.setattr(prepare_module, "parse", small_parts)
    args = ("--source", "webdataset", "--input", folder, "--rows-per-shard", 16, "--row-group-rows", 8, "--output")
    out = command(*args, tmp_path / "out/set")
    assert asked == [3, 4]
    assert "kept 60" in out
    (folder / "00001.tar").write_bytes(b"torn")
    out = command(*args, tmp_path / "torn/set", code=2)
    assert "error: " in out
    assert "00001.tar: not a whole tar file" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("kind", ["webdataset", "hf-parquet", "datacomp"])
def test_from_s3_to_s3_as_from_a_folder_to_a_folder(kind: str, s3: Proxy, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://bucket")
    tars(tmp_path / "in")
    rows = [
        {"uid": f"{n}{at:04d}", "image": b"x" * at, "text": f"t {at}", "n": n} for n in range(3) for at in range(1, 20)
    ]
    table = {name: [row[name] for row in rows] for name in ("uid", "image", "text")}
    pq.write_table(pa.table(table), tmp_path / "in/0.parquet")
    for file in (tmp_path / "in").iterdir():
        fs.pipe_file(f"bucket/in/{file.name}", file.read_bytes())
    made = {}
    for place, root in (("here", str(tmp_path)), ("there", "s3://bucket")):
        metadata = (f"{root}/in/0.parquet",) if kind == "datacomp" else ()
        options = SourceOptions(part_bytes=1, metadata=metadata)
        found = SOURCES[kind]([f"{root}/in"], options)
        report = prepare(found, f"{root}/out/set", layout=LAYOUT, memory_bytes=9 * 1024)
        made[place] = report._replace(seconds=0, shards=[], samples="")
        names = [shard.removeprefix(f"{root}/") for shard in report.shards]
    assert made["here"] == made["there"]
    assert made["here"].rows_written == (60 if kind == "webdataset" else 57)
    local = {f"bucket/out/{name}": content for name, content in contents(tmp_path / "out/set").items()}
    assert {name: fs.cat_file(name) for name in fs.find("bucket/out")} == local
    assert {f"bucket/{name}" for name in names} < set(local)
    assert build_index("s3://bucket/out/set", Columns()).total_rows == made["there"].rows_written


@pytest.mark.slow
def test_s3_is_gone_on_with_and_refused(s3: Proxy, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://bucket")
    target: Any = "s3://bucket/out/set"
    make(tmp_path / "set")
    with pytest.raises(Crash):
        make(target, counting([], PARTS + 2))
    with pytest.raises(DataError, match=r"s3://bucket/out/set: not finished"):
        build_index(target, Columns())
    with pytest.raises(ConfigError, match=r"other options \(seed\)"):
        make(target, seed=1)
    again: list[Any] = []
    make(target, counting(again))
    assert len(again) == SHARDS - 2
    assert {name.removeprefix("bucket/out/"): fs.cat_file(name) for name in fs.find("bucket/out")} == contents(
        tmp_path / "set"
    )
    with pytest.raises(ConfigError, match="already holds 5 shard"):
        make(target)
    report = make(target, seed=1, layout=Layout(64, 8, overwrite=True))
    assert [name.rpartition("/")[2] for name in fs.find("bucket/out/set")] == ["00000.parquet", "00001.parquet"]
    assert report.shards[0] == "s3://bucket/out/set/00000.parquet"


@pytest.mark.slow
def test_every_first_try_may_fail(s3: Proxy, impatient: None, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://bucket")
    for file in tars(tmp_path / "in").iterdir():
        fs.pipe_file(f"bucket/in/{file.name}", file.read_bytes())
    s3.reset()
    s3.rule = lambda method, path, span, before: None if before else "503"
    here, there = (
        prepare(SOURCES["webdataset"]([inputs], SourceOptions(part_bytes=1)), output, layout=LAYOUT)
        for inputs, output in ((tmp_path / "in", f"{tmp_path}/out/set"), ("s3://bucket/in", "s3://bucket/out/set"))
    )
    assert s3.broken["503"] > 20
    s3.reset()
    assert here.rows_written == there.rows_written == 60
    local = {f"bucket/out/{name}": content for name, content in contents(tmp_path / "out/set").items()}
    assert {name: fs.cat_file(name) for name in fs.find("bucket/out")} == local


def test_a_shard_that_cannot_be_written_is_named_and_absent(s3: Proxy, impatient: None) -> None:
    fs, _ = filesystem("s3://bucket")
    target: Any = "s3://bucket/out/set"
    s3.rule = lambda method, path, span, before: "403" if (method, path[-14:]) == ("PUT", "/00002.parquet") else None
    with pytest.raises(DataError, match=r"s3://bucket/out/set/00002\.parquet cannot be written .*AWS_PROFILE"):
        make(target)
    s3.reset()
    assert [name[-13:] for name in fs.glob("bucket/out/set/*.parquet")] == ["00000.parquet", "00001.parquet"]
    again: list[Any] = []
    make(target, counting(again))
    assert len(again) == SHARDS - 2


def test_a_prefix_that_cannot_be_listed_is_not_taken_for_an_empty_one(s3: Proxy, impatient: None) -> None:
    target: Any = "s3://bucket/out/set"
    make(target)
    for denied in range(2):  # the first listing asks whether anything is there
        listings = count()

        def rule(method: str, path: str, span: str, before: int, denied: int = denied, listings: Any = listings) -> Any:
            listing = method == "GET" and path.rstrip("/") == "/bucket"
            return "403" if listing and next(listings) == denied else None

        s3.rule = rule
        with pytest.raises(DataError, match=r"s3://bucket/out/set.*(Denied|Forbidden)"):
            prepare(source(20), target, layout=Layout(16, 8, overwrite=True))
        s3.reset()
    assert len(filesystem("s3://bucket")[0].glob("bucket/out/set/*.parquet")) == SHARDS


def test_what_s3_lacks_is_named(s3: Proxy, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://bucket")
    fs.pipe_file("bucket/in/_own/0.tar", b"x")
    fs.pipe_file("bucket/in/notes.txt", b"x")
    for inputs, message in (
        ("s3://bucket/nowhere", r"s3://bucket/nowhere: no such file or folder"),
        ("s3://bucket/in", r"s3://bucket/in: no \.tar or .* file in this folder \(it holds: \.txt\)"),
        ("s3://bucket/in/*.tar", r"as a pattern it matches nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            SOURCES["webdataset"]([inputs], SourceOptions())
    with pytest.raises(ConfigError, match=r"s3://bucket/in: folders of pictures are read from local disks alone"):
        SOURCES["folder-classes"](["s3://bucket/in"], SourceOptions(templates=("a {}",)))
    with pytest.raises(ConfigError, match=r"s3://bucket: a bucket alone cannot be a split"):
        make("s3://bucket")  # type: ignore[arg-type]
    fs.pipe_file("bucket/in/1.tar", b"no tar" * 999)
    with pytest.raises(ConfigError, match=r"s3://bucket/in/1\.tar: not a whole tar file"):
        prepare(SOURCES["webdataset"](["s3://bucket/in"], SourceOptions()), tmp_path / "set")


def test_requests_to_s3(s3: Proxy, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://bucket")
    for file in tars(tmp_path / "in").iterdir():
        fs.pipe_file(f"bucket/in/{file.name}", file.read_bytes())
    s3.reset()
    options = SourceOptions(part_bytes=1)
    found = SOURCES["webdataset"](["s3://bucket/in/*.tar"], options)._replace(nbytes=4 * 2**27)
    spans: list[str] = []

    def watch(method: str, path: str, span: str, before: int) -> None:
        if method == "GET" and "/run-" in path:
            spans.append(span)

    s3.rule = watch
    prepare(found, "s3://bucket/out/set", layout=LAYOUT, memory_bytes=2**20)
    runs, shards = 3, 4
    assert len(spans) == runs * shards
    assert all(re.fullmatch(r"bytes=\d+-\d+", span) for span in spans)
    assert all(s3.count("GET", f"{number:05d}.tar") <= 2 for number in range(3))
    assert s3.count("PUT", ".parquet") == shards
