"""Random networks in training mode, and growing end to end on some: is any of it wrong?

    OMP_NUM_THREADS=1 python benchmarks/training_networks.py [--count 2000]

Each seed makes a network (tests/drawn_training.py) with paths of training alone, writes in place, sparse graphs and
outputs inside objects. It is traced and proven; two random subsets are cut out of copies and compared with copies in
which every position of every absent unit is zero: float64, in training and in evaluation mode, outputs, gradient of
the input and moved buffers. On three of every twenty seeds a `Grower` runs from seed to budget besides (`grown`).
Every chunk of 50 seeds is a line of results/training-networks.jsonl; chunks that are there already are not run again.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torchgrow
from torchgrow import Budget, BudgetError, Grower, StructureError, TorchgrowError
from torchgrow.lab.environment import environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import drawn  # noqa: E402
import drawn_training  # noqa: E402

RESULTS = ROOT / "results" / "training-networks.jsonl"
CHUNK, TOLERANCE = 50, 1e-9
UPDATES = 5
SHARES = (30, 50, 70, 90)
"""Budgets in % of the frame, tried in turn from a random one on, until one is within reach."""


def cut(seed: int) -> dict[str, Any]:
    """Trace, and two subsets that the proof has not seen."""
    model, x = drawn_training.build(drawn_training.program(seed), seed), drawn.example(seed).double()
    try:
        space = torchgrow.trace(model, x)
    except TorchgrowError as error:
        return {"verdict": "refused", "reason": str(error)}
    try:
        worst = max(drawn_training.error(model, space, share, seed, x) for share in (0.3, 0.6))
    except Exception as error:
        return {"verdict": "wrong", "reason": f"the compact network fails: {type(error).__name__}: {error}"}
    return {
        "verdict": "exact" if worst <= TOLERANCE else "wrong",
        "error": worst,
        "units": drawn.found(space),
        "expected": model.expected,
        "by_proof": [str(f) for f in space.frozen if f.op == "proof" and f.reason != "is the only unit of its group"],
    }


def optimizer(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW."""
    if seed % 3 == 0:
        return torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, weight_decay=1e-3)
    return (torch.optim.Adam, torch.optim.AdamW)[seed % 3 - 1](model.parameters(), 1e-3)


