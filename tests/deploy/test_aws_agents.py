"""The agents of deploy/aws: a stand-in of the instance's metadata service, and a `ray` that writes down its calls."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import fsspec
import pytest
import yaml
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    FailedInstanceRequest,
    GetClusterStatusReply,
    NodeState,
    PendingInstance,
)
from ray.core.generated.autoscaler_pb2 import NodeStatus as Status

FOLDER = Path(__file__).parents[2] / "deploy" / "aws"


def load_agent(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class MetadataServer(ThreadingHTTPServer):
    """Version 2 of the metadata service: a PUT gives a token, a GET needs the token; a path without text is 404."""

    texts: dict[str, str]
    tokens: int
    refuse_first: bool


class Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        self.server.tokens += 1
        self._answer(200, f"token-{self.server.tokens}")

    def do_GET(self) -> None:
        expired = self.server.refuse_first and self.server.tokens == 1
        if expired or self.headers["X-aws-ec2-metadata-token"] != f"token-{self.server.tokens}":
            self._answer(401, "")
            return
        text = self.server.texts.get(self.path.removeprefix("/latest/meta-data/"))
        self._answer(200 if text else 404, text or "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def metadata() -> Iterator[MetadataServer]:
    server = MetadataServer(("127.0.0.1", 0), Handler)
    server.texts, server.tokens, server.refuse_first = {}, 0, False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def ray_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ray` that refuses its first call, and takes the second; the file that it writes its calls to."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "ray"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest "$(wc -l < {calls})" -gt 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # never asked for the metadata
    return calls


def url(server: MetadataServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def run_agent(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / f"{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_a_spot_notice_drains_the_node_until_ray_has_taken_it(metadata: MetadataServer, ray_calls: Path) -> None:
    metadata.refuse_first = True  # the token has expired
    action = {"action": "terminate", "time": f"{in_seconds(120):%Y-%m-%dT%H:%M:%SZ}"}
    metadata.texts["spot/instance-action"] = json.dumps(action)
    ended = run_agent("spot_notice", "--metadata", url(metadata), "--every", "0.05")
    assert ended.returncode == 0, ended.stderr
    calls = ray_calls.read_text().splitlines()
    assert len(calls) == 2, "Ray refused the first"
    start = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot interruption: terminate "
    assert calls[0].startswith(f"{start}--deadline-remaining-seconds ")
    assert 108 <= int(calls[0].rpartition(" ")[2]) <= 115
    assert metadata.tokens == 2, "the token is kept"


def test_the_command_is_ray_s_own() -> None:
    from ray.scripts.scripts import drain_node

    known = {name for option in drain_node.params for name in option.opts}
    assert (
        set(re.findall(r'"(--[a-z-]+)"', (FOLDER / "spot_notice.py").read_text())) - {"--metadata", "--every"} <= known
    )
    (reasons,) = [option.type.choices for option in drain_node.params if option.name == "reason"]
    assert "DRAIN_NODE_REASON_PREEMPTION" in reasons


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("spot/instance-action", '{"action": "stop", "time": "2026-11-30T12:01:30Z"}', ("spot interruption: stop", 90)),
        (
            "events/recommendations/rebalance",
            '{"noticeTime": "2026-11-30T11:59:00Z"}',
            ("rebalance recommendation", 600),
        ),
        (
            "events/maintenance/scheduled",
            '[{"Code": "instance-stop", "State": "completed", "NotBefore": "30 Nov 2026 12:00:10 GMT"},'
            ' {"Code": "system-reboot", "State": "active", "NotBefore": "30 Nov 2026 12:05:00 GMT"}]',
            ("system-reboot", 300),
        ),
        (
            "events/maintenance/scheduled",
            '[{"Code": "instance-retirement", "State": "active", "NotBefore": "14 Dec 2026 12:00:00 GMT"}]',
            None,
        ),
        ("events/maintenance/scheduled", "[]", None),
        ("instance-id", "i-1", None),
    ],
)
def test_notices(metadata: MetadataServer, path: str, text: str, expected: tuple[str, float] | None) -> None:
    agent = load_agent("spot_notice")
    metadata.texts[path] = text
    now = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
    assert agent.find_notice(agent.Metadata(url(metadata)), now) == expected


def test_an_interruption_comes_before_a_recommendation(metadata: MetadataServer) -> None:
    agent = load_agent("spot_notice")
    metadata.texts["events/recommendations/rebalance"] = "{}"
    metadata.texts["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-30T12:02:00Z"}'
    now = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
    assert agent.find_notice(agent.Metadata(url(metadata)), now).seconds == 120


def test_a_node_without_a_head_ends_and_a_node_with_one_does_not(tmp_path: Path) -> None:
    agent = load_agent("end_orphan")
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        watcher = threading.Thread(target=agent.wait_for_silence, args=("127.0.0.1", port, 0.002, 0.01), daemon=True)
        watcher.start()
        watcher.join(0.5)
        assert watcher.is_alive()
    watcher.join(10)
    assert not watcher.is_alive()
    ended = run_agent(
        "end_orphan",
        *("--head", f"127.0.0.1:{port}", "--minutes", "0.001", "--every", "0.01"),
        *("--command", "touch", str(tmp_path / "ended")),
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "ended").exists()


def test_logs_are_copied_once_until_they_grow(tmp_path: Path) -> None:
    agent = load_agent("ship_logs")
    logs = tmp_path / "ray" / "session_2026-11-30" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("one\n")
    (logs / "empty.err").touch()
    (logs / "newest.out").symlink_to(logs / "raylet.out")
    (tmp_path / "ray" / "session_latest").symlink_to(logs.parent)
    own = tmp_path / "nev" / "log"
    own.mkdir(parents=True)
    (own / "spot_notice.log").write_text("two\n")
    filesystem, target = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    shipped: dict[Path, tuple[int, float]] = {}
    folders = agent.log_folders(tmp_path / "ray", own)
    agent.ship(folders, filesystem, target, shipped)
    assert sorted(filesystem.find(target)) == [
        f"{target}/nev/spot_notice.log",
        f"{target}/session_2026-11-30/raylet.out",
    ]
    filesystem.rm(target, recursive=True)
    (logs / "raylet.out").write_text("one\nthree\n")
    agent.ship(folders, filesystem, target, shipped)
    assert filesystem.cat(f"{target}/session_2026-11-30/raylet.out") == b"one\nthree\n"
    assert len(filesystem.find(target)) == 1, "the other file is as it was"


def reply(nodes: int = 0, pending: int = 0, dead: int = 0, failed_at: int = 0) -> GetClusterStatusReply:
    status = GetClusterStatusReply()
    states = [Status.IDLE] * nodes + [Status.DEAD] * dead
    status.cluster_resource_state.node_states.extend(
        NodeState(ray_node_type_name="spot", status=state) for state in states
    )
    status.autoscaling_state.pending_instances.extend([PendingInstance(ray_node_type_name="spot")] * pending)
    if failed_at:
        failed = [FailedInstanceRequest(ray_node_type_name=name, failed_ts=failed_at) for name in ("spot", "other")]
        status.autoscaling_state.failed_instance_requests.extend(failed)
    return status


def test_what_ray_says_of_nodes_and_refusals() -> None:
    agent = load_agent("fallback")
    refused = reply(nodes=2, pending=1, dead=4, failed_at=1000)
    assert agent.count_nodes(refused)["spot"] == 3
    assert agent.refused_at(refused, "spot") == 1000
    assert agent.refused_at(refused, "none") == 0


def test_a_refused_type_stays_at_its_nodes_for_ten_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader

    agent = load_agent("fallback")
    cluster = yaml.safe_load((FOLDER.parents[1] / "cluster.yaml").read_text())
    cluster["auth"].pop("ssh_private_key")
    types = cluster["available_node_types"]
    types["spot"] = types.pop("cpu_decoder")
    config = tmp_path / "ray_bootstrap_config.yaml"
    config.write_text(yaml.safe_dump(cluster))
    reader = FileConfigReader(str(config))
    limits, seen = None, []
    for nodes, now in ((2, 999), (2, 1001), (3, 1002), (3, 1599), (3, 1601), (20, 1602)):
        limits = agent.renew_limit(config, "spot", limits, reply(nodes=nodes, failed_at=1000 if now > 1000 else 0), now)
        reader.refresh_cached_autoscaling_config()
        read = reader.get_cached_autoscaling_config().get_node_type_configs()
        seen.append(read["spot"].max_worker_nodes)
        assert read["cpu_decoder_on_demand"].max_worker_nodes == 16
    assert seen == [16, 2, 3, 3, 16, 16]
    assert config.stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out.count("spot: at most") == 3, "no write without a change"


def test_a_limit_that_ray_up_has_brought_meanwhile_is_the_type_s_own(tmp_path: Path) -> None:
    agent = load_agent("fallback")
    config = tmp_path / "config.yaml"

    def limit() -> int:
        return int(yaml.safe_load(config.read_text())["available_node_types"]["spot"]["max_workers"])

    limits = None
    for brought, now, expected in ((16, 1001, 0), (None, 1002, 0), (32, 1003, 0), (None, 1700, 32)):
        if brought:
            config.write_text(yaml.safe_dump({"available_node_types": {"spot": {"max_workers": brought}}}))
        limits = agent.renew_limit(config, "spot", limits, reply(failed_at=1000), now)
        assert limit() == expected


def test_ray_itself_still_asks_for_the_refused_type() -> None:
    """Why fallback.py is there. Where this fails, Ray does it, and fallback.py may go."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    event = InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_FAILED, instance_type="spot")
    monitor.notify([event])
    assert monitor.get_recoverable_resource_availabilities() == {}
    event = InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_TIMEOUT, instance_type="spot")
    monitor.notify([event])
    assert monitor.get_recoverable_resource_availabilities() == {"spot": 0.0}


