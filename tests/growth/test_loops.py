"""Training loops as people write them: mixed precision, checkpointed activations, events inside an epoch."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from growing import batch, differences, everything, indicators_of, make, run, sgd, train
from oracle import SmallResNet
from planned import Planned
from torchgrow import Budget, Grower, StructureError, TraceError, TrainingError
from torchgrow.policies import Policy

GROWN = Planned(ramp=0.5)


def grow(model: nn.Module, make_optimizer: Any = sgd, updates: int = 8, preset: str | Policy = GROWN) -> Grower:
    x = batch(0, next(model.parameters()).dtype)[0]
    budget = Budget(params="50%")
    how: Any = {"preset": preset} if isinstance(preset, str) else {"policy": preset}
    return Grower(model, make_optimizer(model), example_inputs=x, budget=budget, updates=updates, **how)


# --- mixed precision ---


def test_bfloat16_autocast_follows_float32() -> None:
    """Weights, gradients and indicators stay float32 (float64); they move as without autocast, but for rounding."""
    runs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        grower = grow(SmallResNet())
        start = indicators_of(grower).s.clone()
        for step in range(12):
            x, target = batch(step, torch.float32)
            grower.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(grower.model(x), target)
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in grower.model.parameters() if p.grad is not None)
            grower.optimizer.step()
            if step < 4:
                grower.update()
        runs.append((indicators_of(grower).s - start, grower.keep, grower.model))
    (plain, keep, model), (mixed, keep_mixed, model_mixed) = runs
    assert torch.equal(keep, keep_mixed)
    assert float((plain - mixed).norm()) < 0.05 * float((plain - plain.mean()).norm())
    for p, q in zip(model.parameters(), model_mixed.parameters(), strict=True):
        assert p.dtype == q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.02)


def test_an_update_inside_an_open_autocast_context() -> None:
    """The context caches casts of weights; after the update they would be of the old shapes and values."""
    grower = grow(SmallResNet().eval())
    x = batch(0, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        grower.model(x)
        grower.update()
        grower.finish()
        inside = grower.model(x)
    with torch.autocast("cpu", torch.bfloat16):
        outside = grower.model(x)
    assert torch.equal(inside, outside)


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9),
    "sgd-fused": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, fused=True),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_across_updates(name: str) -> None:
    """Overflow in one step: as a run that never took that step, bit for bit (the scale is a power of 2)."""
    torch.manual_seed(0)
    scaled = grow(SmallResNet().double(), OPTIMIZERS[name])
    torch.manual_seed(0)
    plain = grow(SmallResNet().double(), OPTIMIZERS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    for step in range(14):
        x, target = batch(step)
        overflow = step in (3, 8)
        for grower in (scaled, plain):
            grower.optimizer.zero_grad()
        statistics = {name: b.clone() for name, b in scaled.model.named_buffers()}
        scaler.scale(F.cross_entropy(scaled.model(x), target)).backward()
        if overflow:
            before = everything(scaled)
            gradient = scaled.model.get_parameter("fc2.weight").grad
            assert gradient is not None
            gradient[0, 0] = float("inf")
        scaler.step(scaled.optimizer)
        scaler.update()
        if overflow:
            after = everything(scaled)
            moved = [name for name in differences(before, after) if "gradient of" not in name and "grad" not in name]
            assert moved == []
            for name, buffer in scaled.model.named_buffers():
                buffer.copy_(statistics[name])
        else:
            F.cross_entropy(plain.model(x), target).backward()
            plain.optimizer.step()
        if step % 2:
            scaled.update()
            plain.update()
    assert scaler.get_scale() == 2.0**9  # two halvings, one doubling
    a, b = everything(scaled), everything(plain)
    for key in [key for key in a if key.startswith("gradient of")]:
        del a[key], b[key]
    close(a, b)


def close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, b[key], rtol=1e-12, atol=1e-12, msg=key)


# --- checkpointed activations ---


class Checkpointed(SmallResNet):
    """The same network; activations of the residual branch are computed again in the backward pass."""

    reentrant = False

    def branch(self, x: Tensor) -> Tensor:
        return self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + checkpoint(self.branch, x, use_reentrant=self.reentrant))
        x = checkpoint(lambda y: torch.relu(self.conv4(y)).mean((2, 3)), x, use_reentrant=self.reentrant)
        return self.fc2(torch.relu(self.fc1(x)))


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # while tracing nothing has
@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
def test_activation_checkpointing_is_plain_training(kind: type[SmallResNet]) -> None:
    """Same units, same weights, same indicators, bit for bit, to the end of the run; but statistics count twice."""
    torch.manual_seed(0)
    plain = grow(SmallResNet().double())
    torch.manual_seed(0)
    saving = grow(kind().double())
    assert plain.full_widths() == saving.full_widths()
    reasons = [[(f.op, f.reason, f.places) for f in grower.space.frozen] for grower in (plain, saving)]
    assert reasons[0] == reasons[1]
    run(plain)
    run(saving)
    a, b = dict(plain.model.named_parameters()), dict(saving.model.named_parameters())
    assert differences(a, b) == []
    assert torch.equal(indicators_of(plain).s, indicators_of(saving).s)
    assert plain.widths() == saving.widths()


# --- events where the user wants them ---


def test_events_every_k_steps_with_accumulated_gradients() -> None:
    """Two half batches a step, an event every three steps, as whole batches; gradients waiting at an event are lost."""
    runs = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = SmallResNet().double().eval()  # batch statistics are those of a part
        grower = grow(model)
        for step in range(24):
            x, target = batch(step)
            grower.optimizer.zero_grad()
            for part in range(parts):
                piece = slice(part * 8 // parts, (part + 1) * 8 // parts)
                (F.cross_entropy(model(x[piece]), target[piece]) / parts).backward()
            grower.optimizer.step()
            if step % 3 == 2:
                grower.update()
        runs.append(grower)
    assert [e.update for e in runs[0].history] == list(range(9))
    close(dict(runs[0].model.named_parameters()), dict(runs[1].model.named_parameters()))
    assert torch.equal(runs[0].keep, runs[1].keep)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_early_stop(after: int) -> None:
    """`finish()` at any time: within the budget, hooks off, and the loop goes on as plain training."""
    grower = run(make(), after) if after else make()
    train(grower, 50, 1)
    grower.finish()
    assert grower.limits.params is not None
    assert grower.cost().params <= grower.limits.params
    twin = copy.deepcopy(grower.model)
    optimizer = sgd(twin)
    optimizer.load_state_dict(copy.deepcopy(grower.optimizer.state_dict()))
    x, target = batch(7)
    for model, stepper in ((grower.model, grower.optimizer), (twin, optimizer)):
        stepper.zero_grad()
        F.cross_entropy(model(x), target).backward()
        stepper.step()
    assert all(torch.equal(p, q) for p, q in zip(grower.model.parameters(), twin.parameters(), strict=True))


# --- inference mode, conversions, memory formats ---


def all_that_grows(model: nn.Module, x: Tensor) -> Grower:
    """Construction, updates, a state taken and taken over; the network is called in between."""
    grower = grow(model)
    with torch.inference_mode(False):
        average = copy.deepcopy(grower.model)
    grower.follow(average)
    grower.update()
    grower.model.eval()(x)
    grower.load_state_dict(grower.state_dict())
    grower.update()
    return grower


def test_inference_mode_changes_nothing() -> None:
    """Whatever is done inside it, the network trains on as if it had been done outside."""
    torch.manual_seed(0)
    x, model = batch(0)[0], SmallResNet().double()
    plain = all_that_grows(copy.deepcopy(model), x)
    with torch.inference_mode():
        inside = all_that_grows(model, x.clone())
        assert torch.is_inference_mode_enabled()
    for grower in (plain, inside):
        train(grower, 0, 3)
        with torch.inference_mode(grower is inside):
            grower.finish()
        train(grower, 3, 2)
    assert not any(tensor.is_inference() for tensor in inside.model.state_dict().values())
    assert differences(everything(plain), everything(inside)) == []


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = SmallResNet()
    with pytest.raises(
        TraceError, match=r"conv1\.weight was made under torch\.inference_mode\(\).* build the model outside"
    ):
        grow(model)


def test_a_follower_made_in_inference_mode_is_refused() -> None:
    grower = grow(SmallResNet().double())
    with torch.inference_mode():
        average = copy.deepcopy(grower.model)
    with pytest.raises(StructureError, match=r"conv1\.weight was made under .* make the copy outside"):
        grower.follow(average)


def train_float(grower: Grower) -> None:
    """A step in the model's present dtype."""
    x, target = batch(1, next(grower.model.parameters()).dtype)
    F.cross_entropy(grower.model(x), target).backward()
    grower.optimizer.step()


