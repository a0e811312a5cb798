"""Law 5: ranks agree on every tensor, or all of them stop with the same message; with one process nothing happens."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import torchgrow
from growing import differences, make, train
from oracle import TwoLayers
from ranks import EPOCHS, Plain, launch, plain
from torchgrow import Budget, Grower, TorchgrowError, TraceError, load
from torchgrow.distributed import hash_of

DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"
SCENARIOS: list[Callable[..., Any]] = [
    ranks.plain,
    ranks.with_batch_norm,
    ranks.layers,
    ranks.own_policy,
    ranks.compensated,
    ranks.seeds_differ,
    ranks.budgets_differ,
    ranks.bare_model,
    ranks.rates_differ,
    ranks.calls_differ,
    ranks.one_fails,
    ranks.one_leaves,
    ranks.old_wrapper,
    ranks.resumed,
    ranks.alone_in_an_update,
]
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(2, SCENARIOS, tmp_path_factory.mktemp("ranks"))


def test_all_ranks_hold_the_same_and_what_one_process_would(two: Results) -> None:
    """Bit for bit at every update, different initial weights or not; float64 to 1e-9 of the same global batches."""
    same_everywhere([found["plain"] for found in two])
    as_one_process(two[0]["plain"])


def test_four_ranks(tmp_path: Path) -> None:
    found = [result["plain"] for result in launch(4, [plain], tmp_path)]
    same_everywhere(found)
    as_one_process(found[0])


def test_with_batch_norm_adam_and_accumulation(two: Results) -> None:
    """Every rank has statistics of its own while it trains; an update makes them rank 0's, in the bank too."""
    same_everywhere([found["with_batch_norm"] for found in two])


def test_layers_come_and_go_on_all_ranks(two: Results) -> None:
    same_everywhere([found["layers"] for found in two])
    assert any(int(update["left out"]) for update in two[0]["layers"])


def test_a_policy_of_ones_own_decides_alike_on_all_ranks(two: Results) -> None:
    found = [result["own_policy"] for result in two]
    same_everywhere(found)
    assert found[0][0]["keep"].sum() > found[0][-1]["keep"].sum() > 0


def test_biases_take_over_what_all_ranks_measure(two: Results) -> None:
    """As one process with the batches of both; a rank without batches takes the others' means."""
    found = [result["compensated"] for result in two]
    same_everywhere([seen for seen, _, _ in found])
    (first, *_), (alone,) = found[0][0], ranks.compensated_alone()
    for name in first:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-9, atol=1e-9, msg=name)
    assert found[0][1].startswith("rank 1 failed in this update, for the reason given there; nothing was changed")
    assert found[1][1].startswith("units leave, and batches is empty")
    assert [count for _, _, count in found] == [4, 4]


def same_everywhere(found: list[list[dict[str, Any]]]) -> None:
    for other in found[1:]:
        for update, (a, b) in enumerate(zip(found[0], other, strict=True)):
            assert differences(a, b) == [], f"after update {update}"


def as_one_process(found: list[dict[str, Any]]) -> None:
    alone = plain()
    changed = 0
    for update, (a, b) in enumerate(zip(found, alone, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9, msg=f"{name} after update {update}")
        changed += int((a["keep"] != found[0]["keep"]).sum())
    assert changed > 10
    assert len(found) == EPOCHS + 1


# --- they stop together ---


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        (
            "seeds_differ",
            "Different from rank 0: draws of rank 1; policy of rank 1. To put it right: give Grower the same seed on",
        ),
        ("budgets_differ", "Different from rank 0: settings of rank 1. To put it right: give Grower the same model, b"),
        ("rates_differ", "weights of rank 1. To put it right: the ranks trained on different gradients or wrote into"),
        ("calls_differ", "Different from rank 0: calls of rank 1; "),
        ("calls_differ", "To put it right: call update() and finish() on every rank, equally often"),
    ],
)
def test_a_mismatch_stops_all_ranks(two: Results, scenario: str, text: str) -> None:
    assert two[0][scenario] == two[1][scenario]
    assert text in two[0][scenario]
    assert two[0][scenario].startswith("the ranks do not agree, so nothing was changed on any of them.")


