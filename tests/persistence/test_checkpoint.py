"""Law 4: a run that goes on from a checkpoint ends as the unbroken one, bit for bit; and what damaged ones get."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growing import adamw, batch, differences, everything, make, prodigy, run, sgd, train
from lookalikes import SlowWeights
from torchgrow import Budget, Grower, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.persistence.folder import pack


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), 1e-3, centered=True, momentum=0.5)


def slow_weights(model: nn.Module) -> torch.optim.Optimizer:
    return SlowWeights(model.parameters())


# --- Law 4 ---


@pytest.mark.parametrize(
    ("preset", "optimizer"),
    [("default", sgd), ("paper", adamw), ("default", rmsprop), ("default", prodigy), ("default", slow_weights)],
    ids=["sgd", "adamw", "rmsprop", "settings and dtypes of a step", "slots that come late"],
)
def test_law_4_resume_is_the_unbroken_run(preset: str, optimizer: Any, tmp_path: Path) -> None:
    """Stopped before the first step, in mid-epoch between backward and step, after updates, and at the end."""
    whole = make(preset, updates=4, optimizer=optimizer)
    for epoch in range(4):
        save_checkpoint(tmp_path / f"{epoch}", whole)
        train(whole, 2 * epoch, 1)
        whole.optimizer.zero_grad()
        x, target = batch(2 * epoch + 1)
        F.cross_entropy(whole.model(x), target).backward()
        save_checkpoint(tmp_path / f"{epoch} before the second step", whole)
        whole.optimizer.step()
        whole.update()
    save_checkpoint(tmp_path / "4", whole)
    expected = everything(whole)
    for first in (0, 2, 4):
        again = make(preset, updates=4, optimizer=optimizer)
        load_checkpoint(tmp_path / f"{first}", again)
        for epoch in range(first, 4):
            train(again, 2 * epoch)
            again.update()
        assert differences(expected, everything(again)) == [], first
    for first in (0, 2):
        again = make(preset, updates=4, optimizer=optimizer)
        load_checkpoint(tmp_path / f"{first} before the second step", again)
        again.optimizer.step()
        again.update()
        for epoch in range(first + 1, 4):
            train(again, 2 * epoch)
            again.update()
        assert differences(expected, everything(again)) == [], first


def test_any_structure_can_take_a_state_over_and_again(tmp_path: Path) -> None:
    """Back in one process: to an earlier structure, out of a finished run, twice from one state; objects stay."""
    grower = run(make("paper"), 3)
    early, before = grower.state_dict(), everything(grower)
    parameters = dict(grower.model.named_parameters())
    run(grower, 7)
    late, after = grower.state_dict(), everything(grower)
    assert grower.finished
    for _ in range(2):
        grower.load_state_dict(early)
        assert differences(before, everything(grower)) == []
        for epoch in range(7):
            train(grower, 2 * epoch)
            grower.update()
        assert differences(after, everything(grower)) == []
    grower.load_state_dict(early)
    grower.load_state_dict(late)
    assert differences(after, everything(grower)) == []
    with pytest.raises(TorchgrowError, match="the run is over"):
        grower.update()
    assert not grower.optimizer._optimizer_step_pre_hooks
    assert all(parameters[name] is parameter for name, parameter in grower.model.named_parameters())


def test_a_state_is_a_copy_and_plain_for_torch_save(tmp_path: Path) -> None:
    grower = run(make(), 3)
    state = grower.state_dict()
    torch.save(state, tmp_path / "state.pt")
    run(grower, 2)
    read = torch.load(tmp_path / "state.pt")  # weights only: nothing but data passes
    tensors: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    assert pack(state, tensors["a"]) == pack(read, tensors["b"])
    assert differences(tensors["a"], tensors["b"]) == []
    again = make()
    again.load_state_dict(state)
    run(again, 1)
    assert differences(tensors["a"], tensors["b"]) == []


def test_edits_not_yet_seen_by_the_grower_come_back(tmp_path: Path) -> None:
    """Somebody wrote into a gated weight between steps: raw and folded contents both survive as they are."""
    grower = run(make(), 3)
    with torch.no_grad():
        grower.model.get_parameter("bn2.weight").mul_(1.5)
    save_checkpoint(tmp_path, grower)
    again = make()
    load_checkpoint(tmp_path, again)
    for one in (grower, again):
        train(one, 6)
        one.update()
    assert differences(everything(grower), everything(again)) == []


def test_the_rate_of_the_indicators_is_that_of_the_saved_run(tmp_path: Path) -> None:
    """It follows present over initial learning rate: the one at the start of the run, not at that of this process."""
    grower = run(make(), 2)
    for group in grower.optimizer.param_groups:
        group["lr"] /= 10
    save_checkpoint(tmp_path, grower)
    again = make(optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.5, momentum=0.9))
    load_checkpoint(tmp_path, again)
    for one in (grower, again):
        train(one, 4)
        one.update()
    assert differences(everything(grower), everything(again)) == []


class WithDropout(nn.Module):
    """Random numbers in the forward pass, a channels_last layout, and a buffer that is another object every time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 4)
        self.register_buffer("last", torch.zeros(1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.dropout(F.relu(self.a(x)), 0.3, self.training)))
        self.last = x.detach().mean().reshape(1)
        return self.fc(x.mean((2, 3)))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3, 3, 7]),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)],
        milestones=[3],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # PyTorch 2.6's own SequentialLR uses it
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_and_random_numbers_go_on(name: str, tmp_path: Path) -> None:
    """float32, dropout, batches drawn by all three global generators."""

    def start() -> tuple[Grower, Any]:
        torch.manual_seed(0)
        model = WithDropout()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        budget, x = Budget(params="50%"), torch.randn(2, 3, 8, 8)
        grower = Grower(model, optimizer, example_inputs=x, budget=budget, updates=8)
        return grower, SCHEDULES[name](optimizer)

    def epoch(grower: Grower, schedule: Any) -> None:
        for _ in range(2):
            x = torch.randn(4, 3, 8, 8) * random.random() + float(np.random.rand())
            grower.optimizer.zero_grad()
            loss = F.cross_entropy(grower.model(x), torch.arange(4))
            loss.backward()
            grower.optimizer.step()
        grower.update()
        schedule.step(*([loss.item()] if name == "plateau" else []))

    whole, schedule = start()
    random.seed(1)
    np.random.seed(1)
    for i in range(8):
        epoch(whole, schedule)
        if i == 3:
            save_checkpoint(tmp_path, whole, scheduler=schedule, extra={"epoch": i})
            then = whole.model.state_dict()["last"].clone()
    torch.rand(5)
    again, schedule_again = start()
    random.seed(2)
    np.random.seed(2)
    assert load_checkpoint(tmp_path, again, scheduler=schedule_again) == {"epoch": 3}
    assert torch.equal(again.model.state_dict()["last"], then)
    for _ in range(4, 8):
        epoch(again, schedule_again)
    a, b = whole.state_dict(), again.state_dict()
    for state in (a, b):
        for event in state["history"]:
            del event["seconds"]
    tensors: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    assert pack(a, tensors["a"]) == pack(b, tensors["b"])  # strides included
    assert differences(tensors["a"], tensors["b"]) == []
    assert schedule.state_dict() == schedule_again.state_dict()


