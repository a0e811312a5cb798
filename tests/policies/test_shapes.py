"""Shapes: structures exactly at the budget with the depths and ratios that were asked for; proposals worth trying."""

import itertools
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chains import chain
from growing import view_of
from layered import Stages, batch
from oracle import SmallResNet
from torchgrow import Budget, BudgetError, Limits, Space, StructureError, trace
from torchgrow.lab.models import ResNet
from torchgrow.policies import Shape
from torchgrow.policies.shapes import EVEN, counts, proposals, stages
from torchgrow.structure.cost import CostModel


def residual() -> nn.Module:
    return ResNet(widths=(12, 16, 24), depth=20, shortcut="A", in_channels=3)


SPACES: dict[str, Space] = {}


def space_of(name: str) -> Space:
    makers: dict[str, Any] = {"small": SmallResNet, "layered": lambda: Stages(blocks=4), "resnet": residual}
    if name not in SPACES:
        torch.manual_seed(0)
        SPACES[name] = trace(makers[name]().double(), batch()[0], depth=name != "small")
    return SPACES[name]


def limits(space: Space, **shares: str) -> Limits:
    return Budget(**shares).limits(CostModel(space).cost(space.everything()))


def slow(space: Space, shape: Shape, most: Limits) -> Tensor:
    """Units in the order in which a rising factor lets them in, while all fit; then whichever still fits, likewise."""
    rank = shape.ranks(space).tolist()
    costs, allowed = CostModel(space), most.tensor()
    keep = ~space.removable.clone() | torch.tensor([r < 0 for r in rank])
    order = sorted((u for u in range(space.n_units) if rank[u] >= 0), key=lambda u: (rank[u], u))
    for group in range(space.n_groups):
        own = [u for u in order if space.group_of[u] == group]
        if own and not keep[space.group_of == group].any() and int(space.least[group]):
            keep[own[0]] = True
    for _, together in itertools.groupby(order, key=lambda u: rank[u]):  # equal ranks come in together or not at all
        more = keep.clone()
        more[list(together)] = True
        if not bool((costs.both(costs.live(more)) <= allowed).all()):
            break
        keep = more
    return keep


@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ratios=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=4, max_size=4),
    share=st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_a_shape_is_the_largest_of_its_ratios_and_then_filled(
    widths: list[int], ratios: list[float], share: float
) -> None:
    """Against the literal one; what `fit` adds to that is what still fits, and it adds to it only."""
    space = chain(widths, [1] * (len(widths) + 1))
    costs = CostModel(space)
    low, high = (int(costs.both(x)[0]) for x in (costs.space.least, costs.sizes))
    most = Limits(low + int(share * (high - low)), None)
    shape = Shape("drawn", {}, {f"g{g}": ratios[g] for g in range(len(widths))})
    keep = shape.fitted(view_of(space, most, 2))
    assert bool((keep | ~slow(space, shape, most)).all())
    check_exact(space, keep, most)


def check_exact(space: Space, keep: Tensor, most: Limits) -> None:
    """Law 7, with one unit of every group at least."""
    costs, allowed = CostModel(space), most.tensor()
    assert bool((costs.both(costs.live(keep)) <= allowed).all())
    assert bool((costs.live(keep) >= space.least).all())
    space.check_keep(keep)
    for unit in torch.nonzero(~keep).flatten().tolist():
        inside = int(space.owner[unit])
        if inside >= 0 and not keep[inside]:
            continue  # inside a layer that is left out it would cost nothing
        more = keep.clone()
        more[unit] = True
        assert not bool((costs.both(costs.live(more)) <= allowed).all()), "no unit still fits"


@pytest.mark.parametrize("name", ["small", "layered", "resnet"])
@pytest.mark.parametrize("budget", [{"params": "20%"}, {"params": "60%"}, {"flops": "35%"}], ids=str)
def test_every_proposal_is_legal_and_exactly_at_the_budget(name: str, budget: dict[str, str]) -> None:
    space = space_of(name)
    most, tried = limits(space, **budget), 0
    for shape in itertools.islice(proposals(space), 20):
        try:
            keep = shape.fitted(view_of(space, most, 2))
        except BudgetError:
            continue
        check_exact(space, keep, most)
        tried += 1
    assert tried >= 3


