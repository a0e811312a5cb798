"""Attributes that follow: sizes of unequal parts of an axis, and what else counts units; the proof decides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgrow import Budget, Grower, load, save, shrink_, trace, verify
from torchgrow.structure.attributes import get, held
from torchgrow.structure.space import Attribute
from torchgrow.tracing.size_attributes import Guess, choices

ROWS = (4, 5)


class Cut(nn.Module):
    """a(5, 24), cut -> part i through p_i (as wide as it is), side by side -> o(24, 3); the cut reads attributes"""

    def __init__(self, cut: Callable[[Any, Tensor], Any], wide: tuple[int, ...] = (8, 16), **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)
        self.cut, total = cut, sum(wide)
        self.a, self.o = nn.Linear(5, total), nn.Linear(total, 3)
        self.p = nn.ModuleList(nn.Linear(size, size) for size in wide)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.cut(self, torch.relu(self.a(x)))
        return self.o(torch.cat([p(part) for p, part in zip(self.p, parts, strict=True)], 1))


Y = Tensor


def by_slices(m: Any, y: Y) -> Any:
    return y[:, : m.b], y[:, m.b : m.b + m.c], y[:, m.b + m.c :]


def by_shape(m: Any, y: Y) -> Any:
    third = y.shape[1] // 3
    return y[:, :third], y[:, third:]


# How an axis is cut, how wide the parts are, what the module holds, and the units per group that this leaves.
CUTS: dict[str, tuple[Callable[[Any, Y], Any], tuple[int, ...], dict[str, Any], list[int]]] = {
    "two": (lambda m, y: y.split([m.c, m.d], 1), (8, 16), {"c": 8, "d": 16}, [8, 16, 8, 16]),
    "a tuple": (lambda m, y: y.split(m.sizes, 1), (8, 16), {"sizes": (8, 16)}, [8, 16, 8, 16]),
    "a list": (lambda m, y: torch.split(y, m.sizes, 1), (8, 16), {"sizes": [8, 16]}, [8, 16, 8, 16]),
    "one of a list": (lambda m, y: y.tensor_split([m.sizes[1]], 1), (8, 15), {"sizes": [5, 8]}, [8, 15, 8, 15]),
    "the rest": (lambda m, y: y.split([m.c, y.shape[1] - m.c], 1), (8, 16), {"c": 8}, [8, 16, 8, 16]),
    "an odd rest": (lambda m, y: y.split([m.c, y.shape[1] - m.c], 1), (7, 17), {"c": 7}, [7, 17, 7, 17]),
    "sliced": (lambda m, y: (y[:, : m.c], y[:, m.c :]), (8, 16), {"c": 8}, [8, 16, 8, 16]),
    "from the end": (lambda m, y: (y[:, : -m.d], y[:, -m.d :]), (8, 16), {"d": 16}, [8, 16, 8, 16]),
    "narrow": (lambda m, y: (y.narrow(1, 0, m.c), y.narrow(1, m.c, m.d)), (8, 16), {"c": 8, "d": 16}, [8, 16, 8, 16]),
    "three": (lambda m, y: y.split([m.b, m.c, m.d], 1), (4, 8, 12), {"b": 4, "c": 8, "d": 12}, [4, 8, 12, 4, 8, 12]),
    "three slices": (by_slices, (4, 8, 11), {"b": 4, "c": 8}, [4, 8, 11, 4, 8, 11]),
    "a sum": (lambda m, y: y.split([m.b + m.c, m.d], 1), (13, 7), {"b": 8, "c": 5, "d": 7}, [13, 7, 13, 7]),
    "a multiple": (lambda m, y: y.split([m.c, 2 * m.c], 1), (8, 16), {"c": 8}, [8, 8, 16]),
    "two multiples": (lambda m, y: y.split([2 * m.c, 3 * m.c], 1), (10, 15), {"c": 5}, [5, 10, 15]),
    "one twice": (lambda m, y: y.split([m.c, m.c, m.d], 1), (6, 6, 12), {"c": 6, "d": 12}, [6, 12, 6, 6, 12]),
    "equal by attribute": (lambda m, y: y.split(m.c, 1), (12, 12), {"c": 12}, [12, 12, 12]),
    "equal by shape": (lambda m, y: y.split(y.shape[1] // 3, 1), (8, 8, 8), {}, [8, 8, 8, 8]),
    "among others of their size": (
        lambda m, y: y.split([m.c, m.d], 1), (8, 16), {"c": 8, "d": 16, "e": 8, "f": 16, "g": [8, 16, 2]},
        [8, 16, 8, 16],
    ),
    "a third by shape, beside its number": (by_shape, (8, 16), {"c": 8}, [8, 8, 16]),
    "fixed": (lambda m, y: y.split([8, 16], 1), (8, 16), {}, [8, 16]),
    "fixed, beside their numbers": (lambda m, y: y.split([8, 16], 1), (8, 16), {"c": 8, "d": 16}, [8, 16]),
    "fixed, beside factors": (lambda m, y: y.split([8, 16], 1), (8, 16), {"c": 2, "d": 4}, [8, 16]),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_sizes_of_unequal_parts_follow_if_they_are_attributes(name: str) -> None:
    cut, wide, held, units = CUTS[name]
    torch.manual_seed(0)
    report = verify(Cut(cut, wide, **held), torch.randn(ROWS), fraction=0.4)
    assert report.ok, report
    assert sorted(report.groups.values()) == sorted(units), report.groups


@pytest.mark.parametrize("name", ["fixed", "fixed, beside their numbers"])
def test_a_cut_at_a_fixed_place_is_named(name: str) -> None:
    cut, wide, held, _ = CUTS[name]
    space = trace(Cut(cut, wide, **held), torch.randn(ROWS))
    assert any(
        frozen.op == "aten.split_with_sizes"
        and frozen.line.startswith("test_size_attributes.py:")
        and frozen.reason == "takes a part of this axis at a place fixed in the forward"
        for frozen in space.frozen
    )


def cut_saved_and_loaded(build: Callable[[], nn.Module], rows: str, x: Tensor, folder: Path) -> nn.Module:
    """A model of which every third unit on the rows of a weight has gone, once it is shown to load as it is."""
    torch.manual_seed(0)
    model = build()
    space = trace(model, x)
    keep = space.everything()
    keep[[unit for unit in space.unit_of[rows, 0].tolist() if unit % 3 == 0]] = False
    shrink_(model, space, keep)
    assert {a.name: get(model.get_submodule(a.module), a.name) for a in space.attributes} == {
        a.name: int(keep[a.units].sum()) for a in space.attributes
    }
    expected = model(x)
    save(model, folder / "net")
    loaded = load(folder / "net", build)
    torch.testing.assert_close(loaded(x), expected)
    for path, module in loaded.named_modules():
        assert held(module) == held(model.get_submodule(path))
    return model


@pytest.mark.parametrize("name", ["two", "a tuple", "a list", "one of a list"])
def test_sizes_in_attributes_are_cut_saved_loaded_and_put_back(name: str, tmp_path: Path) -> None:
    cut, wide, sizes, _ = CUTS[name]
    model = cut_saved_and_loaded(lambda: Cut(cut, wide, **sizes), "a.weight", torch.randn(ROWS), tmp_path)
    assert all(type(getattr(model, attribute)) is type(value) for attribute, value in sizes.items())
    assert sizes == CUTS[name][2], "what other modules may share was written to"


class Ghost(nn.Module):
    """a(5, 8) and what b(8, 8) makes of it, side by side, without the last: 15"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.oup = nn.Linear(5, 8), nn.Linear(8, 8), 15

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return torch.cat([y, self.b(y).relu()], 1)[:, : self.oup]


