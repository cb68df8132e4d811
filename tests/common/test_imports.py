"""An import that is interrupted comes to its end all the same."""

from __future__ import annotations

import subprocess
import sys

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
