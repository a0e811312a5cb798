"""What the tests of growing share: small runs, and everything of a run that can be compared."""

import copy
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookalikes import Prodigy
from oracle import Eq6, SmallResNet
from torchgrow import Budget, Event, Grower, Limits, Space
from torchgrow.policies import Paper, Policy, View
from torchgrow.structure.cost import CostModel

STILL = Paper(lambda_base=0.0, final_inverse_temperature=1.0)
"""No pressure and a constant temperature: an update changes the structure and nothing else."""


LITERAL = Paper(lambda_base=0.5, penalised="all", paced=False)
"""The paper's settings with one lambda for all units, where one step of Eq 6 is one step."""


def indicators_of(grower: Grower) -> Any:
    """What holds s, gates and temperatures, of `Paper` or `Planned`."""
    return grower.policy


def view_of(space: Space, limits: Limits, updates: int, seed: int = 0) -> View:
    """A run of that space before its first update, as a policy sees it."""
    generator = torch.Generator().manual_seed(seed)
    return View(space, CostModel(space), limits.tensor(), 0, updates, space.everything(), 1.0, generator)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 4, (8,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == wide]} for wide in (True, False)]
    return torch.optim.AdamW(groups, 0.01, amsgrad=True)


def prodigy(model: nn.Module) -> torch.optim.Optimizer:
    return Prodigy(model.parameters())


def make(
    preset: str | Policy = "default",
    budget: Budget | None = None,
    updates: int = 10,
    seed: int = 0,
    optimizer: Any = sgd,
    policy: Policy | None = None,
) -> Grower:
    torch.manual_seed(0)
    model = SmallResNet().double()
    return Grower(
        model,
        optimizer(model),
        example_inputs=batch(0)[0],
        budget=budget or Budget(params="50%"),
        updates=updates,
        preset=preset if isinstance(preset, str) and policy is None else None,
        policy=policy if isinstance(preset, str) else preset,
        seed=seed,
    )


def train(grower: Grower, first: int = 0, steps: int = 2) -> None:
    for step in range(first, first + steps):
        x, target = batch(step)
        grower.optimizer.zero_grad()
        F.cross_entropy(grower.model(x), target).backward()
        grower.optimizer.step()


def run(grower: Grower, updates: int | None = None) -> Grower:
    """Epochs of two steps, an update after each."""
    for epoch in range(updates or grower.updates):
        train(grower, 2 * epoch)
        grower.update()
    return grower


def outputs(grower: Grower) -> Tensor:
    """In evaluation mode, without a trace in the model."""
    model = copy.deepcopy(grower.model).eval()
    with torch.no_grad():
        return model(batch(99)[0])


def everything(grower: Grower, run: bool = True) -> dict[str, Any]:
    """All that must survive a failed update, as copies; outputs only where it runs on `batch`."""
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in grower.model.state_dict().items()}
    state |= {f"policy's {name}": value for name, value in grower.policy.state_dict().items()}
    for name, parameter in grower.model.named_parameters():
        for key, slot in grower.optimizer.state.get(parameter, {}).items():
            state[f"{key} of {name}"] = copy.deepcopy(slot)
        state[f"gradient of {name}"] = copy.deepcopy(parameter.grad)
    return {
        **state,
        "generator": grower.run.state.generator.get_state(),
        "keep": grower.keep.clone(),
        "history": [timeless(event) for event in grower.history],
        "attributes": [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in grower.model.modules()],
        "record": dict(grower.run.live.bank.record.attributes),
        "outputs": outputs(grower) if run else None,
        "raw": {name: raw.clone() for name, raw in grower.run.live.raw().items()},
    }


def timeless(event: Event) -> dict[str, Any]:
    return {name: value for name, value in vars(event).items() if name != "seconds"}


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested structures are not bit for bit the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys(), key=str)
        return [d for n in names for d in differences(a.get(n), b.get(n), f"{at}/{n}")]
    equal = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
    return [] if equal else [at]


def failing(error: BaseException, call: int, original: Any) -> Any:
    """A function that fails at one of its calls, and only once."""
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return original(*args, **kwargs)

    return wrapper


def breaking(call: int, error: BaseException | int) -> Callable[[Iterable[Any]], None]:
    """In place of `torchgrow.exchange.run`: once, before its call of that index, an error or a signal comes."""
    waiting = True

    def run(calls: Iterable[Any]) -> None:
        nonlocal waiting
        calls = list(calls)
        for number, one in enumerate(calls):
            if waiting and number in (call, call + len(calls)):
                waiting = False
                if not isinstance(error, int):
                    raise error
                os.kill(os.getpid(), error)
            one()

    return run


def step_both(grower: Grower, oracle: Eq6, live: Tensor, literal: Tensor, penalty: float) -> None:
    """One optimizer step of the live network and of Eq 6 written out, whose losses must be the same."""
    assert abs(live.item() - literal.item()) <= 1e-9
    live.backward()
    literal.backward()
    grower.optimizer.step()
    oracle.step(penalty)


def same_indicators(grower: Grower, oracle: Eq6) -> None:
    """Indicators of the units that can go, live and literal."""
    removable = grower.space.removable
    torch.testing.assert_close(indicators_of(grower).s[removable], oracle.s.detach()[removable], rtol=1e-9, atol=1e-9)


def same_parameters(grower: Grower, oracle: Eq6, raw: dict[str, Tensor], where: str) -> None:
    """Raw parameters of the live network, and the present part of the literal ones."""
    for name, parameter in raw.items():
        full = oracle.live(oracle.parameters, name)
        torch.testing.assert_close(parameter.detach(), full, rtol=1e-9, atol=1e-9, msg=f"{name} {where}")


def begun_as(grower: Grower, frame: nn.Module) -> nn.Module:
    """A fresh copy of the frame with the initial weights that the grower gave its own."""
    for name, scale in grower.run.plan.scales.items():
        frame.get_parameter(name).detach().mul_(scale)
    return frame


def interrupted_step(optimizer: torch.optim.Optimizer) -> None:
    """Begin a step that another hook stops once the weights are unfolded; the optimizer's own state stays."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(stop)
    with suppress(KeyboardInterrupt):
        optimizer.step()
    handle.remove()


def refusing() -> tuple[Grower, dict[str, Any]]:
    """A grower that will refuse, and all that must stay as it is; tests share it, since it does."""
    grower = run(make("paper", updates=6), 1)
    return grower, everything(grower)
