r"""Ways to bring a trained network to a budget, with equal FLOPs of fine-tuning: ResNet-20 on CIFAR-10, and digits.

    OMP_NUM_THREADS=1 python benchmarks/shrinking.py --data FOLDER --network resnet20 --budget flops=50% \
        --methods base tp-l1 tp-l1:global=True tp-taylor tp-group uniform "shrink:until=0.3" --lrs 0.01 0.03 0.1
    OMP_NUM_THREADS=1 python benchmarks/shrinking.py ... --test --seeds 0 1 2  # at the rate best on held-out images

What the methods are: shrinking_methods.py. The base is trained once for each seed, on 20,000 images for 40 epochs
(digits: its recipe's epochs), and kept in `--work`. Then a method may spend 10 epochs (digits: half the base's) of a
network exactly at the budget, in training FLOPs: 3 x forward x images in every step, at the size the network then has,
and the teacher's forward passes where the base teaches (Hinton et al., 2015). The learning rate falls linearly to 0
over what is spent. `uniform` trains from scratch for as many epochs as base and fine-tuning together, as the base did.
Where parameters are limited, the network at the budget is the uniform one.

Learning rates are chosen on held-out training images at seed 0; test images are looked at with `--test` alone. The
networks have shortcuts with a convolution (B): Torch-Pruning 1.6.1 cannot cut through the padding of shortcut A.
ResNet-20 trains in bfloat16 and channels_last. Every run is a line of results/shrinking.jsonl; what is there is not
run again.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Budget, TorchgrowError, distillation_loss, measure
from torchgrow.lab import recipes
from torchgrow.lab.data import ImageData, Images, load_images
from torchgrow.lab.environment import environment
from torchgrow.lab.train import evaluate

sys.path.insert(0, str(Path(__file__).parent))
from shrinking_methods import UNIFORM_LR, Shrinker, Task, make, read

RESULTS = Path(__file__).parent.parent / "results" / "shrinking.jsonl"
TUNED_AT = 0
"""The seed that learning rates are chosen at."""
SOFTER, TAUGHT = 4.0, 0.9
"""Temperature of teaching, and the share of the loss that the teacher has."""
KEY = ("network", "method", "budget", "seed", "lr", "epochs", "base_epochs", "images", "batch")
Say = Callable[[str], None]


class Network:
    """A network with its data, and how it is trained.

    Args:
        name: ``"resnet20"`` or ``"digits"``.
        folder: with CIFAR-10; None for digits.
        base_epochs: of the base; None for the benchmark's own.
        epochs: of fine-tuning; None for the benchmark's own.
    """

    def __init__(self, name: str, folder: Path | None, base_epochs: int | None, epochs: int | None) -> None:
        self.name = name
        recipe = recipes.with_shortcut(recipes.get("digits" if name == "digits" else "resnet20-cifar10"), "B")
        if name == "resnet20":
            recipe = replace(recipe, subset=20_000, epochs=40, schedule="wsd", decay=0.3)
            recipe = replace(recipe, precision="bfloat16", channels_last=True)
        self.recipe = replace(recipe, epochs=base_epochs or recipe.epochs)
        self.epochs = epochs or (10 if name == "resnet20" else self.recipe.epochs // 2)
        load = partial(load_images, self.recipe.dataset, folder=folder, subset=self.recipe.subset)
        self.data = replace(load(held_out=True), channels_last=self.recipe.channels_last)
        test = load().test
        assert isinstance(test, Images)  # none are streamed here
        self.test = test

    def factor(self, progress: float) -> float:
        """What the base's learning rate is multiplied by after a share of its training."""
        rising = self.recipe.warmup
        if progress < rising:
            return progress / rising
        falling = self.recipe.decay if self.recipe.schedule == "wsd" else 1 - rising
        return min(1.0, (1 - progress) / falling)

    def accuracy(self, model: nn.Module, images: Images | None = None) -> float:
        """In percent, on held-out images or others."""
        data = self.data if images is None else replace(self.data, test=images)
        return evaluate(model, data)[0]


# --- training by FLOPs ---


