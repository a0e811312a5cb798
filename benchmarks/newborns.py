"""How units should enter a network that trains: python benchmarks/newborns.py [--cifar10 FOLDER] [--seeds 5] [--test]

Policy `Late` holds half of every group, or the first layer of every stage, until the middle of the run; then the rest
enters at once, under a constant learning rate that falls linearly over the last 30 %. What differs is how they enter:

- `fresh`: with initial weights, the default.
- `silent`: with outgoing weights of 0 (layers: with a last scale of 0), so that outputs do not jump, as in
  Net2Net (Chen et al., 2016, arXiv 1511.05641): `newborns="silent"`.
- `paired`: in pairs of equal incoming weights and outgoing ones of opposite sign (V, V) and (Z, -Z), as in Firefly and
  GradMax's comparison (Evci et al., 2022, arXiv 2201.05125): outputs do not jump, and all weights have gradients.
- `warm`: fresh, and steps of their entries grow from 0 to full length over the first 100.
- `direct`: the final structure, trained from scratch for all epochs.

Same seed, batches and steps for all. Judged by training images that are held out, or, with --test, by the test images.
Every training is a line of results/newborns.jsonl, and one that is there is not done again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from birth import mlp, plain_conv
from rich.console import Console
from torch import Tensor, nn

from torchgrow import Budget, Grower, Space, measure, warmup_stable_decay
from torchgrow.lab.baselines import initialised
from torchgrow.lab.data import ImageData, load_images
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet
from torchgrow.policies import Late

RESULTS = Path(__file__).parent.parent / "results" / "newborns.jsonl"
ARMS = ("fresh", "silent", "paired", "warm", "direct")
WARM = 100  # steps


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network and how it is trained; `grow` and `share` as for `Late` and the budget."""

    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    grow: str = "width"
    share: str = "10%"
    cifar10: bool = False


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum, 0.05."""
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def sgd_decay(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum, 0.1, and weight decay, as for ResNets on CIFAR-10."""
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam, 0.001."""
    return torch.optim.Adam(parameters, 1e-3)


def small_resnet() -> nn.Module:
    """A ResNet-14 for grey images."""
    return ResNet(depth=14, widths=(32, 64, 128), in_channels=1)


def resnet20() -> nn.Module:
    """The ResNet-20 of the CIFAR-10 recipes."""
    return ResNet(depth=20, shortcut="A")


TASKS = {
    "digits, MLP 512-512-512, SGD": Task(build=mlp, optimizer=sgd, epochs=15),
    "digits, MLP 512-512-512, Adam": Task(build=mlp, optimizer=adam, epochs=15),
    "digits, 4 convolutions of 96, no norm, SGD": Task(build=plain_conv, optimizer=sgd, epochs=15),
    "digits, ResNet-14, SGD": Task(build=small_resnet, optimizer=sgd, epochs=15),
    "CIFAR-10, ResNet-20, channels": Task(build=resnet20, optimizer=sgd_decay, epochs=20, share="36%", cifar10=True),
    "CIFAR-10, ResNet-20, layers": Task(
        build=resnet20, optimizer=sgd_decay, epochs=20, grow="layers", share="36%", cifar10=True
    ),
}


class Entering:
    """Changes how units enter; to be told before and after every update.

    Args:
        model: the network, which has no gates folded in.
        space: of it.
        arm: how, of `ARMS`.
    """

    def __init__(self, model: nn.Module, space: Space, arm: str) -> None:
        self.model, self.space, self.arm = model, space, arm
        self.age = torch.full((space.n_units,), WARM)  # in steps
        self.before: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def entered(self, old: Tensor, new: Tensor) -> None:
        """The structure went from `old` to `new` (bool [n])."""
        born = self.space.present(new) & ~self.space.present(old)
        layers = {block.unit for block in self.space.blocks}
        own = born & ~((self.space.owner >= 0) & born[self.space.owner.clamp(min=0)])  # not within a new layer
        self.age[born] = 0
        if self.arm == "paired":
            lone = self._pair([i for i in torch.nonzero(own).flatten().tolist() if i not in layers], new)
            self._silence(own & torch.tensor([i in layers or i in lone for i in range(len(own))]), new)

    def _live(self, keep: Tensor) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """Every cut tensor by name, with an axis of it and the units along this axis now."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, axes in self.space.cut_axes.items():
            for axis in axes if not self.space.absent(name, keep) else ():
                units = self.space.unit_of[name, axis]
                yield name, axis, units[(units < 0) | keep[units.clamp(min=0)]], tensors[name]

    def _reads(self, name: str, axis: int) -> bool:
        """Whether units on an axis are read there: the second one of linear layers and convolutions."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        return axis == 1 and isinstance(module, (nn.Linear, nn.Conv2d))

    def _silence(self, units: Tensor, keep: Tensor) -> None:
        for name, axis, live, tensor in self._live(keep):
            if self._reads(name, axis):
                places = torch.nonzero((live >= 0) & units[live.clamp(min=0)]).flatten()
                tensor.index_fill_(axis, places, 0)
        for (name, axis), vector in self.space.fold.items():
            if axis == -1 and bool(units[vector].any()):  # of a layer
                self.model.get_parameter(name).zero_()

    def _pair(self, units: list[int], keep: Tensor) -> set[int]:
        """Make pairs within groups; returns those that stay alone."""
        by_group: dict[int, list[int]] = {}
        for unit in units:
            by_group.setdefault(int(self.space.group_of[unit]), []).append(unit)
        pairs = [(own[i], own[i + 1]) for own in by_group.values() for i in range(0, len(own) - 1, 2)]
        for name, axis, live, tensor in self._live(keep):
            sign = -1 if self._reads(name, axis) else 1
            for one, other in pairs:
                first, second = (torch.nonzero(live == unit).flatten() for unit in (one, other))
                if len(first):
                    tensor.index_copy_(axis, second, sign * tensor.index_select(axis, first))
        return {own[-1] for own in by_group.values() if len(own) % 2}

    @torch.no_grad()
    def stepping(self, keep: Tensor) -> None:
        """Before a step: remember the entries that may not move in full."""
        self.before = []
        if self.arm != "warm" or int(self.age.min()) >= WARM:
            return
        share, factors = ((self.age + 1) / WARM).clamp(max=1), dict[str, Tensor]()
        for name, axis, live, tensor in self._live(keep):
            own = torch.where(live >= 0, share[live.clamp(min=0)], torch.ones(()))
            own = own.view([-1 if i == axis else 1 for i in range(tensor.dim())])
            factors[name] = torch.minimum(factors[name], own) if name in factors else own
        for name, parameter in self.model.named_parameters():
            if name in factors:
                self.before.append((parameter, parameter.clone(), factors[name]))
        self.age += 1

    @torch.no_grad()
    def stepped(self) -> None:
        """After the step: shorten it."""
        for parameter, before, factor in self.before:
            parameter.copy_(before + factor * (parameter - before))


def begun(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    data: ImageData,
    policy: Late,
    updates: int,
    seed: int,
) -> Grower:
    """The run of a task, at its beginning."""
    return Grower(
        model,
        optimizer,
        example_inputs=data.example(),
        budget=Budget(params=task.share),
        updates=updates,
        policy=policy,
        seed=seed,
        depth=task.grow == "layers",
    )


def train(model: nn.Module, task: Task, data: ImageData, seed: int, arm: str) -> dict[str, Any]:
    """Train a network, grown unless the arm is "direct"; returns what it came to."""
    optimizer, generator = task.optimizer(model.parameters()), torch.Generator().manual_seed(seed)
    batch, start, flops = (128, time.perf_counter(), 0) if task.cifar10 else (64, time.perf_counter(), 0)
    steps = len(data.train) // batch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(task.epochs * steps, decay=0.3))
    grower, every = None, max(1, steps // 5)
    updates = task.epochs * (steps // every)
    if arm != "direct":
        policy = Late(grow=task.grow, layer_lag=1.0, newborns="silent" if arm == "silent" else "fresh")
        grower = begun(model, optimizer, task, data, policy, updates, seed)
    entering = Entering(model, grower.space, arm) if grower else None
    for _ in range(task.epochs):
        batches = data.train_batches(
            batch_size=batch, shift=4 if task.cifar10 else 1, mirror=task.cifar10, generator=generator
        )
        cost = measure(model, data.example())
        for step, (x, labels) in enumerate(batches, 1):
            if len(x) < batch:
                continue
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=task.cifar10):
                scores = model(x)
            F.cross_entropy(scores.float(), labels).backward()
            if entering and grower:
                entering.stepping(grower.keep)
            optimizer.step()
            if entering:
                entering.stepped()
            schedule.step()
            flops += 3 * cost.flops * batch
            if entering and grower and step % every == 0 and not grower.finished and len(grower.history) <= updates:
                old = grower.keep.clone()
                grower.update()
                if bool((old != grower.keep).any()):
                    entering.entered(old, grower.keep)
                    cost = measure(model, data.example())
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in data.test_batches())
    model.train()
    cost = measure(model, data.example())
    return {
        "accuracy": 100 * hits / len(data.test),
        "params": cost.params,
        "flops": cost.flops,
        "train_flops": flops,
        "seconds": time.perf_counter() - start,
    }


def frame_and_found(task: Task, data: ImageData, seed: int) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """The frame, and a function that builds the structure at the budget with initial weights of its own."""
    torch.manual_seed(seed)
    frame = task.build().to(memory_format=torch.channels_last if task.cifar10 else torch.preserve_format)

    def found() -> nn.Module:
        """The grown structure with new weights."""
        model = copy.deepcopy(frame)
        optimizer = task.optimizer(model.parameters())
        begun(model, optimizer, task, data, Late(until=0.0, grow=task.grow, layer_lag=1.0), 1, seed).finish()
        torch.manual_seed(seed)
        return initialised(model)

    return frame, found


def main() -> None:
    """Run what the file does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10; without it those tasks are left out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, judged = Console(), "test" if options.test else "held out"
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(row["task"], row["seed"], row["judged"], row["arm"]) for row in map(json.loads, lines)}
    for name in options.tasks:
        task = TASKS[name]
        if task.cifar10 and not options.cifar10:
            continue
        folder, subset = (options.cifar10, 10_000) if task.cifar10 else (None, None)
        data = load_images(
            "cifar10" if task.cifar10 else "digits", folder=folder, subset=subset, held_out=not options.test
        )
        for seed in range(options.seeds):
            for arm in options.arms:
                if (name, seed, judged, arm) in done or (arm == "paired" and task.grow == "layers"):
                    continue
                frame, found = frame_and_found(task, data, seed)
                row = train(found() if arm == "direct" else frame, task, data, seed, arm)
                about = {"judged": judged, "share": task.share, "epochs": task.epochs, "versions": environment()}
                with options.out.open("a") as file:
                    file.write(json.dumps({"task": name, "arm": arm, "seed": seed, **row, **about}) + "\n")
                console.print(f"{name}, seed {seed}, {arm}: {row['accuracy']:.2f} %, {row['params']} parameters")


if __name__ == "__main__":
    main()