def make_grower(model: nn.Module, x: Tensor, seed: int) -> tuple[Grower, str, int]:
    """A grower, and the cost and share it is held to."""
    which = ("params", "flops")[seed // 3 % 2]
    for share in (*SHARES[seed % 2 :], SHARES[-1]):
        try:
            budget = Budget(**{which: f"{share}%"})
            return (
                Grower(model, optimizer(model, seed), example_inputs=x, budget=budget, updates=UPDATES, seed=seed),
                which,
                share,
            )
        except BudgetError as error:
            last = error
    raise last


def measured(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Parameters by `numel`, and FLOPs of one sample by torch's counter, in evaluation mode."""
    counter = FlopCounterMode(display=False)
    mode, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        drawn_training.tensors(model.eval()(x))
    torch.backends.mha.set_fastpath_enabled(fast)
    model.train(mode)
    return {"params": sum(p.numel() for p in model.parameters()), "flops": counter.get_total_flops() // len(x)}


def train(grower: Grower, x: Tensor) -> None:
    """Two steps in training mode; the loss has every output in it."""
    grower.model.train()
    for _ in range(2):
        found = drawn_training.tensors(grower.model(x + 0.1 * torch.randn_like(x)))
        loss = torch.stack([out.square().mean().log1p() for out in found]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(grower.model.parameters(), 1.0)
        grower.optimizer.step()
        grower.optimizer.zero_grad()


def grow(seed: int) -> dict[str, Any]:
    """Train and grow; what is wrong with the network that comes out, if anything."""
    program = drawn_training.program(seed)
    model, x = drawn_training.build(program, seed), drawn.example(seed).double()
    frame = measured(model, x)
    try:
        grower, which, share = make_grower(model, x, seed)
    except (BudgetError, StructureError) as error:
        return {"verdict": "nothing to grow", "reason": str(error)}
    except TorchgrowError as error:
        return {"verdict": "refused", "reason": str(error)}
    wrong: list[str] = []
    # torch counts no FLOPs of sparse products: a share of its count would be too little there
    whole = {"params": grower.frame_cost.params, "flops": grower.frame_cost.flops} if model.sparse else frame
    limit = whole[which] * share // 100
    try:
        for _ in range(UPDATES):
            train(grower, x)
            grower.update()
        train(grower, x)
        counted, found = grower.cost(), measured(model, x)
        if found["params"] != counted.params:
            wrong.append(f"{counted.params} parameters counted, there are {found['params']}")
        if not model.sparse and found["flops"] != counted.flops:
            wrong.append(f"{counted.flops} FLOPs counted, torch counts {found['flops']}")
        if getattr(counted, which) > limit:
            wrong.append(f"{which} {getattr(counted, which)} above the budget of {limit}")
        wrong += saved(model, program, seed, x)
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
    used = getattr(grower.cost(), which) / limit
    row = {"verdict": "wrong" if wrong else "right", "budget": f"{which} {share}%", "used": used, "wrong": wrong}
    return {**row, "flops_compared": not model.sparse}


def saved(model: nn.Module, program: drawn_training.Program, seed: int, x: Tensor) -> list[str]:
    """What is wrong with the network once saved: loaded, and as zeros in a frame that is filled from its files."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        torchgrow.save(model, Path(folder) / "network")
        loaded, moved = (
            torchgrow.load(Path(folder) / "network", lambda: drawn_training.build(program, seed)) for _ in range(2)
        )
        full = drawn_training.from_files(Path(folder) / "network", drawn_training.build(program, seed))
    for training in (False, True):
        here, there = (drawn_training.results(m, x, training) for m in (model, moved))
        if len(here) != len(there) or not all(torch.equal(a, b) for a, b in zip(here, there, strict=True)):
            wrong.append(f"loaded, its outputs differ (training: {training})")
    error = drawn_training.check(loaded, full, x)
    if error > TOLERANCE:
        wrong.append(f"differs by {error:.1e} from the frame with its weights and zeros")
    return wrong


def one_chunk(first: int) -> dict[str, Any]:
    """The row of 50 seeds."""
    rows = [{"seed": seed, **cut(seed)} for seed in range(first, first + CHUNK)]
    runs = [{"seed": seed, **grow(seed)} for seed in range(first, first + CHUNK) if seed % 20 < 3]
    exact = [row for row in rows if row["verdict"] == "exact"]
    return {
        "first": first,
        "networks": CHUNK,
        "exact": len(exact),
        "worst_error": max([row["error"] for row in exact], default=0.0),
        "as_many_units": sum(row["units"] == row["expected"] for row in exact),
        "units": sum(row["units"] for row in exact),
        "units_expected": sum(row["expected"] for row in exact),
        "not_exact": [row for row in rows if row["verdict"] != "exact"],
        "other_counts": [row for row in exact if row["units"] != row["expected"]],
        "grown": dict(Counter(run["verdict"] for run in runs)),
        "flops_compared": sum(run["verdict"] == "right" and run["flops_compared"] for run in runs),
        "least_used": min([run["used"] for run in runs if run["verdict"] == "right"], default=1.0),
        "not_grown": [run for run in runs if run["verdict"] != "right"],
    }


def main() -> None:
    """Run the chunks that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    surroundings = environment()
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    done = {json.loads(line)["first"] for line in arguments.results.read_text().splitlines()}
    chunks = [first for first in range(arguments.first, arguments.count, CHUNK) if first not in done]
    for first in track(chunks, "random networks in training mode", console=Console(stderr=True)):
        with torch.random.fork_rng():
            torch.manual_seed(first)
            line = one_chunk(first)
        with arguments.results.open("a") as file:
            file.write(json.dumps({**line, "environment": surroundings}) + "\n")


if __name__ == "__main__":
    main()
