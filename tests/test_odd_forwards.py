"""Forwards that do odd things: each gets an answer, never a wrong network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import TraceError, verify
from torchgrow.replay import replay


class Odd(nn.Module):
    """a(3, 6) -> something odd -> b(6, 4) -> c(4, 2)"""

    def __init__(self, odd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.odd = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2), odd

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.odd(self.a(x)))))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def half_in_place(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :3].mul_(2)
    return y


def all_in_place(y: Tensor) -> Tensor:
    y = y.clone()
    y.mul_(2).add_(1).relu_()
    return y


def row_by_row(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    for i in range(len(y)):
        out[i] = y[i].tanh()
    return out


def masked(y: Tensor) -> Tensor:
    y = y.clone()
    y[y < 0] = 0
    return y


def which_way(y: Tensor) -> Tensor:
    return y.relu() if float(y.detach().flatten()[0]) > 1e9 else y.sigmoid()


def by_width(y: Tensor) -> Tensor:
    return y * 2 if y.shape[1] == 6 else y * 3


def as_complex(y: Tensor) -> Tensor:
    return torch.polar(y.abs(), y).real


# what it does -> removable units of a (6) and b (4): 10 if it passes, 4 if a must stay
ANSWERS = [
    (F.relu, 10),
    (Square.apply, 10),
    (all_in_place, 10),
    (row_by_row, 10),
    (masked, 10),
    (half_in_place, 4),
    (by_width, 4),
    (lambda y: y + torch.randn_like(y), 10),  # noise that no reader of a removed unit sees
    (lambda y: F.dropout(y, 0.5, training=True), 10),
    (lambda y: y * torch.rand(1), 10),
    (lambda y: y / y.norm(), 10),  # a norm is the same without what is zero
    (lambda y: y / y.sigmoid().norm(), 4),
    (lambda y: torch.from_numpy(y.detach().numpy()), 4),
    (lambda y: y[:, torch.randperm(6)], 4),
    (lambda y: y.sort(-1).values, 4),
    (lambda y: torch.cat([y[:, :2], y[:, 2:]], 1), 4),
    (lambda y: y @ torch.eye(6, dtype=y.dtype), 4),
    (as_complex, 10),
]


@pytest.mark.parametrize(("odd", "units"), ANSWERS, ids=lambda v: getattr(v, "__name__", "") if callable(v) else "")
def test_odd_operations_get_the_right_answer(odd: Callable[[Tensor], Tensor], units: int) -> None:
    torch.manual_seed(0)
    report = verify(Odd(odd), torch.randn(5, 3), fraction=0.4)
    assert report.ok, report
    assert report.units == units, report


def test_reading_a_value_freezes_nothing_but_says_so_if_it_matters() -> None:
    report = verify(Odd(which_way), torch.randn(5, 3))
    assert report.ok
    assert report.units in (4, 10)


def test_lazy_modules_are_refused_with_the_fix() -> None:
    with pytest.raises(TraceError, match=r"not materialised yet; run one forward pass before"):
        verify(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), torch.randn(2, 3))


def test_complex_weights_are_refused_and_complex_buffers_are_not() -> None:
    class Complex(Odd):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * self.turn).real)

    assert verify(Complex(), torch.randn(4, 3)).units == 10
    model = Complex()
    model.extra = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(TraceError, match="extra is complex; keep real and imaginary part in two real parameters"):
        verify(model, torch.randn(4, 3))


def test_a_constant_is_judged_by_what_it_was_when_it_was_used() -> None:
    """Labels are looked at some operations later."""
    states = []

    def changed_after_use(y: Tensor) -> Tensor:
        scale = torch.ones(y.shape[1])
        y = y * scale  # the same for every unit then
        scale += torch.arange(y.shape[1])
        states.append(scale)
        return y.relu_()

    assert replay(Odd(changed_after_use), torch.randn(5, 3)).n_units == 10
    assert states[0].tolist() == [1, 2, 3, 4, 5, 6]
