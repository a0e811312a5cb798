"""What it costs to begin: `torchgrow --help`, a mistyped command, and `import torchgrow` beside `import torch`.

    python benchmarks/startup.py [--repeats 9] [--again]

CPU seconds (user and system) of fresh processes, in turns; medians. Lines of results/startup.jsonl. Exit status 1 if
the command line takes more than 1.5 s, or the import more than that of torch and 0.15 s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from step_overhead import interval

from torchgrow.lab.environment import environment

RESULTS = Path(__file__).parent.parent / "results" / "startup.jsonl"
CASES = {
    "import torch": ["-c", "import torch"],
    "import torchgrow, all of it": ["-c", "import torchgrow; torchgrow.Grower"],
    "torchgrow --help": ["-m", "torchgrow", "--help"],
    "torchgrow run --help": ["-m", "torchgrow", "run", "--help"],
    "torchgrow --version": ["-m", "torchgrow", "--version"],
    "torchgrow rnu (mistyped)": ["-m", "torchgrow", "rnu"],
}
COMMANDS, IMPORT = 1.5, 0.15
"""Most CPU seconds: of a command that trains nothing; of the import beyond torch's."""


def cpu_seconds(arguments: list[str], cache: str) -> float:
    """User and system time of one Python process that finds its bytecode, as installed packages do."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    command = [sys.executable, *arguments]
    subprocess.run(command, capture_output=True, check=False, env={**own, "PYTHONPYCACHEPREFIX": cache})
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--again", action="store_true", help="measure although there are rows")
    arguments = parser.parse_args()
    console = Console()
    if RESULTS.exists() and not arguments.again:
        console.print(f"{RESULTS.name} is there already; --again measures anew")
        return 0
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as cache:
        for case in CASES.values():
            cpu_seconds(case, cache)  # writes bytecode, and fills the disk's cache
        for _ in track(range(arguments.repeats), "repeats"):
            for name, case in CASES.items():
                seconds[name].append(cpu_seconds(case, cache))
    torch = statistics.median(seconds["import torch"])
    rows: list[dict[str, Any]] = []
    for name, found in seconds.items():
        most = torch + IMPORT if name.startswith("import torchgrow") else COMMANDS
        ratios = [a / b for a, b in zip(found, seconds["import torch"], strict=True)]
        low, high = interval(ratios)
        rows.append(
            {
                "case": name,
                "cpu_seconds": statistics.median(found),
                "most": None if name == "import torch" else most,
                "ratio": statistics.median(ratios),
                "low": low,
                "high": high,
                "repeats": arguments.repeats,
                "environment": environment(),
            }
        )
        console.print(f"{name}: {rows[-1]['cpu_seconds']:.2f} s of CPU")
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    slow = [row["case"] for row in rows if row["most"] is not None and row["cpu_seconds"] > row["most"]]
    if slow:
        console.print(f"too slow: {', '.join(slow)}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
