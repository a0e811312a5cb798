"""Is growth the same in two commits, bit for bit? And the file that tests compare with.

    python benchmarks/trajectories.py compare OLD NEW  # two commits, on this machine; exit status 1 if they differ
    python benchmarks/trajectories.py record           # write tests/golden/trajectories.json anew: growth is to change

The runs are those of tests/trajectories.py as it is now, with the library of each commit.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from trajectories import CASES, GOLDEN, differences, run  # noqa: E402


def everything() -> dict[str, Any]:
    """All trajectories of the library that is imported."""
    warnings.simplefilter("ignore")
    return {name: run(name) for name in CASES}


def of_commit(commit: str) -> dict[str, Any]:
    """All trajectories of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        environment = {**os.environ, "PYTHONPATH": f"{folder}/src", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "print"]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{commit} could not run them:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: list[str]) -> int:
    """One of the commands above."""
    console = Console()
    if arguments == ["print"]:
        sys.stdout.write(json.dumps(everything()))
    elif arguments == ["record"]:
        found = {name: {key: v for key, v in one.items() if key != "bits"} for name, one in everything().items()}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(
            "{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(one)}" for n, one in found.items()) + "\n}\n"
        )
    elif arguments[:1] == ["compare"] and len(arguments) == 3:
        old, new = map(of_commit, arguments[1:])
        for name in CASES:
            apart = "rounding" if old[name] != new[name] else ""
            apart = ", ".join(differences(old[name], new[name])) or apart
            console.print(f"{name}: {'differs in ' + apart if apart else 'the same bits'}")
        same = sum(old[name] == new[name] for name in CASES)
        console.print(f"{same} of {len(CASES)} trajectories are the same bit for bit")
        return int(same < len(CASES))
    else:
        console.print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
