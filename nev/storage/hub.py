"""The Hugging Face hub: the files of a model, and what the hub's errors mean.

HF_ENDPOINT names another hub, HF_TOKEN or `hf auth login` the user, HF_HUB_OFFLINE=1 leaves the cache alone.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nev.common.errors import first_line
from nev.config.model_spec import ModelError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
CODE = "*.py"  # fetched where the caller trusts it
PICKLE = "pytorch_model.bin"  # read with weights_only, and fetched where there is nothing else
LOG_IN = "`hf auth login`, or HF_TOKEN"
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # of the disk, not of the network


def fetch_model(name: str, revision: str | None, code: bool = False) -> Path:
    """The folder of a model's files in the cache, with what has changed on the hub. Without the hub: what the cache has.

    revision: branch, tag or commit. None: the default branch. code: fetch Python code, too.
    Raises ModelError for what is neither on the hub nor in the cache.
    """
    from huggingface_hub import snapshot_download

    with hub_errors_as(f"{name}: there is no such folder, and it cannot be fetched from the hub", name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*FILES, CODE] if code else FILES))
        if not any(folder.rglob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=[PICKLE])
        return folder


@contextmanager
def hub_errors_as(what: str, name: str) -> Iterator[None]:
    """Turn an error of the hub into a ModelError, which says what is wrong and what to do.

    what: begins the message. name: of the model. The body calls huggingface_hub, and nothing else.
    """
    try:
        yield
    except Exception as error:  # huggingface_hub, httpx, hf_xet and I/O each raise their own
        raise ModelError(f"{what}: {explain(error, name)}") from error


def explain(error: BaseException, name: str) -> str:
    """What an error of the hub means for a model, and what to do."""
    from huggingface_hub import constants, errors

    cause, status = error.__cause__, getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.IncompleteSnapshotError) and cause:
        return f"the copy in the cache is not whole, and {explain(cause, name)}"
    if isinstance(error, errors.LocalEntryNotFoundError) and cause:
        return explain(cause, name)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not contacted"
    if isinstance(error, errors.GatedRepoError):
        return f"its files are gated: accept the terms at {constants.ENDPOINT}/{name}, and log in ({LOG_IN})"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"nobody is logged in: {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such model, or none that you may see: check the name, and for a private one log in ({LOG_IN})"
    if status == 401:
        return f"the token is not valid: {LOG_IN}"
    if status == 403:
        return f"the token has no right to do this: take one with write access to {name.partition('/')[0]} ({LOG_IN})"
    message = first_line(error)
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        return f"the cache {constants.HF_HUB_CACHE} cannot be written ({message}): make room there, or set HF_HOME"
    if status is not None or isinstance(error, ValueError):
        return f"the hub refuses: {message}"
    return f"{constants.ENDPOINT} cannot be reached, or does not answer as the hub does ({type(error).__name__}: {message})"
