"""A location is a path or s3://: any other URL is refused by name, in every command and field, and makes no folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import rows_of, write_shard
from helpers.tars import tar_of
from typer.testing import CliRunner

from nev.commands.main import app
from nev.common.location import LocationError, check_location
from nev.config.base import ConfigError
from nev.config.file import load
from nev.storage.files import filesystem

WRONG = {
    "gs://bucket/x": "not gs:",
    "gcs://bucket/x": "not gcs:",
    "s3a://bucket/x": "write s3://bucket/x",
    "s3n://bucket/x": "write s3://bucket/x",
    "S3://bucket/x": "write s3://bucket/x",
    "s3:/bucket/x": "write s3://bucket/x",
    "s3:///x": "names no bucket",
    "hf://datasets/x": "not hf:",
    "abfs://container/x": "not abfs:",
    "az://container/x": "not az:",
    "hdfs://node/x": "not hdfs:",
    "https://host/x": "not https:",
    "file:///tmp/x": "write the path",
    "memory://x": "not memory:",
    "dbfs:/x": "not dbfs:",
}
PLAIN = ["x", "/tmp/x", "~/x", "./a:b/c", "a::b", "zip::x", "C:/x", "s3://bucket", "s3://bucket/a b"]
COMMANDS = {
    "prepare, input": ["prepare", "--source", "hf-parquet", "--input", "{}", "--output", "out"],
    "prepare, output": ["prepare", "--source", "hf-parquet", "--input", "shards", "--output", "{}"],
    "prepare, folders": ["prepare", "--source", "folder-captions", "--input", "{}", "--output", "out"],
    "prepare, metadata": [
        "prepare",
        "--source",
        "datacomp",
        "--input",
        "tars",
        "--metadata",
        "{}",
        "--output",
        "out",
    ],
    "embed-images, input": ["embed-images", "--model", "absent", "--input", "{}", "--output", "out"],
    "embed-images, output": ["embed-images", "--model", "absent", "--input", "shards", "--output", "{}"],
    "embed-images, model": ["embed-images", "--model", "{}", "--input", "shards", "--output", "out"],
    "filter, vectors": ["filter", "--vectors", "{}", "--output", "uids.parquet", "--top-share", "0.5"],
    "index": ["index", "--index", "{}", "--images", "vectors"],
    "export, checkpoint": ["export", "--checkpoint", "{}", "--format", "hf", "--output", "out"],
    "export, output": ["export", "--checkpoint", "absent", "--format", "hf", "--output", "{}"],
    "evaluate": ["evaluate", "--checkpoint", "{}"],
    "serve, model": ["serve", "--model", "{}"],
    "serve, index": ["serve", "--model", "absent", "--index", "{}"],
    "train": ["train", "--config", "quickstart", "--set", "data.train={}"],
    "train, validation": ["train", "--config", "quickstart", "--set", "data.val={}"],
    "train, output": ["train", "--config", "quickstart", "--set", "output={}"],
    "embed-text": ["embed-text", "--config", "quickstart", "--set", "data.train={}"],
    "capacity": ["capacity", "--config", "quickstart", "--set", "data.train={}"],
    "train, trunk": ["train", "--config", "quickstart", "--set", "vision.weights={}"],
    "train, text encoder": ["train", "--config", "quickstart", "--set", "text.encoder={}"],
    "demo": ["demo", "{}"],
    "demo, output": ["demo", "--output", "{}"],
    "quickstart": ["quickstart", "--set", "output={}"],
}


@pytest.mark.parametrize(("location", "message"), WRONG.items())
def test_other_urls_are_refused_by_name(location: str, message: str) -> None:
    with pytest.raises(LocationError, match=message):
        check_location(location)
    with pytest.raises(LocationError, match=message):
        filesystem(location)
    for field in ("data.train", "data.val", "output"):
        with pytest.raises(ConfigError, match=rf"{field}.*{message}"):
            load("quickstart", [f"{field}={location}"])


def test_paths_of_any_kind_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for location in PLAIN:
        assert check_location(location) == location
    for name in ("a::b", "zip::x", "a:b", "simplecache::c"):
        fs, path = filesystem(f"{name}/file")
        assert path == str(tmp_path / name / "file")
        fs.makedirs(str(tmp_path / name))
        fs.pipe_file(path, b"content")
        assert (tmp_path / name / "file").read_bytes() == b"content"


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_them_and_make_no_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "shards/0.parquet", rows_of(3), [3])
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "tars/0.tar", {"a.txt": "a"})
    before = sorted(path.name for path in tmp_path.iterdir())
    for location in ("gs://bucket/x", "s3a://bucket/x", "S3://bucket/x", "s3:/bucket/x"):
        shown = CliRunner().invoke(app, [argument.replace("{}", location) for argument in arguments])
        assert shown.exit_code == 1 or shown.exit_code == 2
        assert "Traceback" not in shown.output
        message = shown.output.replace("\n", " ")
        assert "s3://" in message
        assert location.split(":")[0] in message
        assert sorted(path.name for path in tmp_path.iterdir()) == before
