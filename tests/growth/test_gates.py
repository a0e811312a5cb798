"""Law 3: training with folded gates is literal Eq 6 (tests/oracle.py), whatever the optimizer; and what goes wrong."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growing import begun_as, indicators_of
from lookalikes import Madgrad, ScheduleFree
from oracle import Eq6, SmallResNet
from torchgrow import Budget, Grower, Method, TrainingError, trace
from torchgrow.growth.gates import Fold

Make = Callable[[Any], torch.optim.Optimizer]

METHOD = Method.paper()
STEPS = 30


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=generator)


def loss_of(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


@dataclass
class Pair:
    """A live network and its oracle, of equal structure, with some units present and gates of every size."""

    live: Any
    grower: Grower
    oracle: Eq6

    def compare(self, tolerance: float = 1e-9) -> None:
        """Folded and raw weights, buffers, optimizer slots, indicators and their velocity agree."""
        grower, oracle = self.grower, self.oracle
        full: dict[str, Tensor] = {**oracle.parameters, **oracle.held}
        raw = {**dict(self.live.named_parameters()), **grower.run.live.raw()}
        for name, parameter in self.live.named_parameters():
            close(parameter, oracle.live(full, name), name, tolerance)
            close(raw[name], oracle.live(oracle.parameters, name), f"raw {name}", tolerance)
            slots = oracle.slots(name)
            state = grower.optimizer.state.get(parameter, {})
            assert slots.keys() == {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
            for key in slots:
                close(state[key], oracle.live({name: slots[key]}, name), f"{key} of {name}", tolerance)
        for name, buffer in self.live.named_buffers():
            close(buffer.double(), oracle.live(oracle.buffers, name).double(), name, tolerance)
        removable = grower.space.removable
        close(indicators_of(grower).s[removable], oracle.s.detach()[removable], "s", tolerance)
        close(indicators_of(grower).gate * oracle.q, oracle.masks().detach(), "gates", tolerance)


def close(found: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    error = float((found.detach() - expected.detach()).abs().max())
    assert error <= tolerance * max(1.0, float(expected.detach().abs().max())), f"{what} differs by {error:.1e}"


def make_pair(make: Make, penalty: float = 0.0, model: nn.Module | None = None) -> Pair:
    torch.manual_seed(0)
    live = (SmallResNet() if model is None else model).double()
    frame = copy.deepcopy(live)
    grower = Grower(
        live, make(live), example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=10, preset=METHOD
    )
    space, indicators = grower.space, indicators_of(grower)
    generator = torch.Generator().manual_seed(1)
    keep = grower.keep | ~space.removable | (torch.rand(space.n_units, generator=generator) < 0.6)
    indicators.s = torch.randn(space.n_units, generator=generator, dtype=torch.float64)
    for _ in range(3):  # present and absent units have temperatures of their own
        grower.policy.applied(replace(grower.run.view(1), keep=keep))
    grower.run._change_to(keep, grower.policy, grower.run.state.generator, time.perf_counter())
    policy: Any = grower.policy
    policy.penalty = penalty
    assert not bool(keep.all())
    assert bool((indicators.gate[space.removable] < 0.2).any())
    begun_as(grower, frame)
    oracle = Eq6(frame, make(frame), space, METHOD, s=indicators.s, q=keep, beta=indicators.beta)
    return Pair(live, grower, oracle)


def train(pair: Pair, steps: int = STEPS, penalty: float = 0.0, rate: float = 1.0) -> None:
    """Both, side by side, on the same batches."""
    optimizer = pair.grower.optimizer
    for step in range(steps):
        x, target = batch(step)
        optimizer.zero_grad()
        live = loss_of(pair.live(x), target)
        literal = loss_of(pair.oracle(x), target)
        assert abs(live.item() - literal.item()) <= 1e-9
        live.backward()
        literal.backward()
        optimizer.step()
        pair.oracle.step(penalty, rate)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.01, weight_decay=1e-3, amsgrad=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.01, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.01),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), 1e-3),
    "sgd-foreach": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, foreach=True),
    "sgd-single": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "sgd-fused": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam-foreach": lambda m: torch.optim.Adam(m.parameters(), 0.01, foreach=True),
    "adam-single": lambda m: torch.optim.Adam(m.parameters(), 0.01, foreach=False),
    "adam-fused": lambda m: torch.optim.Adam(m.parameters(), 0.01, fused=True),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
}


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


@pytest.mark.parametrize("early", [True, False])
def test_scheduler(early: bool) -> None:
    """The indicators' rate follows the weights': 0.1 x present / initial rate. The scheduler may come first."""
    made: list[torch.optim.lr_scheduler.LRScheduler] = []

    def make(m: nn.Module) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["momentum"](m)
        if early:
            made.append(torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5))
        return optimizer

    pair = make_pair(make)
    if not early:
        both = (pair.grower.optimizer, pair.oracle.optimizer)
        made = [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5) for optimizer in both]
    for step in range(12):
        rate = 0.5 ** (step // 4)
        assert pair.grower.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * rate)
        train(pair, 1, rate=rate)
        for scheduler in made:
            scheduler.step()
    pair.compare()


def test_warm_up() -> None:
    """A scheduler made before the grower has lowered the rate already; what counts is the rate it started from."""
    made: list[torch.optim.lr_scheduler.LRScheduler] = []

    def make(m: nn.Module) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["momentum"](m)
        made.append(torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9))
        return optimizer

    pair = make_pair(make)
    for step in range(12):
        train(pair, 1, rate=min(1.0, 0.1 + 0.1 * step))
        for scheduler in made:
            scheduler.step()
    pair.compare()


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
    """They keep the gates that the weights keep, and are 0 for units that entered in silence."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    grower = Grower(
        model, make(model), example_inputs=batch(0)[0], budget=Budget(params="70%"), updates=10, preset=METHOD
    )
    for number in range(3):
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        grower.optimizer.step()
        grower.optimizer.zero_grad()
        grower.update() if number < 2 else grower.finish()
    fold = grower.run.live.gates.fold
    assert fold is not None
    folded = silent = 0
    for p, factor in zip(fold.parameters, fold.factors(indicators_of(grower).gate), strict=True):
        state = grower.optimizer.state[p]
        away = (state.get("z", state.get("x0")) - p.detach()).abs()
        assert bool((away <= 0.05 * factor).all()), "further than the few steps went"
        assert bool((away[p == 0] == 0).all())
        folded, silent = folded + int((factor < 0.99).sum()), silent + int((p == 0).sum())
    assert folded
    assert silent


