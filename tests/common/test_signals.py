"""SIGTERM: a first one asks, a second one ends, and the handler of before comes back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from nev.common.signals import Stopped, handle_sigterm


def test_the_first_sigterm_sets_the_event_and_the_second_one_ends() -> None:
    before, stop = signal.getsignal(signal.SIGTERM), threading.Event()
    with handle_sigterm(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(60)
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_an_event_the_first_sigterm_ends() -> None:
    with handle_sigterm(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with handle_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
