"""Law 1 where one attribute counts several groups: they are cut alike, or stay whole."""

import copy

import pytest
import torch
from torch import Tensor, nn

from drawn import zeroed
from torchgrow import Budget, Grower, shrink_, trace, verify
from torchgrow.tracing.prover import Prover


class NonLocal(nn.Module):
    """stem conv3(3, 16) -> non-local block of width 8 -> mean -> fc(16, 4); `inter` sizes values, queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.inter = 8
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.g, self.theta, self.phi = (nn.Conv2d(16, 8, 1) for _ in range(3))
        self.out, self.fc = nn.Conv2d(8, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        g, q, k = (conv(x).view(len(x), self.inter, -1) for conv in (self.g, self.theta, self.phi))
        y = g @ (q.mT @ k).softmax(-1).mT
        return self.fc((self.out(y.reshape(len(x), self.inter, *x.shape[2:])) + x).mean((2, 3)))


class TwoLSTMs(nn.Module):
    """Zero states for two LSTMs made by one `hidden_size`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 8
        self.a, self.b = nn.LSTM(6, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for lstm in (self.a, self.b):
            state = x.new_zeros(1, len(x), self.hidden_size)
            x, _ = lstm(x, (state, state))
        return self.fc(x[:, -1])


class Halves(nn.Module):
    """Two layers of two halves; both are parted at `h`, and summed: where one is cut otherwise, nothing fails."""

    def __init__(self) -> None:
        super().__init__()
        self.h = 8
        self.a, self.b = nn.Linear(6, 16), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        return sum(y[:, : self.h].relu().sum(-1) * y[:, self.h :].sum(-1).tanh() for y in (self.a(x), self.b(x)))


class Double(nn.Module):
    """A layer of `h` and one of twice as many; both are viewed by `h`, so that they cannot be cut alike by unit."""

    def __init__(self) -> None:
        super().__init__()
        self.h = 10
        self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 20)
        self.c, self.d = nn.Linear(10, 2), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        return self.c(self.a(x).relu().view(-1, self.h)) + self.d(self.b(x).relu().view(-1, 2 * self.h))


SHARED = (NonLocal, TwoLSTMs, Halves, Double)


def given(kind: type[nn.Module]) -> Tensor:
    return torch.randn(4, 3, 5, 5) if kind is NonLocal else torch.randn(4, 5, 6)


@pytest.mark.parametrize("kind", SHARED)
def test_law_1_with_other_numbers_in_every_group(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), given(kind).double()
    space = trace(model, x)
    sizes = torch.bincount(space.group_of[space.removable], minlength=space.n_groups)
    assert verify(model, x, space=space).ok
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        keep = space.everything()
        for group in torch.nonzero(sizes > 1).flatten():
            units = torch.nonzero(space.group_of == group).flatten()
            gone = torch.randint(1, len(units), (), generator=generator)
            keep[units[torch.randperm(len(units), generator=generator)[:gone]]] = False
        small = copy.deepcopy(model)
        shrink_(small, space, keep)
        torch.testing.assert_close(small(x), zeroed(model, space, keep)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SHARED[:3])
def test_what_one_attribute_counts_is_cut_alike(kind: type[nn.Module]) -> None:
    """Frozen it would be exact too. A frame on the meta device is proven by the grower, with the same result."""
    space = trace(kind(), given(kind))
    (count,) = {len(a.units) for a in space.attributes if not a.module}
    assert count == 8
    widths = space.widths(space.everything())
    assert widths == ({"stem": 16, "g": 8} if kind is NonLocal else {next(iter(widths)): 8})
    if kind is TwoLSTMs:  # whether a state is zero cannot be seen there
        return
    with torch.device("meta"):
        frame = kind()
    optimizer = torch.optim.SGD(frame.parameters(), lr=0.1)
    grower = Grower(frame, optimizer, budget=Budget(params="50%"), example_inputs=given(kind), updates=3)
    assert grower.space.widths(grower.space.everything()) == widths


def test_draws_tell_any_two_groups_of_one_size_apart() -> None:
    """Over three turns, for up to (size - 1) to the third of them; of two units, one group keeps both now and then."""
    for size, count in ((2, 8), (3, 8), (5, 64), (9, 20)):
        model = nn.Sequential(
            *(m for _ in range(count) for m in (nn.Linear(size, size), nn.ReLU())), nn.Linear(size, 1)
        )
        x = torch.randn(2, size)
        prover = Prover(model, trace(model, x, proof=False), x, 0)
        assert prover.space.n_groups == count
        kept = [list(prover.space.widths(prover.draw(0.3, turn=turn)).values()) for turn in range(3)]
        assert len(set(zip(*kept, strict=True))) == count
        assert all(width >= 1 for turn in kept for width in turn)
        assert sum(map(sum, kept)) < 3 * count * size
