"""Processes for tests of distributed growing: every rank runs the same scenarios, one after the other."""

import multiprocessing
import os
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow.distributed
from growing import batch, interrupted_step, sgd
from layered import Residual, Stages
from oracle import SmallResNet
from own_policy import cubic
from planned import Planned
from torchgrow import Budget, Grower, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.policies import Shrink, View

EPOCHS, STEPS = 3, 4


class Plain(nn.Module):
    """No batch norm, so that a batch can be shared out: conv1 -> conv2 (stride 2) -> pool -> fc1 -> fc2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(16, 14), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a global batch of 8."""
    x, target = batch(step)
    size = dist.get_world_size() if dist.is_initialized() else 1
    return x[rank() :: size], target[rank() :: size]


def make(model: nn.Module, optimizer: Any = sgd, **settings: Any) -> Grower:
    arguments = {"example_inputs": batch(0)[0], "budget": Budget(params="50%"), "updates": EPOCHS + 2}
    return Grower(model, optimizer(model), **{"policy": Planned(ramp=0.5), **arguments, **settings})


def train(net: nn.Module, grower: Grower, first: int, steps: int = STEPS, parts: int = 1) -> None:
    """Some steps; with several parts the gradients of the first ones stay on their rank."""
    for step in range(first, first + steps):
        grower.optimizer.zero_grad()
        for part in range(parts):
            x, target = shard(parts * step + part)
            quiet: AbstractContextManager[None] = nullcontext()
            if part < parts - 1 and isinstance(net, nn.parallel.DistributedDataParallel):
                quiet = net.no_sync()
            with quiet:
                (F.cross_entropy(net(x), target) / parts).backward()
        grower.optimizer.step()


def tensors(grower: Grower) -> dict[str, Tensor]:
    """All that must be the same on all ranks."""
    bank = grower.run.live.bank
    slots = {
        f"{i} {key}": slot
        for i, state in enumerate(grower.optimizer.state.values())
        for key, slot in state.items()
        if isinstance(slot, Tensor)
    }
    found = {
        **{f"live {name}": tensor for name, tensor in grower.model.state_dict().items()},
        **{f"bank {name}": asleep.held for name, asleep in bank.full.items()},
        **{f"bank {name} {key}": asleep.held for (name, key), asleep in bank.slots.items()},
        **{f"slot {name}": slot for name, slot in slots.items()},
        **{f"raw {name}": tensor for name, tensor in grower.run.live.raw().items()},
        **{f"policy {key}": value for key, value in grower.policy.state_dict().items() if isinstance(value, Tensor)},
        "generator": grower.run.state.generator.get_state(),
        "keep": bank.keep,
    }
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def plain() -> list[dict[str, Tensor]]:
    """Every tensor after every update, the old wrappers kept alive; rank 0's initial weights count."""
    torch.manual_seed(rank())
    grower, seen, wrappers = make(Plain().double()), [], []
    seen.append(tensors(grower))
    for epoch in range(EPOCHS):
        wrappers.append(grower.wrap())
        train(wrappers[-1], grower, STEPS * epoch)
        grower.update()
        seen.append(tensors(grower))
    return seen


def with_batch_norm() -> list[dict[str, Tensor]]:
    """Statistics differ between ranks until the update; accumulated gradients; Adam; to the end of the run."""
    torch.manual_seed(rank())
    grower = make(SmallResNet().double(), lambda m: torch.optim.Adam(m.parameters(), 0.01), updates=EPOCHS)
    seen = []
    for epoch in range(EPOCHS):
        train(grower.wrap(), grower, STEPS * epoch, parts=2)
        grower.update()
        seen.append(tensors(grower))
    train(grower.wrap(broadcast_buffers=False), grower, 0)
    seen.append(dict(grower.model.named_parameters()))
    return seen


