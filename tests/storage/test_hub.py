"""A model's files from the hub: what is fetched, what the cache gives, and what errors mean. Against a stand-in of the hub."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import Hub, Repo, hub_server
from helpers.processes import run_python

from nev.storage.hub import explain

FILES = {
    "nev.json": b"{}",
    "model.safetensors": b"tensors",
    "text/tokenizer.json": b"[]",
    "vocab.txt": b"a",
    "README.md": b"# small",
    "modeling_nev.py": b"raise SystemExit('code must not be fetched')",
    "onnx/vision.onnx": b"graph",
    "pickle.pkl": b"no",
    "pytorch_model.bin": b"the same as model.safetensors, before",
}
WANTED = ["README.md", "model.safetensors", "nev.json", "text/tokenizer.json", "vocab.txt"]
HERE = "ada/small: there is no such folder, and it cannot be fetched from the hub: "
CODE = """
import hashlib
import json
from pathlib import Path
from nev.config.model_spec import ModelError
from nev.storage.hub import fetch_model
try:
    folder = fetch_model(sys.argv[1], sys.argv[2] or None)
    print(json.dumps(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())))
except ModelError as error:
    print(error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        put(server, FILES)
        yield server


def put(hub: Hub, files: dict[str, bytes], **settings: bool) -> str:
    """Commit files to `ada/small`. Returns the commit."""
    hub.large |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    repo = hub.repos.setdefault("ada/small", Repo())
    for name, value in settings.items():
        setattr(repo, name, value)
    return repo.commit(files)


def fetch(
    hub: Hub, home: Path, name: str = "ada/small", revision: str = "", token: str | None = None, **more: str
) -> str:
    """Fetch a model in a fresh process. Returns the names of its files (JSON), or the message of a ModelError."""
    return run_python(CODE, name, revision, environment=hub.environment(home, token, **more)).strip()


@pytest.mark.slow
def test_data_is_fetched_and_code_is_not_and_the_cache_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    assert json.loads(fetch(hub, tmp_path)) == WANTED
    assert not [each for each in hub.requests if "modeling" in each or ".onnx" in each or ".pkl" in each]
    count = len(hub.requests)
    assert json.loads(fetch(hub, tmp_path, HF_HUB_OFFLINE="1")) == WANTED
    assert json.loads(fetch(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")) == WANTED
    assert len(hub.requests) == count


@pytest.mark.slow
def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    first = hub.repos["ada/small"].commits[0][0]
    put(hub, {**FILES, "config.json": b"{}"})
    assert "config.json" in json.loads(fetch(hub, tmp_path))
    assert "config.json" not in json.loads(fetch(hub, tmp_path, revision=first))
    assert fetch(hub, tmp_path, revision="v9") == f"{HERE}it has no such revision"


def test_a_half_copy_in_the_cache_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    (copy,) = tmp_path.rglob("snapshots/*/model.safetensors")
    copy.unlink()
    wrong = f"{HERE}the copy in the cache is not whole, and HF_HUB_OFFLINE is set, so the hub is not contacted"
    assert fetch(hub, tmp_path, HF_HUB_OFFLINE="1") == wrong


def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path) -> None:
    gone = f"{HERE}http://127.0.0.1:9 cannot be reached, or does not answer"
    assert fetch(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9").startswith(gone)
    assert fetch(hub, tmp_path, HF_HUB_OFFLINE="1") == f"{HERE}HF_HUB_OFFLINE is set, so the hub is not contacted"


@pytest.mark.slow
def test_a_model_that_one_may_not_see(hub: Hub, tmp_path: Path) -> None:
    absent = fetch(hub, tmp_path, "ada/absent")
    assert "the hub has no such model, or none that you may see: check the name, and for a private one log in" in absent
    put(hub, FILES, private=True)
    assert fetch(hub, tmp_path).endswith(absent.removeprefix("ada/absent"))
    assert json.loads(fetch(hub, tmp_path, token="hf_read")) == WANTED


def test_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    put(hub, FILES, gated=True)
    wanted = (
        f"{HERE}its files are gated: accept the terms at {hub.url}/ada/small, and log in (`hf auth login`, or HF_TOKEN)"
    )
    assert fetch(hub, tmp_path, token="hf_read") == wanted


def test_a_wrong_token(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, token="hf_old") == f"{HERE}the token is not valid: `hf auth login`, or HF_TOKEN"


def test_a_disk_that_is_full_is_not_the_hubs() -> None:
    message = explain(OSError(errno.ENOSPC, "No space left on device"), "ada/small")
    assert "cannot be written ([Errno 28] No space left on device): make room there, or set HF_HOME" in message
    assert explain(OSError(), "ada/small").endswith("(OSError: OSError)")


@pytest.mark.slow
def test_a_pickle_is_fetched_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    put(hub, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert json.loads(fetch(hub, tmp_path)) == ["config.json", "pytorch_model.bin"]
