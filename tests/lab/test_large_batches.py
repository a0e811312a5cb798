"""Larger batches while the network is small: memory by hand, the linear rule, every sample once, resume = unbroken."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from torchgrow import Budget, Grower, TorchgrowError
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.data import load
from torchgrow.lab.from_recipe import make_grower, make_network, make_optimizer, with_data
from torchgrow.lab.large_batches import LargeBatches, Memory, faster, merged
from torchgrow.lab.models import ResNet
from torchgrow.lab.recipes import Recipe, get, with_scale
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.run import run
from torchgrow.lab.text import TextData
from torchgrow.lab.train import Epoch, fit

TINY = replace(
    get("digits"),
    build=partial(ResNet, depth=8, widths=(4, 8, 16), in_channels=1),
    epochs=3,
    updates_per_epoch=2,
    subset=192,
    batch_size=16,
    largest_batch=80,
    budget=Budget(params="30%"),
    depth=False,
    preset="default:ramp=0.5",
    schedule="wsd",
    warmup=0.0,
)
DATA: Any = load("digits", subset=192)


def test_memory_by_hand() -> None:
    """Kept: the input (8 numbers), what ReLU gives (16), once for ReLU and the layer behind it; no weights.

    Of the loss the logarithms of the classes' probabilities (4), and the label, of 8 bytes.
    """
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    found = Memory.of(model, torch.randn(5, 8), slots=2)
    assert found == Memory(fixed=(2 + 2) * 4 * (8 * 16 + 16 + 16 * 4 + 4), sample=4 * (8 + 16 + 4) + 8)


@pytest.mark.parametrize("name", ["resnet20-cifar10", "gpt-ptb", "vit-cifar10", "deeplabv3-voc"])
@pytest.mark.parametrize("width", [1.0, 0.25])
def test_memory_is_what_a_training_step_keeps(name: str, width: float) -> None:
    """Of a step of the lab's own, in training mode and on a whole batch; dropout is off, and norms keep a little."""
    recipe, data = with_data(with_scale(get(name), "smoke"), Console(quiet=True), None)
    model = make_network(recipe.build, width, torch.device("cpu")).train()
    found, draw, x = Memory.of(model, data.example(), 1), torch.Generator(), data.example()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    if isinstance(data, TextData):
        x, labels = next(data.train_batches(batch_size=8, shuffle=draw))
    else:
        x, labels = next(data.train_batches(batch_size=8, shift=0, mirror=False, generator=draw))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        scores = out.movedim(1, -1) if out.dim() == 4 else out
        nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())
    bytes_ = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    assert found.sample == pytest.approx(bytes_ / len(x), rel=0.03)


def test_memory_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten()).train()
    x = torch.randn(2, 1, 8, 8)
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Memory.of(model, x, slots=1)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("width", [1.0, 0.5, 0.25])
def test_as_many_as_fit_where_the_frame_fits_with_one(width: float) -> None:
    """One more would not fit."""
    recipe, x = replace(TINY, largest_batch=100_000), DATA.example()
    model = make_network(recipe.build, width, x.device)
    many = LargeBatches(model, DATA, recipe).at_once()
    frame, now = (Memory.of(m, x, 1) for m in (recipe.build(1.0), model))
    room = frame.fixed + 16 * frame.sample
    assert now.fixed + 16 * many * now.sample <= room < now.fixed + 16 * (many + 1) * now.sample
    assert (many == 1) == (width == 1.0)
    assert LargeBatches(model, DATA, replace(recipe, largest_batch=40)).at_once() == min(many, 2)  # whole batches
    assert LargeBatches(model, DATA, replace(recipe, largest_batch=None)).at_once() == 1


def test_every_batch_once_in_order_and_none_beyond_an_end() -> None:
    torch.manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(1, 20, ()))
        ends = {count, *torch.randint(1, count + 1, (2,)).tolist()}
        sizes = torch.randint(1, 6, (100,)).tolist()
        begin = int(torch.randint(0, count, ()))
        batches = [(torch.tensor([[float(i)], [i + 0.5]]), torch.tensor([i, i])) for i in range(count)]
        found = list(merged(iter(batches), lambda: sizes.pop(), begin, ends))  # noqa: B023
        assert torch.equal(torch.cat([x for *_, x, _ in found]), torch.cat([x for x, _ in batches[begin:]]))
        assert torch.equal(torch.cat([y for *_, y in found]), torch.cat([y for _, y in batches[begin:]]))
        for done, many, x, _ in found:
            assert len(x) == 2 * many
            assert not any(done - many < end < done for end in ends)
        assert found[-1][0] == count


