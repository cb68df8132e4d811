"""A prepare that is cut off: the same call continues with it, another is refused, and nobody trains on half of a split."""

import errno
import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers.prepare import LAYOUT, PARTS, ROWS, SHARDS, TASKS, Crash, contents, counting, make, row, source

from nev.config.base import ConfigError
from nev.config.data import Columns
from nev.data.index import WORK_FOLDER, build_index
from nev.data.prepare.filters import Filters
from nev.data.prepare.job_state import exclusive_lock
from nev.data.prepare.pipeline import Progress, prepare
from nev.data.prepare.shards import Layout
from nev.data.rows import Row
from nev.data.sources import Part, Source
from nev.storage.reading import DataError


@pytest.mark.parametrize("after", range(TASKS))
def test_after_a_crash_only_what_is_missing_is_done(after: int, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], after))
    with pytest.raises(DataError, match=r"set: not finished .*run the same prepare command again"):
        build_index(str(output), Columns())
    shards = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert len(shards) == max(0, after - PARTS)
    told: list[str] = []
    again: list[Any] = []
    report = make(output, counting(again), progress=Progress(note=told.append))
    assert len(again) == TASKS - after
    assert all(path.stat().st_mtime_ns == before for path, before in shards.items())
    assert (report.rows_in, report.rows_written, len(report.shards)) == (ROWS, ROWS, SHARDS)
    assert contents(output) == undisturbed
    assert told == [
        f"continuing an unfinished prepare: {what} are done"
        for what in [f"{after} of {PARTS} parts" if after < PARTS else f"all parts, {after - PARTS} of {SHARDS} shards"]
        if after
    ]
    assert build_index(str(output), Columns()).total_rows == ROWS


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from helpers.prepare import make
from nev.data.prepare import gather, scatter
from pathlib import Path
module, name = {where}
own, calls = getattr(module, name), []

def deadly(*args):
    calls.append(args)
    if len(calls) == 3:
        if name != "write_json":
            Path(args[0]).write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*args)

