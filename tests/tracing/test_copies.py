"""Copies that tracing and proof run: every run begins in the same state, and none reads the original."""

import copy
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchgrow import TraceError, trace, verify
from torchgrow.tracing.prover import Prover


class Remembering(nn.Module):
    """Does something else at every call, by what it keeps in an attribute"""

    def __init__(self, kept: Any, at_call: Callable[[Any], float]) -> None:
        super().__init__()
        self.kept, self.at_call = kept, at_call

    def forward(self, x: Tensor) -> Tensor:
        return x * self.at_call(self) if self.training else x


def counted(m: Any) -> float:
    m.kept += 1
    return 1 / m.kept


def listed(m: Any) -> float:
    m.kept.append(len(m.kept))
    return float(sum(m.kept))


def looked_up(m: Any) -> float:
    m.kept["schedule"]["step"] += 1
    return 0.9 ** m.kept["schedule"]["step"]


def of_an_object(m: Any) -> float:
    m.kept.step += 1
    return 0.9**m.kept.step


def taken(m: Any) -> float:
    return float(m.kept.popleft())


def annealed(m: Any) -> float:
    m.kept.mul_(0.9)
    return float(m.kept)


REMEMBERING: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "a counter": (lambda: 1, counted),
    "a list": (lambda: [1], listed),
    "a dict in a dict": (lambda: {"schedule": {"step": 0}}, looked_up),
    "an object": (lambda: SimpleNamespace(step=0), of_an_object),
    "a queue": (lambda: deque(range(1, 100)), taken),
    "a tensor": (lambda: torch.ones(()), annealed),
    "Python's generator": (lambda: random.Random(0), lambda m: m.kept.random()),
    "numpy's generator": (lambda: np.random.default_rng(0), lambda m: float(m.kept.random())),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_every_run_of_the_proof_begins_in_the_same_state(name: str) -> None:
    """What a forward remembers of its calls is no difference between a network and its frame."""
    make, at_call = REMEMBERING[name]
    model = nn.Sequential(nn.Linear(3, 6), Remembering(make(), at_call), nn.ReLU(), nn.Linear(6, 2))
    before, x = copy.deepcopy(model[1].kept), torch.randn(4, 3)
    report = verify(model, x, trials=2)
    assert report.ok, report
    assert report.groups == {"0": 6}, report
    assert str(vars(model[1])["kept"]) == str(before) or "enerator" in name


class Shown(nn.Module):
    """Puts out a buffer or an attribute that it has written to"""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(3, 6), nn.Linear(6, 2), torch.zeros(4).double()
        if held == "buffer":
            del self.kept
            self.register_buffer("kept", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        with torch.no_grad():
            self.kept += (h + 2).prod(1)
        return self.b(h), self.kept


@pytest.mark.parametrize("held", ["buffer", "attribute"])
def test_what_a_model_holds_and_puts_out_is_compared_as_it_was_put_out(
    held: str,
) -> None:
    model, x = Shown(held), torch.randn(4, 3)
    assert verify(model, x).units == 0
    space = trace(Bare(held), x)
    keep = space.everything()
    keep[0] = False
    assert Prover(model, space, x, seed=0).error(keep)[0] > 1e-3


class Bare(nn.Module):
    """The layers of `Shown` alone, whose units can go"""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        if held == "buffer":
            self.register_buffer("kept", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_activations_kept_from_an_earlier_call_are_no_hindrance() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    model.last = model(torch.randn(2, 3))  # with a history, which deepcopy refuses
    assert verify(model, torch.randn(2, 3), trials=1).groups == {"0": 6}
    assert model.last.grad_fn is not None


class Closed(nn.Module):
    """Its forward is a function that holds the module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(4, 2)
        self.block = lambda x: self.c(self.b(self.a(x))[:, :4])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_a_proof_that_would_read_the_original_is_refused() -> None:
    with pytest.raises(TraceError, match=r"reads a\.weight of the original: a function that is kept on the model"):
        trace(Closed().double(), torch.randn(4, 3).double())
