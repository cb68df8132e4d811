"""On a worker node: ends the machine where the cluster's head has not answered for a while. Started by `agent.sh`.

A head that is lost ends no worker, and a worker without a head goes on costing money.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import time


def answers(host: str, port: int) -> bool:
    """Whether the head takes connections."""
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def wait_for_silence(host: str, port: int, minutes: float, every: float) -> None:
    """Return once the head has not answered for `minutes` minutes. every: seconds between two tries."""
    last = time.monotonic()
    while time.monotonic() - last < 60 * minutes:
        if answers(host, port):
            last = time.monotonic()
        time.sleep(every)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", required=True, help="ADDRESS:PORT of the head's GCS")
    parser.add_argument("--minutes", type=float, default=15, help="of silence")
    parser.add_argument("--every", type=float, default=30, help="seconds between two tries")
    parser.add_argument("--command", nargs="+", default=["sudo", "shutdown", "-h", "now"], help="what ends the machine")
    arguments = parser.parse_args()
    host, _, port = arguments.head.rpartition(":")
    wait_for_silence(host, int(port), arguments.minutes, arguments.every)
    print(f"no head at {arguments.head} for {arguments.minutes:g} minutes: this machine ends")
    subprocess.run(arguments.command, check=True)
