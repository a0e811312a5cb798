"""Laws 4 and 11 in every kind of space: layers (residual, plain, meta), transformers, recurrent states."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from growing import differences, everything
from layered import Plain, Residual, Stages
from layered import batch as pictures
from planned import Planned
from torchgrow import Budget, Grower, load_checkpoint, save_checkpoint
from torchgrow.lab.attention import GPT, ViT
from torchgrow.lab.recurrent import LSTM
from torchgrow.policies import Default, Paper, Policy

UPDATES = 4


@dataclass(frozen=True)
class Case:
    """A frame, what it is trained on, and how it grows."""

    build: Callable[[], nn.Module]
    depth: bool = False
    meta: bool = False
    words: bool = False
    carried: bool = False
    adamw: bool = False


CASES = {
    "residual layers": Case(Stages, depth=True),
    "plain layers": Case(lambda: Stages(Plain), depth=True),
    "layers on the meta device": Case(lambda: Stages(Residual), depth=True, meta=True),
    "gpt": Case(
        lambda: GPT(words=11, features=8, layers=3, heads=3, head=2, neurons=7, context=6, dropout=0.2),
        depth=True,
        words=True,
        adamw=True,
    ),
    "vit": Case(lambda: ViT(size=6, features=8, layers=3, heads=3, head=2, neurons=7), depth=True, adamw=True),
    "lstm": Case(lambda: LSTM(words=11, embedding=5, hidden=(6, 7), dropout=0.2), words=True, carried=True),
}
METHODS = {"default": Default(), "paper": Paper(), "gates": Planned(ramp=0.5, settle=0.2)}


def sample(case: Case, step: int) -> tuple[Tensor, Tensor]:
    if not case.words:
        return pictures(step)
    text = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(step))
    return text[:, :-1], text[:, 1:].flatten()


def made(case: Case, method: Policy) -> Grower:
    torch.manual_seed(0)
    with torch.device("meta" if case.meta else "cpu"):
        model = case.build().double()
    optimizer = (
        torch.optim.AdamW(model.parameters(), 0.01) if case.adamw else torch.optim.SGD(model.parameters(), 0.05, 0.9)
    )
    x: Any = sample(case, 0)[0]
    return Grower(
        model,
        optimizer,
        example_inputs=(x, model.start(len(x))) if case.carried else x,  # type: ignore[operator]
        budget=Budget(params="60%"),
        updates=UPDATES,
        policy=method,
        seed=1,
        depth=case.depth,
        carried={1: 1} if case.carried else None,
    )


def loss_of(case: Case, grower: Grower, step: int, state: Any) -> tuple[Tensor, Any]:
    x, target = sample(case, step)
    out = grower.model(x, state) if case.carried else grower.model(x)
    scores, state = out if case.carried else (out, None)
    return F.cross_entropy(scores.flatten(0, -2), target), tree_map(Tensor.detach, state) if case.carried else None


def step_on(case: Case, grower: Grower, step: int, state: Any) -> Any:
    grower.optimizer.zero_grad()
    loss, state = loss_of(case, grower, step, state)
    loss.backward()
    grower.optimizer.step()
    return state


def start(case: Case, grower: Grower) -> Any:
    return grower.model.start(3) if case.carried else None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for i, name in enumerate(CASES)
        for j, method in enumerate(METHODS)
        if name == "lstm" or i % 3 == j
    ],
)
def test_law_4_resume_is_the_unbroken_run(name: str, method: str, tmp_path: Path) -> None:
    """From before any update, in a run that has ended; from near the end, in a new one; with dropout and states."""
    case, whole = CASES[name], made(CASES[name], METHODS[method])
    torch.manual_seed(7)
    state = start(case, whole)
    changed = 0
    for epoch in range(UPDATES):
        save_checkpoint(tmp_path / f"{epoch}", whole, extra={"state": state})
        for step in (0, 1):
            state = step_on(case, whole, 2 * epoch + step, state)
        event = whole.update()
        state = whole.carry(state) if case.carried else None
        changed += event.born + event.regrown + event.detached
    assert changed > 0
    expected = {**everything(whole, run=False), "state": dict(enumerate(tree_leaves(state)))}
    for first, again in ((0, whole), (3, made(case, METHODS[method]))):
        state = load_checkpoint(tmp_path / f"{first}", again)["state"]
        for epoch in range(first, UPDATES):
            for step in (0, 1):
                state = step_on(case, again, 2 * epoch + step, state)
            again.update()
            state = again.carry(state) if case.carried else None
        assert (
            differences(expected, {**everything(again, run=False), "state": dict(enumerate(tree_leaves(state)))}) == []
        ), first


@pytest.mark.parametrize("name", CASES)
def test_law_11_a_live_loss_over_an_update(name: str) -> None:
    """The next backward is right, and a graph of before refuses its own."""
    case = CASES[name]
    grower = made(case, METHODS["gates"])
    grower.model.eval()  # no dropout: the same gradients twice
    state = step_on(case, grower, 0, start(case, grower))
    grower.update()
    state = grower.carry(state) if case.carried else None
    old, after = loss_of(case, grower, 1, state)
    grower.update()
    state = grower.carry(after) if case.carried else None
    loss_of(case, grower, 2, state)[0].backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in grower.model.parameters()]
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
    grower.model.zero_grad()
    loss_of(case, grower, 2, state)[0].backward()
    for (label, parameter), gradient in zip(grower.model.named_parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None), label
        assert gradient is None or parameter.grad is None or torch.equal(gradient, parameter.grad), label
