"""Law 4: a run that goes on from a checkpoint ends as the unbroken one, bit for bit; and what damaged ones get."""

import copy
import errno
import json
import os
import random
import shutil
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

import torchgrow.exchange
import torchgrow.persistence.folder
import torchgrow.structure.bank
from damage import damage, reseal
from growing import (
    batch,
    breaking,
    differences,
    everything,
    failing,
    interrupted_step,
    make,
    run,
    sgd,
    train,
)
from lookalikes import Prodigy, SlowWeights
from oracle import SmallResNet
from torchgrow import Budget, Grower, SavedModelError, TorchgrowError, TrainingError, load_checkpoint, save_checkpoint
from torchgrow.persistence.checkpoint import RECORD, TENSORS
from torchgrow.persistence.folder import pack, unpack


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == wide]} for wide in (True, False)]
    return torch.optim.AdamW(groups, 0.01, amsgrad=True)


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), 1e-3, centered=True, momentum=0.5)


def prodigy(model: nn.Module) -> torch.optim.Optimizer:
    return Prodigy(model.parameters())


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


# --- what does not fit ---


def frame(**arguments: Any) -> Callable[[], Grower]:
    return lambda: make("paper", updates=6, **arguments)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    grower = run(make("paper", updates=6), 3)
    train(grower, 6)
    return grower.state_dict()


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


