"""The faults that a run survives, by name: what is done to a running one. Each returns once the fault is over."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.contestants.processes import wait_for

from .disk import is_small
from .machines import DECODER, STARTING, TRAINER, Machines
from .runs import Run

Strike = Callable[[Machines, Run], None]
NOTICE_S = 60
COMES_BACK_S = 5.0


def worker_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to a training process, in the middle of a step."""
    wait_for(lambda: machines.processes(TRAINER), 60, "training processes")[-1].kill()


def starting_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to a training process and, when all are started again, to one that is not ready yet."""
    worker_killed(machines, run)
    restart_killed(machines, run)


def restart_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to a training process that Ray starts in place of another, before it is ready."""
    wait_for(lambda: machines.processes(STARTING), 60, "processes that start")[-1].kill()


def decoder_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to the process of a data task."""
    wait_for(lambda: machines.processes(DECODER), 60, "a data task")[0].kill()


def node_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to all of a node that trains, and after a while another node comes for it."""
    machines.kill(wait_for(lambda: machines.node_with(TRAINER), 60, "a node that trains"))
    time.sleep(COMES_BACK_S)
    machines.add()


def block_node_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to all of a node that decodes and holds blocks, and does not train."""
    machines.kill(wait_for(lambda: machines.node_with(DECODER, without=TRAINER), 60, "a node that only decodes"))
    machines.add()


def driver_killed(machines: Machines, run: Run) -> None:
    """SIGKILL to the driver of a submitted job, which is submitted again."""
    run.end()
    run.start()


def driver_stopped(machines: Machines, run: Run) -> None:
    """SIGTERM to the driver, as a job's manager sends it: the run keeps what it has, ends, and is submitted again."""
    stop_driver(run)
    run.start()


def stop_driver(run: Run) -> None:
    """SIGTERM to the driver, whose exit status is kept in `run.stopped`."""
    assert run.driver
    run.driver.terminate()
    run.stopped.append(run.driver.wait(120))


def disk_full(machines: Machines, run: Run) -> None:
    """No byte is left on the disk of the run when a checkpoint is due; later there is room again."""
    run.wait_for_step(1)  # a run that begins on a full disk is refused
    before, filler = len(run.said()), Path(run.folder).parent / "filler"
    if not is_small(filler.parent):
        raise RuntimeError(f"{filler.parent} is on a disk that others use, too")
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:  # it is full
        wait_for(lambda: "is tried again" in run.said()[before:] or not run.alive(), 60, "a checkpoint refused")
    finally:
        filler.unlink()


def spot_notice(machines: Machines, run: Run) -> None:
    """A notice that a node that trains goes in a minute, which it does once nothing trains there any more."""
    node = wait_for(lambda: machines.node_with(TRAINER), 60, "a node that trains")
    training = machines.processes(TRAINER, node)
    machines.drain(node, NOTICE_S)
    wait_for(
        lambda: not (run.alive() and any(process.is_running() for process in training)),
        NOTICE_S,
        "the node without training",
    )
    machines.kill(node)
    machines.add()


def rank_stopped(machines: Machines, run: Run) -> None:
    """SIGSTOP to a training process: the others wait for it in a collective until workers.timeout_s."""
    stopped = wait_for(lambda: machines.processes(TRAINER), 60, "training processes")[-1]
    stopped.send_signal(signal.SIGSTOP)
    wait_for(lambda: not stopped.is_running() or not run.alive(), 120, "the end of the stopped process")


FAULTS: dict[str, Strike] = {
    strike.__name__: strike
    for strike in (
        worker_killed,
        starting_killed,
        decoder_killed,
        node_killed,
        block_node_killed,
        driver_killed,
        driver_stopped,
        spot_notice,
        rank_stopped,
        disk_full,
    )
}