def endless(data: ImageData, recipe: recipes.Recipe) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches without end, each with its epoch, counted from 1."""
    generator, epoch = torch.Generator().manual_seed(recipe.seed), 0
    while True:
        epoch += 1
        for x, labels in data.train_batches(
            batch_size=recipe.batch_size, shift=recipe.shift, mirror=recipe.mirror, generator=generator
        ):
            yield epoch, x, labels


def loss_of(scores: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
    """Cross entropy, and where there is a teacher its softened scores too."""
    if taught is None:
        return F.cross_entropy(scores, labels)
    return distillation_loss(scores, taught, labels, temperature=SOFTER, share=TAUGHT)


def train(
    shrinker: Shrinker,
    allowance: int,
    factor: Callable[[float], float],
    say: Say,
    *,
    teacher: nn.Module | None = None,
    judge: Callable[[nn.Module], float] = lambda model: float("nan"),
) -> dict[str, Any]:
    """Train until the next step would spend more than the allowance; returns what it came to.

    Args:
        shrinker: the network and what becomes of it.
        allowance: training FLOPs.
        factor: of the learning rate, by the share of the allowance that is spent.
        say: told of every epoch.
        teacher: a trained network.
        judge: of the network when it is first within the budget; its seconds are not counted. A method that takes its
            last step before that is cut at the end, and judged as it is then.
    """
    task = shrinker.task
    taught_flops = task.cost(teacher).flops if teacher else 0
    lr, spent, steps, before = task.recipe.lr, shrinker.spent, 0, 0
    first = judge(shrinker.model) if task.fits(shrinker.cost()) else None
    began = time.process_time()
    for epoch, x, labels in endless(task.data, task.recipe):
        flops = (3 * shrinker.cost().flops + taught_flops) * len(labels)
        if spent + flops > allowance:
            break
        if epoch > before:
            say(f"epoch {epoch}, {spent / allowance:.0%} spent, {shrinker.cost().flops / 1e6:.1f} MFLOPs")
            before = epoch
        for group in shrinker.optimizer.param_groups:
            group["lr"] = lr * factor(spent / allowance)
        with torch.autocast("cpu", torch.bfloat16, enabled=task.recipe.precision == "bfloat16"):
            with torch.no_grad():
                taught = teacher(x).float() if teacher else None
            scores = shrinker.model.train()(x)
        loss = loss_of(scores.float(), labels, taught)
        if not torch.isfinite(loss):
            raise TorchgrowError(f"the loss is {loss.item()} in step {steps + 1}")
        shrinker.optimizer.zero_grad()
        loss.backward()
        shrinker.regularise()
        shrinker.optimizer.step()
        spent, steps = spent + flops, steps + 1
        shrinker.update(steps, spent / allowance)
        if first is None and task.fits(shrinker.cost()):
            paused = time.process_time()
            first = judge(shrinker.model)
            began += time.process_time() - paused
    shrinker.finish()
    seconds = time.process_time() - began
    first = judge(shrinker.model) if first is None else first
    return {"accuracy_cut": first, "spent_flops": spent, "steps": steps, "epochs_seen": before, "cpu_seconds": seconds}


def base(network: Network, seed: int, work: Path, say: Say) -> nn.Module:
    """The trained network of a seed: from the folder, or trained and put there."""
    recipe = replace(network.recipe, seed=seed)
    path = work / f"{network.name}-{len(network.data.train)}x{recipe.epochs}-{seed}.pt"
    torch.manual_seed(seed)
    model = recipe.build()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    task = Task(data=network.data, recipe=recipe, base=model, epochs=0, base_epochs=recipe.epochs)
    allowance = recipe.epochs * task.epoch_flops(task.cost(model).flops)
    train(Shrinker(task, model), allowance, network.factor, lambda text: say(f"base, seed {seed}: {text}"))
    work.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save(model.state_dict(), unfinished)
    unfinished.rename(path)
    return model


# --- rows ---


def run(network: Network, method: str, trained: nn.Module, recipe: recipes.Recipe, say: Say) -> dict[str, Any]:
    """One method with one seed and learning rate; what it came to, and the network as `model`."""
    name, _, distilled = read(method)
    teacher = copy.deepcopy(trained).eval() if distilled else None
    scratch = name == "uniform"
    task = Task(
        data=network.data, recipe=recipe, base=trained, epochs=network.epochs, base_epochs=network.recipe.epochs
    )
    torch.manual_seed(recipe.seed)
    shrinker = make(method, task)
    allowance, factor = task.allowance(), lambda progress: 1 - progress
    if scratch:
        epochs = task.base_epochs + task.epochs
        allowance, factor = epochs * task.epoch_flops(shrinker.cost().flops), network.factor
    fields = train(shrinker, allowance, factor, say, teacher=teacher, judge=network.accuracy)
    cost, full = task.cost(shrinker.model), task.cost(trained)
    if not task.fits(cost):
        raise TorchgrowError(f"{method} ended with {cost}, beyond {recipe.budget}")
    costs = {"params": cost.params, "flops": cost.flops, "base_params": full.params, "base_flops": full.flops}
    return {"model": shrinker.model, **costs, "allowance_flops": allowance, "updates": shrinker.updates, **fields}


def finished(results: Path) -> list[dict[str, Any]]:
    """Rows so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def best_lr(rows: list[dict[str, Any]], key: dict[str, Any]) -> float:
    """The learning rate with the best held-out accuracy of a method."""
    same = [name for name in KEY if name not in ("lr", "seed")]
    found = [row for row in rows if row["seed"] == TUNED_AT and all(row[name] == key[name] for name in same)]
    if not found:
        raise TorchgrowError(f"no rows to choose the learning rate of {key['method']} by; run without --test first")
    return float(max(found, key=lambda row: row["held_out"])["lr"])


