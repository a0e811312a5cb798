"""Indicators: Eq 7, Eq 8, gates, draws, and the errors of `Method`."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import chain
from torchgrow import Method, TorchgrowError
from torchgrow.policies.indicators import Indicators

WIDTHS = [40, 25, 12]


def make(method: Method, updates: int = 10, seed: int = 0, stuck: int = 3) -> Indicators:
    return Indicators(chain(WIDTHS, [1, 1, 1, 1], stuck), method, updates, seed)


@pytest.mark.parametrize("penalty", [0.0, 0.4, -0.4])
def test_a_step_is_sgd_on_eq_6(penalty: float) -> None:
    """Against torch.optim.SGD and autograd on L(m) + lambda sum m, momentum 0.9, weight decay 1e-6, two rates."""
    indicators = make(Method.paper(), stuck=0)
    generator = torch.Generator().manual_seed(0)
    indicators.s = torch.randn(77, generator=generator, dtype=torch.float64)
    indicators.advance(torch.rand(77, generator=generator) < 0.5)
    s = indicators.s.clone().requires_grad_()
    optimizer = torch.optim.SGD([s], lr=0.1, momentum=0.9, weight_decay=1e-6)
    for step in range(20):
        c = torch.randn(77, generator=generator, dtype=torch.float64)
        rate = 1.0 if step < 10 else 0.1
        m = torch.sigmoid(indicators.beta * s)
        optimizer.zero_grad()
        ((c * m).sin().sum() + penalty * m.sum()).backward()
        optimizer.param_groups[0]["lr"] = 0.1 * rate
        gate = indicators.gate
        optimizer.step()
        indicators.step(gate * c * (c * gate).cos(), penalty, rate)
        torch.testing.assert_close(indicators.s, s.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(indicators.gate, torch.sigmoid(indicators.beta * s).detach(), rtol=1e-12, atol=0)


def test_temperature_is_structure_wise() -> None:
    """Eq 7: beta = gamma^t_s with gamma = 100^(1/T), t_s counting only updates in which the unit was present."""
    indicators = make(Method.paper(), updates=8)
    always, never = indicators.space.everything(), ~indicators.space.everything()
    always[1], never[1] = False, True
    for keep in (always, always, never, always):
        indicators.advance(keep)
    assert indicators.t.tolist() == [3, 1, *[3] * 75]
    assert indicators.beta[0] == pytest.approx(100 ** (3 / 8))
    assert indicators.beta[1] == pytest.approx(100 ** (1 / 8))
    s = torch.where(indicators.space.removable, indicators.beta * indicators.s, math.inf)
    torch.testing.assert_close(indicators.gate, torch.sigmoid(s).clamp(min=1e-6), rtol=1e-12, atol=0)


def test_gates_are_bounded_below_and_1_where_nothing_can_go() -> None:
    indicators = make(Method.paper())
    indicators.s = torch.full((77,), -1000.0, dtype=torch.float64)
    indicators.advance(indicators.space.everything())
    assert indicators.gate[:3].tolist() == [1.0] * 3
    assert indicators.gate[3:].tolist() == [1e-6] * 74


def test_paper_starts_with_one_unit_expected_per_group() -> None:
    indicators = make(Method.paper(), stuck=0)
    for group, width in enumerate(WIDTHS):
        expected = torch.sigmoid(indicators.s[indicators.space.group_of == group]).sum()
        assert float(expected) == pytest.approx(1.0)
        assert width > 1


@pytest.mark.parametrize("method", [Method(), Method.paper()])
def test_the_seed_structure_has_one_unit_per_group(method: Method) -> None:
    for stuck, first in ((0, 1), (3, 3)):
        keep = make(method, stuck=stuck).seed_structure()
        live = torch.bincount(make(method).space.group_of[keep], minlength=3)
        assert live.tolist() == [first, 1, 1]
        assert bool(keep[:stuck].all())


def test_persistent_numbers_are_spread_evenly() -> None:
    """Whatever the probability p, p x size units of a group are drawn, within one: low variance."""
    indicators = make(Method())
    for p in torch.linspace(0.01, 0.99, 50).tolist():
        for group, width in enumerate(WIDTHS):
            count = int((indicators.uniform[indicators.space.group_of == group] < p).sum())
            assert abs(count - p * width) <= 1
    assert sorted(set(make(Method(), seed=1).uniform.tolist())) != sorted(set(indicators.uniform.tolist()))


def test_persistent_draws_do_not_change_on_their_own() -> None:
    indicators = make(Method(controller="pressure"))
    assert torch.equal(indicators.draw(), indicators.draw())


def test_independent_draws_have_the_right_frequencies() -> None:
    """2000 draws: every frequency within 5 standard deviations of sigma(beta s); what must stay is always there."""
    indicators = make(Method.paper())
    indicators.s = torch.linspace(-2, 2, 77, dtype=torch.float64)
    n = 2000
    counts = torch.stack([indicators.draw() for _ in range(n)]).double().mean(0)
    p = torch.sigmoid(indicators.s)
    assert counts[:3].tolist() == [1.0] * 3
    assert bool(((counts - p)[3:].abs() < 5 * (p * (1 - p) / n).sqrt()[3:]).all())


def test_no_group_is_left_empty() -> None:
    indicators = make(Method.paper(), stuck=0)
    indicators.s = torch.full((77,), -50.0, dtype=torch.float64)
    indicators.s[7] = indicators.s[50] = indicators.s[70] = -49
    assert torch.nonzero(indicators.draw()).flatten().tolist() == [7, 50, 70]


def test_alignment() -> None:
    """Groups of at least 2 x 8 units are held at multiples of 8 or below 8; the likeliest units stay."""
    indicators = make(Method(align=8))
    assert indicators.steps.tolist() == [8, 8, 1]
    for shift in torch.linspace(-6, 6, 60).tolist():
        keep = indicators.shifted()(shift)
        live = torch.bincount(indicators.space.group_of[keep], minlength=3)
        assert all(w % 8 == 0 or w < 8 for w in live[:2].tolist())
        chosen = indicators.uniform[40:65][keep[40:65]]
        assert live[1] <= 1 or chosen.max() <= indicators.uniform[40:65].sort().values[live[1] - 1]
    assert make(Method(align=1)).steps.tolist() == [1, 1, 1]


def test_what_is_done_to_a_copy_leaves_the_original_alone() -> None:
    """Draws too: both have the same random numbers ahead of them."""
    indicators = make(Method.paper())
    values = indicators.state_dict()
    other = indicators.copy()
    first = other.draw()
    other.shift(0.5)
    other.advance(first)
    assert not torch.equal(other.s, indicators.s)
    now = indicators.state_dict()
    assert all(torch.equal(values[name], now[name]) for name in values)
    assert torch.equal(indicators.draw(), first)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("controller", "pid", "Method.controller='pid' is unknown; use one of ('plan', 'pressure')"),
        ("draws", "none", "Method.draws='none' is unknown"),
        ("ramp", -0.1, "Method.ramp=-0.1 must lie in [0, 1]"),
        ("ramp", float("nan"), "Method.ramp=nan must lie in [0, 1]"),
        ("settle", 1.1, "Method.settle=1.1 must lie in [0, 1]"),
        ("momentum", 2, "Method.momentum=2 must lie in [0, 1]"),
        ("heat", 0.5, "Method.heat=0.5 must lie in [1, 1000000.0]"),
        ("lr", -1, "Method.lr=-1 must lie in"),
        ("align", 0, "Method.align=0 must lie in [1, 4096]"),
    ],
)
def test_bad_methods_name_the_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(TorchgrowError) as caught:
        Method(**{field: value})
    assert message in str(caught.value)


def test_presets() -> None:
    paper = Method.paper()
    assert (paper.controller, paper.draws, paper.align, paper.lambda_base) == ("pressure", "independent", 1, 0.5)
    assert (paper.heat, paper.lr, paper.momentum, paper.weight_decay) == (100.0, 0.1, 0.9, 1e-6)
    assert (Method().controller, Method().draws) == ("plan", "persistent")


def test_the_score_is_a_tensor_of_worth() -> None:
    """Persistent: probability minus the unit's own number, so that who was drawn comes before who was not."""
    indicators = make(Method(controller="pressure"))
    drawn: Tensor = indicators.uniform < torch.sigmoid(indicators.s)
    assert float(indicators.score()[drawn].min()) > 0 >= float(indicators.score()[~drawn].max())
    independent = make(Method.paper())
    assert torch.equal(independent.score(), torch.sigmoid(independent.s))


