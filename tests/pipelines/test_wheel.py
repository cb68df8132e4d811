"""The wheel: installed elsewhere, it has every file that nev reads, and its command runs from any folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
READS = """
from importlib.resources import files
import nev
from nev.config.file import load, shipped_configs
from nev.eval.report.page import _template
from nev.eval.suite.schema import load_suite, shipped
print(nev.__file__)
print(load("quickstart").name, len(shipped_configs()), len([load_suite(name) for name in shipped()]))
from nev.serve.page import FILES, FOLDER
print(files("nev").joinpath("py.typed").is_file(), bool(_template()), all((FOLDER / name).is_file() for _, name, _ in FILES))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel in it; the libraries that nev needs are found behind it."""
    if not UV.exists():
        pytest.skip("uv is not beside this Python: make setup")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("nev-*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    command = [UV, "pip", "install", "--python", python, "--no-deps", "--offline", "--quiet", wheel]
    subprocess.run(command, check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return environment


def run(environment: Path, elsewhere: Path, *command: str) -> str:
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        cwd=elsewhere,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "NEV_DATA": "data", "NEV_EVAL_DATA": "data"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert "quickstart" in run(installed, tmp_path, "nev", "--help")
    assert "Example: nev quickstart" in run(installed, tmp_path, "nev", "quickstart", "--help")


@pytest.mark.slow
def test_every_file_that_nev_reads_is_there(installed: Path, tmp_path: Path) -> None:
    location, counts, others = run(installed, tmp_path, "python", "-c", READS).splitlines()
    assert Path(location).is_relative_to(installed), "nev is the wheel's, not the checkout's"
    shipped = len(list((ROOT / "configs").rglob("*.yaml")))
    suites = len(list((ROOT / "nev/eval/suite/shipped").glob("*.yaml")))
    assert counts == f"quickstart {shipped} {suites}"
    assert others == "True True True"
