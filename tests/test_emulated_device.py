"""The laws of tests/devices on a device that is emulated: no GPU is needed, a C++ compiler is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = Path(__file__).parent / "devices"


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("ninja"), reason="no g++ or no ninja to build it with")
def test_the_laws_hold_on_another_device(tmp_path: Path) -> None:
    """In a process of its own, since PyTorch knows one such device for good. Of the zoo every twelfth model."""
    told = {"TORCHGROW_DEVICE": "emulated", "TORCHGROW_EVERY": "12", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    asked = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", str(DEVICES)]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, **told}, cwd=DEVICES.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
