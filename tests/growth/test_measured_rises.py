"""How much a loss rises without a tenth of a group, and the shares of groups that follow from it."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchgrow
from growing import differences, sgd
from torchgrow import Budget, Grower, TorchgrowError
from torchgrow.growth.one_shot import zero_
from torchgrow.lab.models import ResNet
from torchgrow.persistence.portable import shrink_
from torchgrow.policies import Shrink, kit

torch.manual_seed(0)
X, LABELS = torch.randn(16, 3, 8, 8).double(), torch.arange(16) % 10


def perceptron(*hidden: int) -> nn.Sequential:
    """Two hidden layers, without biases in the way of arithmetic."""
    torch.manual_seed(0)
    a, b = hidden
    return nn.Sequential(nn.Linear(6, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 2)).double()


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(X), LABELS).item()


def test_by_hand() -> None:
    """Of 20 units two are a tenth; those with the least norm of row and column go, and nothing else."""
    model, x = perceptron(20, 10), torch.randn(8, 6, dtype=torch.float64)

    def loss(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return float(model(x).square().mean())

    rises = torchgrow.measure_rises(model, x, loss, importance="l1")
    for name, layer, few in (("0", 0, 2), ("2", 2, 1)):
        by_hand = copy.deepcopy(model)
        own, reader = by_hand[layer], by_hand[layer + 2]
        assert isinstance(own, nn.Linear)
        assert isinstance(reader, nn.Linear)
        least = own.weight.abs().sum(1).argsort()[:few]
        with torch.no_grad():
            reader.weight[:, least] = 0
            wanted = loss(by_hand.eval()) - loss(model.eval())
        model.train()
        assert rises[name] == pytest.approx(wanted, rel=1e-9)
    assert set(rises) == {"0", "2"}


def test_the_default_device_is_in_force_while_it_is_evaluated() -> None:
    """Tensors that `evaluate` makes are where the user has them made."""
    model, x, seen = perceptron(4, 4), torch.randn(2, 6, dtype=torch.float64), set[str]()

    def loss(model: nn.Module) -> float:
        seen.add(torch.empty(1).device.type)
        return float(model(x).square().mean())

    torch.set_default_device("meta")
    try:
        torchgrow.measure_rises(model, x, loss)
    finally:
        torch.set_default_device(None)
    assert seen == {"meta"}


def test_a_small_group_counts_as_a_tenth() -> None:
    """Of four units one goes, a quarter: its rise is taken for that of (1 / 2.5)^2."""
    model, x = perceptron(4, 10), torch.randn(8, 6, dtype=torch.float64)
    rises = torchgrow.measure_rises(model, x, lambda m: float(m(x).square().mean()), importance="l1")
    without = copy.deepcopy(model)
    first, reader = without[0], without[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(reader, nn.Linear)
    with torch.no_grad():
        reader.weight[:, first.weight.abs().sum(1).argmin()] = 0
        rise = float(without(x).square().mean() - model(x).square().mean())
    assert rises["0"] == pytest.approx(rise / 2.5**2, rel=1e-9)


def test_the_model_is_not_changed_and_norms_may_follow() -> None:
    model = ResNet(depth=14, widths=(4, 6, 8)).double().train()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plain = torchgrow.measure_rises(model, X, loss_of, depth=True)
    again = torchgrow.measure_rises(model, X, loss_of, depth=True, batches=[X, X])
    assert plain.keys() == again.keys()
    assert plain != again, "statistics were re-estimated"
    assert not differences(before, dict(model.state_dict()))
    assert torch.equal(drawn, torch.get_rng_state())
    assert model.training
    assert not any(hasattr(parameter, "grad") and parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_zeroed_is_what_the_compact_network_computes(seed: int) -> None:
    """Law 1, with layers left out too: what is measured is the network that would come out."""
    torch.manual_seed(seed)
    model = ResNet(depth=14, widths=(4, 6, 8)).double().eval()
    space = torchgrow.trace(model, X, depth=True)
    score = torch.rand(space.n_units, dtype=torch.float64)
    keep = kit.one_per_group(space, ~space.removable | (score < 0.6), -score)
    for block in space.blocks[: seed % 2 + 1]:  # left out as a whole
        keep[block.unit] = False
    zeroed = copy.deepcopy(model)
    zero_(zeroed, space, keep)
    shrink_(model, space, keep, store=False)
    with torch.no_grad():
        assert torch.allclose(zeroed(X), model(X), atol=1e-9)


def grown(rises: dict[str, float], budget: Budget, hidden: tuple[int, int] = (24, 24)) -> Grower:
    model = perceptron(*hidden)
    policy = Shrink(allocation="measured", rises=rises, until=1.0, importance="l1")
    x = torch.randn(8, 6, dtype=torch.float64)
    return Grower(model, sgd(model), example_inputs=x, budget=budget, updates=12, start="frame", policy=policy)


def run(grower: Grower, updates: int = 12) -> Grower:
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(updates):
        grower.optimizers[0].zero_grad()
        grower.model(x).square().mean().backward()
        grower.optimizers[0].step()
        grower.update()
    return grower


@pytest.mark.parametrize("share", ["30%", "60%"])
@pytest.mark.parametrize("factor", [1.0, 4.0, 50.0])
def test_shares_are_near_the_best_of_all_pairs_of_widths(factor: float, share: str) -> None:
    """A slow oracle: the pair of widths within the budget at which the measured squares sum up to least."""
    rises = {"0": 1.0, "2": factor}
    grower = run(grown(rises, Budget(params=share)))
    limit, size = grower.limits.params or 0, 24

    def params(a: int, b: int) -> int:
        return 6 * a + a + a * b + b + 2 * b + 2

    def lost(a: int, b: int) -> float:
        return rises["0"] * (1 - a / size) ** 2 + rises["2"] * (1 - b / size) ** 2

    pairs = [pair for pair in itertools.product(range(1, size + 1), repeat=2) if params(*pair) <= limit]
    best = min(lost(*pair) for pair in pairs)
    widths = grower.widths()
    assert params(widths["0"], widths["2"]) == grower.cost().params <= limit
    assert lost(widths["0"], widths["2"]) <= 1.15 * best
    if factor > 1:
        assert widths["2"] > widths["0"]


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    rises, budget = {"0": 1.0, "2": 3.0}, Budget(params="40%")
    whole, first, second = run(grown(rises, budget)), run(grown(rises, budget), 5), grown(rises, budget)
    torchgrow.save_checkpoint(tmp_path, first)
    torchgrow.load_checkpoint(tmp_path, second)
    run(second, 7)
    assert not differences(whole.state_dict()["keep"], second.state_dict()["keep"])
    assert whole.widths() == second.widths()


def test_states_from_before_there_were_rises_load() -> None:
    def start() -> Grower:
        model, x = perceptron(8, 8), torch.randn(4, 6).double()
        return Grower(model, sgd(model), example_inputs=x, budget=Budget(params="40%"), updates=4, start="frame")

    first, second = start(), start()
    run(first, 2)
    state = first.state_dict()
    assert state["settings"].pop("policy.rises") is None
    second.load_state_dict(state)
    assert second.widths() == first.widths()
    measured = grown({"0": 1.0, "2": 1.0}, Budget(params="40%"))
    with pytest.raises(TorchgrowError, match=r"policy\.rises"):
        measured.load_state_dict(run(grown({"0": 1.0, "2": 2.0}, Budget(params="40%")), 1).state_dict())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"allocation": "measured"}, 'rises and allocation="measured" go together: rises = torchgrow.measure_rises'),
        ({"rises": {"0": 1.0}}, r"Shrink\(allocation='uniform', rises=given\)"),
    ],
)
def test_rises_and_measured_go_together(given: Any, text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        Shrink(**given)


def test_rises_of_another_model_are_refused() -> None:
    with pytest.raises(TorchgrowError, match="rises has no number for 2; measure this model"):
        run(grown({"0": 1.0, "other": 2.0}, Budget(params="50%")))


def test_what_cannot_be_measured_is_refused() -> None:
    model, x = perceptron(4, 4), torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(TorchgrowError, match="evaluate returned None; it must return the mean loss"):
        torchgrow.measure_rises(model, x, lambda model: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TorchgrowError, match="evaluate returned nan; it must return the mean loss"):
        torchgrow.measure_rises(model, x, lambda m: float("nan"))
    with pytest.raises(TorchgrowError, match="got importance='taylor' of Sequential; use importance='group_norm'"):
        torchgrow.measure_rises(model, x, lambda m: 0.0, importance="taylor")
    with pytest.raises(TorchgrowError, match="on the meta device"):
        torchgrow.measure_rises(copy.deepcopy(model).to("meta"), x, lambda m: 0.0)


@pytest.mark.parametrize("rise", [float("nan"), float("inf"), "0.1", None])
def test_rises_must_be_numbers(rise: Any) -> None:
    with pytest.raises(TorchgrowError, match=r"rises\['2'\] is .*, it must be a finite number, as measure_rises gives"):
        torchgrow.policies.Shrink(allocation="measured", rises={"0": 0.5, "2": rise})
