"""Law 1 on networks nobody chose, and as many units as books kept by hand say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drawn
from torchgrow import trace

BLOCKS = st.lists(st.tuples(st.sampled_from(drawn.BLOCKS), st.integers(0, 999)), min_size=1, max_size=7)
HEAD = st.tuples(st.sampled_from(drawn.HEADS), st.integers(0, 999))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(BLOCKS, HEAD, st.sampled_from([0.2, 0.5, 0.8]))
def test_law_1_on_networks_nobody_chose(blocks: list[tuple[str, int]], head: tuple[str, int], share: float) -> None:
    model, x = drawn.build(blocks, head).double(), drawn.example().double()
    space = trace(model, x)
    assert drawn.error(model, space, share, 0, x) < 1e-9


@pytest.mark.parametrize("head", [(name, 3) for name in drawn.HEADS], ids=lambda head: head[0])
@pytest.mark.parametrize("block", [(name, 7) for name in drawn.BLOCKS], ids=lambda block: block[0])
def test_as_many_units_as_the_books_say(block: tuple[str, int], head: tuple[str, int]) -> None:
    """Every block between two convolutions; the proof cannot see what was frozen without need."""
    model = drawn.build([("conv", 18), block, ("conv", 37)], head).double()
    space = trace(model, drawn.example().double())
    assert drawn.found(space) == model.expected, [str(frozen) for frozen in space.frozen]


def test_the_books_tie_and_freeze() -> None:
    books = drawn.Books()
    a, b = books.new(3), books.new(3)
    assert books.free() == 6
    books.tie(a, b)
    assert books.free() == 3
    books.freeze(b[:1])
    assert books.free() == 2
    books.see([a[1], b[1]])
    assert books.free() == 1


def test_the_oracle_sees_a_wrong_space() -> None:
    model, x = drawn.build([("conv", 18)], ("pooled", 0)).double(), drawn.example().double()
    space = trace(model, x)
    place = ("blocks.1.0.weight", 1)
    space.unit_of[place][:] = space.unit_of[place].roll(1)
    assert drawn.error(model, space, 0.5, 0, x) > 1e-3


def test_the_same_seed_gives_the_same_network() -> None:
    one, again = (drawn.build(*drawn.program(5), seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], again[key]) for key in one)
