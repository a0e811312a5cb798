"""The laws on a device that is not the CPU: on a GPU where there is one, and on an emulated device wherever asked.

    pytest tests/devices                                  # on a GPU
    TORCHGROW_DEVICE=emulated pytest tests/devices        # without one; tests/test_emulated_device.py does so

What is measured on the CPU elsewhere is not measured here again: only that a run on the device is the same run, that
everything of it is where it belongs, and that what leaves the network leaves the device's memory.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import torchgrow
import zoo
from torchgrow import Budget, Grower
from torchgrow.lab.checkpoints import Checkpoints, Progress
from torchgrow.tracing.model_call import call

DEVICE = os.environ.get("TORCHGROW_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
if not DEVICE:
    pytest.skip("no GPU here; test_emulated_device.py runs these on an emulated one", allow_module_level=True)
if DEVICE == "emulated":
    import emulated

pytestmark = pytest.mark.cuda
HALF = Budget(params="50%")
LEFT_OUT = {"attention"} | ({"tied"} if DEVICE == "emulated" else set())
"""Models of the zoo in which nothing can grow; and one whose weights PyTorch unties on the way to such a device."""

MODELS = sorted(set(zoo.ZOO) - LEFT_OUT)
EVERY = int(os.environ.get("TORCHGROW_EVERY", "1"))
"""Which of them: all, or every fourth, say, and the recurrent cells."""

Optimizers = Callable[[Any], torch.optim.Optimizer]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def net(device: str = DEVICE) -> nn.Module:
    torch.manual_seed(0)
    return Net().double().to(device)


def data(step: int, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(step)
    images = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64, device="cpu")
    return images.to(device), torch.randint(0, 4, (8,), generator=generator, device="cpu").to(device)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, device: str = DEVICE) -> None:
    x, y = data(step, device)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def begun(
    device: str = DEVICE, optimizers: Optimizers = sgd, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Grower]:
    model = net(device)
    optimizer = optimizers(model.parameters())
    given: dict[str, Any] = {"budget": HALF, "updates": 6, "depth": True, **settings}
    return model, optimizer, Grower(model, optimizer, example_inputs=data(0, device)[0], **given)


def grown(device: str = DEVICE, optimizers: Optimizers = sgd, **settings: Any) -> nn.Module:
    model, optimizer, grower = begun(device, optimizers, **settings)
    for step in range(6):
        train(model, optimizer, step, device)
        grower.update()
    assert astray(model, optimizer, device) == []
    return model


def astray(model: nn.Module, optimizer: torch.optim.Optimizer, device: str = DEVICE) -> list[str]:
    """Tensors that are on another device; numbers of an optimizer may be anywhere."""
    state = {f"state {key}": x for slots in optimizer.state.values() for key, x in slots.items()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **state}
    return [name for name, x in tensors.items() if isinstance(x, Tensor) and x.dim() and x.device.type != device]


def apart(model: nn.Module, other: nn.Module) -> float:
    """Largest difference of two networks, wherever they are; infinite where their structures differ."""
    mine, yours = ({k: x for k, x in one.state_dict().items() if isinstance(x, Tensor)} for one in (model, other))
    if {k: x.shape for k, x in mine.items()} != {k: x.shape for k, x in yours.items()}:
        return float("inf")
    return max(float((mine[k].cpu().double() - yours[k].cpu().double()).abs().max()) for k in mine if mine[k].numel())


def moved(value: Any, device: str) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


@pytest.mark.parametrize("name", [m for i, m in enumerate(MODELS) if i % EVERY == 0 or m.endswith("-cell")])
def test_a_run_on_the_device_is_the_run_on_the_cpu(name: str) -> None:
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model, example = zoo.ZOO[name]().to(device), moved(zoo.inputs(name), device)
        optimizer = sgd(model.parameters())
        grower = Grower(model, optimizer, example_inputs=example, budget=Budget(params="60%"), updates=3)
        for _ in range(3):
            optimizer.zero_grad()
            out = next(x for x in tree_leaves(call(model, example)) if isinstance(x, Tensor) and x.requires_grad)
            out.square().mean().backward()
            optimizer.step()
            grower.update()
        assert astray(model, optimizer, device) == []
        found.append(model)
    assert apart(*found) < (1e-9 if next(found[0].parameters()).dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("preset", ["default", "paper", "random", "late", "shrink", "global"])
def test_every_policy_decides_alike(preset: str) -> None:
    settings: dict[str, Any] = {"preset": preset, "start": "frame" if preset == "shrink" else "seed"}
    assert apart(grown(**settings), grown("cpu", **settings)) < 1e-9


OPTIMIZERS: dict[str, Optimizers] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW with amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam for each": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}
if DEVICE == "cuda":
    OPTIMIZERS["fused AdamW"] = lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)
    OPTIMIZERS["capturable Adam"] = lambda p: torch.optim.Adam(p, lr=1e-2, capturable=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_cut_where_it_is(name: str) -> None:
    plain = name not in ("fused AdamW", "capturable Adam")
    model = grown(optimizers=OPTIMIZERS[name])
    assert not plain or apart(model, grown("cpu", OPTIMIZERS[name])) < 1e-7


def test_the_proof_runs_on_the_device() -> None:
    assert torchgrow.verify(net(), data(0)[0], depth=True).ok


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_ranks_must_agree_on_is_summed_on_the_host(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU adds by atomics, in another order each time."""
    original, devices = Tensor.index_add_, set()

    def noted(self: Tensor, *arguments: Any, **more: Any) -> Tensor:
        devices.add(self.device.type)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Tensor, "index_add_", noted)
    grown(preset=preset)
    assert devices == {"cpu"}


