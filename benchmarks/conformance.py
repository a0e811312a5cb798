"""What torchgrow finds in the models people use, and whether it is exact; beside Torch-Pruning on the same models.

    OMP_NUM_THREADS=1 python benchmarks/conformance.py [--sets plain transformers torchvision vision timm]

Needs `pip install '.[zoo]'`. Every model runs in a process of its own, with a time limit, and so does Torch-Pruning.
Verdicts: exact (two more random subsets after the proof, error at most 1e-9 in float64), frozen (nothing may go),
refused (with the reason), wrong, time-out, left out (too large to be proven here). Of Torch-Pruning it is noted only
whether a step that asks for 30 % runs and the forward works afterwards. Each is a line of results/conformance.jsonl;
models that are there already are not run again.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from zoo_models import LARGEST, SETS

from torchgrow import TorchgrowError
from torchgrow.calling import call
from torchgrow.cost import CostModel
from torchgrow.lab.run import environment
from torchgrow.proof import TOLERANCE, Prover, prove
from torchgrow.replay import replay

RESULTS = Path(__file__).parent.parent / "results" / "conformance.jsonl"


def ours(model: nn.Module, example: Any) -> dict[str, Any]:
    """Trace, prove, and try two subsets that the proof has not seen."""
    start = time.perf_counter()
    try:
        space = replay(model, example)
        traced = time.perf_counter() - start
        space = prove(model, space, example)
        proven = time.perf_counter() - start - traced
    except TorchgrowError as error:
        return {"verdict": "refused", "reason": str(error)}
    costs = CostModel(space)
    full, least = int(costs.both(costs.sizes)[0]), int(costs.both(costs.smallest())[0])
    row = {
        "seconds_to_trace": traced,
        "seconds_to_prove": proven,
        "params": full,
        "removable": 1 - least / full,
        "units": int(space.removable.sum()),
        "groups": len(space.widths(space.everything())),
        "by_proof": [str(frozen) for frozen in space.frozen if frozen.op == "proof"],
    }
    if not row["units"]:
        return {"verdict": "frozen", "reason": "; ".join(map(str, space.frozen[:3])), **row}
    prover = Prover(model, space, example, seed=17)
    tried = [prover.error(prover.draw(fraction)) for fraction in (0.3, 0.6)]
    worst, reason = max(tried)
    return {"verdict": "exact" if worst <= TOLERANCE else "wrong", "max_error": worst, "reason": reason, **row}


def theirs(model: nn.Module, example: Any) -> dict[str, Any]:
    """Torch-Pruning: seconds to build its graph; does a step that asks for 30 % run, and the forward after it."""
    import torch_pruning as tp

    model = model.eval()
    inputs = example if not isinstance(example, tuple) else list(example)
    start = time.perf_counter()
    try:
        tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
        built = time.perf_counter() - start
    except Exception as error:
        return {"runs": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    try:
        heads = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        importance = tp.importance.MagnitudeImportance()
        pruner = tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=0.3, ignored_layers=heads)
        before = sum(p.numel() for p in model.parameters())
        pruner.step()
        call(model, example)
        after = sum(p.numel() for p in model.parameters())
    except Exception as error:
        return {
            "seconds_to_build": built,
            "runs": False,
            "error": f"{type(error).__name__}: {error}".splitlines()[0][:200],
        }
    return {"seconds_to_build": built, "runs": after < before, "params_left": after / before}


def one(side: str, set_name: str, name: str) -> dict[str, Any]:
    """The row of one model, or what it holds of Torch-Pruning."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, example = SETS[set_name]()[name]()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return {"verdict": "left out", "reason": f"more than {LARGEST:,} parameters"}
    return ours(model, example) if side == "ours" else theirs(model, example)


def apart(side: str, set_name: str, name: str, seconds: float) -> dict[str, Any] | str:
    """`one` in a process of its own; a text if that crashed or took longer than the limit."""
    command = [sys.executable, __file__, "--one", side, set_name, name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"time-out: more than {seconds:g} s"
    lines = ran.stdout.splitlines()
    if ran.returncode == 0 and lines:
        return json.loads(lines[-1])
    return (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1][:300]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one model")
    parser.add_argument("--their-seconds", type=float, default=60, help="that of Torch-Pruning; 0: leave it out")
    parser.add_argument("--inside", action="store_true", help="in this process, without limits: for many small models")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "SET", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        warnings.simplefilter("ignore")
        sys.stdout.write(json.dumps(one(*arguments.one)))
        return
    surroundings = environment()
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    done = {json.loads(line)["model"] for line in arguments.results.read_text().splitlines()}
    wanted = [(kind, name) for kind in arguments.sets for name in SETS[kind]()]
    wanted = [
        (kind, name) for kind, name in wanted if name not in done and (not arguments.models or name in arguments.models)
    ]
    for kind, name in track(wanted, "models", console=Console(stderr=True)):
        row = one("ours", kind, name) if arguments.inside else apart("ours", kind, name, arguments.seconds)
        if isinstance(row, str):
            row = {"verdict": "time-out" if row.startswith("time-out") else "crashed", "reason": row}
        if row["verdict"] != "left out" and arguments.their_seconds:
            other = (
                one("theirs", kind, name) if arguments.inside else apart("theirs", kind, name, arguments.their_seconds)
            )
            row["torch_pruning"] = {"runs": False, "error": other} if isinstance(other, str) else other
        with arguments.results.open("a") as file:
            file.write(json.dumps({"set": kind, "model": name, **row, "environment": surroundings}) + "\n")


if __name__ == "__main__":
    main()
