"""Biases take over what leaving units gave: the network computes what the full one does with their means in place."""

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow
import torchgrow.exchange
from growing import breaking, differences, everything
from layered import Residual, Stages
from lookalikes import SlowWeights
from readers import FLAT, LAWS, PICTURES, WAYS, Odd, Transposed, convolutions, mlp
from torchgrow import Budget, Grower, Space, TorchgrowError, prune_
from torchgrow.policies import Paper, Policy, Shrink, View
from torchgrow.structure.bank import Bank
from torchgrow.structure.kept import keep_of
from torchgrow.structure.record import recorded
from torchgrow.structure.space import live_positions


@dataclass(eq=False)
class Chosen(Policy):
    """The units of `wanted` once it is set, the whole frame before."""

    def seed(self, view: View) -> Tensor:
        self.wanted = view.space.everything()
        return self.wanted

    def update(self, view: View) -> tuple[Tensor, bool]:
        return self.wanted, False


def axis_of(module: nn.Module) -> int:
    return 0 if isinstance(module, Transposed) else 1


Units = dict[tuple[str, int], Tensor]


def replaced(frame: nn.Module, unit_of: Units, keep: Tensor, batches: list[Tensor], exact: list[str]) -> nn.Module:
    """The network, where exact readers read means in place of gone units, over samples and positions of kernels.

    Other readers read zeros.
    """
    frame = copy.deepcopy(frame).eval()
    seen: dict[str, list[Tensor]] = {}

    def padded(name: str, x: Tensor) -> Tensor:
        module = frame.get_submodule(name)
        if isinstance(module, nn.Conv2d) and module.padding_mode == "reflect":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode="reflect")
        return x.movedim(channels[name], -1)

    readers = {n: m for n, m in frame.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, Transposed))}
    channels = {n: 1 if isinstance(m, nn.Conv2d) else -1 for n, m in readers.items()}
    hooks = [
        m.register_forward_pre_hook(lambda m, x, n=n: seen.setdefault(n, []).append(padded(n, x[0])))
        for n, m in readers.items()
    ]
    with torch.no_grad():
        for x in batches:
            frame(x)
    for hook in hooks:
        hook.remove()
    for name, module in readers.items():
        units = unit_of.get((f"{name}.weight", axis_of(module)))
        if units is not None:
            gone = (units >= 0) & ~keep[units.clamp(min=0)]
            read = torch.cat([x.flatten(0, -2) for x in seen[name]]).mean(0) * (name in exact)

            def put(module: nn.Module, x: Any, gone: Tensor = gone, read: Tensor = read, n: str = name) -> Tensor:
                return torch.where(gone, read, x[0].movedim(channels[n], -1)).movedim(-1, channels[n])

            module.register_forward_pre_hook(put)
    return frame


def kept(model: nn.Module, frame: nn.Module, space: Space) -> Tensor:
    """The units that a cut model has, by its record."""
    return keep_of(Bank(copy.deepcopy(frame), space), recorded(model.named_modules()), [], "it")


