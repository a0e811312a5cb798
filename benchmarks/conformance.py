"""What torchgrow finds in the models people use, and whether it is exact; beside its peers on the same models.

    OMP_NUM_THREADS=1 python benchmarks/conformance.py [--sets plain transformers torchvision vision timm written ...]

Needs `pip install '.[zoo]'`; the set "audio" an environment with torchaudio (its last torch is 2.9.1). Every model runs
in a process of its own, with a time limit, and so does each peer. Verdicts: exact (two more random subsets after the
proof, by an oracle that shares no code with it: relative error at most 1e-9 in float64, in training mode 1e-6), frozen
(nothing may go), refused (with the reason), wrong, time-out, left out (too large to be proven here). Peers are asked
for 30 % of every layer: does the step run, does the network run afterwards, and is it exact by the same oracle in
evaluation mode. Each model is a line of results/conformance.jsonl; those that are there already are not run again.
"""

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils._pytree import tree_map

from torchgrow import TorchgrowError, trace
from torchgrow.lab.environment import environment
from torchgrow.structure.cost import CostModel
from torchgrow.tracing.tracer import replay

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from peers import IN_TRAINING, PEERS, TOLERANCE, compare_cut, double, peer  # noqa: E402
from zoo_models import LARGEST, SETS  # noqa: E402

import drawn  # noqa: E402

RESULTS = ROOT / "results" / "conformance.jsonl"
OF_PEERS = 100_000_000
"""Parameters above which the peers are not asked."""


def ours(model: nn.Module, example: Any) -> dict[str, Any]:
    """Trace, prove, and try two subsets that the proof has not seen."""
    start = time.perf_counter()
    try:
        replay(model, example)
        traced = time.perf_counter() - start
        space = trace(model, example)
        proven = time.perf_counter() - start - 2 * traced
    except TorchgrowError as error:
        return {"verdict": "refused", "reason": str(error)}
    costs = CostModel(space)
    full, least = int(costs.both(costs.sizes)[0]), int(costs.both(costs.space.least)[0])
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
    model, example = model.double(), tree_map(double, example)
    try:
        tried = [compare_cut(model, example, space, drawn.without(space, share, 17)) for share in (0.3, 0.6)]
    except Exception as error:
        return {"verdict": "wrong", "reason": f"the compact network fails: {type(error).__name__}: {error}", **row}
    worst = max(errors["evaluation"] for errors in tried)
    training = max((errors["training"] for errors in tried), key=lambda error: (isinstance(error, str), error))
    exact = worst <= TOLERANCE and (isinstance(training, str) or training <= IN_TRAINING)
    return {"verdict": "exact" if exact else "wrong", "max_error": worst, "training": training, **row}


def one(side: str, set_name: str, name: str) -> dict[str, Any]:
    """The row of one model, or what it holds of a peer."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, example = SETS[set_name]()[name]()
    size = sum(p.numel() for p in model.parameters())
    if side != "ours":
        if size > OF_PEERS:
            return {"runs": False, "exact": False, "error": f"left out: more than {OF_PEERS:,} parameters"}
        return peer(side, model, example)
    if size > LARGEST:
        return {"verdict": "left out", "reason": f"more than {LARGEST:,} parameters"}
    return ours(model, example)


def packages() -> dict[str, str]:
    """Versions of the packages that the models and the peers come from, as far as they are there."""
    names = ("timm", "transformers", "ultralytics", "torchaudio", "torch-pruning", "torch-kirigami")
    return {name: version(name) for name in names if find_spec(name.replace("-", "_"))}


def apart(side: str, set_name: str, name: str, seconds: float) -> dict[str, Any] | str:
    """`one` in a process of its own; a text if that crashed or took longer than the limit."""
    context = multiprocessing.get_context("fork")  # the packages are imported once, here
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, side, set_name, name))
    process.start()
    sending.close()
    try:
        if not receiving.poll(seconds):
            return f"time-out: more than {seconds:g} s"
        found: dict[str, Any] | str = receiving.recv()
        return found
    except EOFError:
        process.join()
        return f"crashed: exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _send(sending: Connection, side: str, set_name: str, name: str) -> None:
    """In the process of its own: the row of `one`, or the error that ended it."""
    warnings.simplefilter("ignore")
    try:
        sending.send(one(side, set_name, name))
    except Exception as error:
        sending.send(f"{type(error).__name__}: {error}"[:300])


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one model")
    parser.add_argument("--their-seconds", type=float, default=60, help="that of each peer; 0: leave them out")
    parser.add_argument("--busy", action="store_true", help="note that other work ran beside, so seconds mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    surroundings = {**environment(), **packages(), "machine busy": arguments.busy}
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    done = {json.loads(line)["model"] for line in arguments.results.read_text().splitlines()}
    wanted = [(kind, name) for kind in arguments.sets for name in SETS[kind]()]
    wanted = [
        (kind, name) for kind, name in wanted if name not in done and (not arguments.models or name in arguments.models)
    ]
    for kind, name in track(wanted, "models", console=Console(stderr=True)):
        row = apart("ours", kind, name, arguments.seconds)
        if isinstance(row, str):
            row = {"verdict": "time-out" if row.startswith("time-out") else "crashed", "reason": row}
        for side in PEERS if row["verdict"] != "left out" and arguments.their_seconds else ():
            other = apart(side, kind, name, arguments.their_seconds)
            row[side] = {"runs": False, "exact": False, "error": other} if isinstance(other, str) else other
        with arguments.results.open("a") as file:
            file.write(json.dumps({"set": kind, "model": name, **row, "environment": surroundings}) + "\n")


if __name__ == "__main__":
    main()