def filled(value: float, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path:
            inner = inner[key]
        inner[1] = value

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no format": (drop("format"), r"got a dict with \['bank', 'bank_slots', 'before'\]; weights alone go into"),
    "a later format": (put(3, "format"), r"the state has format 3"),
    "a bool for the format": (put(True, "format"), r"the state has format True"),
    "a missing field": (drop("keep"), r"state lacks \['keep'\] and has the foreign \[\]; nothing was changed"),
    "a foreign field": (put(1, "code"), r"has the foreign \['code'\]"),
    "other updates": (put(7, "settings", "updates"), r"a run with updates=7, this Grower has 6; construct it with the"),
    "another method": (
        put(0.8, "settings", "policy.momentum"),
        r"a run with policy\.momentum=0\.8, this Grower has 0\.9",
    ),
    "another seed": (put(3, "settings", "seed"), r"a run with seed=3, this Grower has 0"),
    "a bool for a number": (put(False, "settings", "seed"), r"a run with seed=False"),
    "another shape of the frame": (
        put([9, 3, 3, 3], "frame", "shapes", "conv1.weight"),
        r"another frame: conv1\.weight is \[9, 3, 3, 3\] in it and \[6, 3, 3, 3\] here; the model must be built just",
    ),
    "another dtype": (put("torch.float32", "frame", "dtypes", "fc1.bias"), r"fc1\.bias is torch\.float32 in it and"),
    "other units": (put("00", "frame", "units"), r"has other units than this frame, though the shapes agree"),
    "keep of another size": (
        put(torch.ones(3, dtype=torch.bool), "keep"),
        r"state\['keep'\] is torch\.bool \(3,\), it",
    ),
    "keep of another dtype": (
        lambda s: s.update(keep=s["keep"].float()),
        r"state\['keep'\] is torch\.float32 \(\d+,\), it must be",
    ),
    "an empty structure": (lambda s: s["keep"].zero_(), r"the state's structure is damaged: "),
    "another structure": (lambda s: s["keep"].fill_(True), r"state\['history'\] is .* the last one of"),
    "no history": (put([], "history"), r"state\['history'\] is \[\] \(list\), it must be events 0 to at most 6"),
    "a history too long": (
        lambda s: s["history"].extend({**s["history"][-1], "update": i} for i in range(4, 9)),
        r"it must be events 0 to at most 6",
    ),
    "an event too many": (lambda s: s["history"].insert(0, s["history"][0]), r"must be events 0 to"),
    "text in an event": (
        put("3", "history", 2, "born"),
        r"state\['history'\]\[2\]\['born'\] is 3 \(str\), it must be a",
    ),
    "NaN pressure": (
        put(float("nan"), "history", 1, "pressure"),
        r"\['pressure'\] is nan \(float\), it must be a finite",
    ),
    "a negative width": (put(-1, "history", 1, "widths", "conv1"), r"it must be a whole number in \[0, "),
    "an event of two fields": (put({"update": 0, "born": 1}, "history", 0), r"history'\]\[0\] lacks \['detached', "),
    "finished in a word": (put("no", "finished"), r"state\['finished'\] is no \(str\), it must be True or False"),
    "an infinite penalty": (put(float("inf"), "policy", "pressure"), r"\['pressure'\] is inf"),
    "a huge rate": (put(10**400, "initial_lr"), r"state\['initial_lr'\] is 1000"),
    "s with NaN": (filled(float("nan"), "policy", "s"), r"\['policy'\]\['s'\] is .* without NaN and infinity"),
    "more updates than events": (
        filled(99, "policy", "t"),
        r"Paper is damaged: t must lie in \[0, 4\], the number of updates",
    ),
    "no generator": (
        put(torch.zeros(5056, dtype=torch.uint8), "generator"),
        r"state of a torch\.Generator",
    ),
    "a short generator": (
        put(torch.zeros(16, dtype=torch.uint8), "generator"),
        r"it must be torch\.uint8",
    ),
    "a missing weight": (drop("network", "fc1.bias"), r"state\['network'\] lacks \['fc1\.bias'\]"),
    "a foreign weight": (put(torch.ones(1), "network", "evil.weight"), r"has the foreign \['evil\.weight'\]"),
    "a weight at full size": (
        put(torch.ones(6, 3, 3, 3).double(), "network", "conv1.weight"),
        r"it must be torch\.float64",
    ),
    "a sparse weight": (
        lambda s: s["network"].update({"fc1.weight": s["network"]["fc1.weight"].to_sparse()}),
        r"\['fc1\.weight'\] is torch\.float64",
    ),
    "raw of another shape": (put(torch.ones(9).double(), "raw", "bn1.weight"), r"\['raw'\]\['bn1\.weight'\] is"),
    "a gradient of another shape": (
        put({"fc1.bias": torch.ones(99).double()}, "gradients"),
        r"gradients'\]\['fc1\.bias'\]",
    ),
    "a bank without a tensor": (drop("bank", "conv1.weight"), r"state\['bank'\] lacks \['conv1\.weight'\]"),
    "a foreign slot": (
        put([["evil", "momentum_buffer", torch.ones(1)]], "bank_slots"),
        r"a slot of a parameter that can",
    ),
    "a slot of another shape": (
        put(torch.ones(2).double(), "bank_slots", 0, 2),
        r"bank_slots'\]\[0\] is torch\.float64 \(2,",
    ),
    "other groups": (put([], "optimizers", 0, "groups"), r"has 0 groups of parameters, this one has 1"),
    "another order": (
        lambda s: s["optimizers"][0]["groups"][0]["params"].reverse(),
        r"in another order; build it just as",
    ),
    "a setting missing": (
        drop("optimizers", 0, "groups", 0, "momentum"),
        r"has no setting 'momentum'; build the optimizer as in the saved run, of the same class\. Nothing was changed",
    ),
    "text for a rate": (
        put("0.1", "optimizers", 0, "groups", 0, "lr"),
        r"\['lr'\] is 0\.1 \(str\), it must be of the kind of",
    ),
    "a NaN rate": (put(float("nan"), "optimizers", 0, "groups", 0, "lr"), r"\['lr'\] is nan"),
    "text for a foreign setting": (put("x", "optimizers", 0, "groups", 0, "more"), r"\['more'\] is x \(str\)"),
    "a renamed slot": (
        lambda s: s["optimizers"][0]["slots"].update(
            {"fc1.bias": {"momentum": s["optimizers"][0]["slots"]["fc1.bias"]["momentum_buffer"]}}
        ),
        r"\['fc1\.bias'\]\['momentum_buffer'\] is None \(NoneType\), it must be torch\.float64",
    ),
    "slots of a stranger": (
        put({}, "optimizers", 0, "slots", "evil"),
        r"must be the state of a parameter that this optimizer",
    ),
}