def test_memory_is_given_back_when_nothing_holds_the_old_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, grower = begun()
    then: list[int] = []
    afterwards: list[int] = []
    monkeypatch.setattr("torchgrow.growth.run.give_back", lambda: then.append(held()))
    for step in range(6):
        train(model, optimizer, step)
        optimizer.zero_grad()
        grower.update()
        afterwards += [held()] * (len(then) - len(afterwards))  # not where no shape changed
    assert len(then) > 1
    assert then == afterwards


def held() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else emulated.held()


def test_what_does_not_live_is_not_in_the_devices_memory() -> None:
    """The bank is on the host: a seed of a frame of 4.5 MB takes a few hundred bytes, and what it grows to its own."""
    before = held()
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4))
    model.to(DEVICE)
    frame = held() - before
    optimizer = sgd(model.parameters())
    example = torch.randn(4, 64).to(DEVICE)
    grower = Grower(model, optimizer, example_inputs=example, budget=HALF, updates=3, preset="default:peak=1")
    assert held() - before < frame / 100
    for _ in range(3):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
        grower.update()
        optimizer.zero_grad()
        size = 4 * sum(p.numel() for p in model.parameters())
        assert held() - before < 2.2 * size + 100_000  # weights and momentum, and workspaces of libraries
    assert size > frame / 4


