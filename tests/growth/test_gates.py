"""Law 3: training with folded gates is literal Eq 6 (tests/oracle.py), whatever the optimizer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growing import indicators_of
from literal import METHOD, OPTIMIZERS, STEPS, Make, batch, close, everything, loss_of, make_pair, same, train
from lookalikes import Madgrad, ScheduleFree
from oracle import SmallResNet
from torchgrow import Budget, Grower, trace
from torchgrow.growth.gates import Fold


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("penalty", [0.0, -0.3])
def test_folded_training_is_literal_eq6(name: str, penalty: float) -> None:
    """w~ = m w; the optimizer sees w and dL/dw = m dL/dw~, so its steps are those of Eq 6 written out."""
    pair = make_pair(OPTIMIZERS[name], penalty)
    train(pair, penalty=penalty)
    pair.compare()


def test_the_oracle_can_tell_a_difference() -> None:
    pair = make_pair(OPTIMIZERS["momentum"])
    train(pair, 3)
    pair.compare()
    indicators_of(pair.grower).s = indicators_of(pair.grower).s + 1e-6
    with pytest.raises(AssertionError, match=r"s differs by 1\.0e-06"):
        pair.compare()


def test_several_groups_and_parameters_left_out() -> None:
    """Parameters that are not trained get no gate and do not move; each group keeps its own rate."""

    def make(m: SmallResNet) -> torch.optim.Optimizer:
        m.conv1.weight.requires_grad_(False)
        decayed = [p for n, p in m.named_parameters() if p.dim() > 1 and p.requires_grad and n != "fc2.weight"]
        rest = [p for n, p in m.named_parameters() if p.dim() == 1 and not n.startswith("fc1")]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 1e-2, "lr": 0.02}, {"params": rest}]
        return torch.optim.SGD(groups, 0.05, 0.9)

    pair = make_pair(make)
    assert not pair.grower.space.removable[pair.grower.space.unit_of["fc1.bias", 0]].any()
    before = {n: getattr(pair.live, n).weight.detach().clone() for n in ("conv1", "fc2")}
    train(pair)
    pair.compare()
    for name, weight in before.items():
        assert torch.equal(getattr(pair.live, name).weight, weight)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_closures(by_keyword: bool) -> None:
    """With a closure there are no gradients yet before the step."""
    pair = make_pair(OPTIMIZERS["momentum"])
    optimizer = pair.grower.optimizer
    for step in range(STEPS):
        x, target = batch(step)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(pair.live(x), target)  # noqa: B023
            loss.backward()
            return loss

        live = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        literal = loss_of(pair.oracle(x), target)
        literal.backward()
        pair.oracle.step()
        assert live is not None
        assert abs(live.item() - literal.item()) <= 1e-9
    pair.compare()


def test_a_closure_that_fails_changes_nothing() -> None:
    pair = make_pair(OPTIMIZERS["momentum"])
    before = everything(pair)

    def closure() -> float:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        pair.grower.optimizer.step(closure)
    assert same(before, everything(pair))
    train(pair, 2)
    pair.compare()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(set_to_none: bool) -> None:
    pair = make_pair(OPTIMIZERS["momentum"])
    optimizer = pair.grower.optimizer
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none)
        for part in range(3):
            x, target = batch(3 * step + part)
            (loss_of(pair.live(x), target) / 3).backward()
            (loss_of(pair.oracle(x), target) / 3).backward()
        optimizer.step()
        pair.oracle.step()
    pair.compare()


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping(kind: str) -> None:
    """Between backward and step, .grad is dL/dw~: clipping acts on that, and w and s get what it leaves."""
    pair = make_pair(OPTIMIZERS["momentum"])
    optimizer = pair.grower.optimizer
    for step in range(STEPS):
        x, target = batch(step)
        optimizer.zero_grad()
        loss_of(pair.live(x), target).backward()
        loss_of(pair.oracle(x), target).backward()
        if kind == "norm":
            live = nn.utils.clip_grad_norm_(pair.live.parameters(), 0.05)
            literal = nn.utils.clip_grad_norm_(pair.oracle.leaves(), 0.05)
            assert float(live) > 0.05
            assert float(live) == pytest.approx(float(literal), rel=1e-9)
        else:
            nn.utils.clip_grad_value_(pair.live.parameters(), 0.01)
            nn.utils.clip_grad_value_(pair.oracle.leaves(), 0.01)
        optimizer.step()
        pair.oracle.step()
    pair.compare()


def test_to_maximise_the_negative_loss_is_to_minimise_the_loss() -> None:
    """The indicators descend what the weights descend, also where the optimizer is told to ascend."""
    found = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, maximize=sign < 0)
        x, labels = torch.randn(32, 8).double(), torch.arange(32) % 3
        settings: dict[str, Any] = {"budget": Budget(params="50%"), "updates": 6, "preset": "paper"}
        grower = Grower(model, optimizer, example_inputs=x, **settings)
        for _ in range(6):
            for _ in range(5):
                optimizer.zero_grad()
                (sign * F.cross_entropy(model(x), labels)).backward()
                optimizer.step()
            grower.update()
        found.append((indicators_of(grower).s, [event.params for event in grower.history]))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0], found[1][0])


def test_gradients_stay_those_of_the_live_weights() -> None:
    """The step borrows .grad and gives it back, the very same tensor and bits."""
    pair = make_pair(OPTIMIZERS["momentum"])
    x, target = batch(0)
    loss_of(pair.live(x), target).backward()
    before = {n: (p.grad, p.grad.clone()) for n, p in pair.live.named_parameters() if p.grad is not None}
    pair.grower.optimizer.step()
    for name, parameter in pair.live.named_parameters():
        assert parameter.grad is before[name][0]
        assert torch.equal(parameter.grad, before[name][1])


def free(m: nn.Module) -> torch.optim.Optimizer:
    optimizer = ScheduleFree(m.parameters(), 0.05)
    optimizer.train()
    return optimizer


def test_copies_of_the_weights_are_folded_with_them() -> None:
    """Between steps this optimizer puts a mix of weights and copies into the model, and takes it out again."""
    pair = make_pair(free)
    x, _ = batch(0)
    train(pair, 5)
    both: Any = (pair.grower.optimizer, pair.oracle.optimizer)
    for optimizer in both:
        optimizer.eval()
    pair.oracle.refresh()
    torch.testing.assert_close(pair.live(x), pair.oracle(x), rtol=1e-9, atol=1e-9)
    for optimizer in both:
        optimizer.train()
    pair.oracle.refresh()
    train(pair, 5)  # compares the losses


@pytest.mark.parametrize("make", [free, lambda m: Madgrad(m.parameters(), 0.01)], ids=["schedule-free", "madgrad"])
def test_after_the_end_copies_do_not_pull_the_weights_back(make: Make) -> None:
    """They keep the gates that the weights keep, 1 of units that entered in the end, and are 0 where these are read."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    grower = Grower(
        model, make(model), example_inputs=batch(0)[0], budget=Budget(params="70%"), updates=10, policy=METHOD
    )
    for number in range(3):
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        grower.optimizer.step()
        grower.optimizer.zero_grad()
        old = grower.keep.clone()
        grower.update() if number < 2 else grower.finish()
    gate = indicators_of(grower).gate.masked_fill(grower.keep & ~old, 1)
    fold = grower.run.live.gates.fold
    assert fold is not None
    folded = silent = 0
    for p, factor in zip(fold.parameters, fold.factors(gate), strict=True):
        state = grower.optimizer.state[p]
        away = (state.get("z", state.get("x0")) - p.detach()).abs()
        assert bool((away <= 0.05 * factor).all()), "further than the few steps went"
        assert bool((away[p == 0] == 0).all())
        folded, silent = folded + int((factor < 0.99).sum()), silent + int((p == 0).sum())
    assert folded
    assert silent