Cycle = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
CYCLES: dict[str, Cycle] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    "one cycle, peak elsewhere": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.5] * 2, total_steps=12),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.0005, 0.05, step_size_up=5),
    "cyclic, plain momentum": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 0.0005, 0.05, step_size_up=5, cycle_momentum=False
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.7**step),
}


@pytest.mark.parametrize("name", CYCLES)
@pytest.mark.parametrize("early", [True, False])
def test_the_indicators_rate_is_the_share_of_the_full_rate_whenever_the_schedule_is_made(
    name: str, early: bool
) -> None:
    """Cyclic schedules begin 25 to 100 times below the rate they lead to, and note that as the initial one."""
    model = SmallResNet().double()
    wide = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": wide}, {"params": rest, "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    schedule = CYCLES[name](optimizer) if early else None
    grower = Grower(model, optimizer, example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=4)
    schedule = schedule or CYCLES[name](optimizer)
    full = 0.5 if name.endswith("elsewhere") else 0.05
    for _ in range(11):
        assert grower.run.state.rate(grower.optimizer) == pytest.approx(optimizer.param_groups[0]["lr"] / full)
        optimizer.step()
        schedule.step()


def test_a_group_with_a_rate_of_its_own_keeps_it_as_the_full_one() -> None:
    """Also under a schedule made before, and where the other groups have the rate the optimizer was made with."""
    model = SmallResNet().double()
    wide = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": wide, "lr": 0.001}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, 0.05)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    grower = Grower(model, optimizer, example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=4)
    assert grower.run.state.rate(grower.optimizer) == pytest.approx(0.1)


def test_a_rate_that_rises_beyond_the_first_carries_the_indicators_no_further() -> None:
    pair = make_pair(OPTIMIZERS["sgd"])
    group = pair.grower.optimizer.param_groups[0]
    group["lr"] = 5.0
    assert pair.grower.run.state.rate(pair.grower.optimizer) == 1.0
    group["lr"] = 0.5
    assert pair.grower.run.state.rate(pair.grower.optimizer) == pytest.approx(0.1)


def everything(pair: Pair) -> dict[str, Tensor]:
    """All that a step may change, as copies: weights, buffers, indicators, slots."""
    state = {name: tensor.detach().clone() for name, tensor in pair.live.state_dict().items()}
    indicators = indicators_of(pair.grower)
    state.update({name: getattr(indicators, name).clone() for name in ("s", "velocity", "gate", "beta", "t")})
    for i, slots in enumerate(pair.grower.optimizer.state.values()):
        state.update({f"slot {i} {k}": v.clone() for k, v in slots.items() if isinstance(v, Tensor)})
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