def test_a_frame_on_the_meta_device_comes_to_life_where_its_example_is() -> None:
    with torch.device("meta"):
        model = Net()
    optimizer = sgd(model.parameters())
    example = data(0)[0].float()
    grower = Grower(model, optimizer, example_inputs=example, budget=HALF, updates=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
        grower.update()
    assert astray(model, optimizer) == []


@pytest.mark.parametrize("then", [DEVICE, "cpu"])
def test_a_resumed_run_is_the_unbroken_one(then: str, tmp_path: Path) -> None:
    model, optimizer, grower = begun(preset="paper")
    for step in range(6):
        if step == 3:
            torchgrow.save_checkpoint(tmp_path, grower)
        train(model, optimizer, step)
        grower.update()
    again, other, second = begun(then, preset="paper")
    torchgrow.load_checkpoint(tmp_path, second)
    for step in range(3, 6):
        train(again, other, step, then)
        second.update()
    assert astray(again, other, then) == []
    assert apart(model, again) <= (0.0 if DEVICE == then == "emulated" else 1e-9)


def test_averages_are_resumed_where_they_are(tmp_path: Path) -> None:
    class Averaged(torch.optim.swa_utils.AveragedModel):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.register_buffer("seen", torch.zeros(3, device=DEVICE))

    found = []
    for name in ("one", "two"):
        model, optimizer, grower = begun()
        average = Averaged(model).to(DEVICE)
        grower.follow(average)
        if name == "two":
            torchgrow.load_checkpoint(tmp_path, grower)
        train(model, optimizer, 0)
        average.update_parameters(model)
        grower.update()
        if name == "one":
            torchgrow.save_checkpoint(tmp_path, grower)
        found.append({key: x.device.type for key, x in average.state_dict().items() if isinstance(x, Tensor)})
    assert found[0] == found[1]
    assert found[1]["seen"] == DEVICE


def test_a_carried_state_of_the_lab_is_resumed_where_the_network_is(tmp_path: Path) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    checkpoints, state = Checkpoints(folder=tmp_path), (torch.ones(2, device=DEVICE), torch.ones(3, device=DEVICE))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    checkpoints.save(Progress(state=state, taught=state), model, optimizer, None, schedule)
    found = checkpoints.load(model, optimizer, None, schedule)
    assert {x.device.type for x in (*found.state, *found.taught)} == {DEVICE}


@pytest.mark.parametrize("then", [DEVICE, "cpu"])
def test_a_saved_network_loads_anywhere(then: str, tmp_path: Path) -> None:
    model = grown()
    torchgrow.save(model, tmp_path / "network")
    loaded = torchgrow.load(tmp_path / "network", lambda: net(then))
    assert {p.device.type for p in loaded.parameters()} == {then}
    assert apart(model, loaded) == 0.0


def test_what_follows_teaches_and_is_calibrated_stays_there() -> None:
    model, optimizer, grower = begun(start="frame")
    teacher = grower.teacher()
    average = torch.optim.swa_utils.AveragedModel(model)
    grower.follow(average)
    for step in range(6):
        x, y = data(step)
        optimizer.zero_grad()
        torchgrow.distillation_loss(model(x), teacher(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
        grower.update()
        grower.recalibrate([data(100 + step)[0]])
    for one in (model, average, teacher):
        assert {x.device.type for x in [*one.parameters(), *one.buffers()] if x.dim()} == {DEVICE}
    assert {k: x.shape for k, x in average.module.state_dict().items() if isinstance(x, Tensor)} == {
        k: x.shape for k, x in model.state_dict().items() if isinstance(x, Tensor)
    }


@pytest.mark.parametrize("proof", [True, False])
def test_pruning_at_once(proof: bool) -> None:
    model, other = net(), net("cpu")
    torchgrow.prune_(model, data(0)[0], budget=HALF, proof=proof)
    torchgrow.prune_(other, data(0, "cpu")[0], budget=HALF, proof=proof)
    assert apart(model, other) == 0.0


def test_a_search() -> None:
    def fitted(trial: torchgrow.Trial, more: int) -> float:
        assert trial.model is not None
        optimizer = trial.memory.setdefault("optimizer", sgd(trial.model.parameters()))
        for step in range(more):
            train(trial.model, optimizer, step)
        return float(F.cross_entropy(trial.model(data(0)[0]), data(0)[1]))

    search = torchgrow.search(net, HALF, example_inputs=data(0)[0], train=fitted, length=10, candidates=3, depth=True)
    assert search.run().model is not None


def test_a_state_that_is_carried_on() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm, self.out = nn.Embedding(10, 12), nn.LSTM(12, 12, 2), nn.Linear(12, 10)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            y, state = self.lstm(self.embedding(x), state)
            return self.out(y), state

    torch.manual_seed(0)
    model, words = Words().to(DEVICE), torch.randint(0, 10, (5, 2)).to(DEVICE)
    state = (torch.zeros(2, 2, 12, device=DEVICE), torch.zeros(2, 2, 12, device=DEVICE))
    optimizer = sgd(model.parameters())
    grower = Grower(
        model, optimizer, example_inputs=(words, state), budget=Budget(params="60%"), updates=3, carried={1: 1}
    )
    state = grower.carry(state)
    for _ in range(3):
        y, new = model(words, (state[0].detach(), state[1].detach()))
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        grower.update()
        state = grower.carry(new)
    assert {x.device.type for x in state} == {DEVICE}


class Positions(nn.Module):
    """Makes its positions without a word on where, and so where the default is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.places, self.fc = nn.Linear(6, 12), nn.Embedding(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(x) + self.places(torch.arange(x.shape[1])))).mean(1)


def test_the_device_may_be_the_default(tmp_path: Path) -> None:
    """As after `torch.set_default_device`: the user's tensors are made there, ours are not."""
    with torch.device(DEVICE):
        torch.manual_seed(0)
        model = Positions()
        optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(5, 4, 6)
        assert torchgrow.verify(Positions(), x).ok
        torchgrow.prune_(Positions(), x, budget=HALF)
        grower = Grower(model, optimizer, example_inputs=x, budget=HALF, updates=3, preset="paper")
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            torchgrow.save_checkpoint(tmp_path / "checkpoints", grower)
            grower.update()
        torchgrow.save(model, tmp_path / "network")
        loaded = torchgrow.load(tmp_path / "network", Positions)
        again = Positions()
        other = torch.optim.Adam(again.parameters())
        second = Grower(again, other, example_inputs=x, budget=HALF, updates=3, preset="paper")
        torchgrow.load_checkpoint(tmp_path / "checkpoints", second)
        second.update()
    assert astray(model, optimizer) == astray(again, other) == []
    assert apart(model, loaded) == apart(model, again) == 0.0


@pytest.mark.skipif(DEVICE != "cuda", reason="loss scaling, compiled kernels and the order in memory are CUDA's own")
@pytest.mark.parametrize("way", ["scaled float16", "bfloat16", "compiled", "channels last"])
def test_the_ways_of_training_on_a_gpu(way: str) -> None:
    model = Net().to(DEVICE)
    if way == "channels last":
        model.to(memory_format=torch.channels_last)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler(DEVICE, enabled=way == "scaled float16")
    grower = Grower(model, optimizer, example_inputs=data(0)[0].float(), budget=HALF, updates=4, depth=True)
    dtype = torch.float16 if way == "scaled float16" else torch.bfloat16
    for step in range(4):
        x, y = data(step)
        run: Any = torch.compile(model) if way == "compiled" else model
        with torch.autocast(DEVICE, dtype=dtype, enabled="16" in way):
            loss = F.cross_entropy(run(x.float()), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        grower.update()
    assert grower.finished
    assert astray(model, optimizer) == []
    if way == "channels last":
        assert model.get_parameter("stem.weight").is_contiguous(memory_format=torch.channels_last)
