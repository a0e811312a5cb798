"""`Grower.follow`: a second model of the same frame is cut along, and keeps what is its own."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torchgrow.exchange
from growing import batch, breaking, differences, everything, make, run, sgd, train
from layered import Residual, Stages
from oracle import SmallResNet, TwoLayers
from planned import Planned
from torchgrow import Budget, Grower, StructureError, TorchgrowError, save
from torchgrow.persistence.network import load
from torchgrow.policies import Paper, Policy
from torchgrow.structure.store import gather
from torchgrow.structure.surgery import named_tensors

METHOD = Planned(ramp=0.5)
LITERAL = Paper()  # units leave and come back
DECAY = 0.75


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


class Literal:
    """The average at full size: NaN where a weight has never been, and so starts as the network's."""

    def __init__(self, grower: Grower) -> None:
        self.grower = grower
        self.full = {n: torch.full(s, float("nan"), dtype=torch.float64) for n, s in grower.space.shapes.items() if s}

    def step(self, weight: float = DECAY) -> None:
        for name, parameter in self.grower.model.named_parameters():
            index = self.grower.run.live.bank.index.get(name, {})
            old = gather(self.full[name], index)
            torchgrow.structure.store.scatter_(self.full[name], index, old * weight + (1 - weight) * parameter.detach())

    def update(self) -> None:
        for name, parameter in self.grower.model.named_parameters():
            index = self.grower.run.live.bank.index.get(name, {})
            old = gather(self.full[name], index)
            new = torch.where(old.isnan(), parameter.detach(), old)
            torchgrow.structure.store.scatter_(self.full[name], index, new)

    def compare(self, average: nn.Module) -> None:
        for name, parameter in average.named_parameters():
            expected = gather(self.full[name], self.grower.run.live.bank.index.get(name, {}))
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("preset", [METHOD, LITERAL], ids=["plan", "paper"])
@pytest.mark.parametrize("made", ["before", "after", "late"])
def test_a_moving_average_is_literally_that(preset: Policy, made: str) -> None:
    """Against an average kept at full size: copies of the frame, of the seed, and of a half-grown network."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    early = averaged(model)
    arguments: dict[str, Any] = {"example_inputs": batch(0)[0], "budget": Budget(params="50%"), "updates": 12}
    grower = Grower(model, sgd(model), policy=preset, seed=1, **arguments)
    if made == "late":
        run(grower, 5)
    average = early if made == "before" else averaged(model)
    grower.follow(average)
    literal = Literal(grower)
    literal.update()
    for epoch in range(len(grower.history) - 1, 12):
        for step in range(2 * epoch, 2 * epoch + 2):
            train(grower, step, 1)
            first = int(average.n_averaged) == 0
            average.update_parameters(grower.model)
            literal.step(0.0 if first else DECAY)
            literal.compare(average.module)
        grower.update()
        literal.update()
        literal.compare(average.module)
        shapes = {name: tensor.shape for name, tensor in grower.model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in average.module.state_dict().items()} == shapes
        average(batch(0)[0])
    assert grower.finished
    assert preset is METHOD or sum(event.regrown for event in grower.history) > 3
    average.update_parameters(grower.model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_of_its_own_are_never_touched(dtype: torch.dtype) -> None:
    """A whole frame with other weights: what is live of it is its own, bit for bit, statistics included."""
    torch.manual_seed(7)
    teacher = SmallResNet().to(dtype)
    teacher(torch.randn(8, 3, 6, 6, dtype=dtype))
    before = copy.deepcopy(named_tensors(teacher))
    grower = make(LITERAL, updates=12, seed=1)
    grower.follow(teacher)
    for epoch in range(11):
        for name, tensor in named_tensors(teacher).items():
            assert torch.equal(tensor, gather(before[name], grower.run.live.bank.index.get(name, {}))), name
            assert tensor.dtype == before[name].dtype
        assert teacher.eval()(batch(0)[0].to(dtype)).shape == (8, 4)
        assert teacher.conv2.in_channels == grower.model.conv2.in_channels  # type: ignore[union-attr]
        train(grower, epoch)
        grower.update()


def test_objects_of_the_follower_stay() -> None:
    grower = make()
    average = averaged(grower.model)
    parameters = list(average.parameters())
    grower.follow(average)
    run(grower)
    assert all(a is b for a, b in zip(parameters, average.parameters(), strict=True))


def test_several_followers_and_a_saved_one(tmp_path: Any) -> None:
    grower = make()
    averages = [averaged(grower.model), averaged(grower.model)]
    for average in averages:
        grower.follow(average)
    for epoch in range(10):
        train(grower, epoch)
        for average in averages:
            average.update_parameters(grower.model)
        grower.update()
    x = batch(3)[0]
    assert torch.equal(averages[0].eval()(x), averages[1].eval()(x))
    save(averages[0].module, tmp_path / "average")
    loaded = load(tmp_path / "average", lambda: SmallResNet().double())
    assert torch.equal(loaded.eval()(x), averages[0](x))
    with pytest.raises(TorchgrowError, match="the run is over and the structure final"):
        grower.follow(averages[0])


@pytest.mark.parametrize("call", [1, 45, 70, 85, -40, -1])
def test_a_failed_update_leaves_network_and_followers_alone(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails in the network's tensors or, the network changed already, in the follower's, or in the books."""
    grower = run(make("paper"), 4)
    average = averaged(grower.model)
    grower.follow(average)
    train(grower, 8)
    before, mine = everything(grower), copy.deepcopy(average.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(torchgrow.exchange, "run", breaking(call, MemoryError("none left")))
        with pytest.raises(MemoryError):
            grower.update()
    assert differences(before, everything(grower)) == []
    assert differences(dict(mine), dict(average.state_dict())) == []
    assert average.module.conv2.in_channels == grower.model.conv2.in_channels  # type: ignore[union-attr]
    grower.update()
    average.update_parameters(grower.model)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("call", [0, -2, -1])
def test_a_follower_that_fails_to_be_cut_is_as_it_was(call: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole frame or a copy of the live network: shapes, contents, attributes; and it does not follow."""
    frame = SmallResNet().double()
    grower = run(make(), 3)
    other: Any = frame if whole else copy.deepcopy(grower.model)
    before = copy.deepcopy({**other.state_dict(), "channels": other.conv2.in_channels, "names": sorted(vars(other))})
    with monkeypatch.context() as patch:
        patch.setattr(torchgrow.exchange, "run", breaking(call, MemoryError("none left")))
        with pytest.raises(MemoryError):
            grower.follow(other)
    after = {**other.state_dict(), "channels": other.conv2.in_channels, "names": sorted(vars(other))}
    assert differences(before, after) == []
    assert grower.run.live.followers == grower.run.live.copies == []
    grower.follow(other)
    grower.update()
    live: Any = grower.model
    assert other.conv2.in_channels == live.conv2.in_channels


def test_a_follower_whose_parameter_was_exchanged_is_told() -> None:
    grower = run(make(), 3)
    other: Any = copy.deepcopy(grower.model)
    grower.follow(other)
    train(grower, 6)
    before = everything(grower)
    other.fc2.bias = nn.Parameter(torch.zeros(4).double())  # that is as good
    other.fc1.weight = nn.Parameter(torch.zeros(2, 9).double())
    with pytest.raises(StructureError, match=r"fc1\.weight of a follower is \(2, 9\), not \(.*\) as in the network"):
        grower.update()
    assert differences(before, everything(grower)) == []


class Other(SmallResNet):
    """One layer is wider."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 9)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Other(), r"Other is neither the whole frame nor a copy of the live network: fc1\.weight is \(9, 8\), not"),
        (Other(), r"not \(7, 8\) as in the frame or \(1, 1\) as in the live network"),
        (TwoLayers(), r"TwoLayers is neither .* conv1\.weight is missing, not \(6, 3, 3, 3\) as in the frame"),
        (nn.Sequential(SmallResNet(), nn.Linear(4, 4)), r"Sequential is neither .* copy\.deepcopy\(model\)"),
    ],
)
def test_refused(module: nn.Module, text: str) -> None:
    grower = make()
    with pytest.raises(StructureError, match=text):
        grower.follow(module)
    assert grower.run.live.followers == []


