"""`nev`, the command: one help page, light starts, errors on stderr, shipped experiments by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nev
from nev.commands.main import COMMANDS, app, make_pipeline
from nev.config.base import ConfigError
from nev.config.file import load, read_config, shipped_configs

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "mlflow", "timm", "pyarrow")

# What makes each command fail before it starts any work: options that name nothing.
BAD_INPUT = {
    "prepare": ["--source", "webdataset", "--input", "absent", "--output", "out"],
    "embed-text": ["--config", "absent"],
    "embed-images": ["--config", "absent"],
    "train": ["--config", "absent"],
    "evaluate": ["--checkpoint", "absent", "--mteb", "A", "--suite", "B"],
    "export": ["--checkpoint", "/absent", "--format", "hf", "--output", "out"],
    "index": ["--index", "index"],
    "serve": ["--model", "/absent"],
    "demo": ["absent"],
    "filter": ["--vectors", "/absent", "--output", "keep.parquet"],
    "ablate": ["--config", "absent"],
    "capacity": ["--config", "absent"],
    "plan": ["--config", "absent", "--gpu", "h100", "--gpus", "8"],
    "pretrain": ["--config", "absent", "--objective", "mim"],
    "quickstart": ["--config", "absent"],
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_help_page_lists_the_commands_in_the_order_of_use() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160"}).output
    places = [shown.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert list(COMMANDS) == [
        "prepare", "embed-text", "embed-images", "train", "evaluate", "export", "index", "serve",
        "filter", "ablate", "capacity", "plan", "pretrain", "quickstart", "demo",
    ]  # fmt: skip
    assert "--install-completion" in shown


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_short_option_asks_for_help(arguments: list[str]) -> None:
    short, long = (CliRunner().invoke(app, [*arguments, option]).output for option in ("-h", "--help"))
    assert short == long


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_its_file_for_jobs(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example: nev {name} --" in shown.output
    file = f"pipelines/{name.replace('-', '_')}.py"
    assert (
        f"Example: python {file} --"
        in CliRunner().invoke(make_pipeline(name), ["--help"], env={"COLUMNS": "200"}).output
    )
    assert f'make_pipeline("{name}")' in (ROOT / file).read_text()


def test_a_help_page_imports_nothing_that_computes() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from nev.commands.main import COMMANDS, app
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    assert CliRunner().invoke(app, arguments).exit_code == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert python(code) == "[]"


def test_the_public_names_are_imported_when_they_are_used() -> None:
    code = f"""
import sys
import nev
before = [name for name in (*{HEAVY!r}, "pydantic") if name in sys.modules]
assert set(nev.__all__) <= set(dir(nev))
print(before, nev.Experiment.__name__, nev.load_config.__name__, "torch" in sys.modules)
"""
    assert python(code) == "[] Experiment load False"
    with pytest.raises(AttributeError, match="no attribute 'Experimnt'"):
        nev.Experimnt  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_the_package_s() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"nev {nev.__version__}"
    assert f'version = "{nev.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_errors_go_to_stderr(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [name, *BAD_INPUT[name]])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


def test_shipped_experiments_and_sweeps_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {str(file.relative_to(ROOT / "configs").with_suffix("")) for file in (ROOT / "configs").rglob("*.yaml")}
    assert shipped_configs().keys() == files
    assert load("quickstart") == load(ROOT / "configs/quickstart.yaml")
    for name in (name for name in files if name.startswith("ablations/") and "/base/" not in name):
        assert load(read_config(name)["base"], ["train.steps=1", "train.epochs=null", "train.samples=null"])


def test_a_file_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("name: mine")
    assert read_config("quickstart") == {"name": "mine"}


def test_a_name_that_is_neither_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"quickstrat: no such file\. .*ablations/batch_size.*quickstart"):
        load("quickstrat")