def test_shapes_have_the_depths_and_ratios_that_were_asked_for() -> None:
    space = space_of("resnet")
    view = view_of(space, limits(space, params="40%"), 2)
    full = torch.bincount(space.group_of).tolist()

    def share(shape: Shape, group: str) -> float:
        return space.widths(shape.fitted(view))[group] / full[space.group_names.index(group)]

    names = list(stages(space))
    asked = Shape("asked", {names[0]: 0, names[2]: 1})
    keep = asked.fitted(view)
    assert [int(keep[units].sum()) for units in stages(space).values()] == [0, 2, 1]
    assert share(EVEN, "conv1") == pytest.approx(share(EVEN, "layer3.0.conv1"), abs=0.13)
    narrow = Shape("narrow", {}, {"layer*.*.conv1": 0.5})
    assert share(narrow, "layer3.0.conv1") == pytest.approx(share(narrow, "conv1") / 2, abs=0.12)
    by_name = {shape.name: shape for shape in proposals(space)}
    assert share(by_name["early wider"], "layer1.0.conv1") > 1.4 * share(by_name["early wider"], "layer3.2.conv1")
    assert share(by_name["late wider"], "layer3.2.conv1") > 1.4 * share(by_name["late wider"], "layer1.0.conv1")


def test_proposals_begin_even_then_change_one_thing_then_two() -> None:
    space = space_of("resnet")
    found = list(proposals(space, seed=3))
    assert found[0] == EVEN
    singles = [shape for shape in found if ", " not in shape.name]
    assert found[: len(singles)] == singles
    depths = [tuple(shape.depths.values()) for shape in singles if shape.depths]
    assert depths[:3] == [(1, 1, 1), (0, 1, 1), (1, 1, 0)]
    names = [shape.name for shape in found]
    assert max(Counter(names).values()) == 1
    assert names == [shape.name for shape in proposals(space, seed=3)]
    other = [shape.name for shape in proposals(space, seed=4)]
    assert other != names
    assert Counter(other) == Counter(names)
    kinds = [shape for shape in singles if shape.name.endswith(("x0.5", "x2"))]
    assert {tuple(sorted(shape.widths)) for shape in kinds} == {
        tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2))
    }, "the inside of blocks, and no stream"


def test_a_chain_without_blocks_is_tilted_only() -> None:
    found = list(proposals(chain([8, 8, 8], [1] * 4)))
    assert [shape.name for shape in found] == ["even", "early wider", "late wider"]
    assert found[1].widths["g0"] == pytest.approx(2 * found[1].widths["g2"])
    assert found[1].widths["g1"] == pytest.approx(1, rel=0.2)
    assert [shape.name for shape in proposals(chain([8], [1] * 2))] == ["even"]


def test_counts_do_not_see_inside_layers_that_are_left_out() -> None:
    space = space_of("layered")
    layer = stages(space)["stage"][0]
    one, other = space.everything(), space.everything()
    one[layer] = other[layer] = False
    other[torch.nonzero(space.owner == layer).flatten()[0]] = False
    assert counts(space, one) == counts(space, other) != counts(space, space.everything())


@pytest.mark.parametrize(
    ("shape", "error", "text"),
    [
        (
            Shape("x", {"nowhere": 1}),
            StructureError,
            "shape 'x' has depths 'nowhere': 1; stages and the layers that may",
        ),
        (Shape("x", {"stage": 9}), StructureError, "there are 'stage': 0 to 3"),
        (
            Shape("x", {}, {"g*": 0.5}),
            StructureError,
            "shape 'x' has widths 'g*': 0.5; it must name groups of the space",
        ),
        (Shape("x", {}, {"stem": 0.0}), StructureError, "multiply their width by a number above 0; groups are stem"),
        (Shape("x"), BudgetError, "with one unit in every group, more than the budget allows; give it fewer layers"),
    ],
)
def test_what_is_no_shape_is_refused_and_told(shape: Shape, error: Any, text: str) -> None:
    space = space_of("layered")
    costs = CostModel(space)
    least = int(costs.both(costs.space.least)[0])
    with pytest.raises(error, match=re.escape(text)):
        shape.fitted(view_of(space, Limits(least + 1, None), 2))
