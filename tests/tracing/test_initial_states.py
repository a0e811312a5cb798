"""Zeros beside an input: an initial state follows the units it becomes, zeros of a fixed number keep them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import drawn
from torchgrow import trace, verify
from torchgrow.tracing.space_from_labels import ZEROS

HIDDEN = 6
Start = Callable[["Recurrent", Tensor], Tensor]


class Recurrent(nn.Module):
    """The network of a tutorial: the next state is that of i(input beside state); [N, T, 4] to [N, 3]."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start, self.hidden = start, HIDDEN
        self.i, self.o = nn.Linear(4 + HIDDEN, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start(self, x)
        for step in x.unbind(1):
            state = torch.tanh(self.i(torch.cat([step, state], 1)))
        return self.o(state)


class ConvLSTM(nn.Module):
    """[N, T, 2, H, W] to [N, 1, H, W], all gates by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = HIDDEN
        self.gates, self.o = nn.Conv2d(2 + HIDDEN, 4 * HIDDEN, 3, padding=1), nn.Conv2d(HIDDEN, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden, *x.shape[3:])
        for step in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([step, h], 1)).split(self.hidden, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.o(h)


STARTS: dict[str, Start] = {
    "zeros": lambda m, x: torch.zeros(len(x), m.hidden, dtype=x.dtype),
    "new zeros": lambda m, x: x.new_zeros(len(x), m.hidden),
    "by the weight": lambda m, x: x.new_zeros(len(x), m.i.weight.shape[0]),
}


@pytest.mark.parametrize("name", [*STARTS, "convolutions"])
def test_an_initial_state_follows_in_runs_of_any_length(name: str) -> None:
    torch.manual_seed(0)
    model = (ConvLSTM() if name == "convolutions" else Recurrent(STARTS[name])).double()
    sizes = (2, 3, 2, 5, 5) if name == "convolutions" else (2, 3, 4)
    report = verify(model, torch.randn(sizes, dtype=torch.float64))
    assert report.ok, report
    assert list(report.groups.values()) == [HIDDEN], report
    space = trace(model, torch.randn(sizes, dtype=torch.float64))
    for length in (1, 2, 5):
        x = torch.randn(3, length, *sizes[2:], dtype=torch.float64)
        assert drawn.error(model, space, 0.5, length, x) < 1e-9


def test_zeros_of_a_fixed_number_keep_what_they_meet() -> None:
    space = trace(Recurrent(lambda m, x: x.new_zeros(len(x), HIDDEN)), torch.randn(2, 3, 4))
    assert not space.removable.any()
    assert any(frozen.op == "proof" for frozen in space.frozen)


def test_zeros_of_a_fixed_number_keep_it_without_a_proof_too() -> None:
    space = trace(Recurrent(lambda m, x: x.new_zeros(len(x), HIDDEN)), torch.randn(2, 3, 4), proof=False)
    assert not space.removable.any()


def test_columns_that_read_only_zeros_stay() -> None:
    """After one step nothing tells which columns read which rows in the next one."""
    space = trace(Recurrent(STARTS["zeros"]), torch.randn(2, 1, 4))
    units = space.unit_of["i.weight", 1]
    assert not space.removable[units[units >= 0]].any()
    assert any(frozen.reason == ZEROS for frozen in space.frozen)
