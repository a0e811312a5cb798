"""How much a unit matters: each function against its formula, written out slowly unit by unit."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import torchgrow
from growing import view_of
from oracle import SmallResNet
from torchgrow import Limits, TorchgrowError
from torchgrow.policies import View, importance
from torchgrow.policies.importance import IMPORTANCES, levelled


@pytest.fixture
def seen() -> tuple[nn.Module, View]:
    """A network whose entries all differ, of which a third of the units is gone."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    space = torchgrow.trace(model, torch.randn(2, 3, 6, 6).double())
    keep = (torch.arange(space.n_units) % 3 > 0) | ~space.removable
    torchgrow.shrink_(model, space, keep)
    view = view_of(space, Limits(params=None, flops=None), 4)
    return model, replace(view, keep=keep, weights=lambda: dict(model.named_parameters()))


def slices(model: nn.Module, view: View, unit: int) -> Iterator[tuple[str, int, Tensor]]:
    """What of every parameter, on every axis, goes with a unit: name, axis, the part."""
    for name, parameter in model.named_parameters():
        for axis in range(parameter.dim()):
            vector = view.space.unit_of[name, axis]
            live = [u for u in vector.tolist() if u < 0 or bool(view.keep[u])]
            places = [place for place, owner in enumerate(live) if owner == unit]
            if places:
                yield name, axis, parameter.detach().index_select(axis, torch.tensor(places))


def test_norms_are_those_of_the_rows_that_make_a_unit(seen: tuple[nn.Module, View]) -> None:
    model, view = seen
    one, two = (f(view, torch.zeros(view.space.n_units)) for f in (importance.l1, importance.l2))
    for unit in range(view.space.n_units):
        rows = [part for name, axis, part in slices(model, view, unit) if axis == 0 and part.dim() > 1]
        rows = rows or [part for _, _, part in slices(model, view, unit)]
        assert float(one[unit]) == pytest.approx(sum(float(abs(x)) for part in rows for x in part.flatten()))
        assert float(two[unit]) == pytest.approx(math.sqrt(sum(float(x) ** 2 for part in rows for x in part.flatten())))


def test_the_norm_of_a_group_is_that_of_all_tensors_as_shares_of_their_means(seen: tuple[nn.Module, View]) -> None:
    model, view = seen
    found = importance.group_norm(view, torch.zeros(view.space.n_units))
    squares: dict[tuple[str, int], dict[int, float]] = {}
    for unit in range(view.space.n_units):
        for name, axis, part in slices(model, view, unit):
            squares.setdefault((name, axis), {})[unit] = sum(float(x) ** 2 for x in part.flatten())
    for unit in range(view.space.n_units):
        own = [units[unit] / (sum(units.values()) / len(units)) for units in squares.values() if unit in units]
        assert float(found[unit]) == pytest.approx(math.sqrt(sum(own)))


def test_scales_are_those_of_batch_norms(seen: tuple[nn.Module, View]) -> None:
    model, view = seen
    found = importance.bn_scale(view, torch.zeros(view.space.n_units))
    rows = importance.l1(view, torch.zeros(view.space.n_units))
    norms = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for unit in range(view.space.n_units):
        own = [float(abs(x)) for name, _, part in slices(model, view, unit) if name in norms for x in part]
        assert float(found[unit]) == pytest.approx(sum(own) if own else float(rows[unit]))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plain = view_of(torchgrow.trace(model, torch.randn(2, 4)), Limits(params=None, flops=None), 4)
    with pytest.raises(TorchgrowError, match=r'"bn_scale" reads the scales of batch norms.*use one of taylor, l1, l2'):
        importance.bn_scale(replace(plain, weights=lambda: dict(model.named_parameters())), torch.zeros(8))


@pytest.mark.parametrize("name", IMPORTANCES)
def test_absent_units_have_none_and_others_have_some(name: str, seen: tuple[nn.Module, View]) -> None:
    _, view = seen
    squared = torch.rand(view.space.n_units).double() + 0.1
    found = IMPORTANCES[name](view, squared)
    assert found.dtype == torch.float64
    assert not bool(found[~view.keep].any())
    assert bool((found[view.keep & view.space.removable] > 0).all())
    again = IMPORTANCES[name](view, squared)
    assert torch.equal(found, again) != (name == "random")


def test_levelled_makes_every_group_worth_the_same_on_average(seen: tuple[nn.Module, View]) -> None:
    _, view = seen
    found = levelled(view, importance.l2(view, torch.zeros(view.space.n_units)))
    for group in range(view.space.n_groups):
        live = found[(view.space.group_of == group) & view.keep]
        if live.numel() and bool(live.any()):
            assert float(live.mean()) == pytest.approx(1)
