"""deploy/Containerfile, as far as it can be judged without a builder: no test here builds the image."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")


def instructions() -> list[tuple[str, str]]:
    """(instruction, its rest) in order; continued lines are one."""
    text = re.sub(r"^#.*\n", "", (REPO / "deploy" / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def stages() -> list[list[tuple[str, str]]]:
    made: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            made.append([])
        made[-1].append((name, rest))
    return made


def copied() -> list[str]:
    """What COPY takes from the repository."""
    rests = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    return [source for rest in rests if not rest[0].startswith("--from=") for source in rest[:-1]]


def is_ignored(source: str) -> bool:
    """Whether .dockerignore hides a path of the first level: the last line that fits decides."""
    hidden = False
    for line in (REPO / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(source, line.removeprefix("!")):
            hidden = not line.startswith("!")
    return hidden


def test_every_source_is_there_tracked_and_seen_by_the_builder() -> None:
    sources = copied()
    assert {"requirements.lock", "pyproject.toml", "nev", "configs"} <= set(sources)
    for source in sources:
        tracked = subprocess.run(["git", "ls-files", source], cwd=REPO, capture_output=True, text=True, check=True)
        assert tracked.stdout, source
        assert not is_ignored(source), source


def test_the_builder_sees_nothing_else() -> None:
    for name in (".git", ".venv", "runs", "data", "tests", "mlflow.db", "deploy"):
        assert is_ignored(name), name


def test_bases_are_pinned_and_fit_the_package() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1  # an environment is bound to its Python
    pinned = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", bases[0])
    assert pinned
    assert (int(pinned[1]), int(pinned[2])) >= (3, 11)
    text = (REPO / "deploy" / "Containerfile").read_text()
    assert set(re.findall(r"python(\d\.\d+)/", text)) == {f"{pinned[1]}.{pinned[2]}"}


def test_packages_come_from_the_lock_by_hash_as_wheels_and_nev_alone_besides() -> None:
    commands = [rest for name, rest in instructions() if name == "RUN"]
    installs = re.findall(r"pip install (.*?)(?= && |$)", " && ".join(commands))
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert "--only-binary=:all:" in installs[0]
    assert installs[0].endswith("-r requirements.lock")
    assert "--no-deps" in installs[1]
    assert "--no-build-isolation" in installs[1]
    assert not re.search(r"index-url|find-links|https?://", " ".join(commands))


def test_the_image_runs_as_a_user_without_rights_and_without_an_installer() -> None:
    build, final = stages()
    users = [rest for name, rest in final if name == "USER"]
    assert users == ["10001:10001"]  # a number: Kubernetes' runAsNonRoot can't judge a name
    job = list(yaml.safe_load_all((REPO / "deploy" / "kuberay" / "rayjob.yaml").read_text()))[-1]
    assert job["spec"]["submitterPodTemplate"]["spec"]["securityContext"]["runAsUser"] == 10001
    assert final.index(("USER", users[0])) > max(place for place, (name, _) in enumerate(final) if name == "RUN")
    assert all("pip uninstall" in " ".join(rest for name, rest in stage if name == "RUN") for stage in (build, final))
    assert any("org.opencontainers.image.version" in rest for name, rest in final if name == "LABEL")


def test_what_is_copied_is_enough_for_the_wheel(tmp_path: Path) -> None:
    if not UV.exists():
        pytest.skip("uv is not beside this Python: make setup")
    context = tmp_path / "context"
    context.mkdir()
    for source in copied():
        place = REPO / source
        if place.is_dir():
            shutil.copytree(place, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, context / source)
    command = [
        UV,
        "build",
        "--wheel",
        "--no-build-isolation",
        "--python",
        sys.executable,
        "--out-dir",
        tmp_path,
        context,
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("nev-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nev/commands/train.py" in names
    assert "nev/configs/nomic_embed_vision_v1_5.yaml" in names
