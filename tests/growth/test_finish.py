"""A run that is ended early: what enters then has no effect at first, and learns if the network trains on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgrow import Budget, Grower
from torchgrow.lab.models import ResNet
from torchgrow.policies import Late, Policy, View


class Words(nn.Module):
    """An LSTM over words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(10, 12), nn.LSTM(12, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x))[0][:, -1])


class Gated(Late):
    """Units count by a half, which is folded into the weights."""

    def seed(self, view: View) -> Tensor:
        self.gate = torch.full((view.space.n_units,), 0.5, dtype=torch.float64)
        return super().seed(view)


def conv(norm: bool) -> nn.Module:
    """Three convolutions of 16."""
    parts = [
        (nn.Conv2d(16 if i else 3, 16, 3, padding=1), *([nn.BatchNorm2d(16)] if norm else []), nn.ReLU())
        for i in range(3)
    ]
    return nn.Sequential(*(m for part in parts for m in part), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Policy, bool]] = {
    "batch norm": (lambda: conv(True), Late(), False),
    "no norm": (lambda: conv(False), Late(), False),
    "residual": (lambda: ResNet(depth=14, widths=(8, 16, 16), classes=4), Late(), False),
    "layers": (lambda: ResNet(depth=14, widths=(8, 16, 16), classes=4), Late(grow="both", layer_lag=1.0), True),
    "MLP": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4)), Late(), False),
    "LSTM": (Words, Late(), False),
    "gates": (lambda: conv(True), Gated(), False),
}


def begun(name: str) -> tuple[Grower, Tensor, Tensor]:
    """A run after two of its updates, with inputs and labels."""
    build, policy, depth = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    x = torch.randint(10, (8, 5)) if name == "LSTM" else torch.randn(8, 3, 8, 8).double()
    optimizer, budget = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), Budget(params="90%")
    grower = Grower(model, optimizer, example_inputs=x, budget=budget, updates=20, policy=policy, depth=depth)
    labels = torch.randint(4, (8,))
    for _ in range(2):
        steps(grower, x, labels, 2)
        grower.update()
    return grower, x, labels


def steps(grower: Grower, x: Tensor, labels: Tensor, count: int) -> None:
    for _ in range(count):
        grower.optimizer.zero_grad()
        F.cross_entropy(grower.model(x), labels).backward()
        grower.optimizer.step()


def scores(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(x)
    model.train()
    return found


def reading(grower: Grower, units: Tensor) -> dict[int, list[Tensor]]:
    """By unit, the gradients of the weights by which it is read; of a layer, of those that carry its gate."""
    space, found = grower.space, dict[int, list[Tensor]]()
    for (name, axis), vector in space.columns.items():
        gradient = grower.model.get_parameter(name).grad
        live = vector if axis < 0 else vector[(space.unit_of[name, axis] < 0) | grower.keep[space.unit_of[name, axis]]]
        for place, unit in enumerate(live.tolist()):
            if unit >= 0 and bool(units[unit]) and gradient is not None and gradient.numel():
                found.setdefault(unit, []).append(gradient if axis < 0 else gradient.select(axis, place))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_units_that_enter_at_the_end_change_nothing_and_learn(name: str) -> None:
    """Outputs stay to rounding, also those of an average that follows; each unit has a gradient when it is trained on.

    Zero weights where a unit is produced would leave outputs as they are too, but a ReLU has no gradient at 0: those
    units stayed at zero for good.
    """
    grower, x, labels = begun(name)
    average = torch.optim.swa_utils.AveragedModel(grower.model) if name != "LSTM" else None
    if average is not None:
        grower.follow(average)
    old, before = grower.keep.clone(), scores(grower.model, x)
    grower.finish()
    entered = grower.keep & ~old
    assert int(entered.sum()) > 3
    torch.testing.assert_close(scores(grower.model, x), before, rtol=1e-12, atol=1e-12)
    if average is not None:
        torch.testing.assert_close(scores(average, x), before, rtol=1e-12, atol=1e-12)
    steps(grower, x, labels, 3)
    found = reading(grower, grower.space.present(entered))
    assert found.keys() == set(torch.nonzero(grower.space.present(entered)).flatten().tolist())
    dead = [unit for unit, gradients in found.items() if all(float(g.abs().max()) == 0 for g in gradients)]
    assert len(dead) <= len(found) // 8, dead  # a ReLU may be at rest for all of a small batch