def test_training_around_the_wrapper_is_found_out(two: Results) -> None:
    for found in two:
        said, events, changed = found["bare_model"]
        assert "weights of rank 1. To put it right: the ranks trained on different gradients" in said
        assert "run the forward pass through what grower.wrap() returns, not through the bare model" in said
        assert (events, changed) == (1, [])


def test_one_failure_ends_the_update_for_all_and_all_can_go_on(two: Results) -> None:
    (here, events), (there, _) = (found["one_fails"] for found in two)
    assert here == "rank 1 failed in this update, for the reason given there; nothing was changed on any rank"
    assert there.startswith("the last optimizer.step() did not finish")
    assert events == 2


def test_one_that_leaves_ends_the_update_for_all(two: Results) -> None:
    """An exception that is no Exception is told the others too: they do not wait for half an hour."""
    (here, events), (there, _) = (found["one_leaves"] for found in two)
    assert here == "rank 1 failed in this update, for the reason given there; nothing was changed on any rank"
    assert there == "terminated in update 1"
    assert events == 2


def test_an_old_wrapper_raises(two: Results) -> None:
    for said in two[0]["old_wrapper"]:
        assert "has changed under this wrapper" in said
        assert "call it anew after every update: ddp = grower.wrap()" in said


# --- they go on ---


def test_every_rank_goes_on_with_its_own_random_numbers(two: Results) -> None:
    """From a checkpoint that rank 0 wrote right after an update, or all together at any moment: bit for bit."""
    for found in two:
        ends, *_ = found["resumed"]
        for name in ("together", "updated"):
            assert differences(ends["whole"], ends[name]) == [], name
    drawn = [found["resumed"][0]["whole"]["drawn"] for found in two]
    assert not torch.equal(*drawn)


def test_one_that_saves_alone_at_another_moment_says_what_is_lost(two: Results) -> None:
    (ends, said, paths, _, _, _), (_, silent, others, _, _, _) = (found["resumed"] for found in two)
    assert differences(ends["whole"], ends["alone"]) != []
    assert len(said) == 2  # not of the one right after an update, nor of that of all together
    for text in said:
        assert "rank 0 saves alone and has drawn random numbers since the last update" in text
        assert "Call save_checkpoint(..., together=True) on every rank, or save right after update()" in text
    assert silent == []
    assert paths == others
    assert Path(paths[0]).name == "checkpoint-000001"
    assert len(list(Path(paths[0]).parent.glob("checkpoint-*"))) == 1


def test_a_rank_without_a_random_state_keeps_its_own(two: Results) -> None:
    (_, _, _, lost, kept, _), (_, _, _, lost_1, kept_1, _) = (found["resumed"] for found in two)
    assert (lost, kept, kept_1) == ([], False, True)
    assert len(lost_1) == 1
    assert lost_1[0].startswith("the checkpoint has no random state of rank 1, which goes on with the numbers it has")


def test_saving_together_ends_for_all_where_rank_0_fails(two: Results) -> None:
    here, there = (found["resumed"][-1] for found in two)
    assert "extra/0 is of type builtin_function_or_method" in here
    assert there.startswith("rank 0 could not write the checkpoint, for the reason given there; the older ones stay")


def test_a_rank_that_waits_in_vain_says_so(two: Results) -> None:
    """Rank 0 in one grower's update, rank 1 in another's."""
    for rank in (0, 1):
        said = two[rank]["alone_in_an_update"]
        assert f"rank {rank} timed out waiting for other ranks during an update" in said
        assert "Call update(), finish() and save_checkpoint(..., together=True) on every rank, not on some" in said
        assert "alone; or else another rank has died" in said


# --- one process ---


def test_without_processes_wrap_is_the_model() -> None:
    grower = make()
    assert grower.wrap() is grower.model
    train(grower)
    grower.update()
    assert grower.wrap() is grower.model