def begin(model: nn.Module, x: Any, policy: Policy | None = None, optimizer: Any = None, **more: Any) -> Any:
    """A run from the whole model, to 60 % of its parameters; a step of a rate of 0 is behind it."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    arguments = {"updates": 3, "budget": Budget(params="60%"), "start": "frame", **more}
    grower = Grower(model, optimizer, example_inputs=x, policy=policy or Shrink(importance="l1"), **arguments)
    optimizer.step()
    return grower


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("how", ["update", "finish", "prune_", "twice"])
@pytest.mark.parametrize("name", LAWS)
def test_gone_units_are_as_if_they_gave_their_means(name: str, how: str) -> None:
    build, batches, exact = LAWS[name]
    torch.manual_seed(1)
    model = build().double()
    frame, x = copy.deepcopy(model), batches[0]
    space = torchgrow.trace(frame, x)
    units = dict(space.unit_of)
    if how == "prune_":
        torchgrow.prune_(model, x, budget=Budget(params="60%"), batches=batches)
    else:
        grower = begin(model, x, Shrink(importance="l1", until=1.0, power=1.0))
        if how == "twice":  # the second cut is of the network after the first
            grower.update(batches)
            before, keep = copy.deepcopy(model), grower.keep.clone()
            units = {place: vector[live_positions(vector, keep)] for place, vector in units.items()}
            grower.optimizer.step()
        (grower.finish if how == "finish" else grower.update)([(x, "labels") for x in batches])
    keep = kept(model, frame, space)
    assert not bool(keep.all())
    frame = before if how == "twice" else frame
    with torch.no_grad():
        found, expected = model.eval()(x), replaced(frame, units, keep, batches, exact.split())(x)
        close(found, expected)
        assert float((found - frame.eval()(x)).abs().max()) > 1e-4, "no test: the units did not matter"


@pytest.mark.parametrize("how", ["update", "prune_"])
def test_units_that_are_constant_leave_without_a_trace(how: str) -> None:
    for build, batches, pairs in ((mlp, FLAT, ["0", "2"]), (convolutions, PICTURES, ["0", "2", "4", "6", "9"])):
        torch.manual_seed(2)
        model = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.Sigmoid) else m for m in build())).double()
        with torch.no_grad():
            for path in pairs:
                model.get_parameter(f"{path}.weight")[::2] *= 1e-14
                model.get_parameter(f"{path}.bias")[::2] = 0.01
        before = model.eval()(batches[0])
        policy = Shrink(importance="l1", allocation="uniform")
        if how == "prune_":
            torchgrow.prune_(model, batches[0], budget=Budget(params="50%"), policy=policy, batches=batches[:1])
        else:
            begin(model, batches[0], policy, budget=Budget(params="50%")).update(batches[:1])
        assert model.get_parameter("2.weight").shape[1] < (20 if build is mlp else 8)
        close(model.eval()(batches[0]), before)


# --- what is left alone, bit for bit ---


@pytest.mark.parametrize("way", [*WAYS, "plainly"])
def test_what_is_no_exact_reader_stays_bit_for_bit(way: str) -> None:
    torch.manual_seed(3)
    model = Odd(way).double()
    space = torchgrow.trace(model, PICTURES[0])
    cut = {n: space.unit_of[f"{n}.weight", 0].tolist() for n in ("first", "last")}
    keep = space.everything()
    keep[[u for u in cut["first"] if u >= 0 and space.removable[u]][1::2]] = False
    assert not bool(keep.all()), "nothing can leave here"
    results = []
    for batches in (PICTURES, None):
        grower = begin(copy.deepcopy(model), PICTURES[0], Chosen(), updates=5)
        grower.policy.wanted = keep
        grower.update(batches)
        assert torch.equal(grower.keep, keep)
        results.append({n: p.detach().clone() for n, p in grower.model.named_parameters() if not n.startswith("last")})
    changed = {name[1:] for name in differences(results[0], results[1])}
    assert changed == ({"reader.bias"} if way == "plainly" else set())


# --- all or nothing, and nothing else ---


class Counting(nn.Module):
    """Draws numbers, counts its calls, and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 4)
        self.drop = nn.Dropout(0.5)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.last(self.drop(torch.relu(self.norm(self.first(x)) + 0 * noise)))


def counting(policy: Policy | None = None) -> Any:
    torch.manual_seed(4)
    model = Counting().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    grower = begin(model, FLAT[0], policy or Shrink(importance="l1"), optimizer)
    for _ in range(2):
        model(FLAT[0]).square().sum().backward()
        optimizer.step()
    model.norm.eval()
    return grower


def around(grower: Grower) -> dict[str, Any]:
    """All that measuring must leave as it was."""
    model, state = grower.model, [*np.random.get_state()]
    keys: Any = state[1]
    return {
        "modes": str([module.training for module in model.modules()]),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.shape},
        "drawn": {"torch": torch.get_rng_state(), "others": f"{random.getstate()} {keys.tolist()} {state[2]}"},
    }


def test_nothing_else_changes() -> None:
    """Modes, counters and random numbers; the structure, and what the optimizer holds, is as without batches."""
    with_means, without = counting(), counting()
    before = around(with_means)
    with_means.update(iter(FLAT))
    assert not differences(before, around(with_means))
    without.update()
    one, other = everything(with_means, run=False), everything(without, run=False)
    assert {name for name in differences(one, other) if "generator" not in name} == {"/last.bias"}


def fails_later() -> Iterator[Tensor]:
    yield FLAT[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "policy", "text"),
    [
        ([], None, "units leave, and batches is empty, so nothing says what they give on average; nothing was changed"),
        ([FLAT[0] * torch.nan], None, r"what last.weight reads from units that leave is not finite on average, so la"),
        (FLAT, Paper(), "biases take over exactly only from units that count in full, and Paper folds gates into weig"),
        (fails_later, None, "the disk is gone"),
        ([torch.ones(2, 3)], None, "mat1 and mat2"),
    ],
)
def test_what_cannot_be_measured_changes_nothing(batches: Any, policy: Policy | None, text: str) -> None:
    grower = counting(policy)
    for act in (grower.update, grower.finish):
        before, still = everything(grower, run=False), around(grower)
        with pytest.raises((TorchgrowError, OSError, RuntimeError), match=text):
            act(batches() if callable(batches) else batches)
        assert not differences(before, everything(grower, run=False))
        assert not differences(still, around(grower))
    if policy is None:
        model = mlp().double()
        weights = copy.deepcopy(model.state_dict())
        made = batches() if callable(batches) else batches
        with pytest.raises((TorchgrowError, OSError, RuntimeError), match=text.replace("last", "2")[:50]):
            torchgrow.prune_(model, FLAT[0], budget=Budget(params="50%"), batches=made)
        assert not differences(weights, dict(model.state_dict()))


