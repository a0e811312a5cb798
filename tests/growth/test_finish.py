"""Units that enter without an effect, at the end of a run or by a policy's wish: outputs stay, and the units learn."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgrow import Budget, Grower, TorchgrowError
from torchgrow.lab.models import ResNet
from torchgrow.policies import Late, Policy, Shrink, View


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
    "batch norm": (lambda: conv(True), Late(newborns="silent"), False),
    "no norm": (lambda: conv(False), Late(newborns="silent"), False),
    "residual": (lambda: ResNet(depth=14, widths=(8, 16, 16), classes=4), Late(newborns="silent"), False),
    "layers": (
        lambda: ResNet(depth=14, widths=(8, 16, 16), classes=4),
        Late(grow="both", layer_lag=1.0, newborns="silent"),
        True,
    ),
    "MLP": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4)),
        Late(newborns="silent"),
        False,
    ),
    "LSTM": (Words, Late(newborns="silent"), False),
    "gates": (lambda: conv(True), Gated(newborns="silent"), False),
}


def begun(name: str, updates: int = 20) -> tuple[Grower, Tensor, Tensor]:
    """A run after two of its updates, with inputs and labels; with 6 in all, the next one grows."""
    build, policy, depth = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    x = torch.randint(10, (8, 5)) if name == "LSTM" else torch.randn(8, 3, 8, 8).double()
    optimizer, budget = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), Budget(params="90%")
    grower = Grower(model, optimizer, example_inputs=x, budget=budget, updates=updates, policy=policy, depth=depth)
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


@pytest.mark.parametrize("early", [True, False], ids=["finish", "update"])
@pytest.mark.parametrize("name", MODELS)
def test_silent_units_change_nothing_and_learn(name: str, early: bool) -> None:
    """Outputs stay to rounding, also those of an average that follows; each unit has a gradient when it is trained on.

    Zero weights where a unit is produced would leave outputs as they are too, but a ReLU has no gradient at 0: those
    units stayed at zero for good.
    """
    grower, x, labels = begun(name, 20 if early else 6)
    average = torch.optim.swa_utils.AveragedModel(grower.model) if name != "LSTM" else None
    if average is not None:
        grower.follow(average)
    old, before = grower.keep.clone(), scores(grower.model, x)
    assert grower.policy.newborns == "silent"
    grower.finish() if early else grower.update()
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


def test_fresh_units_change_outputs() -> None:
    """So that the law above is not one of nothing."""
    torch.manual_seed(0)
    model = conv(True).double()
    x, optimizer, budget = torch.randn(8, 3, 8, 8).double(), torch.optim.SGD(model.parameters(), 0.05), Budget("90%")
    grower = Grower(model, optimizer, example_inputs=x, budget=budget, updates=4, policy=Late())
    steps(grower, x, torch.randint(4, (8,)), 2)
    grower.update()
    before = scores(grower.model, x)
    assert grower.update().born > 3
    assert not torch.allclose(scores(grower.model, x), before, rtol=1e-3)


def test_units_that_come_back_keep_their_weights() -> None:
    """Silent are only those that never lived."""
    torch.manual_seed(0)
    model = conv(True).double()
    x, optimizer = torch.randn(8, 3, 8, 8).double(), torch.optim.SGD(model.parameters(), 0.05)
    grower = Grower(
        model, optimizer, example_inputs=x, budget=Budget("100%"), updates=9, start="frame", policy=ThereAndBack()
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert grower.update().detached > 3
    assert grower.update().regrown > 3
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


class ThereAndBack(Policy):
    """Half of all units leave, and come back."""

    newborns = "silent"

    def seed(self, view: View) -> Tensor:
        return view.space.everything()

    def update(self, view: View) -> tuple[Tensor, bool]:
        keep = view.space.everything()
        if view.update == 1:
            keep[torch.nonzero(view.space.removable).flatten()[::2]] = False
        return keep, False


def test_how_newborns_enter_is_checked() -> None:
    with pytest.raises(TorchgrowError, match=r"Late\(newborns='zero'\): newborns must be one of \('fresh', 'silent'\)"):
        Late(newborns="zero")
    model, policy = conv(True), ThereAndBack()
    policy.newborns = "zero"
    with pytest.raises(TorchgrowError, match=r"ThereAndBack\(newborns='zero'\): newborns must be one of"):
        Grower(
            model, torch.optim.SGD(model.parameters(), 0.1), example_inputs=torch.randn(2, 3, 8, 8),
            budget=Budget("100%"), updates=3, start="frame", policy=policy,
        )  # fmt: skip


def test_gates_of_units_that_enter_in_the_end_do_not_hold_them_back() -> None:
    """A gate of 1e-6 is folded in for good: read by zeros, such a unit would have next to no gradients."""

    class Closed(Late):
        def seed(self, view: View) -> Tensor:
            small = super().seed(view)
            self.gate = torch.where(view.space.present(small), 1.0, 1e-6).double()
            return small

    torch.manual_seed(0)
    model = conv(False).double()
    x, optimizer = torch.randn(8, 3, 8, 8).double(), torch.optim.SGD(model.parameters(), 0.05)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget("90%"), updates=20, policy=Closed())
    steps(grower, x, torch.randint(4, (8,)), 2)
    old = grower.keep.clone()
    grower.finish()
    rows = grower.space.unit_of["0.weight", 0]
    entered = ~old[rows[grower.keep[rows]]]
    assert int(entered.sum()) > 3
    assert float(model.get_parameter("0.weight").detach().abs().amax((1, 2, 3))[entered].min()) > 1e-3


class Counting(Shrink):
    """Draws in `score`, and counts how often it was asked."""

    def seed(self, view: View) -> Tensor:
        self.asked = 0
        return super().seed(view)

    def score(self, view: View) -> Tensor:
        self.asked += 1
        return super().score(view)


def test_a_finish_that_is_refused_has_drawn_and_changed_nothing() -> None:
    """Neither the run's generator nor the policy; the run goes on as if it had not been tried."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Counting(importance="random")
    budget, inputs = Budget(params="40%"), torch.randn(4, 8)
    grower = Grower(model, optimizer, example_inputs=inputs, budget=budget, updates=3, policy=policy, start="frame")
    before = grower.run.state.generator.get_state(), grower.policy.state_dict()
    with pytest.raises(TorchgrowError, match="batch"):
        grower.finish([])
    assert torch.equal(grower.run.state.generator.get_state(), before[0])
    assert grower.policy.state_dict().keys() == before[1].keys()
    assert grower.policy.asked == 0  # type: ignore[attr-defined]
    grower.finish()
    assert grower.policy.asked == 1  # type: ignore[attr-defined]
