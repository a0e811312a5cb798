"""Which reading of the paper gives the paper's own tables? Its budget dynamics without any training, in seconds.

    OMP_NUM_THREADS=1 python benchmarks/paper_dynamics.py [--networks ResNet-20 ...] [--readings "..."] [--seeds 1]
    OMP_NUM_THREADS=1 python benchmarks/paper_dynamics.py --schedules  # ResNet-20 in fewer steps and updates

The policy is torchgrow's own `Paper`, on the real space and the real costs of each network, with the paper's budgets,
epochs and learning rates. Nothing is trained: the sensitivity of every unit is 0. Behind batch norm that is not far
off: there the sum of m dL/dm over a group is 0, so how many units a group gets is decided by the penalty, the draws and
the start alone. What the paper leaves open is a switch, in `Paper` or in `Reading` below. Every run is a line of
results/paper-dynamics.jsonl; what is there already from the same policy file is not run again. The table is part of
docs/results.md (python benchmarks/tables.py).
"""

import argparse
import ast
import hashlib
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.models import resnet50

from torchgrow import Budget, Space, trace
from torchgrow.lab.environment import environment
from torchgrow.lab.models import VGG16, MobileNetV1, ResNet, WideResNet
from torchgrow.policies import Paper, View, kit, pace
from torchgrow.structure.budget import fit
from torchgrow.structure.cost import CostModel

RESULTS = Path(__file__).parent.parent / "results" / "paper-dynamics.jsonl"
SHOWN_AFTER = (1, 2, 3, 5, 8, 12, 20, 30)
"""Epochs after which the share of the parameters is noted."""


# --- the networks, as the paper grew them ---


@dataclass(frozen=True)
class Network:
    """A network of the paper's tables.

    Attributes:
        build: the frame.
        side: of its images, in pixels.
        budget: what it is grown to: parameters where the paper gives them, else FLOPs.
        epochs: with one update after each.
        milestones: epochs at which the learning rate falls, to `factor` of what it was.
        factor: see there.
        params: share of the frame's parameters that the paper keeps; None where it does not say.
        flops: share of the frame's FLOPs (MACs).
        saving: training FLOPs of the dense frame over those of growing.
    """

    build: Callable[[], nn.Module]
    side: int
    budget: Budget
    epochs: int
    milestones: tuple[int, ...]
    factor: float
    params: float | None
    flops: float
    saving: float


STEPS = 390
"""Of an epoch on CIFAR-10. ImageNet's epochs get as many, for seconds a run; `--steps 5004` gives it its own."""


def cost(model: Callable[[], nn.Module], side: int) -> int:
    """FLOPs of a frame for one image, by the count of its space."""
    with torch.device("meta"):
        frame = model()
    space = trace(frame, torch.randn(2, 3, side, side))
    return CostModel(space).cost(space.everything()).flops


def mobile(width: float) -> Callable[[], nn.Module]:
    """MobileNetV1 of a width."""
    return lambda: MobileNetV1(width, classes=1000)


SMALL = cost(mobile(0.25), 128) / cost(mobile(0.5), 128)
LARGE = cost(mobile(0.75), 224) / cost(mobile(1.0), 224)
"""Table 6 counts in the cost of networks narrower than the frame."""
NETWORKS = {
    "VGG-16": Network(VGG16, 32, Budget(params="5.0%"), 160, (80, 120), 0.1, 0.050, 0.1355, 4.95),
    "ResNet-20": Network(ResNet, 32, Budget(params="35.8%"), 160, (80, 120), 0.1, 0.358, 0.502, 2.40),
    "WRN-28-10": Network(WideResNet, 32, Budget(params="9.3%"), 200, (60, 120, 160), 0.2, 0.093, 0.2825, 3.12),
    "ResNet-50": Network(resnet50, 224, Budget(params="61.2%"), 90, (30, 60), 0.1, 0.612, 0.503, 1.9),
    "MobileNetV1, 128": Network(
        mobile(0.5), 128, Budget(flops=0.73 * SMALL), 90, (30, 60), 0.1, None, 0.73 * SMALL, 1.7 / SMALL
    ),
    "MobileNetV1, 224": Network(
        mobile(1.0), 224, Budget(flops=0.83 * LARGE), 90, (30, 60), 0.1, None, 0.83 * LARGE, 1.5 / LARGE
    ),
}


