"""Small optimizers that keep what those of other packages keep, for tests of how their slots are told apart and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Make = Callable[[Iterable[Any]], Optimizer]


class Own(Optimizer):
    """One that calls `move(parameter, gradient, its state, group)` for each parameter with a gradient."""

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, self.state[p], group)

    def begin(self, group: dict[str, Any]) -> None:
        """Before the parameters of a group."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change a parameter by its gradient."""


class ScheduleFree(Own):
    """The model holds y; z is stepped, x is the mean of all z; `eval` and `train` exchange x and y in the model."""

    beta = 0.9

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr, train_mode=False, k=0)

    def begin(self, group: dict[str, Any]) -> None:
        if not group["train_mode"]:
            raise RuntimeError("not in train mode; call optimizer.train()")
        group["k"] += 1

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        z = state.setdefault("z", p.clone())
        share = 1 / group["k"]
        p.lerp_(z, share).add_(g, alpha=group["lr"] * (self.beta * (1 - share) - 1))
        z.sub_(g, alpha=group["lr"])

    @torch.no_grad()
    def _switch(self, train: bool) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] is not train else ():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - self.beta if train else 1 - 1 / self.beta)
            group["train_mode"] = train

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)


class Madgrad(Own):
    """Dual averaging from x0, with momentum."""

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] = group.get("k", 0) + 1

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"grad_sum_sq": torch.zeros_like(p), "s": torch.zeros_like(p), "x0": p.clone()}
        rate = group["lr"] * group["k"] ** 0.5
        state["grad_sum_sq"].addcmul_(g, g, value=rate)
        state["s"].add_(g, alpha=rate)
        z = state["x0"] - state["s"] / (state["grad_sum_sq"] ** (1 / 3) + 1e-6)
        p.mul_(0.9).add_(z, alpha=0.1)


class SlowWeights(Own):
    """SGD with momentum, pulled half-way back to slow weights every third step, from the sixth on."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        p.sub_(state.setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(g), alpha=group["lr"])
        if state["step"] == 6:
            state["slow"] = p.clone()
        if state["step"] >= 6 and state["step"] % 3 == 0:
            p.copy_(state["slow"].lerp_(p, 0.5))


class Prodigy(Own):
    """Distance from p0, which is kept as a vector, sets the rate; settings appear with the first step."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, lr, d=1e-4, d0=1e-4, odd_dtype=torch.bfloat16, rule=abs)

    def begin(self, group: dict[str, Any]) -> None:
        gap = 0.0
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state |= {"p0": p.flatten().clone(), "s": torch.zeros_like(p).flatten()}
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["s"].add_(p.grad.flatten(), alpha=group["d"])
                gap += float(p.grad.flatten().dot(state["p0"] - p.flatten()))
        group["d_numerator"] = group.get("d_numerator", torch.zeros(1)) + gap * group["d"]
        group["d"] = torch.as_tensor(group["d"]).clone()
        group["d_hat"] = gap

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["exp_avg_sq"].mul_(0.9).addcmul_(g.float(), g.float(), value=0.1)
        p.sub_(g / (state["exp_avg_sq"].sqrt() + 1e-8), alpha=float(group["d"]) * group["lr"])


class Gains(Own):
    """A rate for every weight that rises while the gradient keeps its sign: the last gradient and a magnitude."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        last = state.get("last", torch.zeros_like(p))
        state["gain"] = state.get("gain", torch.ones_like(p)) * torch.where(last * g > 0, 1.1, 0.9)
        state["last"] = g.clone()
        p.sub_(g * state["gain"], alpha=group["lr"])


class Listed(Own):
    """Buffers in a list."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("bufs", [torch.zeros_like(p)])[0].add_(g)
        p.sub_(state["bufs"][0], alpha=group["lr"])


class Factored(Own):
    """Moments by row where a matrix is large, by element where it is small."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if p.dim() > 1 and min(p.shape) >= 32:
            state.setdefault("row", torch.zeros(p.shape[0])).add_(g.square().mean(1))
        else:
            state.setdefault("square", torch.zeros_like(p)).addcmul_(g, g)


class Sized(Own):
    """Slots of another name where a matrix is large."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("large" if min(p.shape) >= 32 else "small", torch.zeros_like(p)).addcmul_(g, g)


class Packed(Own):
    """Moments in 8 bits."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("packed", torch.zeros_like(p, dtype=torch.uint8)).add_(1)


class Subclassed(Own):
    """Moments in a tensor of a class of its own."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("moment", torch.zeros_like(p).as_subclass(Mine)).add_(g)


class Mine(Tensor):
    pass


class Held:
    """An object that holds a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Projected(Own):
    """An object for a slot."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("projector", Held(torch.eye(p.shape[0])))


class Square(Own):
    """A preconditioner that has the parameter's shape only where that is square."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        flat = g.reshape(g.shape[0], -1)
        state["left"] = flat @ flat.mT


class Shadowed(torch.optim.Adam):
    """Adam with a moving average of the weights in an attribute."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-3)
        self.shadow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


class LateShadow(torch.optim.Adam):
    """The same, made by the first step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.shadow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}


class Global(Own):
    """State that belongs to no parameter."""

    def begin(self, group: dict[str, Any]) -> None:
        self.state["total"] = {"steps": 1}  # type: ignore[index]

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(g, alpha=group["lr"])


class Reaching(Own):
    """Steps the original's parameters, which it can reach by a function, also from a copy."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        held = [p for group in self.param_groups for p in group["params"]]
        self.every = lambda: held

    def begin(self, group: dict[str, Any]) -> None:
        for p in self.every():
            p.add_(1)

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        pass


class Sharp(Own):
    """Needs a closure, and says so with a bare assertion."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None
        closure()


class Lookahead(Optimizer):
    """Holds another and steps it; its own `__init__` does not call the base class's."""

    def __init__(self, inner: Optimizer) -> None:
        self._base_optimizer = inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

    def step(self, closure: Any = None) -> Any:
        return self._base_optimizer.step()


class AcceleratedOptimizer(Optimizer):
    """As Accelerate's: hands everything on."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Engine:
    """As DeepSpeed's: no torch optimizer, holds one in an object."""

    def __init__(self, inner: Optimizer) -> None:
        self.parts = Held(inner)  # type: ignore[arg-type]
        self.param_groups = inner.param_groups

    def step(self) -> None:
        self.parts.tensor.step()  # type: ignore[attr-defined]


SERVED: dict[str, Make] = {
    "schedule-free": ScheduleFree,
    "madgrad": Madgrad,
    "slow weights": SlowWeights,
    "prodigy": Prodigy,
    "gains": Gains,
}
