"""What a run holds beside weights goes through a checkpoint: late buffers, extra states, counts of averages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from growing import differences
from torchgrow import Budget, Grower, SavedModelError, load, load_checkpoint, save, save_checkpoint


class Keeps(nn.Module):
    """Two linear maps; a buffer that grows with the longest sequence, one that appears late, and a number."""

    places: Tensor

    def __init__(self, number: Any = 1.0) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 32), nn.Linear(32, 6)
        self.register_buffer("places", torch.arange(4.0)[:, None] / 10, persistent=False)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.places):
            self.register_buffer("places", torch.arange(float(x.shape[1]))[:, None] / 10, persistent=False)
            self.register_buffer("late", torch.full((3,), 0.5), persistent=False)
        scale = self.number if isinstance(self.number, float) else 1.0
        return self.out(torch.relu(self.into(x + self.places[: x.shape[1]]))) * scale

    def get_extra_state(self) -> Any:
        return {"number": self.number}

    def set_extra_state(self, state: Any) -> None:
        self.number = state["number"]


def begun(number: Any = 1.0) -> tuple[Grower, AveragedModel]:
    torch.manual_seed(0)
    model = Keeps(number)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    budget = Budget(params="50%")
    grower = Grower(model, optimizer, example_inputs=torch.ones(2, 4, 6), budget=budget, updates=6)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    grower.follow(average)
    return grower, average


def epoch(grower: Grower, average: AveragedModel, number: int) -> None:
    model: Any = grower.model
    x = torch.randn(2, 4 if number == 0 else 9, 6, generator=torch.Generator().manual_seed(number))
    average.eval()(x)  # its buffers grow as the network's do, or PyTorch cannot copy these
    for _ in range(3):
        grower.optimizer.zero_grad()
        grower.model(x).square().mean().backward()
        model.number *= 0.9
        grower.optimizer.step()
        average.update_parameters(grower.model)
    grower.update()


def contents(grower: Grower, average: AveragedModel) -> dict[str, Any]:
    tensors = {**dict(average.named_parameters()), **dict(average.named_buffers())}
    own = {**dict(grower.model.named_parameters()), **dict(grower.model.named_buffers())}
    kept = {f"average {name}": tensor.detach() for name, tensor in tensors.items()}
    return {**kept, **{name: tensor.detach() for name, tensor in own.items()}, "number": grower.model.number}


@pytest.mark.parametrize("warm", [False, True])
def test_a_resumed_run_has_all_of_it(tmp_path: Path, warm: bool) -> None:
    """Law 4, into a model that has seen long sequences and into one that has not."""
    grower, average = begun()
    for number in range(4):
        epoch(grower, average, number)
        if number == 2:
            save_checkpoint(tmp_path, grower)
    other, mean = begun()
    if warm:
        other.model(torch.ones(2, 9, 6))
    load_checkpoint(tmp_path, other)
    assert int(mean.n_averaged) == 9
    assert set(dict(other.model.named_buffers())) == {"places", "late"}
    epoch(other, mean, 3)
    assert differences(contents(grower, average), contents(other, mean)) == []


def test_a_buffer_that_the_saved_run_has_not_yet_is_dropped(tmp_path: Path) -> None:
    grower, average = begun()
    epoch(grower, average, 0)
    save_checkpoint(tmp_path, grower)
    other, _ = begun()
    other.model(torch.ones(2, 9, 6))
    load_checkpoint(tmp_path, other)
    assert [name for name, _ in other.model.named_buffers()] == ["places"]
    assert len(other.model.places) == 4  # type: ignore[arg-type]


class Late(nn.Module):
    """Two linear maps, and buffers that a call makes, replaces at another shape, or takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 32), nn.Linear(32, 6)
        self.register_buffer("places", torch.zeros(4, 1))
        self.register_buffer("first", torch.ones(2), persistent=False)
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            self.places, self.mask, self.first = torch.zeros(9, 1), torch.ones(9, 9), None
            if not hasattr(self, "kept"):
                self.register_buffer("kept", torch.full((3,), 0.5))
                self.out.register_buffer("hidden", torch.full((2,), 0.5), persistent=False)
        return self.out(torch.relu(self.into(x)))


@pytest.mark.parametrize("grown", [True, False], ids=["grown", "whole"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_is_loaded_with_the_buffers_that_its_calls_made(grown: bool, device: str, tmp_path: Path) -> None:
    model, x = Late(), torch.ones(9, 6)
    if grown:
        optimizer, budget = torch.optim.SGD(model.parameters(), 0.1), Budget(params="50%")
        Grower(model, optimizer, example_inputs=x[:2], budget=budget, updates=2).finish()
    expected = model(x)
    save(model, tmp_path / "net")

    def frame() -> nn.Module:
        with torch.device(device):
            return Late()

    again = load(tmp_path / "net", frame)
    assert torch.equal(again(x), expected)
    assert differences(dict(model.named_buffers()), dict(again.named_buffers())) == []
    assert again.state_dict().keys() == model.state_dict().keys()
    save(again, tmp_path / "twice")
    assert differences(dict(load(tmp_path / "twice", frame).named_buffers()), dict(model.named_buffers())) == []


@pytest.mark.parametrize("damage", ["lost", "another shape", "lost from the list"])
def test_a_late_buffer_that_is_not_as_the_state_lists_it_is_refused(damage: str) -> None:
    """Found by benchmarks/fuzz_files.py: the network of a damaged state ran no more."""
    whole, average = begun()
    epoch(whole, average, 0)
    state = whole.state_dict()
    if damage == "lost":
        del state["network"]["places"]
    elif damage == "another shape":
        state["network"]["places"] = torch.ones(1, 0, 3)
    else:
        del state["buffers"][0]["places"]
    again, _ = begun()
    with pytest.raises(SavedModelError, match=r"state\['buffers'\]\[0\] is .* it must be .* as the buffers of the"):
        again.load_state_dict(state)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    grower, _ = begun(number=object())
    with pytest.raises(SavedModelError, match=r"get_extra_state\(\) of the model \(Keeps\)/number is of type object"):
        save_checkpoint(tmp_path, grower)
    grower, _ = begun()
    grower.model.more = nn.Linear(2, 2)
    with pytest.raises(SavedModelError, match=r"more\.weight is \(2, 2\), but not there in the structure that torchg"):
        save_checkpoint(tmp_path, grower)
    assert not list(tmp_path.iterdir())


def test_a_state_of_before_extra_states_and_counts_is_still_read() -> None:
    """It lacks fields that came later: what they hold stays as it is in the run that loads it."""
    grower, average = begun()
    epoch(grower, average, 0)
    state = grower.state_dict()
    del state["extra_states"], state["followers"][0]["beside"], state["steps"]["taken"], state["steps"]["moved"]
    other, mean = begun()
    number = other.model.number
    other.load_state_dict(state)
    assert torch.equal(other.model.into.weight, grower.model.into.weight)  # type: ignore[union-attr, arg-type]
    assert (int(mean.n_averaged), other.model.number) == (0, number)
    epoch(other, mean, 1)


def test_a_buffer_in_the_place_of_something_else_is_refused() -> None:
    grower, _ = begun()
    for name in ("forward", "into.", "into.forward"):
        state = grower.state_dict()
        state["network"][name] = torch.ones(1)
        with pytest.raises(SavedModelError, match=r"state\['network'\] lacks \[\] and has the foreign"):
            grower.load_state_dict(state)
