"""Folders of checkpoints: the last ones are kept, damaged ones passed over, full disks lose nothing."""

import copy
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgrow.exchange
import torchgrow.persistence.folder
import torchgrow.structure.bank
from damage import damage, reseal
from growing import batch, differences, everything, make, refusing, run, train
from oracle import SmallResNet
from torchgrow import Grower, SavedModelError, TorchgrowError, TrainingError, load_checkpoint, save_checkpoint
from torchgrow.persistence.checkpoint import RECORD, TENSORS
from torchgrow.persistence.folder import pack


def multistep(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.MultiStepLR:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3, 7])


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
        load_checkpoint(tmp_path / "grown", grower, scheduler=multistep(grower.optimizer))


def test_another_scheduler_changes_nothing(tmp_path: Path) -> None:
    grower = run(make(), 2)
    save_checkpoint(tmp_path, grower, scheduler=multistep(grower.optimizer))
    other = make()
    schedule = torch.optim.lr_scheduler.OneCycleLR(other.optimizer, 0.2, total_steps=20)
    before, was = everything(other), copy.deepcopy(schedule.state_dict())
    with pytest.raises(SavedModelError, match=r"checkpoint\['scheduler'\] is .* it must be of the kind of"):
        load_checkpoint(tmp_path, other, scheduler=schedule)
    assert differences(before, everything(other)) == []
    assert schedule.state_dict() == was


class Plateau:
    """A schedule of one's own, whose state fills up as it goes."""

    def __init__(self) -> None:
        self.best: Any = None
        self.seen: list[float] = []
        self.drops: dict[str, float] = {}

    def step(self, loss: float) -> None:
        self.best = torch.tensor(loss) if self.best is None else torch.minimum(self.best, torch.tensor(loss))
        self.drops |= {str(len(self.seen)): loss} if self.seen and loss > self.seen[-1] else {}
        self.seen.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "seen": list(self.seen), "drops": dict(self.drops)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.seen, self.drops = state["best"], list(state["seen"]), dict(state["drops"])


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_schedule_whose_state_fills_up(tmp_path: Path, steps: int) -> None:
    """It loads into one that is new, and into one that has seen fewer or more."""
    schedule, again = Plateau(), Plateau()
    for loss in (1.0, 0.5, 0.7):
        schedule.step(loss)
    save_checkpoint(tmp_path, scheduler=schedule)
    for i in range(steps):
        again.step(float(i))
    load_checkpoint(tmp_path, scheduler=again)
    assert again.state_dict() == schedule.state_dict()
    assert again.drops == {"2": 0.7}


class Listed:
    """A schedule whose state is no dict with text for keys."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize(("saved", "fresh"), [([1, 2.5], []), ({3: 0.1, 7: 0.2}, {3: 0.0, 7: 0.0})])
def test_a_schedule_may_keep_what_it_likes(tmp_path: Path, saved: Any, fresh: Any) -> None:
    schedule: Any = Listed(fresh)
    save_checkpoint(tmp_path, scheduler=Listed(saved))
    load_checkpoint(tmp_path, scheduler=schedule)
    assert schedule.state == saved


def test_a_scheduler_comes_back_when_the_grower_does_not_fit(tmp_path: Path) -> None:
    grower = run(make(), 2)
    save_checkpoint(tmp_path, grower, scheduler=multistep(grower.optimizer))
    other = make(updates=12)
    schedule, random_numbers = multistep(other.optimizer), torch.get_rng_state()
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


@pytest.fixture(scope="module")
def other() -> tuple[Grower, dict[str, Any]]:
    return refusing()


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
            "rename": (Path, "replace"),
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
