"""`torchgrow run` under torchrun: one folder, one voice, every batch shared out; a mismatch is an error, not a hang."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchgrow
from torchgrow import TorchgrowError
from torchgrow.lab import processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RUN = ["run", "digits", "--epochs", "3", "--subset", "128", "--no-twins", "--checkpoint-every", "1"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(torchgrow.__file__).parent.parent)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two torchrun agents on loopback, a process each: the folder of their run, and what each printed."""
    out = tmp_path_factory.mktemp("nodes") / "run"
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    agents = [
        subprocess.Popen(
            [*TORCHRUN, *where, f"--node-rank={node}", "-m", "torchgrow", *RUN, "--out", str(out)],
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    return out, [printed for printed, _ in said]


def test_two_nodes_make_one_run(nodes: tuple[Path, list[str]]) -> None:
    """The process of node 0 writes and prints, the other is silent."""
    out, said = nodes
    assert "grown       epoch   3/3" in said[0]
    assert said[1] == ""
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert (out / "network" / "structure.json").exists()


FALLS = """
import os, signal, sys
from torchgrow import Grower
from torchgrow.cli import app

update, calls = Grower.update, 0

def falling(grower):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(grower)

Grower.update = falling
app()
"""


def test_a_killed_rank_is_started_anew_and_the_run_ends_as_if_nothing_had_been(
    nodes: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Rank 1 is killed in its third update; torchrun starts both again, which go on from the last checkpoint.

    On one node; the run in which nothing had been is that of two nodes with as many processes.
    """
    script, out, torchrun = tmp_path / "falls.py", tmp_path / "broken", [*TORCHRUN, "--standalone"]
    script.write_text(FALLS)
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "--max-restarts=1", str(script), *RUN, "--out", str(out)],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    ends = []
    for folder in (nodes[0], out):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            record.pop("seconds")
        ends.append((records, (folder / "network" / "model.safetensors").read_bytes()))
    assert ends[0] == ends[1]


WRONG = """
import json, os, sys
from torchgrow.__main__ import main

for n, command in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(n)  # a process group of its own
    sys.argv[1:] = [argument.replace("RANK", os.environ["RANK"]) for argument in command]
    try:
        main()
    except SystemExit as ended:
        code = ended.code
        print(f"exit {code}")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Commands that cannot go well, one after the other by the same two processes; the last one's exit is theirs."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "wrong.py").write_text(WRONG)
    commands = [
        ["run", "resnet20-cifar10", *RUN[2:], "--data", "nowhere", "--out", "new"],
        [*RUN, "--out", str(folder)],
        ["run", "--resume", str(folder)],
        [*RUN, "--out", str(folder / "run"), "--seed", "RANK"],
    ]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "wrong.py", json.dumps(commands)]
    done = subprocess.run(command, env=ENV, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.stdout.count("exit 1") == 2 * len(commands), done.stdout + done.stderr  # two may share a line
    return folder, done


def test_what_is_wrong_with_data_or_folders_is_said_once_and_plainly(wrong: Any) -> None:
    """Process 0 finds it; the other one says the same, and nothing of sockets."""
    folder, done = wrong
    texts = (
        "no CIFAR-10 in nowhere: the folder does not exist",
        "exists already and is not overwritten",
        "is not a run: it has no config.json",
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("error")]
    for text in texts:
        assert [line for line in ours if text in line], done.stderr
    assert all(any(text in line for text in (*texts, "the ranks do not agree")) for line in ours), done.stderr
    assert "torchgrow/lab" not in done.stderr, "a traceback of ours"
    assert "gloo" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["run.partial", "wrong.py"]


def test_a_mismatch_reaches_the_user(wrong: Any) -> None:
    """Every rank with another seed: all end with exit code 1 and say why, and the folder keeps the reason."""
    folder, done = wrong
    assert done.returncode == 1
    for rank in (0, 1):
        assert f"error (rank {rank}): the ranks do not agree" in done.stderr
    assert "exitcode  : 1 " in done.stderr
    assert "exitcode  : 0 " not in done.stderr
    assert "Different from rank 0: draws of rank 1; policy of rank 1. To put it right: give Grower the same seed" in (
        done.stderr
    )
    assert "draws of rank 1" in (folder / "run.partial" / "stopped.txt").read_text()


def test_who_waits_for_one_that_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "rendezvous", lambda url: iter([(None, 1, 2)]))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(processes, "PrefixStore", lambda *_: None)
    gone = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(TorchgrowError, match="another rank has ended, which this one waited for"), processes.joined():
        raise gone
    with pytest.raises(RuntimeError, match="shapes"), processes.joined():
        raise RuntimeError("shapes do not fit")


def test_shares_are_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(12, 3), torch.arange(12)
    seen = []
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "size", lambda: 4)
        ((mine, its),) = processes.shares(iter([(x, labels)]))
        assert len(mine) == 3
        assert torch.equal(mine, x[its])
        seen += its.tolist()
    assert sorted(seen) == list(range(12))


def test_uneven_shares_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "size", lambda: 5)
    with pytest.raises(TorchgrowError, match=r"a batch of 12 cannot be shared out evenly among 5 .* that divides 12"):
        next(processes.shares(iter([(torch.zeros(12), torch.zeros(12))])))


def test_alone_nothing_changes() -> None:
    model = torch.nn.Linear(2, 2)
    x = torch.randn(5, 2)
    with processes.joined(), processes.first_alone():
        assert (processes.rank(), processes.size()) == (0, 1)
        assert processes.wrap(model) is model
        assert processes.mean(0.1) == 0.1
        assert processes.told("here") == "here"
        ((same, _),) = processes.shares(iter([(x, x)]))
        assert torch.equal(same, x)
