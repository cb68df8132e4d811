"""The floors and laws of `docs/architecture.md`, held by the imports: each violation is printed with its file and line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.imports import Import, find_circles, imported_with, is_in, read_imports, read_sources

ROOT = Path(__file__).parents[2]

# From the bottom. A module belongs to the longest name that holds it, and imports from its own room and from floors below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("nev.common", "nev.ops"),
    ("nev.config", "nev.cluster", "nev.losses"),
    ("nev.models", "nev.storage", "nev.planner.hardware"),
    ("nev.runs", "nev.data"),
    ("nev.inference",),
    ("nev.embed", "nev.search"),
    ("nev.eval.metrics",),
    ("nev.eval.suite",),
    ("nev.eval.validation",),
    ("nev.eval.report",),
    ("nev.eval",),
    ("nev.train.core",),
    ("nev.train.job", "nev.train.capacity", "nev.train.start_weights"),
    ("nev.train.messages", "nev.train.flops"),
    ("nev.train.worker",),
    ("nev.train.driver",),  # hands the worker's function to Ray Train
    ("nev.train",),
    ("nev.sweep", "nev.export", "nev.serve", "nev.planner"),
    ("nev.demo",),
    ("nev",),
    ("nev.commands",),
    ("pipelines", "nev.__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# What a room never imports, late imports included.
NEVER: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("nev.losses", "nev.models", "nev.ops", "nev.runs", "nev.inference", "nev.search", "nev.planner"),
        ("ray", "nev.cluster"),
    ),
    "nev.train.core": ("ray", "nev.cluster", "nev.runs", "nev.data", "nev.eval"),
    "nev.data": ("nev.models",),
    "nev.eval.metrics": ("nev.config", "nev.storage", "nev.data", "nev.runs", "nev.embed", "pathlib", "os", "json"),
    "nev.train.worker": ("rich", "mlflow", "nev.runs.tracking", "nev.common.progress", "nev.common.cli"),
    "nev.serve": ("nev.embed", "nev.eval", "nev.train", "nev.export"),
    "nev": ("tests", "helpers", "benchmarks"),
    "pipelines": ("tests", "helpers", "benchmarks"),
}

# What is not imported when a module of the room is, by whatever chain of imports.
NOT_AT_IMPORT: dict[str, tuple[str, ...]] = {
    "nev.train.driver": ("torch", "torchvision", "timm", "transformers", "sentence_transformers"),
    "nev.train.worker": ("rich", "mlflow", "matplotlib", "scipy"),
    "nev.planner": ("torch", "timm", "transformers", "mlflow"),
}

# What one place alone imports.
ONLY: dict[str, tuple[str, ...]] = {
    "nev.storage": ("fsspec", "s3fs", "botocore", "aiobotocore"),
    "nev.search": ("lancedb", "psycopg", "pgvector"),
    "nev.cluster.ray_internals": ("ray._private", "ray._raylet", "ray.train.v2._internal"),
    "nev.cluster": ("ray.data._internal",),
    "nev.serve.replicas": ("ray.serve",),
}


def room_of(module: str) -> str:
    rooms = [room for room in LEVEL if is_in(module, room)]
    return max(rooms, key=len, default="")


def refuse(violations: Sequence[str]) -> None:
    if violations:
        pytest.fail("\n".join([f"{len(violations)} imports against the laws:", *violations]), pytrace=False)


def upward_imports(imports: Sequence[Import]) -> list[str]:
    found = []
    for one in imports:
        here, there = room_of(one.importer), room_of(one.target)
        if there and here != there and LEVEL[there] >= LEVEL[here] and one.target != "nev":
            found.append(f"{one.place}: {here} imports {one.target}, which is not on a floor below")
    return found


def forbidden_imports(imports: Sequence[Import]) -> list[str]:
    return [
        f"{one.place}: {room} never imports {name}"
        for one in imports
        for room, names in NEVER.items()
        if is_in(one.importer, room)
        for name in names
        if is_in(one.target, name)
    ]


def heavy_imports(imports: list[Import], modules: set[str]) -> list[str]:
    found = []
    for module in sorted(modules):
        for room, names in NOT_AT_IMPORT.items():
            if not is_in(module, room):
                continue
            for target, chain in imported_with(module, imports, modules).items():
                if any(is_in(target, name) for name in names):
                    found.append(f"{' > '.join(one.place for one in chain)}: importing {module} imports {target}")
    return found


def misplaced_imports(imports: Sequence[Import]) -> list[str]:
    return [
        f"{one.place}: {name} is imported by {owner} alone"
        for one in imports
        for owner, names in ONLY.items()
        for name in names
        if is_in(one.target, name) and not is_in(one.importer, owner)
    ]


def imports_of_tests(imports: Sequence[Import]) -> list[str]:
    return [
        f"{one.place}: a test module is imported: share code in tests/helpers"
        for one in imports
        if one.target.rpartition(".")[2].startswith("test_") or one.target.rpartition(".")[2] == "conftest"
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[str, str]]:
    return read_sources(ROOT, "nev", "pipelines")


@pytest.fixture(scope="module")
def imports(sources: dict[str, tuple[str, str]]) -> list[Import]:
    return read_imports(sources)


def test_a_room_imports_only_from_floors_below(imports: list[Import]) -> None:
    assert {room_of(one.importer) for one in imports} - {""} >= {"nev.common", "nev.train.worker", "nev.commands"}
    refuse(upward_imports(imports))


def test_what_a_room_never_imports(imports: list[Import]) -> None:
    refuse(forbidden_imports(imports))


def test_what_is_not_imported_at_the_start(imports: list[Import], sources: dict[str, tuple[str, str]]) -> None:
    refuse(heavy_imports(imports, set(sources)))


def test_what_one_place_alone_imports(imports: list[Import]) -> None:
    refuse(misplaced_imports(imports))


def test_no_modules_import_each_other(imports: list[Import], sources: dict[str, tuple[str, str]]) -> None:
    refuse([f"circle: {', '.join(group)}" for group in find_circles(imports, set(sources))])


def test_no_test_module_imports_another() -> None:
    refuse(imports_of_tests(read_imports(read_sources(ROOT, "tests"))))


def test_each_law_sees_a_violation() -> None:
    """Of made-up modules that break every law once."""
    made_up = {
        "nev": ("nev/__init__.py", ""),
        "nev.common.low": ("nev/common/low.py", "def late():\n    from nev.eval import high\n"),
        "nev.eval.high": ("nev/eval/high.py", "from nev.common import low\nimport fsspec\n"),
        "nev.losses.loss": ("nev/losses/loss.py", "if TYPE_CHECKING:\n    import ray\n"),
        "nev.train.driver.a": ("nev/train/driver/a.py", "from nev.models import net\n"),
        "nev.models.net": ("nev/models/net.py", "import torch\n"),
        "tests.test_one": ("tests/test_one.py", "from test_two import maker\n"),
    }
    imports = read_imports(made_up)
    assert upward_imports(imports) == [
        "nev/common/low.py:2: nev.common imports nev.eval.high, which is not on a floor below"
    ]
    assert forbidden_imports(imports) == ["nev/losses/loss.py:2: nev.losses never imports ray"]
    assert misplaced_imports(imports) == ["nev/eval/high.py:2: fsspec is imported by nev.storage alone"]
    assert heavy_imports(imports, set(made_up)) == [
        "nev/train/driver/a.py:1 > nev/models/net.py:1: importing nev.train.driver.a imports torch"
    ]
    assert find_circles(imports, set(made_up)) == [["nev.common.low", "nev.eval.high"]]
    assert imports_of_tests(imports) == ["tests/test_one.py:1: a test module is imported: share code in tests/helpers"]
