"""A live network with gates beside its oracle, literal Eq 6, of equal structure; what both can be trained with."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growing import begun_as, indicators_of
from oracle import Eq6, SmallResNet
from torchgrow import Budget, Grower
from torchgrow.policies import Paper

Make = Callable[[Any], torch.optim.Optimizer]

METHOD = Paper(lambda_base=0.5)
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
        live, make(live), example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=10, policy=METHOD
    )
    space, indicators = grower.space, indicators_of(grower)
    generator = torch.Generator().manual_seed(1)
    keep = grower.keep | ~space.removable | (torch.rand(space.n_units, generator=generator) < 0.6)
    indicators.s = torch.randn(space.n_units, generator=generator, dtype=torch.float64)
    for _ in range(3):  # present and absent units have temperatures of their own
        grower.policy.applied(replace(grower.run.view(1), keep=keep))
    grower.run.change_to(keep, grower.policy, grower.run.state.generator, time.perf_counter())
    policy: Any = grower.policy
    policy.penalty = torch.full_like(policy.s, penalty)
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