def layers() -> list[dict[str, Tensor]]:
    """Layers come and go: DDP must not wait for gradients of what is empty."""
    torch.manual_seed(rank())
    grower, seen = make(Stages(Residual).double(), updates=EPOCHS, depth=True), []
    for epoch in range(EPOCHS):
        train(grower.wrap(), grower, STEPS * epoch)
        grower.update()
        seen.append(
            {**tensors(grower), "left out": torch.tensor(sum(not p.numel() for p in grower.model.parameters()))}
        )
    return seen


def own_policy() -> list[dict[str, Tensor]]:
    """A policy that a user wrote, which knows nothing of ranks."""
    torch.manual_seed(rank())
    grower, seen = make(Plain().double(), policy=cubic()(), updates=EPOCHS), []
    for epoch in range(EPOCHS):
        train(grower.wrap(), grower, STEPS * epoch)
        grower.update()
        seen.append(tensors(grower))
    return seen


def compensated() -> list[Any]:
    """Means over what all ranks measure; then rank 1 cannot read its batches, and the others do not wait for it."""
    torch.manual_seed(rank())
    grower, seen = make(Plain().double(), start="frame", policy=Shrink(importance="l1", until=1.0)), []
    for step in range(2):
        train(grower.wrap(), grower, STEPS * step)
        unequal = [shard(step)[0], shard(step)[0][:2]] if rank() == 0 else [shard(step)[0]]
        grower.update(unequal if step == 0 or rank() else None)
        seen.append(tensors(grower))
    train(grower.wrap(), grower, 2 * STEPS)
    said = message(lambda: grower.update([shard(0)[0]] if rank() == 0 else []))
    grower.update()
    return [seen, said, len(grower.history)]


def compensated_alone() -> list[dict[str, Tensor]]:
    """The same in one process, up to the first update."""
    torch.manual_seed(0)
    grower = make(Plain().double(), start="frame", policy=Shrink(importance="l1", until=1.0))
    train(grower.model, grower, 0)
    x = batch(0)[0]
    grower.update([x[0::2], x[0::2][:2], x[1::2]])
    return [tensors(grower)]


