"""`nev export --push`: what reaches the hub, and what is refused before anything is written. Against a stand-in of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.hub_server import Hub, Repo, hub_server
from helpers.models import make_experiment, write_checkpoint
from helpers.processes import run_python
from helpers.s3_server import Proxy

import nev
from nev.export.parts import sample_pictures
from nev.storage.files import upload

PUSH = "from nev.export.push import check_push, push\n"
SQUARES = sample_pictures(32)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


def write_folder(folder: Path, **more: bytes) -> dict[str, bytes]:
    """A folder that stands for an export. Returns its files."""
    files = {
        "nev.json": b"{}",
        "README.md": b"---\nlicense: apache-2.0\n---\n\n# small\n",
        "model.safetensors": bytes(range(256)) * 9,
        "text/config.json": b"{}",
        "text/model.safetensors": b"tensors",
        **{name.replace("__", "/").replace("_", "."): data for name, data in more.items()},
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def run_push(
    hub: Hub, tmp_path: Path, name: str, private: bool = False, token: str | None = "hf_write", **more: str
) -> str:
    """Check and push `tmp_path/out` in a fresh process. Returns what it prints, or the message of its ModelError."""
    code = (
        f"{PUSH}from nev.config.model_spec import ModelError\n"
        "try:\n"
        "    check_push(sys.argv[2], sys.argv[3] == 'True')\n"
        "    print('checked', push(sys.argv[1], sys.argv[2], sys.argv[3] == 'True'))\n"
        "    print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    return run_python(
        code, tmp_path / "out", name, private, environment=hub.environment(tmp_path / "home", token, **more)
    )


def test_the_files_of_the_folder_and_nothing_else_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    files = write_folder(tmp_path / "out")
    shown = run_push(hub, tmp_path, "ada/small")
    repo = hub.repos["ada/small"]
    assert len(repo.commits) == 2  # what the hub makes, and the push
    sha, there = repo.commits[-1]
    assert there == {**files, ".gitattributes": repo.commits[0][1][".gitattributes"]}
    assert shown == f"checked {hub.url}/ada/small/commit/{sha}\n[]\n"
    assert not repo.private
    assert len([each for each in hub.requests if each.startswith("PUT /lfs/")]) == 2


def test_a_second_push_replaces_the_first(hub: Hub, tmp_path: Path) -> None:
    write_folder(tmp_path / "out", old_json=b"[]")
    run_push(hub, tmp_path, "lab/small", private=True)
    repo = hub.repos["lab/small"]
    assert repo.private
    hub.repos["lab/small"].commits[-1][1]["LICENSE"] = b"of the owner"
    uploads = len([each for each in hub.requests if each.startswith("PUT")])
    (tmp_path / "out" / "old.json").unlink()
    (tmp_path / "out" / "nev.json").write_bytes(b'{"format": 1}')
    assert run_push(hub, tmp_path, "lab/small", private=True).startswith("checked")
    assert len(repo.commits) == 3
    there = repo.commits[-1][1]
    assert there["nev.json"] == b'{"format": 1}'
    assert "old.json" not in there
    assert there["LICENSE"] == b"of the owner"
    assert "old.json" in repo.commits[-2][1]
    assert (
        len([each for each in hub.requests if each.startswith("PUT")]) == uploads
    )  # unchanged tensors do not travel again


REFUSED = [
    ("ada/small", "hf_wrong", "push ada/small: the token is not valid: `hf auth login`, or HF_TOKEN"),
    ("ada/small", None, "push ada/small: nobody is logged in: `hf auth login`, or HF_TOKEN"),
    ("ada/small", "hf_read", "push ada/small: this token may only read: take one with write access"),
    ("bob/small", "hf_write", "push bob/small: this token is of ada, who may write to ada, lab"),
    ("small", "hf_write", "push 'small': a repository on the hub is named OWNER/NAME"),
    ("ada/..", "hf_write", "push ada/..: the hub refuses: "),
]


def test_what_is_refused_before_an_export(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import json, os\n"
        "from nev.config.model_spec import ModelError\n"
        "from nev.export.push import check_push\n"
        "for name, token in json.loads(sys.argv[1]):\n"
        "    os.environ['HF_TOKEN'] = token or ''\n"
        "    try:\n"
        "        check_push(name, False)\n"
        "        print('not refused')\n"
        "    except ModelError as error:\n"
        "        print(json.dumps(str(error)))\n"
    )
    requests = json.dumps([(name, token) for name, token, _ in REFUSED])
    shown = run_python(code, requests, environment=hub.environment(tmp_path / "home", None)).splitlines()
    for line, (_, _, message) in zip(shown, REFUSED, strict=True):
        assert json.loads(line).startswith(message)
    assert not hub.repos
    assert not [each for each in hub.requests if "create" in each]


def test_a_hub_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    shown = run_push(hub, tmp_path, "ada/small", HF_ENDPOINT="http://127.0.0.1:9")
    assert shown.startswith("push ada/small: http://127.0.0.1:9 cannot be reached, or does not answer")
    shown = run_push(hub, tmp_path, "ada/small", HF_HUB_OFFLINE="1")
    assert shown == "push ada/small: HF_HUB_OFFLINE is set, so the hub is not contacted\n"
    assert not hub.requests


def test_a_private_model_is_not_shown_in_a_public_repository(hub: Hub, tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    run_push(hub, tmp_path, "ada/small")
    assert "it exists and is public" in run_push(hub, tmp_path, "ada/small", private=True)
    assert len(hub.repos["ada/small"].commits) == 2


def test_files_that_nev_has_not_written_are_not_replaced(hub: Hub, tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    hub.repos["ada/other"] = Repo()
    hub.repos["ada/other"].commit({".gitattributes": b"", "README.md": b"# mine", "model.safetensors": b"mine"})
    assert "it has files that nev has not written (model.safetensors)" in run_push(hub, tmp_path, "ada/other")
    hub.repos["ada/new"] = Repo()
    hub.repos["ada/new"].commit({".gitattributes": b"", "README.md": b"# made on the web"})
    assert run_push(hub, tmp_path, "ada/new").startswith("checked")


def test_a_hub_that_refuses_after_the_export(hub: Hub, tmp_path: Path) -> None:
    write_folder(tmp_path / "out", README_md=b"---\n[]\n---\n")
    shown = run_push(hub, tmp_path, "ada/small")
    assert shown.startswith(
        f"{tmp_path / 'out'} is written, but it cannot be pushed to ada/small: the hub refuses: Invalid metadata"
    )
    code = f"{PUSH}push(sys.argv[1], 'bob/small', False)"
    with pytest.raises(AssertionError, match="the token has no right to do this: take one with write access to bob"):
        run_python(code, tmp_path / "out", environment=hub.environment(tmp_path / "home"))


@pytest.mark.slow
def test_an_export_on_s3_is_pushed(hub: Hub, s3: Proxy, tmp_path: Path) -> None:
    files = write_folder(tmp_path / "out")
    upload(tmp_path / "out", "s3://bucket/exports/small")
    run_python(
        f"{PUSH}push('s3://bucket/exports/small', 'ada/small', False)", environment=hub.environment(tmp_path / "home")
    )
    assert hub.repos["ada/small"].commits[-1][1].items() >= files.items()


def run_command(*arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nev", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_the_command_stops_before_it_works(hub: Hub, tmp_path: Path) -> None:
    arguments = ("--checkpoint", tmp_path / "absent", "--format", "hf", "--output", tmp_path / "out")
    done = run_command(*arguments, "--push", "ada/small", environment=hub.environment(tmp_path / "home", "hf_wrong"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: push ada/small: the token is not valid")
    done = run_command(*arguments, "--private", environment={})
    assert (done.returncode, done.stderr) == (2, "error: --private is for --push OWNER/NAME: give both, or neither\n")


@pytest.mark.slow
def test_a_pushed_model_opens_by_its_name(hub: Hub, tmp_path: Path) -> None:
    location = write_checkpoint(make_experiment(tmp_path))
    arguments = (
        "--checkpoint",
        location,
        "--format",
        "hf",
        "--output",
        tmp_path / "out",
        "--push",
        "ada/small",
        "--private",
    )
    done = run_command(*arguments, environment=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["ada/small"]
    assert done.stdout.splitlines()[-1].split() == ["pushed", f"{hub.url}/ada/small/commit/{repo.commits[-1][0]}"]
    assert repo.private
    assert b'model = nev.load("ada/small")' in repo.commits[-1][1]["README.md"]
    np.save(tmp_path / "squares.npy", SQUARES)
    code = (
        "import numpy as np, nev\n"
        "model = nev.load('ada/small')\n"
        "np.save(sys.argv[2], model.encode_image(np.load(sys.argv[1])))\n"
        "np.save(sys.argv[3], model.encode_text(['a dog in the snow']))"
    )
    run_python(
        code,
        *(tmp_path / name for name in ("squares.npy", "pictures.npy", "texts.npy")),
        environment=hub.environment(tmp_path / "another home"),
    )
    model = nev.load(location)
    np.testing.assert_allclose(np.load(tmp_path / "pictures.npy"), model.encode_image(SQUARES), rtol=0, atol=1e-6)
    texts = model.encode_text(["a dog in the snow"])
    np.testing.assert_allclose(np.load(tmp_path / "texts.npy"), texts, rtol=0, atol=1e-6)
    assert not [each for each in hub.requests if each.endswith(".py")]  # no code is fetched