# --- the readings ---


@dataclass(eq=False)
class Reading(Paper):
    """`Paper` with what only these experiments vary.

    Attributes:
        norm: the L1 norm is the "sum" over units, that over the number of groups ("sum / groups"), the sum of the means
            within groups ("means of groups"), or the "mean" over all.
        flat: indicators to begin with, the same for all; None: as `start` says.
        acts: whether the penalty acts at every step, or once in every update.
        forgets: whether momentum is lost when the structure changes.
        through: "gate": the gradient of s comes through sigma(beta s); "identity": straight through, as if ds = dm.
        follows: whether the rate of s follows the weights' schedule.
        lambdas: "one" for the network; "by group": from the share of each group's units, beside the even share that
            costs the budget.
    """

    norm: str = "sum"
    flat: float | None = None
    acts: str = "steps"
    forgets: bool = False
    through: str = "gate"
    follows: bool = True
    lambdas: str = "one"

    def seed(self, view: View) -> Tensor:
        """As the paper's, then weights of the norm and the start."""
        keep = super().seed(view)
        space = view.space
        size = torch.bincount(space.group_of, minlength=space.n_groups)[space.group_of].double()
        weight = {
            "sum": 1.0,
            "sum / groups": 1 / space.n_groups,
            "means of groups": 1 / size,
            "mean": 1 / space.n_units,
        }
        self.lambda_share = self.lambda_share * weight[self.norm]  # type: ignore[operator]
        if self.flat is not None:
            self.s = torch.full_like(self.s, self.flat)
        if self.lambdas == "by group":
            place = kit.spread(replace(view, generator=torch.Generator().manual_seed(0)))
            keep_at = lambda share: kit.one_per_group(space, place < share, -place)  # noqa: E731
            self._even = kit.largest_share(view, place, keep_at, view.limits)
        self.acted = -1
        return keep

    def step(self, view: View, sensitivity: Tensor) -> None:
        """At every step, or at one in every update."""
        if self.acts == "steps" or self.acted < view.update:
            self.acted = view.update
            super().step(view if self.follows else replace(view, rate=1.0), sensitivity)

    def applied(self, view: View) -> None:
        """Momentum and lambda after a change."""
        super().applied(view)
        if self.forgets:
            self.velocity = torch.zeros_like(self.velocity)
        if self.lambdas == "by group":
            sizes, live = (
                torch.bincount(view.space.group_of[k], minlength=view.space.n_groups)
                for k in (view.space.everything(), view.keep)
            )
            missing = (live / sizes - self._even)[view.space.group_of]
            self.penalty = self._base * missing * self.lambda_share * (self.penalised == "all" or view.keep)

    def _move(self, view: View, sensitivity: Tensor, steps: float) -> None:
        if self.through == "gate":
            super()._move(view, sensitivity, steps)
            return
        for _ in range(count := round(steps)):
            self.velocity = self.momentum * self.velocity + self.penalty * self._removable + self.weight_decay * self.s
            self.s = self.s - self.lr * view.rate * (steps / count) * self.velocity
        self._set_gates()


