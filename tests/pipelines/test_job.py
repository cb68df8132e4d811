"""The way to a cluster, on one machine: a head with its job server, and jobs submitted to it over HTTP with a token.

The head is a cluster of its own: other ports and another folder than the Ray of the test session, and a token of its own.
"""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks.contestants.head import BIN, Head, job_head
from nev.runs.manifest import latest_checkpoint, verify
from nev.runs.metrics_log import load_mlflow_run_id

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

REPO = Path(__file__).parents[2]
JOB_S = 500  # a hang becomes an error; no promise of speed


class JobServer(Head):
    """A running head, and what a user does with it."""

    def submit(
        self, name: str, *command: str, env: dict[str, str] | None = None, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir .` from the repository's root, to the end of the job."""
        sent = json.dumps({"env_vars": {"SENT_ALONG": "yes", **(variables or {})}})
        submit = ["submit", "--submission-id", name, "--working-dir", ".", "--runtime-env-json", sent]
        return self.job(*submit, "--", *command, env=env)

    def job(self, action: str, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job ACTION`, from the repository's root."""
        whole = [str(BIN / "ray"), "job", action, "--address", self.address, *options]
        return subprocess.run(whole, cwd=REPO, env=env or self.env, capture_output=True, text=True, timeout=JOB_S)

    def log(self, name: str) -> str:
        """What the job itself printed, without the words of the submitting client; nothing before the job has begun."""
        file = self.folder / "session_latest" / "logs" / f"job-driver-{name}.log"
        return file.read_text() if file.exists() else ""


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_head() as head:
        yield JobServer(head.address, head.folder, head.env)


# What the job sees: its files, their size, and in the job and in a task of it: where `nev` comes from, and a variable.
PROBE = """
import os, pathlib, ray, nev, nev.cluster.session
nev.cluster.session.connect()
def where():
    import nev
    return pathlib.Path(nev.__file__).parents[1], os.environ.get("SENT_ALONG"), os.environ.get("TQDM_DISABLE")
files = [path for path in pathlib.Path().rglob("*") if path.is_file()]
print("probe: top", *sorted({path.parts[0] for path in files}))
print("probe: bytes", sum(path.stat().st_size for path in files))
print("probe: here", os.getcwd())
print("probe: job", *where())
print("probe: task", *ray.get(ray.remote(where).remote()))
"""


def check_uploaded(server: JobServer, log: str) -> None:
    """A job runs the uploaded code, and so do its tasks."""
    seen = dict(line.split(" ", 2)[1:] for line in log.splitlines() if line.startswith("probe: "))
    top = set(seen["top"].split())
    assert {"nev", "pipelines", "configs"} <= top
    assert not top & {".git", ".venv", "data", "runs", "tests", "docs", "notebooks"}
    assert int(seen["bytes"]) < 5 * 2**20
    assert Path(seen["here"]).is_relative_to(server.folder)
    assert seen["job"] == seen["task"] == f"{seen['here']} yes 2", (
        "a variable that nev sets itself has the user's value"
    )


def test_no_token_no_job(server: JobServer) -> None:
    env = {name: value for name, value in server.env.items() if name != "RAY_AUTH_TOKEN_PATH"}
    done = server.submit("stranger", "true", env=env | {"RAY_AUTH_MODE": "disabled"})
    assert done.returncode != 0
    assert "Unauthorized" in done.stdout + done.stderr
    other = server.folder / "other"
    other.write_text(secrets.token_hex(32))
    done = server.submit("forger", "true", env=env | {"RAY_AUTH_TOKEN_PATH": str(other)})
    assert done.returncode != 0
    assert "token is invalid" in done.stdout + done.stderr


def make_command(pictures: Path, output: Path, steps: int) -> str:
    """The command that trains so many steps with a constant rate, so that a later command may train more or fewer."""
    changes = {
        "name": "job",
        "output": output,
        "data.train": pictures / "train",
        "data.val": pictures / "val",
        "data.image_size": 32,
        "vision.trunk_args": "{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
        "train.steps": steps,
        "train.log_every": 2,
        "optim.schedule": "constant",
        "eval.zero_shot.classes": pictures / "classes.txt",
        "workers.count": 1,
    }
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return shlex.join(["python", "pipelines/train.py", "--config", "configs/quickstart.yaml", *options])


def wait_for_log(server: JobServer, name: str, text: str) -> None:
    deadline = time.monotonic() + JOB_S
    while text not in server.log(name):
        if time.monotonic() > deadline:
            pytest.fail(f"{text!r} is not in the log of the job:\n{server.log(name)}")
        time.sleep(0.2)


def test_a_stopped_job_continues_with_the_next_and_ends(server: JobServer, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    run = str(output / "job")
    command = make_command(pictures, output, 100_000)
    stopping = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    sent = json.dumps({"env_vars": stopping})
    begun = server.job("submit", "--no-wait", "--submission-id", "stopped", "--working-dir", ".", "--runtime-env-json", sent,
                       "--", "bash", "-c", f"exec {command}")  # fmt: skip
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_for_log(server, "stopped", "step 2/100000")
    stopped = server.job("stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = printed_by_nev(server.log("stopped"))
    assert "stopped by SIGTERM (exit status 143). The same command continues" in log.splitlines()[-1]
    assert "kills this job" not in log
    saved = latest_checkpoint(run)
    assert saved is not None
    step = verify(saved)["step"]
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    mlflow_run = load_mlflow_run_id(run)
    assert client.get_run(mlflow_run).info.status == "KILLED"

    probe, command = shlex.quote(PROBE), make_command(pictures, output, step + 4)
    done = server.submit("train", "bash", "-c", f"python -c {probe} && {command}", variables={"TQDM_DISABLE": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    check_uploaded(server, server.log("train"))

    newest = latest_checkpoint(run)
    assert newest is not None
    manifest = verify(newest)
    assert manifest["step"] == step + 4
    assert "zero_shot/top1" in manifest["metrics"]
    assert (load_mlflow_run_id(run), client.get_run(mlflow_run).info.status) == (mlflow_run, "FINISHED")
    log = printed_by_nev(server.log("train"))
    assert f"steps {step:,} to {step + 4:,}" in log
    assert "`ray job stop` kills this job 3 s after its SIGTERM" in log
    assert "top1" in log
    assert newest in log
    for mark in (" INFO ", "WARNING", "Warning", "(pid=", "(RayTrainWorker", "(TrainController", "Traceback"):
        assert mark not in log, f"{mark!r} in the log of the job:\n{log}"


def printed_by_nev(log: str) -> str:
    """The log of a job without the two lines that the job server puts before it."""
    before, found, after = log.partition("Running entrypoint for job ")
    assert found
    assert len(before.splitlines()) <= 1
    return after.partition("\n")[2]
