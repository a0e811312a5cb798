"""The results file of comparisons: JSON Lines, appended to without a loss when the process is killed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchgrow import TorchgrowError


class Rows:
    """The results file: whole lines only, one per finished job.

    Args:
        path: the file, made if it is not there.

    Raises:
        TorchgrowError: a whole line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that was cut short by a kill is none."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise TorchgrowError(f"{self.path}, line {number} is damaged: {error}; take it out") from error
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        with self.path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            whole = self.path.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)  # what a kill left of a line goes
            file.seek(whole)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