def test_the_linear_rule() -> None:
    """For gradients that do not change, one step of k batches moves as far as k steps; the rate is back afterwards."""
    model = nn.Linear(3, 1, bias=False).double()
    first, x = model.weight.detach().clone(), torch.randn(12, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for part in x.split(4):
        optimizer.zero_grad()
        model(part).mean().backward()
        optimizer.step()
    apart, model.weight.data = model.weight.detach().clone(), first.clone()
    optimizer.zero_grad()
    model(x).mean().backward()
    with faster(optimizer, 3):
        optimizer.step()
    assert torch.allclose(model.weight, apart)
    assert optimizer.param_groups[0]["lr"] == 0.1


def grown(
    recipe: Recipe, folder: Path | None = None, stop: int = 0, steps: list[int] | None = None
) -> tuple[nn.Module, list[Epoch], list[float]]:
    """A network grown by a recipe, its epochs and the learning rate after each.

    Args:
        recipe: what to train.
        folder: of checkpoints.
        stop: after so many steps.
        steps: gets how many batches of the epoch are done after each step.
    """
    torch.manual_seed(0)
    model, steps = make_network(recipe.build, 1.0, torch.device("cpu")), [] if steps is None else steps
    optimizer = make_optimizer(model, recipe)
    grower = make_grower(model, optimizer, DATA, recipe)
    checkpoints = Checkpoints(folder=folder, every=5) if folder else None

    def count(epoch: int, done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == stop:
            raise KeyboardInterrupt

    epochs, rates = [], []
    fitted = fit("grown", model, optimizer, DATA, recipe, grower=grower, on_step=count, checkpoints=checkpoints)
    for epoch in fitted:
        epochs.append(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return model, epochs, rates


@pytest.mark.parametrize("preset", ["default:ramp=0.5", "paper"])
def test_fewer_steps_of_the_same_samples_and_rates(preset: str) -> None:
    """Steps are larger while the network is small, and cost the same FLOPs; the schedule ends where it did."""
    recipe = replace(TINY, preset=preset)
    steps: list[int] = []
    _, large, rates = grown(recipe, steps=steps)
    _, usual, usual_rates = grown(replace(recipe, largest_batch=None))
    assert rates == usual_rates
    assert all(one.batch is None for one in usual)
    assert all(16 <= (one.batch or 0) <= 80 for one in large)
    assert max(one.batch or 0 for one in large) > 16
    assert steps[:6] == [1, 2, 3, 4, 5, 6]  # the first update comes after steps of one batch
    assert steps[6] > 7
    assert large[-1].params <= 0.3 * sum(p.numel() for p in TINY.build().parameters())


@pytest.mark.parametrize("stop", [3, 7, 12])
def test_stopped_anywhere_it_goes_on_as_the_unbroken_run(tmp_path: Path, stop: int) -> None:
    unbroken, epochs, _ = grown(TINY, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        grown(TINY, tmp_path / "stopped", stop)
    resumed, rest, _ = grown(TINY, tmp_path / "stopped")
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [replace(one, seconds=0.0) for one in rest] == [replace(one, seconds=0.0) for one in epochs[-len(rest) :]]


def test_the_papers_indicators_follow_the_linear_rule() -> None:
    """A step of k batches is at k times the rate, for them as for the weights."""
    rates = []
    recipe = replace(TINY, preset="paper")
    model = make_network(recipe.build, 1.0, torch.device("cpu"))
    optimizer = make_optimizer(model, recipe)
    grower: Grower = make_grower(model, optimizer, DATA, recipe)
    policy = grower.policy
    step = policy.step

    def seen(view: Any, *rest: Any) -> Any:
        rates.append(view.rate)
        return step(view, *rest)

    policy.step = seen  # type: ignore[assignment, method-assign]
    x, labels = next(DATA.train_batches(batch_size=16, shift=0, mirror=False, generator=torch.Generator()))
    for many in (1, 3, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        with faster(optimizer, many):
            optimizer.step()
    assert rates == pytest.approx([1, 3, 1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        TorchgrowError, match="largest_batch must be at least 32, since whole batches go together, or None"
    ):
        replace(TINY, largest_batch=8)
    recipe = replace(get("lstm-ptb"), largest_batch=40, build=partial(LSTM, embedding=8, hidden=(8,), words=20))
    text = load("text", subset=2000)
    with pytest.raises(TorchgrowError, match=r"LSTM carries a state from one to the next; leave .*--largest-batch"):
        LargeBatches(recipe.build(), text, recipe)


def test_a_run_folder_says_it_and_goes_on_with_it(tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=2, subset=128)
    folder = run(recipe, console=Console(quiet=True), out=tmp_path / "out", beside=("uniform",))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / "config.json").read_text())["largest_batch"] == 80
    assert all(line["batch"] > 16 for line in lines), [line["batch"] for line in lines]


@pytest.mark.parametrize("schedule", ["milestones", "cosine", "linear", "wsd"])
def test_one_epoch_may_follow_growth(schedule: str) -> None:
    """With its schedule anew, as after any number of them; milestones lie between epochs, the first before this one."""
    recipe = replace(TINY, schedule=schedule, epochs=2, then=1)
    _, epochs, rates = grown(recipe)
    assert len(epochs) == 3
    last = recipe.lr * (0.1 if schedule == "milestones" else 1.0)
    assert [epochs[0].lr, epochs[2].lr] == pytest.approx([recipe.lr, last])
    assert rates[1] == pytest.approx(last)
