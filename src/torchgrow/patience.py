"""Names of files and folders where something else may have them open for a moment."""

from __future__ import annotations

import sys
import time
from pathlib import Path

WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between two attempts on Windows."""


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name, in the place of a file of that name.

    On Windows nothing that is open takes another name, and scanners and indexers open what was just written: there it
    is tried again for a while.

    Raises:
        OSError: it keeps its name.
    """
    for seconds in WAITS if sys.platform == "win32" else ():
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    source.replace(target)
