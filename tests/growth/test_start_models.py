"""Starts on random networks and those of the zoo: a run begins with what was computed before, in a fresh frame too."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import drawn
import drawn_training
import zoo
from drawn_training import gap
from torchgrow import Budget, BudgetError, Grower, StructureError, TraceError
from torchgrow.policies import Paper, Policy, Shrink

POLICIES: list[Policy] = [
    Shrink(),
    Shrink(importance="l1", allocation="levelled"),
    Shrink(importance="group_norm", allocation="global", align=2),
    Paper(),
]


def begun(model: nn.Module, x: Any, seed: int, start: str | nn.Module = "frame") -> Grower:
    """A grower at the first budget in reach."""
    for share in (40, 60, 80, 95, 100):
        try:
            return Grower(
                model,
                torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9),
                example_inputs=x,
                budget=Budget(params=f"{share}%"),
                updates=3,
                start=start,
                policy=POLICIES[seed % len(POLICIES)],
                seed=seed,
            )
        except BudgetError:
            continue
    raise BudgetError("none in reach")


Outputs = Callable[[nn.Module], list[Tensor]]


def gaps(model: nn.Module, frame: nn.Module, x: Any, seed: int, run: Outputs, seen: Outputs) -> dict[str, float]:
    """How far outputs are from what they were: at the start from the frame, and where a fresh frame takes over.

    Args:
        model: the first frame.
        frame: another one like it, with other weights.
        x: example inputs.
        seed: chooses the policy.
        run: outputs to train on.
        seen: outputs in evaluation mode.
    """
    before = seen(model)
    grower = begun(model, x, seed)
    found = {"frame": gap(seen(model), before)}
    teacher = grower.teacher()
    for _ in range(3):
        grower.optimizer.zero_grad()
        outputs = [y.square().mean() for y in run(model.train()) if y.is_floating_point() and y.requires_grad]
        torch.stack(outputs).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # the drawn ones soon diverge
        grower.optimizer.step()
        grower.update()
    if not grower.finished:
        grower.finish()
    found["teacher"] = gap(seen(teacher), before)
    small = seen(model)
    on = begun(frame, x, seed, start=model)
    assert torch.equal(on.keep, grower.keep)
    found["taken over"] = gap(seen(frame), small)
    return found


def checked(model: nn.Module, frame: nn.Module, x: Any, seed: int, run: Outputs, seen: Outputs) -> None:
    """`gaps`, where the model can be grown at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = gaps(model, frame, x, seed, run, seen)
        except (TraceError, BudgetError, StructureError) as error:
            pytest.skip(str(error)[:100])
    assert all(error <= 1e-9 for error in found.values()), found


@pytest.mark.parametrize("seed", range(12))
def test_a_start_of_a_random_network_computes_what_it_did(seed: int) -> None:
    program, x = drawn_training.program(seed), drawn.example(seed).double()
    model, frame = (drawn_training.build(program, one) for one in (seed, seed + 1))
    seen = partial(drawn_training.results, x=x, training=False)
    checked(model, frame, x, seed, lambda model: drawn_training.tensors(model(x)), seen)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_start_of_the_zoo_computes_what_it_did(name: str) -> None:
    model, frame = (zoo.build(name, seed).double() for seed in (0, 1))
    x = tree_map(lambda t: t.double() if t.is_floating_point() else t, zoo.inputs(name))

    def run(model: nn.Module) -> list[Tensor]:
        y = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
        return [t for t in tree_leaves(y) if isinstance(t, Tensor)]

    def seen(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return run(model.eval())

    checked(model, frame, x, list(zoo.ZOO).index(name), run, seen)