def test_ranked_numbers_are_dealt_by_presence_then_worth() -> None:
    indicators = make(Method(draws="ranked"))
    before, keep = indicators.uniform.clone(), indicators.space.everything()
    keep[1::2] = False
    keep |= ~indicators.space.removable
    indicators.worth = torch.rand(len(keep), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    indicators.rank(keep)
    assert bool((indicators.worth[~keep] == 0).all())
    for group in range(indicators.space.n_groups):
        units = torch.nonzero(indicators.space.group_of == group).flatten()
        assert torch.equal(indicators.uniform[units].sort().values, before[units].sort().values)
        ranking = sorted(units.tolist(), key=lambda u: (not keep[u], -indicators.worth[u], before[u]))
        assert ranking == units[indicators.uniform[units].argsort()].tolist()


def test_other_draws_are_not_dealt_anew() -> None:
    indicators = make(Method())
    before = indicators.uniform.clone()
    indicators.rank(indicators.space.everything())
    assert torch.equal(indicators.uniform, before)


def test_worth_is_a_running_mean_of_squares() -> None:
    indicators, expected = make(Method(gates=False)), 0.0
    for k in range(1, 6):
        gradient = torch.full((indicators.space.n_units,), float(k), dtype=torch.float64)
        indicators.step(gradient, 0.0, 1.0)
        expected = 0.99 * expected + 0.01 * k**2
    assert indicators.worth.tolist() == pytest.approx([expected] * indicators.space.n_units)


def test_methods_by_name() -> None:
    assert Method.named("default") == Method.default()
    assert Method.named("paper", layers=True) == Method.paper(layers=True)
    assert Method.named("default: peak=2.5, gates=True,align=4") == replace(
        Method.default(), peak=2.5, gates=True, align=4
    )
    with pytest.raises(TorchgrowError, match=r"preset 'fast' is unknown; use one of \['default'"):
        Method.named("fast")
    for text in ("default:peak", "default:peek=2", "default:peak=much", "default:gates=1"):
        with pytest.raises(TorchgrowError, match=r"not a field of torchgrow.Method with its value, or .*write it like"):
            Method.named(text)
    for text in ("paper:heat=9,final_inverse_temperature=3", "paper:final_inverse_temperature=3,heat=9"):
        with pytest.raises(TorchgrowError, match=r"or there by its other name too"):
            Method.named(text)
    assert Method.named("default:peak=2,peak=3").peak == 3, "a recipe's own way, and what differs from it"
    with pytest.raises(TorchgrowError, match=r"Method.peak=0.5 must lie in \[1"):
        Method.named("default:peak=0.5")


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_ranked_numbers_give_every_group_the_same_share(probability: float) -> None:
    uniform = make(Method(draws="ranked"), stuck=0).uniform
    for width, numbers in zip(WIDTHS, uniform.split(WIDTHS), strict=True):
        assert int((numbers < probability).sum()) == math.floor(probability * width)
