"""Laws of growing inside other people's loops, in what all callbacks share, and inside accelerate."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from borrowed import BUDGET, X, Y, net, on_budget, same
from torchgrow import Grower, TorchgrowError, portable_
from torchgrow.integrations.borrowed_loop import BorrowedLoop, one_process

# --- what they share; needs no framework ---


def test_a_loop_that_begins_twice_grows_once() -> None:
    loop, model = BorrowedLoop(BUDGET, None, None, {}), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert loop.begin(model, [optimizer], X[:2], 3) == {}
    first = loop.grower
    assert first is not None
    for due in (0, 0, 1):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        loop.update(due)
    assert len(first.history) == 2
    loop.begin(model, [optimizer], X[:2], 3)
    assert loop.grower is first
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    loop.begin(model, [other], X[:2], 3)
    assert loop.grower is not first
    assert loop.grower is not None
    assert len(loop.grower.history) == 2
    other.step()
    assert loop.update(0) is False
    loop.update(1)
    assert len(loop.grower.history) == 3
    loop.end()
    final, cost = loop.grower, loop.grower.cost()
    loop.begin(model, [torch.optim.SGD(model.parameters(), lr=0.1)], X[:2], 3)
    loop.end()
    assert loop.grower is final
    assert final.cost() == cost


def test_what_a_loop_refuses() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TorchgrowError, match=r"nothing says how many updates .* GrowCallback\(\.\.\., updates=20\)"):
        BorrowedLoop(BUDGET, None, None, {}).begin(model, [optimizer], X[:2], None)
    with pytest.raises(TorchgrowError, match="updates=0 must be a whole number >= 1"):
        BorrowedLoop(BUDGET, 0, None, {}).begin(model, [optimizer], X[:2], 3)
    assert model[0].out_features == 32
    one_process(1, "this loop")
    with pytest.raises(TorchgrowError, match="this loop has 2: it wraps the model once"):
        one_process(2, "this loop")
    with pytest.raises(TorchgrowError, match="every_n_steps=0 must be a whole number >= 1"):
        BorrowedLoop(BUDGET, None, 0, {})


def test_a_loop_of_one_epoch_plans_by_steps(caplog: pytest.LogCaptureFixture) -> None:
    for epochs, steps, room, every in (
        (1, 24, 12, 2),
        (1, 4, 4, 1),
        (1, 1, 1, None),
        (2, 24, 2, None),
        (None, 9, None, None),
    ):
        loop = BorrowedLoop(BUDGET, None, None, {})
        caplog.clear()
        assert loop.plan(epochs, steps) == room
        assert loop.every_n_steps == every
        assert ("updates come every" in caplog.text) == (every is not None)
    other = BorrowedLoop(BUDGET, None, None, {})
    other.go_on({"offset": 1, "every_n_steps": 2})
    assert (other.offset, other.every_n_steps) == (1, 2)
    for every in (24, 50):
        with pytest.warns(
            UserWarning, match=rf"room for {24 // every} updates .*={every}: .* Give every_n_steps=2 or less"
        ):
            assert BorrowedLoop(BUDGET, None, every, {}).plan(6, 24) == 24 // every


@pytest.mark.parametrize(
    ("made", "fix"),
    [(2, r"GrowCallback\(\.\.\., updates=3\) or fewer, and every_n"), (0, "untrained. Give every_n_steps=")],
)
def test_a_loop_that_ends_early_says_what_is_untrained(made: int, fix: str) -> None:
    """Without any update a plan of one would be the same again."""
    loop, model = BorrowedLoop(BUDGET, None, None, {}), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop.begin(model, [optimizer], X[:2], 1000)
    for due in range(made + 1):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        loop.update(due)
    text = rf"after {made} of 1000 planned updates: \d+ of \d+ units .*{fix}"
    with pytest.warns(UserWarning, match=text):
        loop.end()
    assert loop.grower is not None
    assert on_budget(loop.grower)


# --- accelerate ---


def test_accelerate_saves_and_loads(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def begin() -> tuple[Any, nn.Module, Any, Grower]:
        torch.manual_seed(7)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        grower = Grower(model, optimizer, example_inputs=X[:2], budget=BUDGET, updates=6)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(grower)
        return accelerator, model, optimizer, grower

    def train(accelerator: Any, model: nn.Module, optimizer: Any, grower: Grower, epochs: int) -> None:
        for _ in range(epochs):
            for number in range(4):
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(model(X[number::4]), Y[number::4]))
                optimizer.step()
            grower.update()

    straight, broken = begin(), begin()
    train(*straight, 5)
    train(*broken, 2)
    broken[0].save_state(tmp_path)
    resumed = begin()
    resumed[0].load_state(tmp_path)
    assert resumed[3].widths() == broken[3].widths()
    train(*resumed, 3)
    assert same(straight[1], resumed[1])
    frame = portable_(net())
    frame.load_state_dict(copy.deepcopy(resumed[1].state_dict()))
    assert same(frame, resumed[1])