def test_an_average_that_does_not_follow_is_told_of_at_the_first_update() -> None:
    """It broadcasts, silently; a twin of the frame, and an average that follows, are as they should be."""
    twin, average = SmallResNet().double(), AveragedModel(SmallResNet().double())
    grower = make()
    average.update_parameters(grower.model)
    with pytest.warns(UserWarning, match=r"units of .* are alike in another SmallResNet of the frame's size") as found:
        run(grower, 1)
    assert len(found) == 1
    assert "Call grower.follow(average) right after Grower(...)" in str(found[0].message)
    del average
    grower = make()
    average = AveragedModel(grower.model)
    grower.follow(average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(3):
            train(grower, 2 * epoch)
            average.update_parameters(grower.model)
            grower.update()
    assert next(twin.parameters()).shape[0] > 1


def test_the_look_for_spoilt_averages_passes_over_layers_that_are_left_out() -> None:
    model = Stages(Residual).double()
    arguments: dict[str, Any] = {"example_inputs": batch(0)[0], "budget": Budget(params="50%")}
    grower = Grower(model, sgd(model), updates=3, depth=True, **arguments)
    assert any(not p.numel() for p in model.parameters())
    run(grower, 1)


def test_the_network_itself_is_refused_and_a_copy_twice() -> None:
    grower = make()
    grower.follow(twice := copy.deepcopy(grower.model))
    around = nn.Module()
    around.module = twice
    for again in (twice, around):
        with pytest.raises(StructureError, match=r"conv1\.weight of .* follows already; call follow once"):
            grower.follow(again)
    assert len(grower.run.live.followers) == 1
    with pytest.raises(StructureError, match=r"conv1\.weight is the network's own; pass a copy\.deepcopy\(model\)"):
        grower.follow(grower.model)


def test_a_copy_of_an_older_structure_is_refused() -> None:
    grower = make()
    old = copy.deepcopy(grower.model)
    run(grower, 3)
    with pytest.raises(
        StructureError, match=r"SmallResNet is neither .* is \(1, 3, 3, 3\), not .* or \([2-6], 3, 3, 3\)"
    ):
        grower.follow(old)


def test_distillation_from_an_average() -> None:
    """A mean teacher's outputs and the network's: losses are finite and the teacher gets no gradient."""
    grower = make()
    teacher = averaged(grower.model).requires_grad_(False)
    grower.follow(teacher)
    for epoch in range(10):
        x, target = batch(epoch)
        grower.optimizer.zero_grad()
        scores = grower.model(x)
        loss = F.cross_entropy(scores, target) + F.mse_loss(scores, teacher(x))
        loss.backward()
        grower.optimizer.step()
        teacher.update_parameters(grower.model)
        grower.update()
        assert bool(loss.isfinite())
        assert all(p.grad is None and not p.requires_grad for p in teacher.module.parameters())