CONVERTED = (
    r"is torch\.float64 on cpu now, but was torch\.float32 .* before Grower\(\.\.\.\) .*"
    r"model\.to\('cpu', torch\.float32\)"
)


@pytest.mark.parametrize(
    ("act", "error"), [(Grower.update, StructureError), (Grower.finish, StructureError), (train_float, TrainingError)]
)
def test_a_converted_model_is_told_and_can_go_on(act: Any, error: type[Exception]) -> None:
    """`double()` after the grower was made: an update, the end and a step say so, and change nothing."""
    torch.manual_seed(0)
    grower = grow(SmallResNet())
    grower.update()
    grower.model.double()
    shapes = [parameter.shape for parameter in grower.model.parameters()]
    with pytest.raises(error, match=CONVERTED):
        act(grower)
    assert [parameter.shape for parameter in grower.model.parameters()] == shapes
    grower.model.to("cpu", torch.float32)
    grower.optimizer.zero_grad()
    train_float(grower)
    grower.update()


@pytest.mark.parametrize("late", [False, True])
def test_channels_last_weights_stay_so(late: bool) -> None:
    """Converted before the grower or, at a width of one, after it; slots, and a state that is taken over, too."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    if not late:
        model.to(memory_format=torch.channels_last)
    grower = grow(model, preset="default:ramp=0.5,peak=1,settle=0")
    if late:
        model.to(memory_format=torch.channels_last)
    for epoch in range(4):
        train(grower, 2 * epoch)
        grower.update()
    train(grower, 8)
    grower.load_state_dict(grower.state_dict())
    grower.update()
    wide = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert len(wide) >= 2
    for parameter in wide:
        for tensor in (parameter, grower.optimizer.state[parameter]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()