class Scaled:
    """What GradScaler does to an optimizer that unscales by itself: two attributes while it steps."""

    def __init__(self, scale: float, overflow: float) -> None:
        self.scale, self.overflow = scale, overflow

    def step(self, optimizer: Any) -> None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(self.scale), torch.tensor(self.overflow)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("name", ["sgd-fused", "adam-fused"])
def test_fused_optimizer_under_a_scaler(name: str) -> None:
    """Scaled by a power of 2 and unscaled in the step: exactly the unscaled run. On overflow: no change at all."""
    scaled, plain = make_pair(OPTIMIZERS[name]), make_pair(OPTIMIZERS[name])
    for step in range(10):
        x, target = batch(step)
        for pair, scale in ((scaled, 1024.0), (plain, 1.0)):
            pair.grower.optimizer.zero_grad()
            (loss_of(pair.live(x), target) * scale).backward()
        if step == 5:
            before = everything(scaled)
            keep = {n: p.grad.clone() for n, p in scaled.live.named_parameters() if p.grad is not None}
            scaled.live.bn1.weight.grad.fill_(float("inf"))
            Scaled(1024.0, 1.0).step(scaled.grower.optimizer)
            assert same(before, everything(scaled))
            for n, p in scaled.live.named_parameters():
                p.grad = keep[n]
        Scaled(1024.0, 0.0).step(scaled.grower.optimizer)
        plain.grower.optimizer.step()
    a, b = everything(scaled), everything(plain)
    assert a.keys() == b.keys()
    for key in a:
        close(a[key].double(), b[key].double(), key, 1e-12)