setattr(module, name, deadly)
make(Path({output!r}))
"""


@pytest.mark.parametrize(
    ("where", "left"),
    [("scatter, '_write_run'", TASKS), ("scatter, 'write_json'", TASKS - 2), ("gather, 'write_shard'", SHARDS - 2)],
)
def test_after_a_kill_only_what_is_missing_is_done(
    where: str, left: int, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "set"
    code = KILLED.format(where=where, output=str(output), tests=str(Path(__file__).parents[1]))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    again: list[Any] = []
    make(output, counting(again))
    assert len(again) == left
    assert contents(output) == undisturbed


@pytest.mark.parametrize("at", ["plan.json", "job.json"])
def test_a_job_cut_off_while_it_cleans_up_has_nothing_left_to_do(
    at: str, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "set"
    remove = LocalFileSystem.rm_file

    def die(self: Any, path: str) -> None:
        if path.endswith(at):
            raise Crash
        remove(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", die)
        with pytest.raises(Crash):
            make(output)
    assert {path.name for path in (output / WORK_FOLDER).iterdir()} == {at, "plan.json"}
    with pytest.raises(DataError, match="not finished"):
        build_index(str(output), Columns())
    again: list[Any] = []
    report = make(output, counting(again))
    assert (again, report.rows_written, report.dropped) == ([], ROWS, {})
    assert contents(output) == undisturbed


@pytest.mark.parametrize("damage", [lambda run: run.unlink(), lambda run: run.write_bytes(run.read_bytes()[:-1])])
def test_a_part_whose_runs_are_not_whole_is_done_again(
    damage: Callable[[Path], None], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], 3))
    damage(output / WORK_FOLDER / "part-from18/run-00002")
    again: list[Any] = []
    make(output, counting(again))
    assert [item.stamp for item in again[:2]] == ["from18", "from54"]
    assert contents(output) == undisturbed


@pytest.mark.parametrize("file", ["run-00000", "keys.npz"])
def test_a_run_that_is_damaged_after_all_is_named(file: str, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], PARTS + 1))
    run = output / WORK_FOLDER / "part-from18" / file
    run.write_bytes(bytes(len(run.read_bytes())))
    with pytest.raises(DataError, match=rf"part-from18/{file} .*Delete it and run the same command again"):
        make(output)
    run.unlink()
    again: list[Any] = []
    make(output, counting(again))
    assert len(again) == 1 + SHARDS  # that part, and all shards
    assert contents(output) == undisturbed


@pytest.mark.parametrize("file", ["job.json", "plan.json"])
def test_damaged_facts_of_a_job_are_named(file: str, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], PARTS + 1))
    (tmp_path / "set" / WORK_FOLDER / "plan.json").touch()
    if file == "job.json":
        (tmp_path / "set" / WORK_FOLDER / "plan.json").unlink()
    damaged = tmp_path / "set" / WORK_FOLDER / file
    damaged.write_bytes(bytes(50))
    with pytest.raises(DataError, match=rf"{file} is damaged .*Delete it and run the same command again"):
        make(tmp_path / "set")


def test_damaged_facts_of_a_part_are_no_part(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 3))
    (tmp_path / "set" / WORK_FOLDER / "part-from18/part.json").write_bytes(b"\xff" * 50)
    again: list[Any] = []
    make(tmp_path / "set", counting(again))
    assert [item.stamp for item in again[:2]] == ["from18", "from54"]
    assert contents(tmp_path / "set") == undisturbed


@pytest.mark.parametrize("memory", [3 * 1024, 50 * 1024])
def test_a_part_that_is_read_again_with_other_memory_has_other_runs_than_the_plan_says(
    memory: int, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], PARTS + 1))
    (output / WORK_FOLDER / "part-from18/part.json").unlink()
    with pytest.raises(Crash):
        make(output, counting([], 1), memory_bytes=memory)  # that part, and no further
    make(output, memory_bytes=memory)
    assert contents(output) == undisturbed


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "set"
    make(output)
    listed = LocalFileSystem.ls

    def refuse(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if path.rstrip("/") == str(output):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(self, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", refuse)
    with pytest.raises(DataError, match=r"set.*Permission denied"):
        prepare(source(20), output, layout=LAYOUT)
    with pytest.raises(DataError, match=r"set.*Permission denied"):
        build_index(str(output), Columns())


def test_names_are_held_against_those_that_another_split_has_written_meanwhile(tmp_path: Path) -> None:
    rows: list[Row] = [{**row(at), "label": at % 2, "label_name": "ab"[at % 2]} for at in range(20)]
    apart = Source([Part("a", rows)], iter, 0, {})
    with pytest.raises(Crash):
        prepare(apart, tmp_path / "train", layout=LAYOUT, run=counting([], 2))
    (tmp_path / "classes.txt").write_text("x\ny\n")
    with pytest.raises(ConfigError, match=r"classes\.txt: label 0 is 'x' there and 'a' in row row-0"):
        prepare(apart, tmp_path / "train", layout=LAYOUT)


@pytest.mark.parametrize("left", [b"", b'{"numb'])
def test_a_part_file_that_was_being_written_is_no_part(
    left: bytes, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], 2))
    torn = output / WORK_FOLDER / "part-from36/.writing-x/part.json"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(left)
    make(output)
    assert contents(output) == undisturbed


def test_sidecars_of_older_shards_go_though_the_shards_are_gone_already(tmp_path: Path) -> None:
    output = tmp_path / "set"
    (output / "_text/key").mkdir(parents=True)
    (output / "_text/key/00000.parquet").touch()
    make(output)
    assert not (output / "_text").exists()


def test_a_failure_before_the_first_shard_leaves_older_shards(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    output = tmp_path / "set"
    make(output)
    anew = {"layout": Layout(16, 8, overwrite=True)}
    with pytest.raises(ConfigError, match="no rows to write"):
        make(output, filters=Filters(min_caption=1000), **anew)
    assert not (output / WORK_FOLDER).exists()  # another filter may follow, without a word about this one
    older = {f"set/{path.name}": path.read_bytes() for path in output.glob("*.parquet")}
    assert older == {name: content for name, content in undisturbed.items() if name.endswith(".parquet")}
    with pytest.raises(Crash):
        make(output, counting([], PARTS + 1), seed=1, **anew)
    assert [path.name for path in output.glob("*.parquet")] == ["00000.parquet"]  # from here on they are gone
    with pytest.raises(ConfigError, match=r"other options \(seed\)"):
        make(output)
    make(output, **anew)
    assert contents(output) == undisturbed


def test_a_shard_of_an_older_set_is_not_taken_for_one_of_this(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    output = tmp_path / "set"
    make(output, seed=1)
    with pytest.raises(Crash):
        make(output, counting([], 2), layout=Layout(16, 8, overwrite=True))
    assert len(list(output.glob("*.parquet"))) == SHARDS
    with pytest.raises(ConfigError, match="already holds 5 shard"):  # nobody has said again that they may go
        make(output)
    make(output, layout=Layout(16, 8, overwrite=True))
    assert contents(output) == undisturbed


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(ConfigError, match=r"set: is a file\. The output is a folder"):
        make(tmp_path / "set")


def test_an_output_where_nothing_can_be_made_is_named() -> None:
    with pytest.raises(DataError, match=r"/proc/nowhere/set.* Nothing can be made at this place"):
        make(Path("/proc/nowhere/set"))


def test_two_at_once_are_kept_apart(tmp_path: Path) -> None:
    with (
        exclusive_lock(str(tmp_path / "set")),
        pytest.raises(ConfigError, match="set: another prepare is at work in this folder"),
    ):
        make(tmp_path / "set")
    assert make(tmp_path / "set").rows_written == ROWS


def test_a_folder_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert make(tmp_path / "set").rows_written == ROWS
    assert "set: this file system has no locks" in caplog.text


def test_a_label_with_two_names_in_two_parts_is_refused(tmp_path: Path) -> None:
    rows: list[Row] = [{**row(0), "label_name": "x"}, {**row(1), "label_name": "b"}, {**row(3), "label_name": "y"}]
    apart = Source([Part("a", rows[:2]), Part("b", rows[2:])], iter, 0, {})
    with pytest.raises(ConfigError, match="row row-3: label 0 is 'y' here and 'x' in an earlier row"):
        prepare(apart, tmp_path / "set")
    assert not list(tmp_path.glob("set/*.parquet"))


def test_the_bars_are_told_of_parts_shards_and_rows(tmp_path: Path) -> None:
    told: list[tuple[str, int, int, int]] = []
    progress = Progress(*(lambda *counts, name=name: told.append((name, *counts)) for name in ("read", "written")))
    make(tmp_path / "set", progress=progress)
    read_rows, written = (ROWS, PARTS), (ROWS, SHARDS)
    assert [one for one in told if one[0] == "read"] == [
        ("read", done, PARTS, min(18 * done, read_rows[0])) for done in range(PARTS + 1)
    ]
    assert [one for one in told if one[0] == "written"] == [
        ("written", done, SHARDS, min(16 * done, written[0])) for done in range(SHARDS + 1)
    ]
    assert pq.read_table(tmp_path / "set").num_rows == ROWS
