"""Budgets: Eq 4, the largest share of all groups that fits, and the final fit against a slow literal greedy one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chains import chain
from growing import view_of
from torchgrow import Budget, Cost, Space, trace
from torchgrow.policies import Default, kit
from torchgrow.policies.kit import gap
from torchgrow.structure.budget import fit, shed
from torchgrow.structure.cost import CostModel
from torchgrow.structure.limits import Limits


def counted(space: Space, keep: Tensor) -> tuple[int, int]:
    """Parameters and FLOPs, counted position by position."""
    params = flops = 0
    for name in space.parameters:
        size = 1
        for axis in (0, 1):
            size *= sum(1 for u in space.unit_of[name, axis].tolist() if u < 0 or keep[u])
        params += size
    for term in space.flops:
        size = term.constant
        for vector in term.vectors:
            size *= sum(1 for u in vector.tolist() if u < 0 or keep[u])
        flops += size
    return params, flops


def within(space: Space, keep: Tensor, limits: Limits) -> bool:
    params, flops = counted(space, keep)
    return (limits.params is None or params <= limits.params) and (limits.flops is None or flops <= limits.flops)


def slow_fit(space: Space, keep: Tensor, score: Tensor, limits: Limits) -> Tensor:
    """Throw out the worst unit, again and again, until it fits; then let in the best that fits, again and again."""
    keep = keep.clone()
    worst_first = sorted(range(space.n_units), key=lambda u: (float(score[u]), u))
    while not within(space, keep, limits):
        for unit in worst_first:
            alone = int(keep[space.group_of == space.group_of[unit]].sum()) == 1
            if keep[unit] and space.removable[unit] and not alone:
                keep[unit] = False
                break
    while True:
        for unit in reversed(worst_first):
            more = keep.clone()
            more[unit] = True
            if not keep[unit] and within(space, more, limits):
                keep = more
                break
        else:
            return keep


@st.composite
def problems(draw: st.DrawFn) -> tuple[Space, Tensor, Tensor, Limits]:
    widths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    pixels = draw(st.lists(st.sampled_from([1, 4, 16, 64]), min_size=len(widths) + 1, max_size=len(widths) + 1))
    space = chain(widths, pixels, stuck=draw(st.integers(0, widths[0])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    keep = (torch.rand(space.n_units, generator=generator) < draw(st.floats(0, 1))) | ~space.removable
    for group in range(space.n_groups):
        units = torch.nonzero(space.group_of == group).flatten()
        if not keep[units].any():
            keep[units[0]] = True
    score = torch.randint(0, 6, (space.n_units,), generator=generator).double()  # with ties
    costs = CostModel(space)
    low, high = costs.both(costs.space.least).tolist(), costs.both(costs.sizes).tolist()
    kind = draw(st.sampled_from(["params", "flops", "both"]))
    params = draw(st.integers(low[0], high[0])) if kind != "flops" else None
    flops = draw(st.integers(low[1], high[1])) if kind != "params" else None
    return space, keep, score, Limits(params, flops)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_fit_is_the_literal_greedy_one(problem: tuple[Space, Tensor, Tensor, Limits]) -> None:
    space, keep, score, limits = problem
    steps = torch.ones(space.n_groups, dtype=torch.int64)
    found = fit(space, CostModel(space), keep, score, limits.tensor(), steps)
    assert torch.equal(found, slow_fit(space, keep, score, limits))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 4))
def test_fit_guarantees_the_budget_at_any_step(problem: tuple[Space, Tensor, Tensor, Limits], step: int) -> None:
    """Within the limits, nothing more fits, at least one unit a group, what must stay stays; fitting again is idle."""
    space, keep, score, limits = problem
    before, costs = keep.clone(), CostModel(space)
    steps = torch.full((space.n_groups,), step)
    found = fit(space, costs, keep, score, limits.tensor(), steps)
    assert torch.equal(keep, before)
    assert within(space, found, limits)
    for unit in torch.nonzero(~found).flatten().tolist():
        more = found.clone()
        more[unit] = True
        assert not within(space, more, limits)
    space.check_keep(found)
    if within(space, keep, limits):
        assert bool((found | ~keep).all())
    assert torch.equal(fit(space, costs, found, -score, limits.tensor(), steps), found)
    assert costs.both(costs.live(found)).tolist() == list(counted(space, found))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 3))
def test_the_largest_share_that_fits(problem: tuple[Space, Tensor, Tensor, Limits], align: int) -> None:
    """What the default keeps fits, and with the next unit of every pool it would not. More is never narrower."""
    space, _, score, limits = problem
    policy, view = Default(align=align), view_of(space, limits, updates=5, seed=int(score.sum()))
    policy.seed(view)
    keep = policy.target(view)
    assert within(space, keep, limits)
    costs, steps, must = view.costs, kit.multiples(space, align), kit.smallest(space, policy.rank)

    def at(share: float) -> Tensor:
        margin = share - policy.rank
        return kit.aligned(space, (margin > 0) | must, must, margin, steps)

    larger = [at(rank + 1e-12) for rank in sorted(policy.rank.tolist())]
    fitting = [one for one in larger if within(space, one, limits)]
    most = max([int(one.sum()) for one in fitting], default=int(must.sum()))
    assert int(keep.sum()) == max(most, int(must.sum()))
    widths = torch.stack([costs.live(one) for one in larger])
    assert bool((widths.diff(dim=0) >= 0).all())
    assert bool((keep | space.removable).all())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_memory_grows_with_the_network() -> None:
    """A chain of 400 layers: what is counted anew for one group are the two maps that contain it."""
    space = chain([2] * 400, [1] * 401)
    with Largest() as largest:
        costs = CostModel(space)
        limits, steps = Limits(int(costs.both(costs.sizes)[0]) // 2, None), torch.ones(400, dtype=torch.int64)
        policy, view = Default(), view_of(space, limits, updates=5)
        seed = policy.seed(view)
        policy.target(view)
        fit(space, costs, seed, policy.score(view), limits.tensor(), steps)
        fit(space, costs, space.everything(), policy.score(view), limits.tensor(), steps)
        worth = torch.rand(space.n_units, dtype=torch.float64)
        shed(space, costs, space.everything(), worth, limits.tensor(), steps)
    assert largest.elements <= 20 * space.n_units


def distance(limits: Limits, frame: Cost, now: Cost) -> float:
    """`gap` of a structure that costs `now`, True for the frame."""
    costs = {True: torch.tensor([frame.params, frame.flops]), False: torch.tensor([now.params, now.flops])}
    space = SimpleNamespace(everything=lambda: torch.tensor(True))
    view: Any = SimpleNamespace(limits=limits.tensor(), space=space, cost=lambda keep: costs[bool(keep)])
    return gap(view, torch.tensor(False))


def test_pressure_is_eq_4() -> None:
    """lambda = lambda^base (u - u_G), u = 1 - kept share; of two budgets the one nearer to being violated counts."""
    frame, now = Cost(1000, 500), Cost(100, 400)
    u, u_now = 1 - 360 / 1000, 1 - 100 / 1000
    assert distance(Limits(360, None), frame, now) == pytest.approx(u - u_now)
    assert distance(Limits(360, None), frame, now) < 0  # too sparse: growth is rewarded
    assert distance(Limits(None, 250), frame, now) == pytest.approx((400 - 250) / 500)
    assert distance(Limits(360, 250), frame, now) == pytest.approx(0.3)
    assert distance(Limits(360, None), frame, Cost(360, 1)) == 0


def test_shares_and_absolute_numbers() -> None:
    frame = Cost(1000, 12345)
    assert Budget(params="36%").limits(frame) == Limits(360, None)
    assert Budget(params=" 12.5 % ", flops="100%").limits(frame) == Limits(125, 12345)
    assert Budget(params="29%").limits(Cost(100, 1)) == Limits(29, None)  # 0.29 * 100 < 29 in floating point
    assert Budget(params="33.39%").limits(frame) == Limits(333, None)  # rounded down: a guarantee
    assert Budget(flops=2e4).limits(frame) == Limits(None, 20000)
    assert str(Budget(params="36%", flops=5)) == "params <= 36% and flops <= 5"


@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    pixels=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    share=st.floats(0.05, 1.0),
    step=st.sampled_from([1, 4]),
    by=st.sampled_from(["params", "flops", "both"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_what_is_shed_is_worth_least(
    widths: list[int], pixels: list[int], share: float, step: int, by: str, seed: int
) -> None:
    space = chain(widths, pixels, stuck=1)
    costs, generator = CostModel(space), torch.Generator().manual_seed(seed)
    worth = torch.rand(space.n_units, generator=generator, dtype=torch.float64)
    before = space.everything()
    least, full = costs.both(costs.space.least), costs.both(costs.sizes)
    allowed = least + ((full - least).double() * share).long()
    if by != "both":
        allowed[1 if by == "params" else 0] = torch.iinfo(torch.int64).max
    steps = torch.tensor([step if width >= 2 * step else 1 for width in widths])
    keep = shed(space, costs, before, worth, allowed, steps)
    params, flops = counted(space, keep)
    assert params <= allowed[0]
    assert flops <= allowed[1]
    assert bool(keep[~space.removable].all())
    for group in range(space.n_groups):
        units = torch.nonzero((space.group_of == group) & space.removable).flatten()
        gone, stays = units[~keep[units]], units[keep[units]]
        assert int((keep & (space.group_of == group)).sum()) >= 1
        if len(gone) and len(stays):
            assert worth[gone].max() <= worth[stays].min()  # the worst of a group go first
        width = int((keep & (space.group_of == group)).sum())
        assert width in (widths[group], *range(steps[group])) or width % steps[group] == 0
    assert torch.equal(shed(space, costs, keep, worth, allowed, steps), keep)  # what fits stays as it is


def test_what_is_shed_is_cheap_for_what_it_saves() -> None:
    """Two groups of equal worth: the one whose units cost more goes."""
    space = chain([8, 8], [1, 1, 9])
    costs = CostModel(space)
    worth = torch.ones(space.n_units, dtype=torch.float64)
    allowed = torch.tensor([torch.iinfo(torch.int64).max, int(costs.both(costs.sizes)[1]) * 8 // 10])
    keep = shed(space, costs, space.everything(), worth, allowed, torch.ones(2, dtype=torch.int64))
    # a unit of the first group computes 3 + 8 products, one of the second 8 + 9 * 2
    assert keep[:8].sum() == 8
    assert keep[8:].sum() < 8
    worth[8:] = 10.0  # now it is worth it
    keep = shed(space, costs, space.everything(), worth, allowed, torch.ones(2, dtype=torch.int64))
    assert keep[:8].sum() < 8
    assert keep[8:].sum() == 8


class Branch(torch.nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = torch.nn.Linear(8, 20), torch.nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Add a branch."""
        return x + self.out_of(torch.relu(self.into(x)))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_that_is_left_out_enters_with_fewer_units_where_it_fits_only_so(
    share: float, seed: int, steps: int
) -> None:
    """Afterwards neither a unit nor a layer with the fewest units inside fits any more."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Sequential(*[Branch() for _ in range(4)]))
    space = trace(model, torch.randn(4, 5), depth=True, protect=["0"])
    costs = CostModel(space)
    keep, layers = space.everything(), [block.unit for block in space.blocks]
    keep[layers] = False
    limits = Limits(int(share * costs.cost(space.everything()).params), None)
    multiples = torch.full((space.n_groups,), steps)
    found = fit(space, costs, keep, torch.rand(space.n_units), limits.tensor(), multiples, thin=True)
    assert costs.cost(found).params <= limits.params  # type: ignore[operator]
    assert costs.cost(found).params > 0.93 * limits.params  # type: ignore[operator]
    for unit in torch.nonzero(~found).flatten().tolist():
        more = found.clone()
        more[unit] = True
        if unit in layers:
            inside = torch.nonzero(space.owner == unit).flatten()
            more[inside] = False
            more[inside[:1]] = True
        elif int(space.owner[unit]) >= 0 and not found[space.owner[unit]]:
            continue
        assert costs.cost(more).params > limits.params  # type: ignore[operator]
