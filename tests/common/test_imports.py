"""An import that is interrupted comes to its end all the same."""

from __future__ import annotations

import subprocess
import sys

from helpers.processes import run_python

SCRIPT = """
import _thread, sys, threading, time
from nev.common.imports import import_uninterrupted

threading.Timer(0.3, _thread.interrupt_main).start()
try:
    import_uninterrupted("torch")
    time.sleep(60)
except KeyboardInterrupt:
    pass
import torch
print(torch.arange(3).sum().item())
"""


def test_torch_is_there_after_an_interrupt() -> None:
    """With `import torch` in the place of `import_uninterrupted` it is not: torch refuses to be imported again."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr


def test_an_action_waits_for_an_import() -> None:
    code = """
from nev.common.imports import when_imported
calls = []
when_imported("wave", lambda: calls.append(sys.modules["wave"].WAVE_FORMAT_PCM))
when_imported("colorsys", lambda: calls.append("colorsys"))
import importlib.util, json
assert importlib.util.find_spec("wave").name == "wave"
assert calls == []
import wave, wave
assert calls == [1], calls
import inspect
assert "class Wave_read" in inspect.getsource(wave)
when_imported("wave", lambda: calls.append("now"))
assert calls == [1, "now"]
"""
    assert run_python(code) == ""
