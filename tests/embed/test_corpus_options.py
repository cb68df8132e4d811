"""`nev embed-images --model`: options that do not go together, and outputs that are not those of this command."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.parts import Opened, job_for, run, write_tar
from typer.testing import CliRunner

from nev.commands.embed_images import check_options
from nev.commands.main import app
from nev.config.base import ConfigError
from nev.data.vectors import list_vector_files
from nev.embed.output import find_finished, prune_stale
from nev.storage.files import list_files
from nev.storage.reading import DataError


def test_an_output_of_another_kind_is_refused(opened: Opened, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "tars")
    output = str(tmp_path / "out")
    job = job_for(opened, source, tmp_path / "out")
    record = run(source, job)
    stamp = source.parts[0].stamp
    assert find_finished(output, job.spec, job.settings) == {stamp: record}
    other = job.spec.model_copy(update={"fingerprint": "f" * 64, "model": "other"})
    with pytest.raises(
        ConfigError, match=r"\(model small there, other here, fingerprint \w{20}\.\.\. there, f{20}\.\.\. here\)"
    ):
        find_finished(output, other, job.settings)
    changed = job_for(opened, source, tmp_path / "out", thumbnail=32, precision="int8")
    with pytest.raises(ConfigError, match="precision float32 there, int8 here, thumbnail 0 there, 32 here"):
        find_finished(output, changed.spec, changed.settings)

    # A damaged file is made again; a stranger's is not ours to judge.
    file = Path(list_vector_files(output)[0])
    file.write_bytes(file.read_bytes()[:-10])
    assert find_finished(output, job.spec, job.settings) == {}
    pq.write_table(pa.table({"uid": ["x"]}), file)
    with pytest.raises(DataError, match="no vector file of nev"):
        find_finished(output, job.spec, job.settings)


def test_files_of_changed_input_are_deleted_only_when_it_is_said(opened: Opened, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "tars", **{"bad.jpg": b"x"})
    job = job_for(opened, source, tmp_path / "out")
    run(source, job)
    output, stamp = str(tmp_path / "out"), source.parts[0].stamp
    with pytest.raises(ConfigError, match=rf"1 vector files are of input that has changed.*part-{stamp}.*--prune"):
        prune_stale(output, [stamp], prune=False)
    assert prune_stale(output, [], prune=False) == 0
    assert prune_stale(output, [stamp], prune=True) == 1
    assert list_files(output) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--gpus"}, "give --model for vectors of any pictures, or --config"),
        ({"--model", "--config"}, "give --model for vectors of any pictures, or --config"),
        ({"--config", "--input", "--thumbnails"}, "--config has no use for --input, --thumbnails"),
        ({"--model", "--set", "--input", "--output"}, "--model has no use for --set"),
        ({"--model", "--input"}, "--model needs --output, too"),
    ],
)
def test_each_mode_has_its_own_options(given: set[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(given)
    check_options({"--config", "--set", "--gpus"})
    check_options({"--model", "--input", "--output", "--gpus", "--width"})


def test_what_cannot_be_is_said_before_a_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    args = ["embed-images", "--model", str(tmp_path / "absent"), "--input", str(tmp_path / "in"), "--output"]
    for output, message in (
        (str(tmp_path / "in/out"), "lies in the input"),
        ("s3://bucket", "give a folder in the bucket: s3://bucket/NAME"),
        ("vectors.parquet", "give the name of a folder"),
    ):
        done = CliRunner().invoke(app, [*args, output])
        assert done.exit_code == 2
        assert message in done.stderr.replace("\n", " ")


def test_a_wider_vector_than_the_model_s_is_refused(opened: Opened, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "tars")
    with pytest.raises(ConfigError, match="--width 49: the model's vectors have 48 numbers"):
        job_for(opened, source, tmp_path / "out", width=49)