@pytest.fixture(scope="module")
def other() -> tuple[Grower, dict[str, Any]]:
    """A grower that will refuse, and all that must stay as it is; tests share it, since it does."""
    grower = run(make("paper", updates=6), 1)
    return grower, everything(grower)


@pytest.mark.parametrize("name", BAD)
def test_a_state_that_does_not_fit_changes_nothing(
    name: str, state: dict[str, Any], other: tuple[Grower, dict[str, Any]]
) -> None:
    change, text = BAD[name]
    grower, before = other
    bad = copy.deepcopy(state)
    change(bad)
    with pytest.raises(SavedModelError, match=text):
        grower.load_state_dict(bad)
    assert differences(before, everything(grower)) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, r"got a NoneType; weights alone go into model\.load_state_dict"),
        ([], r"got a list; weights"),
        ({1: 2}, r"got a dict with \['1'\]; weights"),
        (
            nn.Linear(2, 2).state_dict(),
            r"got a dict with \['bias', 'weight'\]; weights alone",
        ),
        ("run/", r"got a str; of a folder, torchgrow\.load_checkpoint\(folder, grower\)"),
        (Path("run"), r"Path; of a folder, torchgrow\.load_checkpoint\(folder, grower\)"),
    ],
)
def test_what_is_no_state_at_all(bad: Any, says: str) -> None:
    with pytest.raises(SavedModelError, match=rf"load_state_dict takes what grower\.state_dict\(\) returned, .*{says}"):
        make().load_state_dict(bad)


def test_a_grower_or_a_dict_around_a_state_is_no_state(state: dict[str, Any]) -> None:
    with pytest.raises(SavedModelError, match=r"got a Grower; of another grower, grower\.load_state_dict\(other"):
        make().load_state_dict(make())  # type: ignore[arg-type]
    with pytest.raises(SavedModelError, match=r"got a dict with \['mine', 'step'\]; which is in it as state\['mine'\]"):
        make().load_state_dict({"step": 3, "mine": state})


@pytest.mark.parametrize("given", [nn.Linear(2, 2), {}, "run"])
def test_a_checkpoint_is_of_a_grower(given: Any, tmp_path: Path) -> None:
    """Of a module, `save_checkpoint` wrote weights as the grower's state, which nothing could load."""
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(TorchgrowError, match=r"a checkpoint is of a Grower, got a .*; call save_checkpoint"):
            call(tmp_path, given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", [adamw, prodigy])
def test_an_optimizer_restored_before_by_a_framework_is_restored_anew(optimizer: Any) -> None:
    """Its state does not fit the seed as yet; and settings that steps have added since go with a state without them."""
    grower, again = make(updates=6, optimizer=optimizer), make(updates=6, optimizer=optimizer)
    fresh = grower.state_dict()
    run(grower, 3)
    own, state = copy.deepcopy(grower.optimizer.state_dict()), grower.state_dict()
    again.optimizer.load_state_dict(own)
    again.load_state_dict(state)
    assert differences(everything(grower), everything(again)) == []
    for one in (grower, again):
        train(one, 6)
        one.update()
    assert differences(everything(grower), everything(again)) == []
    again.load_state_dict(fresh)
    assert again.optimizer.param_groups[0].keys() == make(optimizer=optimizer).optimizer.param_groups[0].keys()


def test_another_optimizer_is_refused(state: dict[str, Any]) -> None:
    """Of the same groups, but with other settings and slots."""
    grower = make("paper", updates=6, optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.05))
    before = everything(grower)
    with pytest.raises(SavedModelError, match=r"no setting 'betas'; build the optimizer as in the saved run"):
        grower.load_state_dict(state)
    assert differences(before, everything(grower)) == []


