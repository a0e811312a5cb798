"""Random networks in training mode: what the generator and its oracle promise."""

from pathlib import Path
from typing import Any

import pytest
import torch

import drawn
import drawn_training
from torchgrow import save, shrink_, trace

PLAIN = ([("conv", 18), ("batch_norm", 1), ("written", 20)], ("pooled", 0), "tuple")


@pytest.mark.parametrize("seed", range(8))
def test_frames_run_in_both_modes_and_are_drawn_again_alike(seed: int) -> None:
    program, x = drawn_training.program(seed), drawn.example(seed).double()
    model, again = (drawn_training.build(program, seed) for _ in range(2))
    for training in (False, True, False):
        first, second = (drawn_training.results(m, x, training) for m in (model, again))
        assert drawn_training.gap(first, second) == 0.0
        assert all(torch.isfinite(tensor).all() for tensor in first)


@pytest.mark.parametrize("output", drawn_training.OUTPUTS)
def test_every_kind_of_output_is_opened(output: str) -> None:
    given = [torch.randn(2), torch.randn(3), torch.randn(4)]
    found = drawn_training.tensors(drawn_training.OUTPUTS[output](given[0], given[1:]))
    assert all(a is b for a, b in zip(found, given, strict=True))


def test_the_oracle_sees_what_training_alone_reads() -> None:
    """A learned noise is wrong where its size is, and evaluation cannot show it."""
    program = ([("conv", 18), ("noise", 0)], ("pooled", 0), "tuple")
    model, x = drawn_training.build(program), drawn.example().double()
    full: Any = drawn.copied(model)
    compact = drawn.copied(model)
    with torch.no_grad():
        full.blocks[2].size[0] = 0.0
    assert drawn_training.gap(*(drawn_training.results(m, x, False) for m in (compact, full))) == 0.0
    assert drawn_training.check(compact, full, x) > 1e-3


def test_the_oracle_agrees_where_all_is_right() -> None:
    model, x = drawn_training.build(PLAIN), drawn.example().double()
    assert drawn_training.error(model, trace(model, x), 0.5, 0, x) < 1e-9


def test_the_oracle_sees_a_wrong_space() -> None:
    model, x = drawn_training.build(PLAIN), drawn.example().double()
    space = trace(model, x)
    place = ("blocks.1.0.weight", 1)
    space.unit_of[place][:] = space.unit_of[place].roll(1)
    assert drawn_training.error(model, space, 0.5, 0, x) > 1e-3


def test_a_frame_filled_from_saved_files_computes_what_was_saved(tmp_path: Path) -> None:
    model, x = drawn_training.build(PLAIN), drawn.example().double()
    space = trace(model, x)
    shrink_(model, space, drawn.without(space, 0.5, 0))
    save(model, tmp_path / "network")
    full: Any = drawn_training.from_files(tmp_path / "network", drawn_training.build(PLAIN, seed=1))
    assert drawn_training.check(model, full, x) < 1e-9
    with torch.no_grad():
        full.blocks[0].weight.mul_(2.0)
    assert drawn_training.check(model, full, x) > 1e-3