class Dropping(nn.Module):
    """Dropout by PyTorch, noise by NumPy and Python: every rank draws of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.drop = Plain(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        noise = numpy.random.rand() + random.random() if self.training else 0.0
        return self.plain(self.drop(x) + noise)


def dropping() -> Grower:
    """One with random numbers that differ between ranks."""
    torch.manual_seed(0)
    grower = make(Dropping().double())
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(100 + rank())
    return grower


def resumed(folder: Path) -> list[Any]:
    """Tensors at the end and the next random number, of a run and of those that go on from its checkpoints."""

    def end(grower: Grower) -> dict[str, Tensor]:
        return {**tensors(grower), "drawn": torch.rand(3) + numpy.random.rand() + random.random()}

    def caught(act: Callable[[], Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            act()
        return [str(one.message) for one in found]

    grower, said, paths = dropping(), [], []
    for epoch in range(2):
        train(grower.wrap(), grower, 4 * epoch, 2)
        if epoch == 1:
            said += caught(lambda: paths.append(save_checkpoint(folder / "together", grower, together=True)))
            said += caught(lambda: rank() or save_checkpoint(folder / "alone", grower))
        train(grower.wrap(), grower, 4 * epoch + 2, 2)
        grower.update()
        if epoch == 0 and rank() == 0:
            said += caught(lambda: save_checkpoint(folder / "updated", grower))
    ends = {"whole": end(grower)}
    if rank() == 0:
        said += caught(lambda: save_checkpoint(folder / "nothing known", None))
    dist.barrier()
    for name in ("together", "alone", "updated"):
        again = dropping()
        load_checkpoint(folder / name, again)
        for first in (4, 6) if name == "updated" else (6,):
            train(again.wrap(), again, first, 2)
        again.update()
        ends[name] = end(again)
    torch.rand(1)
    before = torch.get_rng_state()
    lost = caught(lambda: load_checkpoint(folder / "nothing known"))
    kept = torch.equal(before, torch.get_rng_state())
    failed = message(lambda: save_checkpoint(folder / "failed", dropping(), extra=[[print], 0][rank()], together=True))
    return [ends, said, [str(path) for path in paths], lost, kept, failed]


def message(act: Callable[[], Any]) -> str:
    try:
        act()
    except (TorchgrowError, SystemExit) as error:
        return str(error)
    return "no error"


def seeds_differ() -> str:
    return message(lambda: make(Plain().double(), seed=rank()))


def budgets_differ() -> str:
    return message(lambda: make(Plain().double(), budget=Budget(params=f"{50 - rank()}%")))


def bare_model() -> list[Any]:
    """Trained around the wrapper: the update is refused, nothing has changed, and the message says why."""
    torch.manual_seed(0)
    grower = make(Plain().double())
    grower.wrap()
    train(grower.model, grower, 0)
    before = tensors(grower)
    said = message(grower.update)
    after = tensors(grower)
    changed = [name for name in before if not torch.equal(before[name], after[name]) and "bank" not in name]
    return [said, len(grower.history), changed]  # writing back into the bank is no change


def rates_differ() -> str:
    torch.manual_seed(0)
    grower = make(Plain().double(), lambda m: torch.optim.SGD(m.parameters(), 0.1 + 0.01 * rank()))
    train(grower.wrap(), grower, 0)
    return message(grower.update)


def calls_differ() -> str:
    """One rank calls update(), the other finish()."""
    torch.manual_seed(0)
    grower = make(Plain().double())
    train(grower.wrap(), grower, 0)
    grower.update()
    grower.history.extend(grower.history[-1:] * rank())
    return message(grower.update)


def one_fails() -> list[Any]:
    """An optimizer step of rank 1 did not finish; the others must not wait, and all can go on."""
    torch.manual_seed(0)
    grower = make(Plain().double())
    net = grower.wrap()
    train(net, grower, 0)
    if rank() == 1:
        interrupted_step(grower.optimizer)
    said = message(grower.update)
    train(net, grower, STEPS)
    grower.update()
    return [said, len(grower.history)]


def one_leaves() -> list[Any]:
    """A SystemExit comes in an update of rank 1, as from a handler of SIGTERM; both go on."""
    torch.manual_seed(0)
    grower = make(Plain().double())
    net = grower.wrap()
    train(net, grower, 0)
    if rank() == 1:
        grower.policy.update = leave  # type: ignore[method-assign]
    said = message(grower.update)
    vars(grower.policy).pop("update", None)
    train(net, grower, STEPS)
    grower.update()
    return [said, len(grower.history)]


def leave(view: View) -> tuple[Tensor, bool]:
    raise SystemExit(f"terminated in update {view.update}")


def old_wrapper() -> list[str]:
    grower = make(Plain().double())
    net = grower.wrap()
    train(net, grower, 0)
    grower.update()
    said = [message(lambda: net(shard(0)[0]))]
    net = grower.wrap()
    train(net, grower, 0)
    grower.finish()
    return [*said, message(lambda: net(shard(0)[0]))]


def alone_in_an_update() -> str:
    """The last scenario: afterwards the groups of the growers are broken. Once with, once without buffers."""
    torchgrow.distributed.TIMEOUT = timedelta(seconds=1)
    growers = [make(Plain().double()), make(SmallResNet().double())]
    said = message(growers[0].update) if rank() == 0 else message(growers[1].update)
    dist.barrier()
    return said


def work(number: int, size: int, scenarios: list[Callable[..., Any]], folder: Path) -> None:
    """What one process does: all scenarios, results in a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=size)
    results = {one.__name__: one(folder) if one is resumed else one() for one in scenarios}
    torch.save(results, folder / f"{number}.pt")
    torch.manual_seed(0)
    grower = make(Plain().double()) if scenarios[-1] is not alone_in_an_update else None
    dist.destroy_process_group()
    if grower:
        assert "process group in which this Grower was made has been destroyed" in message(grower.update)


def launch(size: int, scenarios: list[Callable[..., Any]], folder: Path, timeout: float = 240) -> list[dict[str, Any]]:
    """Results of all ranks, by scenario."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(i, size, scenarios, folder)) for i in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(size)]
