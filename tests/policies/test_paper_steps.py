"""The paper's policy step by step: Eq 7, Eq 8, gates and draws, each beside its literal form."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from chains import chain
from growing import view_of
from torchgrow import Limits
from torchgrow.policies import Paper, View

WIDTHS = [40, 25, 12]
LITERAL = Paper(penalised="all", start=1.0, paced=False)


def begun(policy: Paper = LITERAL, updates: int = 10, stuck: int = 3) -> tuple[Any, View]:
    """A policy at the start of its run, and its view."""
    own, view = policy.copied(), view_of(chain(WIDTHS, [1, 1, 1, 1], stuck), Limits(500, None), updates)
    view = replace(view, keep=own.seed(view))
    own.applied(view)
    return own, view


@pytest.mark.parametrize("penalty", [0.0, 0.4, -0.4])
def test_a_step_is_sgd_on_eq_6(penalty: float) -> None:
    """Against torch.optim.SGD and autograd on L(m) + lambda sum m, momentum 0.9, weight decay 1e-6, two rates."""
    policy, view = begun(stuck=0)
    generator = torch.Generator().manual_seed(0)
    policy.s = torch.randn(77, generator=generator, dtype=torch.float64)
    policy.applied(replace(view, update=1, keep=torch.rand(77, generator=generator) < 0.5))
    policy.penalty = torch.full((77,), penalty, dtype=torch.float64)
    s = policy.s.clone().requires_grad_()
    optimizer = torch.optim.SGD([s], lr=0.1, momentum=0.9, weight_decay=1e-6)
    for step in range(20):
        c = torch.randn(77, generator=generator, dtype=torch.float64)
        rate = 1.0 if step < 10 else 0.1
        m = torch.sigmoid(policy.beta * s)
        optimizer.zero_grad()
        ((c * m).sin().sum() + penalty * m.sum()).backward()
        optimizer.param_groups[0]["lr"] = 0.1 * rate
        gate = policy.gate
        optimizer.step()
        policy.step(replace(view, rate=rate), gate * c * (c * gate).cos())
        torch.testing.assert_close(policy.s, s.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(policy.gate, torch.sigmoid(policy.beta * s).detach(), rtol=1e-12, atol=0)


def test_temperature_is_structure_wise() -> None:
    """Eq 7: beta = gamma^t_s with gamma = 100^(1/T), t_s counting only updates in which the unit was present."""
    policy, view = begun(updates=8)
    always, never = view.space.everything(), ~view.space.everything()
    always[1], never[1] = False, True  # what cannot be removed is present in any case
    always[10], never[10] = False, True
    for update, keep in enumerate((always, always, never, always), start=1):
        policy.applied(replace(view, update=update, keep=keep))
    assert policy.t[[9, 10, 11]].tolist() == [3, 1, 3]
    assert policy.beta[9] == pytest.approx(100 ** (3 / 8))
    assert policy.beta[10] == pytest.approx(100 ** (1 / 8))
    s = torch.where(view.space.removable, policy.beta * policy.s, math.inf)
    torch.testing.assert_close(policy.gate, torch.sigmoid(s).clamp(min=1e-6), rtol=1e-12, atol=0)


def test_gates_are_bounded_below_and_1_where_nothing_can_go() -> None:
    policy, view = begun()
    policy.s = torch.full((77,), -1000.0, dtype=torch.float64)
    policy.applied(replace(view, update=1, keep=view.space.everything()))
    assert policy.gate[:3].tolist() == [1.0] * 3
    assert policy.gate[3:].tolist() == [1e-6] * 74


def test_with_start_1_one_unit_is_expected_per_group() -> None:
    policy, view = begun(stuck=0)
    for group, width in enumerate(WIDTHS):
        expected = torch.sigmoid(policy.s[view.space.group_of == group]).sum()
        assert float(expected) == pytest.approx(1.0)
        assert width > 1


@pytest.mark.parametrize(("stuck", "first"), [(0, 1), (3, 3)])
def test_the_seed_structure_has_one_unit_per_group(stuck: int, first: int) -> None:
    _, view = begun(stuck=stuck)
    assert torch.bincount(view.space.group_of[view.keep], minlength=3).tolist() == [first, 1, 1]
    assert bool(view.keep[:stuck].all())


def test_draws_have_the_right_frequencies() -> None:
    """2000 draws: every frequency within 5 standard deviations of sigma(beta s); what must stay is always there."""
    policy, view = begun(updates=4000)
    policy.s = torch.linspace(-2, 2, 77, dtype=torch.float64)
    n = 2000
    draws = [policy.update(replace(view, update=1))[0] for _ in range(n)]
    p = torch.sigmoid(policy.s)
    counts = torch.stack(draws).double().mean(0)
    assert counts[:3].tolist() == [1.0] * 3
    assert bool(((counts - p)[3:].abs() < 5 * (p * (1 - p) / n).sqrt()[3:]).all())


def test_no_group_is_left_empty() -> None:
    policy, view = begun(stuck=0)
    policy.s = torch.full((77,), -50.0, dtype=torch.float64)
    policy.s[7] = policy.s[50] = policy.s[70] = -49
    keep, _ = policy.update(replace(view, update=1))
    assert torch.nonzero(keep).flatten().tolist() == [7, 50, 70]


def test_a_priority_is_the_probability() -> None:
    policy, view = begun()
    policy.applied(replace(view, update=1, keep=view.space.everything()))
    assert torch.equal(policy.score(view), torch.sigmoid(policy.beta * policy.s))


def test_what_is_done_to_a_copy_leaves_the_original_alone() -> None:
    policy, view = begun()
    values, other = policy.state_dict(), policy.copied()
    other.step(view, torch.ones(77, dtype=torch.float64))
    other.applied(replace(view, update=1, keep=view.space.everything()))
    assert not torch.equal(other.s, policy.s)
    now = policy.state_dict()
    assert values.keys() == now.keys()
    assert all(torch.equal(values[name], now[name]) for name in values if isinstance(values[name], torch.Tensor))