def test_grad_scaler_with_an_unfused_optimizer() -> None:
    """The scaler unscales before the step and leaves the step out on overflow."""
    pair = make_pair(OPTIMIZERS["momentum"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(10):
        x, target = batch(step)
        pair.grower.optimizer.zero_grad()
        loss = loss_of(pair.live(x), target)
        scaler.scale(loss).backward()
        if step == 4:
            before = everything(pair)
            pair.live.fc2.weight.grad.fill_(float("inf"))
            scaler.step(pair.grower.optimizer)
            scaler.update()
            assert same(before, everything(pair))
            pair.grower.optimizer.zero_grad()
            continue
        literal = loss_of(pair.oracle(x), target)
        if step != 4:
            literal.backward()
            scaler.step(pair.grower.optimizer)
            scaler.update()
            pair.oracle.step()
    assert scaler.get_scale() == 2.0**9
    close(indicators_of(pair.grower).s, pair.oracle.s, "s", 1e-9)
    close(pair.live.fc2.weight, pair.oracle.live(pair.oracle.parameters, "fc2.weight"), "fc2", 1e-9)


def test_gates_of_complex_weights_get_the_gradient_of_what_they_scale() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))
            self.b = nn.Parameter(torch.randn(2, 6, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(self.a.dtype) @ self.a.t() @ self.b.t()).abs()

    torch.manual_seed(0)
    model, x = Turned(), torch.randn(5, 3, dtype=torch.float64)
    space = trace(model, x)
    parameters = dict(model.named_parameters())
    fold, gate = Fold(space, parameters, space.everything(), {}), torch.rand(space.n_units, dtype=torch.float64)
    gate.requires_grad_()
    contents = {**parameters, **fold.folded(fold.factors(gate))}
    torch.func.functional_call(model, contents, (x,)).square().sum().backward()
    with torch.no_grad():
        for name, folded in fold.folded(fold.factors(gate)).items():
            parameters[name].copy_(folded)
    model.zero_grad()
    model(x).square().sum().backward()
    found = fold.gate_gradient([parameter.grad for parameter in fold.parameters])
    assert space.n_units == 6
    assert gate.grad is not None
    assert torch.allclose(found, (gate.grad * gate).detach())