class Runs:
    """The runs of one call of this benchmark, and the rows they leave.

    Args:
        network: what is shrunk.
        arguments: of the command line.
    """

    def __init__(self, network: Network, arguments: argparse.Namespace) -> None:
        self.network, self.arguments = network, arguments
        self.bases: dict[int, nn.Module] = {}

    def key(self, method: str, budget: str, seed: int, lr: float) -> dict[str, Any]:
        """What tells a run from others."""
        network = self.network
        epochs = network.epochs if method != "base" else 0
        values = (epochs, network.recipe.epochs, len(network.data.train), network.recipe.batch_size)
        return dict(zip(KEY, (network.name, method, budget, seed, lr, *values), strict=True))

    def say(self, text: str) -> None:
        """A line of progress."""
        Console(stderr=True).print(f"{time.strftime('%H:%M:%S')} {self.network.name} {text}", soft_wrap=True)

    def base(self, seed: int) -> nn.Module:
        """The trained network of a seed."""
        if seed not in self.bases:
            self.bases[seed] = base(self.network, seed, self.arguments.work, self.say)
        return self.bases[seed]

    def one(self, method: str, budget: str, seed: int, lr: float) -> None:
        """Run what is not there yet, and write its row."""
        key = self.key(method, budget, seed, lr)
        test, results = self.arguments.test, self.arguments.results
        for row in finished(results):
            if all(row[name] == key[name] for name in KEY) and (row["test"] is not None or not test):
                return
        trained = self.base(seed)
        if method == "base":
            cost = measure(trained, self.network.data.example())
            fields: dict[str, Any] = {"model": trained, "params": cost.params, "flops": cost.flops}
        else:
            recipe = replace(self.network.recipe, seed=seed, lr=lr, budget=Budget.read(budget))
            about = f"{budget} {method}, seed {seed}, lr {lr:g}"
            fields = run(self.network, method, trained, recipe, lambda text: self.say(f"{about}: {text}"))
        model = fields.pop("model")
        scores = {"held_out": self.network.accuracy(model), "test": None}
        if test:
            scores["test"] = self.network.accuracy(model, self.network.test)
        row = {**key, **scores, **fields, "environment": environment()}
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.say(f"{budget} {method}, seed {seed}, lr {lr:g}: held-out {scores['held_out']:.2f} %")

    def rates(self, method: str, budget: str) -> list[float]:
        """Learning rates to run a method with."""
        if method == "base" or read(method)[0] == "uniform":
            return [self.network.recipe.lr if method == "base" else UNIFORM_LR]
        if not self.arguments.test:
            return list(self.arguments.lrs)
        return [best_lr(finished(self.arguments.results), self.key(method, budget, TUNED_AT, 0.0))]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10")
    parser.add_argument("--network", choices=("resnet20", "digits"), default="resnet20")
    parser.add_argument("--budget", nargs="+", default=["flops=50%"], help="such as flops=25%%, params=36%%")
    parser.add_argument("--methods", nargs="+", required=True, help="base, tp-l1, tp-taylor, tp-group, uniform, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[TUNED_AT])
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--test", action="store_true", help="test images, at the learning rate best on held-out ones")
    parser.add_argument("--epochs", type=int, help="of fine-tuning, at the budget")
    parser.add_argument("--base-epochs", type=int)
    parser.add_argument("--work", type=Path, default=Path("runs/shrinking"), help="folder of trained networks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(arguments.network, arguments.data, arguments.base_epochs, arguments.epochs)
    runs = Runs(network, arguments)
    for seed in arguments.seeds:
        for budget in arguments.budget:
            for method in arguments.methods:
                for lr in runs.rates(method, budget):
                    runs.one(method, budget if method != "base" else "", seed, lr)


if __name__ == "__main__":
    main()
