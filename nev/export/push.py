"""Uploads an exported folder to the Hugging Face hub, in one commit.

The repository then holds exactly the files of the folder. What was there before stays in its history.
"""

from __future__ import annotations

from pathlib import Path

from nev.common.errors import first_few
from nev.config.model_spec import SPEC_FILE, ModelError
from nev.storage.files import local_copy
from nev.storage.hub import HUB_NAME, LOG_IN, hub_errors_as

UNTOUCHED = (".gitattributes", "LICENSE")  # files that people add on the hub, which a push leaves alone
STARTED = (*UNTOUCHED, "README.md")  # what a repository has that was made on the web


def check_push(name: str, private: bool) -> None:
    """Check what can be checked before an export: the name, the token, and the repository where there is one.

    Raises ModelError where a push would fail, would show to all what was to be private, or would replace files that nev has not
    written.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not HUB_NAME.fullmatch(name):
        raise ModelError(f"push {name!r}: a repository on the hub is named OWNER/NAME")
    hub, files = HfApi(), list[str]()
    with hub_errors_as(f"push {name}", name):
        user = hub.whoami()
        try:
            there = hub.model_info(name)
            files = [file.rfilename for file in there.siblings or []]
        except RepositoryNotFoundError:
            there = None
    owner, owners = name.partition("/")[0], [user["name"], *(each["name"] for each in user.get("orgs", []))]
    if owner not in owners:
        raise ModelError(
            f"push {name}: this token is of {user['name']}, who may write to {first_few(owners)} ({LOG_IN})"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ModelError(f"push {name}: this token may only read: take one with write access ({LOG_IN})")
    if there and private and not there.private:
        raise ModelError(f"push {name}: it exists and is public: make it private on the hub, or choose another name")
    foreign = [file for file in files if file not in STARTED]
    if foreign and not any(Path(file).name == SPEC_FILE for file in foreign):
        raise ModelError(
            f"push {name}: it has files that nev has not written ({first_few(foreign)}): choose another name"
        )


def push(location: str, name: str, private: bool) -> str:
    """Upload an exported folder, and make the repository where there is none. Returns the address of the commit.

    location: a folder, or a prefix on S3. name: OWNER/NAME. private: of a new repository.
    Raises ModelError where the hub refuses; the exported folder stays.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    failed = f"{location} is written, but it cannot be pushed to {name}"
    hub = HfApi()
    with local_copy(location) as folder, hub_errors_as(failed, name):
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        hub.create_repo(name, private=private or None, exist_ok=True)
        old = [file for file in hub.list_repo_files(name) if file not in files and file not in UNTOUCHED]
        commit = hub.create_commit(
            name,
            [
                *(CommitOperationAdd(path, str(file)) for path, file in files.items()),
                *(CommitOperationDelete(path) for path in old),
            ],
            commit_message="nev export",
        )
    return str(commit.commit_url)
