"""Building blocks of policies: ranks, and widths held at multiples."""

import math

import pytest
import torch

from chains import chain
from growing import view_of
from torchgrow import Limits
from torchgrow.policies import Default, View, kit

WIDTHS = [40, 25, 12]


def view(stuck: int = 3, seed: int = 0) -> View:
    return view_of(chain(WIDTHS, [1, 1, 1, 1], stuck), Limits(500, None), 10, seed)


def test_spread_numbers_are_spread_evenly() -> None:
    """Whatever the share p, p x size units of a group have a number below it, within one."""
    numbers = kit.spread(here := view())
    for p in torch.linspace(0.01, 0.99, 50).tolist():
        for group, width in enumerate(WIDTHS):
            count = int((numbers[here.space.group_of == group] < p).sum())
            assert abs(count - p * width) <= 1
    assert sorted(set(kit.spread(view(seed=1)).tolist())) != sorted(set(numbers.tolist()))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_staggered_numbers_give_every_group_the_same_share(share: float) -> None:
    for width, numbers in zip(WIDTHS, kit.staggered(view(0), 1.0).split(WIDTHS), strict=True):
        assert int((numbers < share).sum()) == math.floor(share * width)


def test_alignment() -> None:
    """Groups of at least 2 x 8 units are held at multiples of 8 or below 8; the best units stay."""
    here = view()
    steps, rank = kit.multiples(here.space, 8), kit.spread(here)
    assert steps.tolist() == [8, 8, 1]
    must = kit.smallest(here.space, rank)
    for share in torch.linspace(0, 1, 60).tolist():
        margin = share - rank
        keep = kit.aligned(here.space, (margin > 0) | must, must, margin, steps)
        live = torch.bincount(here.space.group_of[keep], minlength=3)
        assert all(w % 8 == 0 or w < 8 for w in live[:2].tolist())
        chosen = rank[40:65][keep[40:65]]
        assert live[1] <= 1 or chosen.max() <= rank[40:65].sort().values[live[1] - 1]
    assert kit.multiples(here.space, 1).tolist() == [1, 1, 1]


def test_ranks_are_dealt_by_presence_then_importance() -> None:
    here = view()
    before, keep = kit.staggered(here, 1.0), here.space.everything()
    keep[1::2] = False
    keep |= ~here.space.removable
    importance = torch.rand(len(keep), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    importance = torch.where(keep, importance, 0.0)
    rank = kit.deal(here.space, before, importance, keep)
    for group in range(here.space.n_groups):
        units = torch.nonzero(here.space.group_of == group).flatten()
        assert torch.equal(rank[units].sort().values, before[units].sort().values)
        ranking = sorted(units.tolist(), key=lambda u: (not keep[u], -importance[u], before[u]))
        assert ranking == units[rank[units].argsort()].tolist()


def test_importance_is_a_running_mean_of_squares() -> None:
    policy, here, expected = Default(), view(), 0.0
    policy.seed(here)
    for k in range(1, 6):
        policy.step(here, torch.full((here.space.n_units,), float(k), dtype=torch.float64))
        expected = 0.99 * expected + 0.01 * k**2
    assert policy.importance.tolist() == pytest.approx([expected] * here.space.n_units)


def test_structures_are_fitted_and_cut_to_the_limits_that_a_policy_sees() -> None:
    """`fit` and `shed` take `View.limits` as they are, whichever of the two costs is limited."""
    space = chain([12, 12], [4, 4, 4])
    for limits in (Limits(120, None), Limits(None, 240), Limits(120, 240)):
        view = view_of(space, limits, updates=5)
        score = torch.arange(space.n_units, dtype=torch.float64)
        for start in (view.keep, kit.smallest(space, score)):
            found = kit.fit(space, view.costs, start, score, view.limits)
            more = [found | (torch.arange(space.n_units) == unit) for unit in torch.nonzero(~found).flatten().tolist()]
            assert bool((view.cost(found) <= view.limits).all())
            assert not any(bool((view.cost(one) <= view.limits).all()) for one in more)
        cut = kit.shed(space, view.costs, view.keep, score, view.limits, kit.multiples(space, 1))
        assert bool((view.cost(cut) <= view.limits).all())