def test_an_agent_runs_once_in_the_background_and_its_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "nev" / "env" / "bin").mkdir(parents=True)
    (tmp_path / "nev" / "env" / "bin" / "python").symlink_to(sys.executable)
    scripts = tmp_path / "nev" / "aws"
    scripts.mkdir()
    (scripts / "agent.sh").write_bytes((FOLDER / "agent.sh").read_bytes())
    (scripts / "word.py").write_text(
        "import os, sys, time\nprint(sys.argv[1], os.environ['RAY_AUTH_MODE'], os.getpid())\ntime.sleep(60)\n"
    )
    command = ["bash", str(scripts / "agent.sh"), "word", "hello"]
    log = tmp_path / "nev" / "log" / "word.log"
    for _ in range(2):
        subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, check=True, timeout=10)
        wait_for_text(log)
    time.sleep(1)  # a second process would have written by now
    (line,) = log.read_text().splitlines()
    word, mode, process = line.split()
    assert (word, mode) == ("hello", "token")
    os.kill(int(process), 15)


def wait_for_text(file: Path) -> None:
    for _ in range(200):
        if file.exists() and file.read_text():
            return
        time.sleep(0.05)
    raise TimeoutError(file)


def test_an_image_with_the_locked_packages_installs_nothing(tmp_path: Path) -> None:
    env = tmp_path / "nev" / "env"
    env.mkdir(parents=True)
    (tmp_path / "nev" / "requirements.lock").write_text("a==1\n")
    subprocess.run(f"sha256sum {tmp_path}/nev/requirements.lock | cut -d ' ' -f 1 > {env}/lock", shell=True, check=True)
    run = ["bash", str(FOLDER / "install.sh")]
    variables = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    assert subprocess.run(run, env=variables, timeout=10, check=False).returncode == 0
    assert sorted(file.name for file in env.iterdir()) == ["lock"]
    programs = tmp_path / "nev" / "env" / "bin"
    programs.mkdir()
    for name in ("pip", "uv"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        (programs / name).chmod(0o755)
    (tmp_path / "nev" / "requirements.lock").write_text("a==2\n")
    for _ in range(2):
        subprocess.run(run, env=variables, timeout=10, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2, "a new lock is installed once"
    assert calls[1].endswith(f"--require-hashes -r {tmp_path}/nev/requirements.lock")