@pytest.mark.parametrize("call", [0, 7, 20])
def test_an_interrupted_change_takes_the_biases_back(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grower = counting()
    before = everything(grower, run=False)
    monkeypatch.setattr(torchgrow.exchange, "run", breaking(call, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        grower.update(FLAT)
    gradients = [n for n in before if "gradient" in n]
    assert not [d for d in differences(before, everything(grower, run=False)) if d.strip("/") not in gradients]
    grower.update(FLAT)


def test_batches_are_read_only_where_units_leave() -> None:
    grower = begin(mlp().double(), FLAT[0], Chosen(), updates=5)
    batches = itertools.chain(FLAT)
    grower.update(batches)
    assert len(list(batches)) == len(FLAT)


def test_copies_of_weights_in_the_optimizer_move_along() -> None:
    """Slow weights would pull a bias back to what it was."""
    torch.manual_seed(5)
    model = mlp().double()
    optimizer = SlowWeights(model.parameters(), 0.01)
    grower = begin(model, FLAT[0], optimizer=optimizer)
    for _ in range(6):
        model(FLAT[0]).square().sum().backward()
        optimizer.step()
    gaps = {}
    for name in ("2.bias", "4.bias"):  # one is cut, the other is not
        bias = model.get_parameter(name)
        gaps[name] = (bias - optimizer.state[bias]["slow"]).detach().clone(), bias.detach().clone()
    keep = grower.keep
    grower.update(FLAT)
    assert not torch.equal(keep, grower.keep)
    units = grower.space.unit_of["2.bias", 0]
    for name, (gap, before) in gaps.items():
        bias = model.get_parameter(name)
        stay = grower.keep[units] if name == "2.bias" else slice(None)
        assert not torch.equal(bias, before[stay])
        close((bias - optimizer.state[bias]["slow"]).detach(), gap[stay])


# --- wherever it may happen ---


def test_layers_leave_without_compensation() -> None:
    torch.manual_seed(6)
    model = Stages(Residual).double()
    grower = begin(model, PICTURES[0], Chosen(), updates=5, depth=True)
    layers = [block.unit for block in grower.space.blocks]
    keep = grower.keep.clone()
    keep[layers[0]] = False
    grower.policy.wanted = keep
    before = copy.deepcopy(model).eval()
    before.stage[1] = nn.Identity()
    grower.update(PICTURES)
    close(model.eval()(PICTURES[0]), before(PICTURES[0]))
    assert torch.equal(model.head.bias, before.head.bias)


def test_from_a_seed_and_into_channels_last() -> None:
    """Units that come and leave at one update: old ones are compensated, and memory stays laid out as it was."""
    torch.manual_seed(7)
    model: Any = convolutions().double().to(memory_format=torch.channels_last)
    frame = copy.deepcopy(model)
    grower = begin(model, PICTURES[0], Chosen(), updates=6, rescale=False)
    everything_else, first = grower.keep.clone(), grower.space.unit_of["0.weight", 0]
    everything_else[first[:4]] = False
    grower.policy.wanted = everything_else
    grower.update(PICTURES)
    close(model(PICTURES[0]), replaced(frame, dict(grower.space.unit_of), grower.keep, PICTURES, ["2"])(PICTURES[0]))
    bias = model[2].bias.detach().clone()
    back = grower.space.everything()
    back[first[4:6]] = False
    grower.policy.wanted = back
    read = [torch.sigmoid(model[0](x)).mean((0, 2, 3)) for x in PICTURES]
    lost = model[2].weight[:, :2, 0, 0] @ torch.stack(read).mean(0)[:2]
    grower.optimizer.step()
    grower.update(PICTURES)
    close(model[2].bias, bias + lost)
    assert model[0].weight.shape[0] == 6
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_run_from_the_seed_takes_batches_at_every_update(device: str) -> None:
    torch.manual_seed(8)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))
    x = FLAT[0].float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="40%"), updates=8)
    left = 0
    for _ in range(8):
        F.cross_entropy(model(x), torch.arange(7) % 3).backward()
        optimizer.step()
        left += grower.update([x]).detached
    assert left
    assert grower.finished
    assert bool(model(x).isfinite().all())


def test_followers_keep_their_biases() -> None:
    torch.manual_seed(9)
    model: Any = mlp().double()
    grower = begin(model, FLAT[0])
    average: Any = torch.optim.swa_utils.AveragedModel(model)
    grower.follow(average)
    bias = average.module[4].bias.detach().clone()
    grower.update(FLAT)
    assert torch.equal(average.module[4].bias, bias)
    assert not torch.equal(model[4].bias, bias)


def test_a_compiled_network_is_measured_as_it_is_written() -> None:
    import torch._dynamo

    models = [mlp().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].compile(backend="eager")
    for model in models:
        begin(model, FLAT[0]).update(FLAT)
    torch.compiler.reset()
    assert not differences(dict(models[0].state_dict()), dict(models[1].state_dict()))


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """Data of no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)).unbind()


def test_a_loader_of_no_length_does() -> None:
    """As for `recalibrate`; the same batches in a list do the same."""
    found = []
    for batches in (torch.utils.data.DataLoader(Stream(), batch_size=None), list(Stream())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        prune_(model, torch.randn(4, 6), budget=Budget(params="50%"), batches=batches)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))
