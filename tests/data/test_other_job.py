"""A prepare in a folder where another one was begun: what the result depends on decides whether it continues."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.prepare import LAYOUT, PARTS, ROWS, SHARDS, TASKS, Crash, contents, counting, make, row, source

from nev.config.base import ConfigError
from nev.config.data import Columns, Limits
from nev.data.index import WORK_FOLDER, build_index
from nev.data.prepare import job_state as unfinished
from nev.data.prepare.filters import Filters
from nev.data.prepare.pipeline import PrepareReport, prepare
from nev.data.prepare.resize import Resize
from nev.data.prepare.scatter import BUCKET_BYTES
from nev.data.prepare.shards import Layout
from nev.data.sources import Part, Source, make_source
from nev.storage.reading import DataError


def test_another_job_is_refused_and_named(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], 6))
    with pytest.raises(
        ConfigError,
        match=r"prepare with other options \(filters, seed\).*--overwrite to start again",
    ):
        make(output, seed=1, filters=Filters(min_caption=2))
    with pytest.raises(ConfigError, match=r"prepare with other options \(limit, input\)"):
        make(output, limit=50)
    with pytest.raises(ConfigError, match=r"prepare with other options \(rows, input\)"):
        prepare(source(50), output, layout=LAYOUT)
    again: list[Any] = []
    make(output, counting(again), seed=1, layout=Layout(16, 8, overwrite=True))
    assert len(again) == TASKS
    assert contents(output) != undisturbed
    make(output, layout=Layout(16, 8, overwrite=True))
    assert contents(output) == undisturbed


@pytest.mark.parametrize(
    ("differing", "options"),
    [("resize", {"resize": Resize(side=32)}), ("limits", {"limits": Limits(max_bytes=9)}), ("seed", {"seed": 2})],
)
def test_an_option_that_the_result_depends_on_makes_another_job(
    differing: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 2))
    with pytest.raises(ConfigError, match=rf"prepare with other options \({differing}\)"):
        make(tmp_path / "set", **options)


def test_an_input_that_is_mended_concerns_its_own_part(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    torn = source(nbytes=2 * BUCKET_BYTES)  # mended, it is larger
    torn = torn._replace(
        parts=[part._replace(stamp="torn") if part.content.start == 18 else part for part in torn.parts]
    )

    def stop(function: Callable[[Any], Any], items: Sequence[Any], task_bytes: int) -> Iterator[Any]:
        for item in items:
            if item.stamp == "torn":
                raise ConfigError("this file is torn")
            yield function(item)

    options = {"layout": LAYOUT, "memory_bytes": 5 * 1024}
    with pytest.raises(ConfigError, match="this file is torn"):
        prepare(
            torn._replace(parts=sorted(torn.parts, key=lambda part: part.stamp)), tmp_path / "set", run=stop, **options
        )
    again: list[Any] = []
    make(tmp_path / "set", counting(again))
    assert [item.stamp for item in again[:1]] == ["from18"]
    assert len(again) == 1 + SHARDS
    assert contents(tmp_path / "set") == undisturbed


def test_parts_of_an_input_that_has_none_of_them_are_another_jobs_work(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 2))
    other = source()
    other = other._replace(parts=[part._replace(stamp=f"other{part.stamp}") for part in other.parts])
    with pytest.raises(ConfigError, match=r"prepare with other options \(input\)"):
        make_of(other, tmp_path)
    with pytest.raises(ConfigError, match=r"prepare with other options \(.*source.*input\)"):
        make_of(make_source([row(0)]), tmp_path)
    again: list[Any] = []
    make(tmp_path / "set", counting(again))
    assert len(again) == TASKS - 2
    anew = Layout(16, 8, overwrite=True)
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 2), layout=anew)
    make_of(other, tmp_path, layout=anew)


def make_of(other: Source, tmp_path: Path, **options: Any) -> PrepareReport:
    return prepare(other, tmp_path / "set", **{"layout": LAYOUT, "memory_bytes": 5 * 1024, **options})


def test_parts_that_are_not_asked_for_any_more_go(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 3))
    less = source()
    with pytest.raises(Crash):
        make_of(less._replace(parts=less.parts[1:]), tmp_path, run=counting([], 2))
    left = sorted(path.name for path in (tmp_path / "set" / WORK_FOLDER).glob("part-*"))
    assert left == ["part-from18", "part-from36", "part-from54"]


def test_stamps_that_do_not_tell_parts_apart_are_refused(tmp_path: Path) -> None:
    for stamps in (["a", "a"], ["a", "b/c"]):
        parts = [Part(stamp, range(3)) for stamp in stamps]
        with pytest.raises(ValueError, match="stamps of parts must be words, and differ"):
            make_of(source()._replace(parts=parts), tmp_path)


@pytest.mark.parametrize("at", ["write_json", "_remove_file"])  # before the new job's options are written, and after
def test_half_of_another_jobs_split_is_never_trained_on(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], TASKS - 1))
    anew = Layout(16, 8, overwrite=True)

    def die(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, at, die)
        with pytest.raises(Crash):
            make(tmp_path / "set", seed=1, layout=anew)
    with pytest.raises(DataError, match="not finished"):
        build_index(str(tmp_path / "set"), Columns())
    make(tmp_path / "set", seed=1, layout=anew)
    assert build_index(str(tmp_path / "set"), Columns()).total_rows == ROWS


def test_work_of_an_older_version_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 2))
    for file in (tmp_path / "set" / WORK_FOLDER).rglob("*.json"):
        facts = {key: value for key, value in json.loads(file.read_text()).items() if key != "stamp"}
        file.write_text(json.dumps({**facts, "format": 1}))
    again: list[Any] = []
    make(tmp_path / "set", counting(again))
    assert len(again) == TASKS


def test_other_input_is_another_job_once_all_was_read(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], PARTS + 1))
    less = source()
    with pytest.raises(ConfigError, match=r"prepare with other options \(input\)"):
        prepare(less._replace(parts=less.parts[1:]), tmp_path / "set", layout=LAYOUT)


def test_another_job_that_has_done_nothing_yet_is_forgotten(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], 0), seed=1)
    make(tmp_path / "set")
    assert contents(tmp_path / "set") == undisturbed


def test_a_list_of_uids_that_changed_is_another_job(tmp_path: Path) -> None:
    output, listed = tmp_path / "set", tmp_path / "uids.txt"
    listed.write_text("\n".join(f"row-{k}" for k in range(40)))
    with pytest.raises(Crash):
        make(output, counting([], 2), filters=Filters(uids=listed))
    listed.write_text("row-3")
    with pytest.raises(ConfigError, match=r"prepare with other options \(uids\)"):
        make(output, filters=Filters(uids=listed))