LOADING = [
    (torchgrow.structure.bank.Change, "into", 1),
    (torchgrow.growth.gates.Fold, "factors", 1),
    *[(torchgrow.exchange, "run", call) for call in (0, 1, 5, 20, 40, -40, -20, -1)],
]


@pytest.mark.parametrize(("owner", "name", "call"), LOADING, ids=lambda p: p if isinstance(p, (str, int)) else "")
@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt()])
def test_a_failed_load_changes_nothing(
    owner: Any,
    name: str,
    call: int,
    error: BaseException,
    state: dict[str, Any],
    other: tuple[Grower, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grower, before = other
    with monkeypatch.context() as patch:
        within = name == "run"
        patch.setattr(owner, name, breaking(call, error) if within else failing(error, call, getattr(owner, name)))
        with pytest.raises(type(error)):
            grower.load_state_dict(state)
    assert differences(before, everything(grower)) == []


def test_an_unfinished_step_has_no_state_but_can_be_replaced(state: dict[str, Any]) -> None:
    grower = run(make("paper", updates=6), 1)
    train(grower, 6, 1)
    interrupted_step(grower.optimizer)
    with pytest.raises(TrainingError, match=r"the last optimizer\.step\(\) did not finish"):
        grower.state_dict()
    interrupted_step(grower.optimizer)
    grower.load_state_dict(state)
    expected = make("paper", updates=6)
    expected.load_state_dict(state)
    assert differences(everything(expected), everything(grower)) == []


# --- folders ---


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_k_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".checkpoint-000001.half").mkdir()
    made = [save_checkpoint(tmp_path, extra=i, keep=2).name for i in range(4)]
    assert made[-1] == "checkpoint-000004"
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000004", "notes.txt"]
    assert names(tmp_path / "checkpoint-000004") == [RECORD, TENSORS]
    assert load_checkpoint(tmp_path) == 3
    assert load_checkpoint(tmp_path / "checkpoint-000003") == 2
    with pytest.raises(TorchgrowError, match=r"keep=0 must be a whole number >= 1: how many checkpoints to keep"):
        save_checkpoint(tmp_path, keep=0)


WRITER = """
import sys, torch, torchgrow
folder, who = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for step in range(25):
    made = torchgrow.save_checkpoint(folder, extra=[who, step, torch.full((5000,), who)], keep=3)
    print(made.name)
    last = torchgrow.load_checkpoint(folder)
    assert bool((last[2] == last[0]).all())
"""


def test_processes_that_write_to_one_folder_take_turns(tmp_path: Path) -> None:
    """Each checkpoint has a number of its own, stays whole, and is there to be read without a warning."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER, str(tmp_path)]
    pipe = subprocess.PIPE
    writers: list[Any] = [
        subprocess.Popen([*command, str(who)], stdin=pipe, stdout=pipe, stderr=pipe, text=True) for who in range(2)
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    printed = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], printed
    made = sorted(line for out, _ in printed for line in out.split())
    assert made == [f"checkpoint-{number:06d}" for number in range(1, 51)]
    assert names(tmp_path) == made[-3:]


@pytest.mark.parametrize("name", [RECORD, TENSORS])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(name: str, how: str, tmp_path: Path) -> None:
    for i in range(2):
        save_checkpoint(tmp_path, extra={"i": i, "x": torch.arange(9)})
    damaged = tmp_path / "checkpoint-000002" / name
    whole = damaged.read_bytes()
    if how == "missing":
        damaged.unlink()
    else:
        flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
        damaged.write_bytes({"cut": whole[: len(whole) // 2], "flipped": flipped, "empty": b""}[how])
    with pytest.warns(UserWarning, match=rf"going on from .*checkpoint-000001, since .*{name}"):
        assert load_checkpoint(tmp_path)["i"] == 0
    with pytest.raises(SavedModelError, match=rf"no checkpoint in .* is whole: .*{name}"):
        load_checkpoint(tmp_path / "checkpoint-000002")


def test_no_checkpoint_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SavedModelError, match=r"no checkpoint in .*; make one with torchgrow\.save_checkpoint"):
            load_checkpoint(folder)


def test_a_grower_or_a_scheduler_too_many_or_too_few(tmp_path: Path) -> None:
    grower = make()
    save_checkpoint(tmp_path / "bare")
    with pytest.raises(SavedModelError, match=r"was saved without a grower; load it without one"):
        load_checkpoint(tmp_path / "bare", grower)
    save_checkpoint(tmp_path / "grown", grower)
    with pytest.raises(SavedModelError, match=r"was saved with a grower; load it with one"):
        load_checkpoint(tmp_path / "grown")
    with pytest.raises(SavedModelError, match=r"was saved without a scheduler"):
        load_checkpoint(tmp_path / "grown", grower, scheduler=SCHEDULES["multistep"](grower.optimizer))


def test_another_scheduler_changes_nothing(tmp_path: Path) -> None:
    grower = run(make(), 2)
    save_checkpoint(tmp_path, grower, scheduler=SCHEDULES["multistep"](grower.optimizer))
    other = make()
    schedule = SCHEDULES["onecycle"](other.optimizer)
    before, was = everything(other), copy.deepcopy(schedule.state_dict())
    with pytest.raises(SavedModelError, match=r"checkpoint\['scheduler'\] is .* it must be of the kind of"):
        load_checkpoint(tmp_path, other, scheduler=schedule)
    assert differences(before, everything(other)) == []
    assert schedule.state_dict() == was


def test_a_scheduler_comes_back_when_the_grower_does_not_fit(tmp_path: Path) -> None:
    grower = run(make(), 2)
    save_checkpoint(tmp_path, grower, scheduler=SCHEDULES["multistep"](grower.optimizer))
    other = make(updates=12)
    schedule, random_numbers = SCHEDULES["multistep"](other.optimizer), torch.get_rng_state()
    train(other)
    schedule.step()
    with pytest.raises(SavedModelError, match=r"updates=10, this Grower has 12"):
        load_checkpoint(tmp_path, other, scheduler=schedule)
    assert schedule.last_epoch == 1
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_what_is_not_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"extra/models/0 is of type Linear, which cannot be stored as data; use"):
        save_checkpoint(tmp_path, extra={"models": [nn.Linear(1, 1)]})
    with pytest.raises(SavedModelError, match=r"extra is a torch\.sparse_coo tensor, .* use tensor\.to_dense\(\)"):
        save_checkpoint(tmp_path, extra=torch.eye(3).to_sparse())
    assert names(tmp_path) == []


def test_damaged_random_numbers(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    record = json.loads((folder / RECORD).read_text())
    for key, value in (("python", [3, 4, None]), ("numpy", ["MT19937"]), ("numpy", 5), ("cuda", 1), ("torch", 0)):
        bad = copy.deepcopy(record)
        bad["contents"]["random"][key] = value
        (folder / RECORD).write_text(json.dumps(bad))
        reseal(folder, RECORD, TENSORS)
        before = torch.get_rng_state(), random.getstate()
        with pytest.raises(SavedModelError, match=r"checkpoint\['random'\].* (is damaged|it must be)"):
            load_checkpoint(tmp_path)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()


# --- disks that are full, folders that are read-only ---

WRITES = ["safetensors", "json", "fsync", "rename", "mkdir"]


@pytest.mark.parametrize("where", WRITES)
def test_a_full_disk_leaves_the_older_checkpoints(
    where: str, other: tuple[Grower, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grower, before = other
    save_checkpoint(tmp_path, grower, extra="older", keep=1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise full

    with monkeypatch.context() as patch:
        owner, name = {
            "safetensors": (torchgrow.persistence.folder, "save_file"),
            "json": (Path, "write_text"),
            "fsync": (os, "fsync"),
            "rename": (Path, "rename"),
            "mkdir": (Path, "mkdir"),
        }[where]
        patch.setattr(owner, name, fail)
        with pytest.raises(
            SavedModelError, match=r"could not be written \(.*No space left on device\); what was there"
        ):
            save_checkpoint(tmp_path, grower, extra="newer", keep=1)
    assert names(tmp_path) == ["checkpoint-000001"]
    assert load_checkpoint(tmp_path, grower) == "older"
    assert differences(before, everything(grower)) == []


LIMITS = """
import resource, signal, sys, torch, torchgrow

def refused(work):
    try:
        work()
    except (torchgrow.TorchgrowError, RuntimeError, MemoryError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))

