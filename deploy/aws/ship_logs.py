"""Copies a node's logs to a folder on S3, so that they outlive the node. Started by `agent.sh`.

Files go to TARGET/<name of the machine>/<session of Ray>/, the agents' own beside them. A file is copied again once it has grown.
"""

from __future__ import annotations

import argparse
import socket
import time
from pathlib import Path
from typing import Any

import fsspec


def ship(folders: list[Path], filesystem: Any, target: str, shipped: dict[Path, tuple[int, float]]) -> None:
    """Copy the files that are new or have changed.

    shipped: size and time of each file when it was copied; updated.
    """
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or file.is_symlink():
                continue
            facts = file.stat()
            state = (facts.st_size, facts.st_mtime)
            if facts.st_size and shipped.get(file) != state:
                filesystem.put_file(str(file), f"{target}/{folder.parent.name}/{file.relative_to(folder)}")
                shipped[file] = state


def log_folders(ray: Path, own: Path) -> list[Path]:
    """The folders of logs: of each session of Ray, and of the agents."""
    return [*sorted(folder for folder in ray.glob("session_2*/logs") if folder.is_dir()), own]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="s3://BUCKET/PREFIX")
    parser.add_argument("--ray", type=Path, default=Path("/tmp/ray"), help="Ray's temporary folder")
    parser.add_argument("--own", type=Path, default=Path.home() / "nev" / "log", help="folder of the agents' logs")
    parser.add_argument("--every", type=float, default=60, help="seconds between two copies")
    arguments = parser.parse_args()
    filesystem, root = fsspec.core.url_to_fs(
        arguments.target, **({"auto_mkdir": True} if "://" not in arguments.target else {})
    )
    shipped: dict[Path, tuple[int, float]] = {}
    while True:
        try:
            ship(log_folders(arguments.ray, arguments.own), filesystem, f"{root}/{socket.gethostname()}", shipped)
        except OSError as error:  # S3 is away, or a file has gone: the next round copies it
            print(f"not copied: {error}")
        time.sleep(arguments.every)
