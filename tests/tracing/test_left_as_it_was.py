"""Modules that change themselves in a forward: traced and proven as they will be, and left as they were."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from torchgrow import trace, verify


class ActNorm(nn.Module):
    """Sets itself from the first batch it sees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(1, width, 1, 1)), nn.Parameter(torch.ones(1, width, 1, 1))
        self.set, self.seen = False, list[torch.Size]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        if not self.set:
            with torch.no_grad():
                self.shift.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.data = 1 / (x.std((0, 2, 3), keepdim=True) + 1e-6)
            self.set = True
        return self.scale * (x + self.shift)


class Merging(nn.Linear):
    """A low-rank part that is merged into the weight in evaluation mode and taken out of it in training."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.down, self.up, self.merged = nn.Parameter(torch.randn(2, a)), nn.Parameter(torch.randn(b, 2)), False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


class Cached(nn.Module):
    """Keeps a table of its weights in evaluation mode and drops it when trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(width)), dict[str, Tensor]()

    def train(self, mode: bool = True) -> "Cached":
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.table.exp()
        if "exp" not in self.cache:
            self.cache["exp"] = self.table.exp()
        return x * self.cache["exp"]


class Moving(nn.Module):
    """Counts calls in an attribute and moves a parameter at every one of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.center, self.calls = nn.Parameter(torch.zeros(width), requires_grad=False), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.training:
            self.center.data.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.center


def changing(name: str) -> tuple[nn.Module, Tensor, dict[str, int]]:
    if name == "data-dependent initialisation":
        return nn.Sequential(zoo.c3(3, 6), ActNorm(6), nn.ReLU(), zoo.c3(6, 2)), torch.randn(4, 3, 6, 6), {"0": 6}
    middle: nn.Module = {"merged": Merging, "cached": Cached, "moving": Moving}[name](
        *([6, 6] if name == "merged" else [6])
    )
    layers = [nn.Linear(3, 6), middle, nn.ReLU(), nn.Linear(6, 2)]
    return nn.Sequential(*layers), torch.randn(4, 3), {"0": 6, "1": 6, "1.down[0]": 2} if name == "merged" else {"0": 6}


def state(model: nn.Module) -> list[Any]:
    """Everything that a module holds, by value."""
    held = []
    for module in model.modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters", "_buffers"):
                held.append((key, copy.deepcopy(value)))
    return held


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["data-dependent initialisation", "merged", "cached", "moving"])
def test_the_model_is_as_before_and_the_network_is_proven_as_it_will_be(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x, widths = changing(name)
    model.train(training)
    tensors = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    before, random_states = state(model), (torch.get_rng_state(), random.getstate())
    space = trace(model, x)
    assert str(state(model)) == str(before)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    for key, (tensor, value) in tensors.items():
        assert model.state_dict(keep_vars=True)[key] is tensor
        assert torch.equal(tensor, value)
    assert space.widths(space.everything()) == widths
    assert not [str(frozen) for frozen in space.frozen if frozen.op == "proof"]
    assert verify(model, x, space=space, trials=1).ok
