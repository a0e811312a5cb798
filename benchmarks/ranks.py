"""Several processes growing one network: do they hold the same, and what one process would hold?

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--processes 2 4] [--epochs 3]

Every process trains on its share of each batch (gloo, float64, scikit-learn's digits, an update every 5 steps). After
each update it hashes every tensor it has: weights, statistics, the bank, optimizer slots, indicators, draws. Hashes
must be equal on all ranks. A network without batch norm is compared, tensor by tensor, with one process that trains
on whole batches; with batch norm a share has statistics of its own, so there only the ranks are compared. Every case
is a line of results/ranks.jsonl; those that are there already from the same commit are not run again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from torchgrow import Budget, Grower
from torchgrow.lab import data, processes
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet
from torchgrow.policies import Paper

RESULTS = Path(__file__).parent.parent / "results" / "ranks.jsonl"
TARGET = 1e-9  # largest difference to one process, relative to a tensor's largest entry (or 1)
BATCH, EVERY = 64, 5  # images, steps


def plain() -> nn.Module:
    """Convolutions and linear layers with biases, no batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS = {"plain": plain, "ResNet-14": lambda: ResNet(depth=14, widths=(32, 64, 128), in_channels=1)}


def tensors(grower: Grower) -> dict[str, Tensor]:
    """All that a rank holds."""
    bank, policy = grower.run.live.bank, grower.policy
    names = {parameter: name for name, parameter in grower.model.named_parameters()}
    slots = {
        f"{key} of {names[parameter]}": slot
        for parameter, state in grower.optimizer.state.items()
        for key, slot in state.items()
        if isinstance(slot, Tensor)
    }
    return {
        **grower.model.state_dict(),
        **{f"stored {name}": tensor for name, tensor in bank.full.items()},
        **{f"stored {key} of {name}": tensor for (name, key), tensor in bank.slots.items()},
        **slots,
        **{f"raw {name}": tensor for name, tensor in grower.run.live.raw().items()},
        **{name: value for name, value in policy.state_dict().items() if isinstance(value, torch.Tensor)},
        "generator": grower.run.state.generator.get_state(),
        "keep": bank.keep,
    }


def train(network: str, epochs: int, folder: Path) -> None:
    """One process's part; leaves its hashes and, on rank 0, the tensors, an entry per update."""
    torch.set_num_threads(1)
    torch.manual_seed(processes.rank())  # rank 0's weights count
    images = data.load_images("digits")
    model = NETWORKS[network]().double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    updates = epochs * (len(images.train) // BATCH) // EVERY
    grower = Grower(
        model,
        optimizer,
        example_inputs=images.normalise(images.train.pixels[:2]).double(),
        budget=Budget(params="30%"),
        updates=updates + 1,
        policy=Paper(settle=0.1),
    )
    generator = torch.Generator().manual_seed(0)
    hashes: list[dict[str, str]] = []
    kept: list[dict[str, Tensor]] = []
    net, steps, loss = grower.wrap(), 0, torch.zeros(())
    for _ in range(epochs):
        batches = images.train_batches(batch_size=BATCH, shift=1, mirror=False, generator=generator)
        for x, labels in processes.shares(batches):
            loss = F.cross_entropy(net(x.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if steps % EVERY == 0:
                grower.update()
                net = grower.wrap()
                found = {name: t.detach().contiguous().clone() for name, t in tensors(grower).items()}
                hashes.append({n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in found.items()})
                kept.append(found if processes.rank() == 0 else {})
    torch.save((hashes, kept, float(loss.detach()), grower.widths()), folder / f"{processes.rank()}.pt")


def work(rank: int, size: int, network: str, epochs: int, folder: Path) -> None:
    """One process of several."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    train(network, epochs, folder)
    dist.destroy_process_group()


def run(size: int, network: str, epochs: int) -> list[tuple[Any, ...]]:
    """What every rank left."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if size == 1:
            train(network, epochs, folder)
        else:
            context = multiprocessing.get_context("spawn")
            workers = [context.Process(target=work, args=(i, size, network, epochs, folder)) for i in range(size)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if any(worker.exitcode for worker in workers):
                raise SystemExit(f"{network}, {size} processes: exit codes {[w.exitcode for w in workers]}")
        return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(size)]


def gap(found: list[dict[str, Tensor]], alone: list[dict[str, Tensor]]) -> float:
    """Largest difference of two runs over all updates and tensors, relative to the tensor's largest entry (or 1)."""
    worst = 0.0
    for here, there in zip(found, alone, strict=True):
        for name in here.keys() | there.keys():
            a, b = here[name].double(), there[name].double()
            if a.shape != b.shape:
                return float("inf")
            if a.numel():
                worst = max(worst, float((a - b).abs().max()) / max(1.0, float(b.abs().max())))
    return worst


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    torch.set_num_threads(1)
    console, here = Console(), environment()
    for network in NETWORKS:
        alone: list[tuple[Any, ...]] = []
        for size in arguments.processes:
            settings = {"network": network, "processes": size, "epochs": arguments.epochs, "batch": BATCH}
            rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
            if any(settings.items() <= row.items() and row["environment"]["commit"] == here["commit"] for row in rows):
                continue
            start = time.perf_counter()
            found = run(size, network, arguments.epochs)
            seconds = time.perf_counter() - start
            hashes = [rank[0] for rank in found]
            differing = sum(
                len({json.dumps(rank[update].get(name)) for rank in hashes}) > 1
                for update in range(len(hashes[0]))
                for name in hashes[0][update]
            )
            row = {
                **settings,
                "updates": len(hashes[0]),
                "tensors": sum(map(len, hashes[0])),
                "differing": differing,
                "structures": len({one["keep"] for one in hashes[0]}),
                "loss": found[0][2],
                "seconds": seconds,
            }
            if network == "plain":
                alone = alone or run(1, network, arguments.epochs)
                row |= {"difference_to_one_process": gap(found[0][1], alone[0][1]), "target": TARGET}
            with arguments.results.open("a") as file:
                file.write(json.dumps({**row, "environment": here}) + "\n")
            console.print(row)


if __name__ == "__main__":
    main()