def test_processes_that_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    grower = make()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TorchgrowError, match=r"torchrun started 2 processes .* call .*init_process_group\(\"gloo\"\)"):
        grower.wrap()


def test_processes_started_too_late(group_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    grower = make()
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(TorchgrowError, match=r"init_process_group was called after Grower\(\.\.\.\); call it before"):
        grower.wrap()


@pytest.fixture
def group_of_one(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one(group_of_one: None) -> None:
    """Wrappers are real and go stale; everything is as without a group."""
    one = make()
    net = one.wrap()
    assert isinstance(net, nn.parallel.DistributedDataParallel)
    one.update()
    with pytest.raises(TorchgrowError, match=r"call it anew after every update: ddp = grower\.wrap\(\)"):
        net(torch.zeros(1, 3, 6, 6, dtype=torch.float64))


def test_wrapped_or_sharded_models_are_refused(group_of_one: None) -> None:
    x = torch.randn(2, 5)
    arguments: dict[str, Any] = {"budget": Budget(params="50%"), "updates": 3}
    model = TwoLayers()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(
        TraceError, match=r"wrapped in DistributedDataParallel; pass model\.module, .* grower\.wrap\(\)"
    ):
        Grower(ddp, optimizer, example_inputs=x, **arguments)
    from torch.distributed.fsdp import fully_shard

    flat = type("FullyShardedDataParallel", (nn.Sequential,), {})(TwoLayers())
    with pytest.raises(TraceError, match=r"the model is sharded over processes \(FSDP\); use DDP"):
        Grower(flat, torch.optim.SGD(flat.parameters(), 0.1), example_inputs=x, **arguments)
    sharded: Any = fully_shard(TwoLayers())
    optimizer = torch.optim.SGD(sharded.parameters(), 0.1)
    with pytest.raises(TraceError, match=r"fc1\.weight is sharded over processes \(FSDP2, fully_shard\).* use DDP"):
        Grower(sharded, optimizer, example_inputs=x, **arguments)


def test_sharded_afterwards(group_of_one: None) -> None:
    """fully_shard puts other parameters into the model; the next update says so and changes nothing."""
    from torch.distributed.fsdp import fully_shard

    grower = make()
    fully_shard(grower.model)
    with pytest.raises(TorchgrowError, match=r"conv1\.weight is not the parameter any more .* sharded \(fully_shard"):
        grower.update()
    assert len(grower.history) == 1


def test_hashes_see_contents_shapes_and_types() -> None:
    x = torch.arange(6.0)
    same = [[x], [x.clone()]]
    others = [[x + 1], [x.reshape(2, 3)], [x.double()], [x.to(torch.bfloat16)], [x, x], [x.flip(0)], ["x"], []]
    others += [[torch.tensor(1)], [torch.tensor([1])], [torch.tensor(True)], [torch.tensor(1 + 2j)]]
    hashes = [hash_of(values) for values in same + others]  # type: ignore[arg-type]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == len(hashes) - 1
    assert all(-(2**63) <= value < 2**63 for value in hashes)
    assert hash_of([torch.zeros(3, 3)[:, 1]]) == hash_of([torch.zeros(3)])


def test_plain_grows() -> None:
    assert sum(p.numel() for p in Plain().parameters()) > 1000


# --- the document ---


def test_the_document_does_what_it_says(tmp_path: Path) -> None:
    """The first block under torchrun with two processes, the others one after the other in a third."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 5
    assert blocks[0].count("\n") <= 20
    (tmp_path / "train.py").write_text(blocks[0])
    (tmp_path / "rest.py").write_text("\n".join(blocks[1:]))
    here = str(Path(torchgrow.__file__).parent.parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    for arguments in (torchrun, ["-W", "error", "rest.py"]):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    for folder in ("small", "average"):
        saved = load(tmp_path / folder, lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)))
        assert 771 / 2 - 12 < sum(p.numel() for p in saved.parameters()) <= 771 / 2  # a unit costs 12