ALL = {"penalised": "all"}
READINGS: dict[str, dict[str, Any]] = {
    "present, size^-1/2 (the preset)": {},
    "present, size^-1": {"start": 1.0},
    "present, size^-3/4": {"start": 0.75},
    "present, s = -2": {"flat": -2.0},
    "present, s = -3": {"flat": -3.0},
    "present, sum / groups": {"norm": "sum / groups"},
    "present, means of groups": {"norm": "means of groups"},
    "present, means of groups, s = -2": {"norm": "means of groups", "flat": -2.0},
    "present, no momentum": {"momentum": 0.0},
    "present, once an update": {"acts": "updates", "paced": False},
    "present, momentum lost at a change": {"forgets": True},
    "present, straight through": {"through": "identity"},
    "present, rate of s constant": {"follows": False},
    "present, lambda by group": {"lambdas": "by group"},
    "all, size^-1 (the preset before)": {**ALL, "start": 1.0},
    "all, size^-1/2": ALL,
    "all, s = -2": {**ALL, "flat": -2.0},
    "all, sum / groups, size^-1": {**ALL, "norm": "sum / groups", "start": 1.0},
    "all, sum / groups, s = -2": {**ALL, "norm": "sum / groups", "flat": -2.0},
    "all, means of groups, size^-1": {**ALL, "norm": "means of groups", "start": 1.0},
    "all, means of groups, s = -2": {**ALL, "norm": "means of groups", "flat": -2.0},
    "all, mean, s = -2": {**ALL, "norm": "mean", "flat": -2.0},
    "all, once an update, s = -2": {**ALL, "acts": "updates", "paced": False, "flat": -2.0},
    "all, straight through, size^-1": {**ALL, "through": "identity", "start": 1.0},
    "all, lambda by group, size^-1/2": {**ALL, "lambdas": "by group"},
}
"""By name: what differs from `Paper`'s own settings."""
SCHEDULES = [(160, 390), (160, 195), (160, 98), (160, 49), (160, 20), (80, 390), (40, 390), (20, 390)]
"""Updates, and steps in each: the paper's, then the same run in fewer steps and in fewer updates."""


# --- the dynamics ---


def spaces(names: list[str]) -> dict[str, Space]:
    """Traced on the meta device, where frames take no memory."""
    found = {}
    for name in names:
        with torch.device("meta"):
            model = NETWORKS[name].build()
        side = NETWORKS[name].side
        found[name] = trace(model, torch.randn(2, 3, side, side))
    return found


