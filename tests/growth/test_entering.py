"""Units that cannot enter without an effect: at zero they would never learn, so they enter with initial weights."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgrow import Budget, Grower, trace
from torchgrow.policies import Late


class Layer(nn.Module):
    """A layer of eight, plain or around a branch, with what comes last in it."""

    def __init__(self, last: Callable[[Tensor], Tensor], plain: bool = False) -> None:
        super().__init__()
        self.linear, self.last, self.plain = nn.Linear(8, 8), last, plain

    def forward(self, x: Tensor) -> Tensor:
        branch = self.last(self.linear(x))
        return branch if self.plain else x + branch


class Outside(Layer):
    """A layer whose last operation is outside of the branch, as in ResNets."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.linear(x))


class Tied(nn.Module):
    """An autoencoder that reads its units by the weights that produce them, perhaps with a norm between."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(32, 8) / 3), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(F.relu(self.norm(F.linear(x, self.weight))), self.weight.t()))


class Summed(nn.Module):
    """Units that are read by a sum over them, or that have a norm over them, beside weights."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 16), nn.Linear(16, 4), norm

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.b(F.normalize(hidden, dim=1)) if self.norm else self.b(hidden) * hidden.sum(1, keepdim=True)


def layers(*blocks: nn.Module) -> nn.Module:
    first = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    return nn.Sequential(first, nn.Sequential(*blocks), nn.Linear(8, 4))


WITH_EFFECT: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain layers": (lambda: layers(*(Layer(F.relu, plain=True) for _ in range(3))), True),
    "branches that end in a ReLU": (lambda: layers(*(Layer(F.relu) for _ in range(3))), True),
    "tied weights": (Tied, False),
    "tied weights around a norm": (lambda: Tied(norm=True), False),
    "a norm over units": (lambda: Summed(norm=True), False),
    "a sum over units": (lambda: Summed(norm=False), False),
}


@pytest.mark.parametrize("early", [True, False], ids=["finish", "update"])
@pytest.mark.parametrize("name", WITH_EFFECT)
def test_what_would_be_dead_enters_with_an_effect_and_learns(name: str, early: bool) -> None:
    """Each was at zero for good, with gradients of exactly 0, and behind plain layers so was all the rest."""
    build, depth = WITH_EFFECT[name]
    torch.manual_seed(0)
    model = build().double()
    x, optimizer, labels = torch.randn(64, 8).double(), torch.optim.SGD(model.parameters(), 0.05), torch.arange(64) % 4
    policy = Late(until=0.5, grow="both" if depth else "width", layer_lag=1.0, newborns="silent")
    grower = Grower(
        model, optimizer, example_inputs=x, budget=Budget(params="90%"), updates=4, policy=policy, depth=depth
    )

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    steps(2)
    grower.update()
    steps(2)
    old, before = grower.keep.clone(), model(x).detach()
    grower.finish() if early else grower.update()
    entered = grower.space.present(grower.keep & ~old) & ~old
    assert int(entered.sum()) > 1
    assert not torch.allclose(model(x), before)
    steps(3)
    learns = torch.zeros(grower.space.n_units, dtype=torch.bool)
    for key, parameter in model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.any()):
            continue
        if key in grower.space.block_of:
            learns[grower.space.block_of[key]] = True
        for axis in grower.space.cut_axes.get(key, ()):
            if axis >= 0:
                vector = grower.space.unit_of[key, axis]
                live = vector[(vector < 0) | grower.space.present(grower.keep)[vector.clamp(min=0)]]
                moved = parameter.grad.transpose(axis, 0).abs().reshape(len(live), -1).sum(1) > 0
                learns[live[moved & (live >= 0)]] = True
    assert int((entered & ~learns).sum()) <= int(entered.sum()) // 8


@pytest.mark.parametrize(
    ("blocks", "silent"),
    [
        ([Layer(F.relu, plain=True)], False),
        ([Layer(F.relu)], False),
        ([Layer(torch.square)], False),
        ([Layer(F.leaky_relu)], True),
        ([Layer(F.gelu)], True),
        ([Layer(nn.Dropout(0.5))], True),
        ([Outside(F.relu)], True),
        ([Layer(F.relu), Outside(F.relu), Layer(F.silu)], [False, True, True]),
    ],
)
def test_only_layers_with_gradients_at_zero_can_be_silent(
    blocks: Sequence[nn.Module], silent: bool | list[bool]
) -> None:
    space = trace(layers(*blocks), torch.randn(4, 8), depth=[f"1.{k}" for k in range(len(blocks))])
    silent = silent if isinstance(silent, list) else [silent]
    assert [
        any(int(vector[0]) == block.unit for (_, axis), vector in space.columns.items() if axis < 0)
        for block in space.blocks
    ] == silent
    assert all(bool(space.removable[block.unit]) for block in space.blocks)


def test_statistics_that_are_means_over_all_batches_begin_anew_where_units_come() -> None:
    """Weighed as if they had seen all batches before, what units come with would stay in the mean for long."""
    torch.manual_seed(0)
    linear, norm = nn.Linear(6, 16), nn.BatchNorm1d(16, momentum=None)
    model = nn.Sequential(linear, norm, nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    grower = Grower(
        model, optimizer, example_inputs=torch.randn(4, 6), budget=Budget("90%"), updates=6, policy=Late(until=0.4)
    )
    average = copy.deepcopy(model)
    grower.follow(average)
    means = []
    for _ in range(5):
        for _ in range(20):
            x = torch.randn(64, 6) * 5 + 3
            F.cross_entropy(model(x), torch.arange(64) % 3).backward()
            optimizer.step()
        means.append(int(norm.get_buffer("num_batches_tracked")))
        x = torch.randn(4096, 6) * 5 + 3
        ratio = norm.running_var / linear(x).detach().var(0)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.15, atol=0)
        counted = average.get_buffer("1.num_batches_tracked").fill_(7)
        born = grower.update().born
        assert int(counted) == (0 if born else 7)
    assert means == [20, 40, 60, 20, 40]
