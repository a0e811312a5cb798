"""Random networks against a literal oracle: is every space exact, and does it hold as many units as it should?

    OMP_NUM_THREADS=1 python benchmarks/random_networks.py [--count 2000]

Each seed makes a network (tests/drawn.py). It is traced and proven; two random subsets are cut out of copies, and their
outputs compared with copies in which every position of every absent unit is zero: float64, random weights and
statistics. How many units can go is worked out beside, by books on the channels. Every chunk of 50 seeds is a line of
results/random-networks.jsonl; chunks that are there already are not run again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from torchgrow import TorchgrowError, trace
from torchgrow.lab.environment import environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import drawn  # noqa: E402

RESULTS = ROOT / "results" / "random-networks.jsonl"
CHUNK = 50
TOLERANCE = 1e-9


def one(seed: int) -> dict[str, Any]:
    """The verdict on a seed: exact, wrong or refused; and its counts."""
    blocks, head = drawn.program(seed)
    model, x = drawn.build(blocks, head, seed).double(), drawn.example(seed).double()
    try:
        space = trace(model, x)
    except TorchgrowError as error:
        return {"seed": seed, "verdict": "refused", "reason": str(error)}
    worst = max(drawn.error(model, space, share, seed, x) for share in (0.3, 0.6))
    return {
        "seed": seed,
        "verdict": "exact" if worst <= TOLERANCE else "wrong",
        "error": worst,
        "units": drawn.found(space),
        "expected": model.expected,
        "by_proof": [str(f) for f in space.frozen if f.op == "proof" and f.reason != "is the only unit of its group"],
    }


def main() -> None:
    """Run the chunks that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    surroundings = environment()
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    done = {json.loads(line)["first"] for line in arguments.results.read_text().splitlines()}
    chunks = [first for first in range(0, arguments.count, CHUNK) if first not in done]
    for first in track(chunks, "random networks", console=Console(stderr=True)):
        rows = [one(seed) for seed in range(first, first + CHUNK)]
        exact = [row for row in rows if row["verdict"] == "exact"]
        line = {
            "first": first,
            "networks": CHUNK,
            "exact": len(exact),
            "worst_error": max(row["error"] for row in exact),
            "as_many_units": sum(row["units"] == row["expected"] for row in exact),
            "units": sum(row["units"] for row in exact),
            "units_expected": sum(row["expected"] for row in exact),
            "not_exact": [row for row in rows if row["verdict"] != "exact"],
            "other_counts": [row for row in exact if row["units"] != row["expected"]],
            "environment": surroundings,
        }
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