def dynamics(space: Space, network: Network, policy: Paper, updates: int, steps: int, seed: int) -> dict[str, Any]:
    """One run, in the order of `Grower`, but without weights: nothing is felt by any unit.

    Args:
        space: of the network.
        network: its budget and schedule; milestones are kept in units of progress.
        policy: drives it.
        updates: T.
        steps: in every one of them.
        seed: of all draws.
    """
    costs, generator = CostModel(space), torch.Generator().manual_seed(seed)
    limits, frame = network.budget.limits(costs.cost(space.everything())), costs.both(costs.sizes)
    bound = 0 if limits.params is not None else 1
    view = View(space, costs, limits.tensor(), 0, updates, space.everything(), 1.0, generator)
    keep = kit.one_per_group(space, policy.seed(view), torch.zeros(space.n_units))
    policy.applied(replace(view, keep=keep))
    ones, nothing = torch.ones(space.n_groups, dtype=torch.int64), torch.zeros(space.n_units, dtype=torch.float64)
    shares, widths, landed = [], [], 0.0
    for update in range(1, updates + 1):
        rate = network.factor ** sum((update - 1) / updates >= m / network.epochs for m in network.milestones)
        view = replace(view, update=update - 1, keep=keep, rate=rate)
        shares.append((costs.both(costs.live(keep)) / frame).tolist())  # what this epoch is trained with
        widths.append(costs.live(keep) / costs.sizes)
        for _ in range(steps):
            policy.step(view, nothing)
        wanted, exactly = policy.update(view := replace(view, update=update))
        keep = kit.one_per_group(space, wanted, torch.zeros(space.n_units))
        if update == updates - 1:
            landed = float(costs.both(costs.live(keep))[bound] / view.limits[bound])
        if exactly or update >= updates - 1:
            keep = fit(space, costs, keep, policy.score(view), view.limits, ones)
        policy.applied(replace(view, keep=keep))
    settled = max(SHOWN_AFTER[-1] * updates // network.epochs, 1)
    swings = [float((b - a).abs().max()) for a, b in zip(widths[settled:-2], widths[settled + 1 : -1], strict=True)]
    end = (costs.both(costs.live(keep)) / frame).tolist()
    after = [min(updates - 1, round(epoch * updates / network.epochs)) for epoch in SHOWN_AFTER]
    return {
        "params": end[0],
        "flops": end[1],
        "saving": updates / sum(flops for _, flops in shares),
        "landed": landed,
        "swing": max(swings, default=0.0),
        "after": dict(zip(map(str, SHOWN_AFTER), (shares[number][0] for number in after), strict=True)),
    }


def fingerprint() -> str:
    """Of the code that decides the dynamics, without its prose: rows of another policy are not taken for this one's."""
    parts: list[Any] = [Paper, pace.starts, kit.gap]
    modules = [inspect.getsource(inspect.getmodule(part) or part) for part in parts]
    sources = [inspect.getsource(Reading), inspect.getsource(dynamics), *modules]
    return hashlib.sha256("".join(map(bare, sources)).encode()).hexdigest()[:12]


def bare(source: str) -> str:
    """Code without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return ast.dump(tree)


def as_the_paper(network: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with its constants as they are: with ImageNet's 90 updates, pace would scale the draws."""
    return settings if NETWORKS[network].epochs >= pace.UPDATES else {"paced": False, **settings}


def main() -> None:
    """Run what is missing, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--readings", nargs="+", choices=list(READINGS), default=list(READINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--schedules", action="store_true", help="ResNet-20 in fewer steps and updates")
    parser.add_argument("--steps", type=int, default=STEPS, help="in an epoch")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    jobs: list[tuple[str, str, dict[str, Any], int, int]] = [
        (
            network,
            reading,
            as_the_paper(network, READINGS[reading]),
            NETWORKS[network].epochs,
            arguments.steps,
        )
        for reading in arguments.readings
        for network in arguments.networks
    ]
    if arguments.schedules:
        jobs = [
            ("ResNet-20", name, {"paced": paced}, updates, steps)
            for paced, name in ((True, "paced"), (False, "constants as they are"))
            for updates, steps in SCHEDULES
        ]
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    found, console, here, of = spaces(sorted({job[0] for job in jobs})), Console(), environment(), fingerprint()
    keys = ("network", "reading", "settings", "updates", "steps", "seed", "fingerprint")
    done = [[row[key] for key in keys] for row in map(json.loads, arguments.results.read_text().splitlines())]
    for name, reading, settings, updates, steps in jobs:
        for seed in range(arguments.seeds):
            row: dict[str, Any] = dict(zip(keys, (name, reading, settings, updates, steps, seed, of), strict=True))
            if list(row.values()) in done:
                continue
            own = {field.name for field in fields(Paper)}
            policy = (Paper if settings.keys() <= own else Reading)(**settings)
            start = time.perf_counter()
            row |= dynamics(found[name], NETWORKS[name], policy, updates, steps, seed)
            wanted = {key: getattr(NETWORKS[name], key) for key in ("params", "flops", "saving")}
            row |= {"paper": wanted, "seconds": time.perf_counter() - start, "environment": here}
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            paper = NETWORKS[name]
            console.print(
                f"{name}, {reading}, {updates} x {steps}: parameters {row['params']:.3f}, FLOPs {row['flops']:.3f} "
                f"({paper.flops:.3f}), saving {row['saving']:.2f} ({paper.saving:.2f}), landed {row['landed']:.2f}, "
                f"swing {row['swing']:.2f}, after " + " ".join(f"{x:.2f}" for x in row["after"].values()),
                highlight=False,
                soft_wrap=True,
            )


if __name__ == "__main__":
    main()
