"""Gates where something goes wrong: bad gradients, steps that fail, edits of what is gated."""

import pytest
import torch

from growing import indicators_of
from literal import OPTIMIZERS, batch, everything, loss_of, make_pair, same, train
from oracle import SmallResNet
from torchgrow import Budget, Grower, TrainingError


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("closure", [False, True])
def test_bad_gradients_change_nothing(bad: float, closure: bool) -> None:
    pair = make_pair(OPTIMIZERS["momentum"])
    train(pair, 3)
    x, target = batch(3)
    pair.grower.optimizer.zero_grad()
    loss_of(pair.live(x), target).backward()
    good = pair.live.bn2.weight.grad.clone()
    pair.live.bn2.weight.grad[0] = bad
    before = everything(pair)
    with pytest.raises(TrainingError, match=r"gradients of bn2\.weight are NaN or infinite; nothing was changed"):
        pair.grower.optimizer.step((lambda: 0.0) if closure else None)
    assert same(before, everything(pair))
    pair.live.bn2.weight.grad = good
    pair.grower.optimizer.step()
    loss_of(pair.oracle(x), target).backward()
    pair.oracle.step()
    train(pair, 3)
    pair.compare()


@pytest.mark.parametrize("then", ["step", "update"])
def test_a_step_that_fails_midway(then: str) -> None:
    """The next call puts the folded weights and the gradients back, says so, and the one after that works."""
    pair = make_pair(OPTIMIZERS["momentum"])
    train(pair, 3)
    pair.grower.optimizer.zero_grad()
    x, target = batch(3)
    loss_of(pair.live(x), target).backward()
    before = everything(pair)
    group = pair.grower.optimizer.param_groups[0]
    rate, group["lr"] = group["lr"], "broken"
    with pytest.raises(TypeError):
        pair.grower.optimizer.step()
    group["lr"] = rate
    call = pair.grower.optimizer.step if then == "step" else pair.grower.update
    with pytest.raises(TrainingError, match=r"did not finish; the weights were put back in order"):
        call()
    after = everything(pair)
    assert all(torch.equal(before[name], after[name]) for name in before if "slot" not in name)
    call()
    pair.grower.finish()


def test_a_failed_step_does_not_resurrect_dropped_gradients() -> None:
    pair = make_pair(OPTIMIZERS["momentum"])
    optimizer = pair.grower.optimizer
    loss_of(pair.live(batch(0)[0]), batch(0)[1]).backward()
    rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], "broken"
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    with pytest.raises(TrainingError):
        optimizer.step()
    assert all(p.grad is None for p in pair.live.parameters())


@pytest.mark.parametrize("how", ["load_state_dict", "in place", "data in place", "data", "diverged"])
def test_edits_of_gated_parameters_are_kept(how: str) -> None:
    """What the user writes between steps is the new w~: the step goes on from there, the gates stay."""
    pair = make_pair(OPTIMIZERS["momentum"])
    train(pair, 3)
    other = {k: 1.25 * v + 1e-3 if v.is_floating_point() else v.clone() for k, v in pair.live.state_dict().items()}
    if how == "load_state_dict":
        pair.live.load_state_dict(other)
    elif how == "diverged":
        pair.live.bn1.weight.data.fill_(float("nan"))
        pair.grower.run.live.raw()
        pair.live.load_state_dict(other)
    else:
        for name, parameter in pair.live.named_parameters():
            if how == "in place":
                with torch.no_grad():
                    parameter.copy_(other[name])
            elif how == "data in place":
                parameter.data.copy_(other[name])
            else:
                parameter.data = other[name].clone()
        for name, buffer in pair.live.named_buffers():
            buffer.copy_(other[name])
    m = pair.oracle.masks().detach()
    with torch.no_grad():
        for name, parameter in pair.oracle.parameters.items():
            index = torch.nonzero(~pair.oracle.absent(name), as_tuple=True)
            factor = torch.ones(parameter.shape, dtype=torch.float64)
            for (place, axis), units in pair.grower.space.fold.items():
                if place == name:
                    shape = [1] * parameter.dim()
                    shape[axis] = -1
                    factor = factor * torch.where(units < 0, 1.0, m[units]).reshape(shape)
            parameter[index] = other[name].flatten() / factor[index]
        for name, buffer in pair.oracle.buffers.items():
            if buffer.dim():
                buffer[~pair.oracle.absent(name)] = other[name]
    pair.oracle.zero_grad()
    pair.compare()
    train(pair, 10)
    pair.compare(1e-8)


def test_small_gates_keep_the_raw_weight() -> None:
    """Float32: a gate of sigmoid(-200) = 0 is held at 1e-6, and 50 steps leave the raw weight of that unit exact."""
    torch.manual_seed(0)
    model = SmallResNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x = torch.randn(4, 3, 6, 6)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="50%"), updates=10, preset="paper")
    before = {name: raw.clone() for name, raw in grower.run.live.raw().items()}
    indicators_of(grower).s = indicators_of(grower).s - 200
    indicators_of(grower).velocity.zero_()
    for _ in range(50):
        model(x).sum().backward()
        optimizer.step()
    assert float(indicators_of(grower).gate.min()) == 1e-6
    assert all(torch.equal(before[name], raw) for name, raw in grower.run.live.raw().items())