def test_a_size_greater_than_that_of_an_axis_that_is_cut_is_saved(tmp_path: Path) -> None:
    model = cut_saved_and_loaded(
        lambda: nn.Sequential(Ghost(), nn.Linear(15, 3)), "0.a.weight", torch.randn(ROWS), tmp_path
    )
    assert model.get_submodule("0").oup == 12


class View(nn.Module):
    """As `nn.Unflatten`, from an attribute of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, self.channels, 2, 2)


def decoder(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Sequential(inner), nn.ConvTranspose2d(6, 3, 2))


# Modules without tensors that view an axis as several, after which 6 units remain, and how.
VIEWS: dict[str, Callable[[], nn.Module]] = {
    "unflatten": lambda: decoder(nn.Unflatten(1, (6, 2, 2))),
    "unflatten, a list": lambda: decoder(nn.Unflatten(1, [6, 2, 2])),
    "unflatten, a size": lambda: decoder(nn.Unflatten(1, torch.Size([6, 2, 2]))),
    "a view": lambda: decoder(View(6)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_size_of_an_axis_that_a_module_without_tensors_splits_off_follows(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = verify(VIEWS[name](), torch.randn(ROWS), fraction=0.4)
    assert report.ok, report
    assert list(report.groups.values()) == [6], report
    cut_saved_and_loaded(VIEWS[name], "0.weight", torch.randn(ROWS), tmp_path)


def test_a_decoder_grows_and_grows_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = decoder(nn.Unflatten(1, (6, 2, 2))), torch.randn(ROWS)
    for most in (150, 110):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params=most), updates=2)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            grower.update()
        save(model, tmp_path / "net")
        again = load(tmp_path / "net", lambda: decoder(nn.Unflatten(1, (6, 2, 2))))
        torch.testing.assert_close(again(x), model(x))
        model = again
    unflatten = model.get_submodule("2.0")
    assert isinstance(unflatten, nn.Unflatten)
    assert 1 <= unflatten.unflattened_size[0] < 6


def test_one_place_of_a_list_may_be_chance() -> None:
    """What is sure is tried as it is, then without single places of lists: a window's shift that equals the heads."""
    units = torch.arange(3)
    heads, shift, weak = (
        Guess(frozenset({0}), Attribute("attention", name, units), strong=True, sure=sure)
        for name, sure in (("num_heads", True), ("shift_size[1]", True), ("depth", False))
    )
    names = [[guess.attribute.name for guess in choice] for choice in choices([heads, shift, weak])]
    assert names == [["num_heads", "shift_size[1]"], ["num_heads"], ["num_heads", "shift_size[1]", "depth"]]