PROCESS = """
import hashlib, json, sys, torch
sys.path.insert(0, sys.argv[1])
from growing import make, run, everything
from torchgrow import load_checkpoint

def digest(grower):
    return hashlib.sha256(repr(sorted((k, v.numpy().tobytes() if isinstance(v, torch.Tensor) else v)
        for k, v in everything(grower).items())).encode()).hexdigest()

def go_on(grower):
    from growing import train
    for epoch in range(4, 8):
        train(grower, 2 * epoch)
        grower.update()
    return grower

anew = run(make("paper", updates=8))
resumed = make("paper", updates=8)
load_checkpoint(sys.argv[2], resumed)
print(digest(anew), digest(go_on(resumed)))
"""


def test_another_process_comes_to_the_same_bits(tmp_path: Path) -> None:
    """From the seed and from a checkpoint, structures and weights are those of this process."""
    grower = run(make("paper", updates=8), 4)
    save_checkpoint(tmp_path, grower)
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parents[1]), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for epoch in range(4, 8):
        train(grower, 2 * epoch)
        grower.update()
    scope: dict[str, Any] = {}
    exec(PROCESS[PROCESS.index("import hashlib") : PROCESS.index("def go_on")].replace("sys.argv[1]", "''"), scope)
    assert done.stdout.split() == [scope["digest"](grower)] * 2