model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 1000))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
x = torch.ones(2, 1000)
grower = torchgrow.Grower(model, optimizer, example_inputs=x, budget=torchgrow.Budget(params="90%"), updates=2)
model(x).sum().backward()
optimizer.step()
before, width = model(x), sum(grower.widths().values())
pages = int(open("/proc/self/statm").read().split()[0])
whole = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2_000_000, whole[1]))
refused(grower.update)
resource.setrlimit(resource.RLIMIT_AS, whole)
print(torch.equal(model(x), before), sum(grower.widths().values()) == width)
grower.update()
print(sum(grower.widths().values()) > width)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
torchgrow.save_checkpoint(sys.argv[1], extra="small")
refused(lambda: torchgrow.save_checkpoint(sys.argv[1], grower, keep=1))
refused(lambda: torchgrow.save(model, sys.argv[1] + "/net"))
print(torchgrow.load_checkpoint(sys.argv[1]))
"""


def test_real_limits_of_memory_and_files(tmp_path: Path) -> None:
    """An update without memory, writes that stop half-way (for root too): old network and old files whole."""
    command = [sys.executable, "-c", LIMITS, str(tmp_path)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what was freed is not there to be used again
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    memory, same, grown, checkpoint, network, extra = done.stdout.splitlines()
    assert "allocate memory" in memory or memory.startswith("MemoryError")
    assert (same, grown, extra) == ("True True", "True", "small")
    assert checkpoint.startswith("SavedModelError")
    assert "checkpoint-000002 could not be written" in checkpoint
    assert "net could not be written" in network
    assert names(tmp_path) == ["checkpoint-000001"]


@pytest.mark.filterwarnings("ignore:.* is saved before its growth has finished:UserWarning")
def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grower = run(make(), 2)
    before = everything(grower)

    def refuse(*args: Any, **kwargs: Any) -> Any:  # root may write anywhere, so that permissions would prove nothing
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        for write in (
            lambda: save_checkpoint(tmp_path, grower),
            lambda: torchgrow.save(grower.model, tmp_path / "net"),
        ):
            with pytest.raises(
                SavedModelError, match=r"could not be written \(.*Permission denied\); .* another folder"
            ):
                write()
    (tmp_path / "file").touch()
    with pytest.raises(SavedModelError, match=r"could not be written"):
        save_checkpoint(tmp_path / "file" / "run", grower)
    assert differences(before, everything(grower)) == []


@pytest.mark.filterwarnings("ignore:.* is saved before its growth has finished:UserWarning")
@pytest.mark.parametrize("chunk", range(2))
def test_damaged_files_are_refused_or_load(chunk: int, tmp_path: Path) -> None:
    """A small part of benchmarks/fuzz_files.py: a TorchgrowError and nothing changed, or a run that goes on."""
    grower = run(make(updates=6), 3)
    whole = save_checkpoint(tmp_path / "whole", grower, extra=[1, (2.5, None)])
    torchgrow.save(grower.model, tmp_path / "net")
    for seed in range(25 * chunk, 25 * chunk + 25):
        draw = random.Random(seed)
        kind = draw.choice(["checkpoint-000001", "net"])
        target = tmp_path / "damaged" / kind
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(whole if kind == whole.name else tmp_path / "net", target)
        damage(target, (RECORD, TENSORS) if kind == whole.name else ("structure.json", "model.safetensors"), draw)
        before = grower.state_dict()
        try:
            if kind == "net":
                torchgrow.load(target, lambda: SmallResNet().double())(batch(0)[0])
            else:
                load_checkpoint(target, grower)
                if not grower.finished:
                    run(grower, 1)
        except TrainingError:
            pass  # damaged weights, say, are weights
        except TorchgrowError:
            tensors: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
            assert pack(before, tensors["a"]) == pack(grower.state_dict(), tensors["b"]), seed
            assert differences(tensors["a"], tensors["b"]) == [], seed


# --- plain data ---


def test_everything_plain_survives_the_packing() -> None:
    from collections import Counter

    shared = torch.arange(6.0).reshape(2, 3)
    expanded = torch.ones(1).expand(4)
    value = {
        "numbers": [0, -1, 10**30, 0.1, -0.0, 1e-300, float("inf"), -float("inf"), True, None, "text", "\ud800é\n"],
        "tuple": ((), (1, [2, (3,)])),
        "!odd": {1: "a", -2: "b", (1, "x"): {"!tuple": []}, None: 0, False: 5, 0.5: 6},
        "counter": Counter({3: 2, 5: 1}),
        "tensors": [shared, shared.t(), shared[0], torch.tensor(5), torch.zeros(0, 3), torch.ones(2) > 0],
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "nhwc": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "thin": torch.randn(4, 1, 1, 1).to(memory_format=torch.channels_last),
        "expanded": expanded,
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    tensors: dict[str, Tensor] = {}
    packed = pack(value, tensors)
    again = unpack(json.loads(json.dumps(packed)), tensors)
    flat_a, tree_a = torch.utils._pytree.tree_flatten(value)
    flat_b, tree_b = torch.utils._pytree.tree_flatten(again)
    assert str(tree_a) == str(tree_b)
    assert type(again["counter"]) is Counter
    for a, b in zip(flat_a, flat_b, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
            assert a.stride() == b.stride() or a.data_ptr() == expanded.data_ptr()
        else:
            assert a == b
            assert str(a) == str(b)  # -0.0
    assert np.isnan(unpack(pack({"x": float("nan")}, {}), {})["x"])


@pytest.mark.parametrize(
    "bad",
    [
        {"!tensor": "none"},
        {"!tensor": ["x"]},
        {"!tensor": "x", "more": 1},
        {"!tensor": "x", "stride": [1]},
        {"!tensor": "x", "stride": [1, 1]},
        {"!tensor": "x", "stride": [2**70, 1]},
        {"!tensor": "x", "stride": [-3, 1]},
        {"!tensor": "x", "stride": [5, 0]},
        {"!tensor": "x", "stride": [True, 2]},
        {"!tuple": 5},
        {"!tuple": [], "x": 1},
        {"!float": "1"},
        {"!float": []},
        {"!dict": [[1]]},
        {"!dict": [[[1], 2]]},
        {"!dict": 1},
        {"!evil": 1},
    ],
    ids=str,
)
def test_what_packing_never_makes(bad: Any) -> None:
    with pytest.raises(SavedModelError, match=r"a record has .*(stands for nothing|for a tensor of shape \(2, 3\))"):
        unpack([bad], {"x": torch.zeros(2, 3)})


def test_settings_that_the_optimizer_would_not_take_are_refused() -> None:
    """A beta of 7 is a number, but its square root in Adam is none."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    grower = torchgrow.Grower(
        model, optimizer, example_inputs=torch.randn(2, 4), budget=torchgrow.Budget(params="60%"), updates=3
    )
    state = grower.state_dict()
    state["optimizers"][0]["groups"][0]["betas"] = (0.9, 7.0)
    with pytest.raises(SavedModelError, match=r"groups'\]\[0\] cannot be set: Invalid beta parameter.*7"):
        grower.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
