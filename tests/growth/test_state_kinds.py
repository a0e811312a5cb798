"""Law 4 for every kind of state: layers, frames on the meta device, several optimizers, followers, carried state."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from growing import differences
from layered import Residual, Stages, batch
from torchgrow import Budget, Grower, SavedModelError, load_checkpoint, save_checkpoint


class Run:
    """A grower with all that hangs on it; `step` and `update` as a user's loop would."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        with torch.device("meta" if kind == "meta" else "cpu"):
            model = Stages(Residual).double()
        wide = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() == 1]
        split = [torch.optim.SGD(wide, 0.05, momentum=0.9), torch.optim.AdamW(rest, 0.01)]
        self.optimizers = split if kind == "optimizers" else [torch.optim.AdamW(model.parameters(), 0.01)]
        preset = {"gumbel": "paper:relaxation=gumbel,temperature_rises=learning_rate", "paper": "paper"}
        self.grower = Grower(
            model,
            self.optimizers,
            example_inputs=batch()[0],
            budget=Budget(params="60%"),
            updates=8,
            seed=3,
            depth=True,
            preset=preset.get(kind, "default"),
        )
        self.average: AveragedModel | None = None
        if kind == "follower":
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            self.grower.follow(self.average)

    def backward(self, number: int) -> None:
        x, target = batch(number)
        F.cross_entropy(self.grower.model(x), target).backward()

    def finish_step(self, first: int = 0) -> None:
        for optimizer in self.optimizers[first:]:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.grower.model)

    def epoch(self, number: int) -> None:
        for step in range(2):
            self.backward(2 * number + step)
            self.finish_step()
        self.grower.update()

    def everything(self) -> dict[str, Any]:
        grower, state = self.grower, self.grower.state_dict()
        followed = {} if self.average is None else dict(self.average.module.state_dict())
        for event in state["history"]:
            event.pop("seconds")
        return {
            "state": _flat(state),
            "followed": followed,
            "left out": sorted(grower.run.live.bank.skipped(grower.keep)),
        }


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    if not isinstance(value, (dict, list, tuple)):
        return {at: value}
    return {key: found for name, item in items for key, found in _flat(item, f"{at}/{name}").items()}


KINDS = ("default", "paper", "gumbel", "meta", "optimizers", "follower")


@pytest.mark.parametrize("kind", KINDS)
def test_law_4(kind: str, tmp_path: Path) -> None:
    whole = Run(kind)
    for epoch in range(8):
        if epoch == 3:
            save_checkpoint(tmp_path / "three", whole.grower)
            average = None if whole.average is None else whole.average.n_averaged.clone()
        whole.epoch(epoch)
    again = Run(kind)
    load_checkpoint(tmp_path / "three", again.grower)
    if again.average is not None and average is not None:
        again.average.n_averaged.copy_(average)
    for epoch in range(3, 8):
        again.epoch(epoch)
    assert differences(whole.everything(), again.everything()) == []
    assert any(not p.numel() for p in Run(kind).grower.model.parameters())


def test_between_the_steps_of_two_optimizers(tmp_path: Path) -> None:
    whole, again = Run("optimizers"), Run("optimizers")
    for epoch in range(2):
        whole.epoch(epoch)
    whole.backward(4)
    whole.optimizers[0].step()
    save_checkpoint(tmp_path, whole.grower)
    load_checkpoint(tmp_path, again.grower)
    for one in (whole, again):
        one.finish_step(first=1)
        one.grower.update()
        one.epoch(3)
    assert differences(whole.everything(), again.everything()) == []


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


BOX = ("bank", "stem.weight", "box")


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("optimizers", put([], "optimizers"), r"a list of 2, one for every optimizer"),
        ("optimizers", put([True], "steps", "waiting"), r"a list of 2, one for every optimizer"),
        ("follower", put([], "followers"), r"has 0 followers, this Grower 1; call grower\.follow\(module\)"),
        ("default", put(None, "bank", "stem.weight", "box"), r"it must be all positions of a frame"),
        ("meta", put({"7": torch.tensor([0])}, "bank", "stem.weight", "box"), r"it must be positions of an axis"),
        (
            "meta",  # 8 bytes that say they are 8 TB
            put({"0": torch.tensor([0]).expand(10**12)}, "bank", "stem.weight", "box"),
            r"it must be at most \d+ positions",
        ),
        (
            "meta",
            put({"0": torch.tensor([3, 1])}, "bank", "stem.weight", "box"),
            r"it must be rising positions below 6",
        ),
        (
            "meta",
            put({"1": torch.tensor([1])}, "bank", "stem.weight", "box"),
            r"it must be torch.float64 \(6, 1, 3, 3\)",
        ),
        ("default", put(torch.zeros(3), "policy", "rank"), r"\['rank'\] is torch.float32 \(3,\)"),
        ("gumbel", lambda s: s["policy"]["exponent"].fill_(99), r"\[0, 4\], the number of updates"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(kind: str, change: Any, says: str) -> None:
    run = Run(kind)
    for epoch in range(3):
        run.epoch(epoch)
    state = run.grower.state_dict()
    change(state)
    before = copy.deepcopy(run.everything())
    with pytest.raises(SavedModelError, match=says):
        run.grower.load_state_dict(state)
    assert differences(before, run.everything()) == []


class Reader(nn.Module):
    """An LSTM that is handed its state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, state = self.lstm(x, state)
        return self.head(out), state


def test_a_carried_state_is_cut_after_a_resume_as_before(tmp_path: Path) -> None:
    growers = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Reader().double()
        state = (torch.zeros(1, 2, 8, dtype=torch.float64),) * 2
        x = torch.randn(2, 5, 4, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        growers.append(
            Grower(model, optimizer, example_inputs=(x, state), carried={1: 1}, budget=Budget(params="70%"), updates=4)
        )
    whole, again = growers
    start = tuple(torch.zeros(1, 2, whole.widths()[next(iter(whole.widths()))], dtype=torch.float64) for _ in range(2))
    _, state = whole.model(x, start)
    whole.update()
    save_checkpoint(tmp_path, whole, extra=[t.detach() for t in state])
    extra = load_checkpoint(tmp_path, again)
    for a, b in zip(whole.carry(state), again.carry(extra), strict=True):
        assert torch.equal(a, b)


def test_sparse_gradients_are_in_the_state_too() -> None:
    """Of a step that was not taken yet; they come back dense."""
    torch.manual_seed(0)
    model, words = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 2)), torch.randint(0, 20, (4, 6))
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1)
    grower = Grower(model, optimizer, example_inputs=words, budget=Budget(params="60%"), updates=3, start="frame")
    model(words).square().mean().backward()
    wanted = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    state = grower.state_dict()
    optimizer.zero_grad()
    grower.load_state_dict(state)
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))
    optimizer.step()
    grower.update()
