"""A prepare in a folder where another one was begun: what the result depends on decides whether it goes on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prepare_helpers import LAYOUT, PARTS, SHARDS, TASKS, Crash, contents, counting, make, source

from nev.config import ConfigError, Limits
from nev.data.filters import Filters
from nev.data.prepare import prepare
from nev.data.resize import Resize
from nev.data.shards import Layout


def test_another_job_is_refused_and_named(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    output = tmp_path / "set"
    with pytest.raises(Crash):
        make(output, counting([], 6))
    with pytest.raises(ConfigError, match=r"begun with other options \(filters, seed\).*--overwrite to start anew"):
        make(output, seed=1, filters=Filters(min_caption=2))
    with pytest.raises(ConfigError, match=r"begun with other options \(limit, input\)"):
        make(output, limit=50)
    with pytest.raises(ConfigError, match=r"begun with other options \(rows, input\)"):
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
    with pytest.raises(ConfigError, match=rf"begun with other options \({differing}\)"):
        make(tmp_path / "set", **options)


def test_an_input_that_is_mended_concerns_its_own_part(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    torn = source()
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


def test_other_input_is_another_job_once_all_was_read(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make(tmp_path / "set", counting([], PARTS + 1))
    less = source()
    with pytest.raises(ConfigError, match=r"begun with other options \(input\)"):
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
    with pytest.raises(ConfigError, match=r"begun with other options \(uids\)"):
        make(output, filters=Filters(uids=listed))
