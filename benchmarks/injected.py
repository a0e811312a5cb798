"""2,000 exceptions at random lines of torchgrow inside updates, endings and loads: all of it is made or nothing.

    OMP_NUM_THREADS=1 python benchmarks/injected.py [--count 112]

One and two optimizers, the paper's preset, followers, layers, a frame on the meta device (tests/injecting.py). Before
the action every run is forked; a trace function raises at one line of torchgrow's code, half of them drawn from all
lines, half from those of the exchange itself and the last ones. What is left must be bit for bit (weights, slots,
gradients, attributes, hooks, books) the state before the action or after it, and must go on to where the unbroken run
is some steps later; where it is the one before, the action is repeated. Every case and action is a line of
results/injected.jsonl; what is there already is not run again.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from torchgrow.lab.environment import environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from injecting import ACTIONS, CASES, draw, expected, verdict  # noqa: E402

RESULTS = ROOT / "results" / "injected.jsonl"


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=112, help="exceptions per case and action")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actions", nargs="*", default=ACTIONS[:3], help="construct, too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    done = {(row["case"], row["action"], row["seed"]) for row in rows}
    wanted = [(case, action, arguments.seed) for case in CASES for action in arguments.actions]
    for case, action, seed in track([w for w in wanted if w not in done], "cases", console=Console(stderr=True)):
        whole = expected(case, action)
        found = [verdict(whole, line) for line in draw(whole, arguments.count, seed)]
        row = {
            "case": case,
            "action": action,
            "seed": seed,
            "lines": len(whole.lines),
            "exceptions": len(found),
            "verdicts": Counter(one["verdict"].partition(":")[0] for one in found),
            "rooms": Counter(one["where"].partition(".")[0] for one in found),
            "bad": [one for one in found if one["verdict"].startswith("bad")],
            "environment": environment(),
        }
        rows.append(row)
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    verdicts: Counter[str] = Counter()
    for row in rows:
        verdicts.update(row["verdicts"])
    Console().print(f"{sum(row['exceptions'] for row in rows)} exceptions: {dict(verdicts)}", soft_wrap=True)
    bad = [one for row in rows for one in row["bad"]]
    if bad:
        Console().print(bad[:5], soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
