"""On a node of AWS: turns a notice that the instance will be taken away into `ray drain-node`. Ray's AWS provider does not.

A drained node gets no new task, its decoding tasks end, and a run that trains there writes a checkpoint (docs/faults.md). Started
by `agent.sh`. Notices: a spot interruption (two minutes before), a rebalance recommendation (spot alone, at any time before), and
a scheduled event of the machine (days before: heeded in its last ten minutes).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPException
from typing import NamedTuple

METADATA = "http://169.254.169.254"
TOKEN_S = 21600
EVENT_S = 600  # a scheduled event that is further away is not heeded yet
REBALANCE_S = 600  # a rebalance recommendation names no time
DRAIN_S = 20  # for the answer of Ray
SPARE_S = 5  # the instance may go a little early
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Notice(NamedTuple):
    """That the instance will be taken away.

    reason: text for Ray.
    seconds: time that is left.
    """

    reason: str
    seconds: float


class Metadata:
    """The instance's metadata service, version 2, at the URL `base`."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._token = ""

    def read(self, path: str) -> str | None:
        """The text at `path` of the instance's metadata; None where there is none. OSError where the service is away."""
        for _ in range(2):
            self._token = self._token or self._request(
                "PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": TOKEN_S}
            )
            try:
                return self._request("GET", f"meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                self._token = ""  # expired
        raise OSError("the metadata service takes no token")

    def _request(self, method: str, path: str, headers: dict[str, object]) -> str:
        request = urllib.request.Request(
            f"{self._base}/latest/{path}", method=method, headers={name: str(value) for name, value in headers.items()}
        )
        with OPENER.open(request, timeout=2) as reply:
            text: str = reply.read().decode()
            return text


def find_notice(metadata: Metadata, now: datetime) -> Notice | None:
    """The most urgent notice; None where nothing is announced."""
    if text := metadata.read("spot/instance-action"):
        action = json.loads(text)
        return Notice(f"spot interruption: {action['action']}", (_spot_time(action["time"]) - now).total_seconds())
    if text := metadata.read("events/maintenance/scheduled"):
        events = [event for event in json.loads(text) if event["State"] == "active"]
        coming = [Notice(event["Code"], (_event_time(event["NotBefore"]) - now).total_seconds()) for event in events]
        if coming and (first := min(coming, key=lambda notice: notice.seconds)).seconds <= EVENT_S:
            return first
    if metadata.read("events/recommendations/rebalance"):
        return Notice("rebalance recommendation", REBALANCE_S)
    return None


def _spot_time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _event_time(text: str) -> datetime:
    return datetime.strptime(text, "%d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)


def drain(notice: Notice) -> bool:
    """Tell Ray that this node goes. Returns whether Ray took it."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.reason]
    command += ["--deadline-remaining-seconds", str(max(1, math.floor(notice.seconds - SPARE_S)))]
    try:
        ended = subprocess.run(command, check=False, timeout=DRAIN_S)
    except subprocess.TimeoutExpired:
        print(f"ray drain-node: no answer in {DRAIN_S} s")
        return False
    return ended.returncode == 0


def watch(metadata: Metadata, every: float) -> None:
    """Look for a notice every `every` seconds, and return once Ray knows of one."""
    while True:
        try:
            notice = find_notice(metadata, datetime.now(UTC))
        except (OSError, HTTPException, ValueError, KeyError) as error:
            print(f"the metadata service: {error}")
            notice = None
        if notice:
            print(f"{notice.reason}, in {notice.seconds:.0f} s")
            if drain(notice):
                return
        time.sleep(every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metadata", default=METADATA, help="URL of the metadata service")
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks")
    arguments = parser.parse_args()
    watch(Metadata(arguments.metadata), arguments.every)
