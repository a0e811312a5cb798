"""On what something was measured."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import torchgrow
from torchgrow.lab import processes
from torchgrow.lab.devices import described


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, cores, threads, CPU, device and commit, as far as they can be found out."""
    packages = ("torch", "torchvision", "numpy", "safetensors", "torchgrow")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.size(),
        **({"device": described(device)} if device is not None and device.type != "cpu" else {}),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor()


def _commit() -> str | None:
    """The commit torchgrow runs from, with ``+changes`` if files differ; None if not from a checkout."""
    package = Path(torchgrow.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository; that one's commit says nothing.
        if Path(git("rev-parse", "--show-toplevel")) / "src" / "torchgrow" != package:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
