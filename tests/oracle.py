"""Slow, literal versions of what the library does fast: Eq 6 with explicit masks, and small frames to try it on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgrow import Space
from torchgrow.structure.space import WHOLE


class SmallResNet(nn.Module):
    """Every kind of gated place: batch norm after a convolution, a residual sum, convolution and linear with bias.

    x -> conv1 bn1 -+-> conv2 bn2 conv3 bn3 -+-> conv4 (stride 2, bias) -> pool -> fc1 -> fc2
                    +------------------------+
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv3, self.bn3 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv4 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x))))))
        x = torch.relu(self.conv4(x)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


class TwoLayers(nn.Module):
    """The smallest frame that can grow: 12 hidden units between two linear layers."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Eq6:
    """Eq 6 to the letter: the whole frame, every gated weight times sigma(beta s) q, everything by autograd.

    Gradients of the masked weights w~ are collected first, so that a test can clip them as a user clips those of
    the live network; `step` carries them on to w and s. What belongs to an absent unit is put back after a step.

    Args:
        frame: the model at full size, a copy of what a Grower was given before it shrank it.
        optimizer: of the frame's own parameters.
        space: the space; its `fold` says where gates sit.
        method: settings of the indicators.
        s: float64 [n], their initial values.
        q: bool [n], what is present.
        beta: float64 [n].
    """

    def __init__(
        self,
        frame: nn.Module,
        optimizer: torch.optim.Optimizer,
        space: Space,
        method: Any,
        *,
        s: Tensor,
        q: Tensor,
        beta: Tensor,
    ) -> None:
        self.frame, self.optimizer, self.space, self.method = frame, optimizer, space, method
        self.s = s.clone().requires_grad_()
        self.s_optimizer = torch.optim.SGD(
            [self.s], lr=method.lr, momentum=method.momentum, weight_decay=method.weight_decay
        )
        self.q, self.beta = q.clone(), beta.clone()
        self.parameters = dict(frame.named_parameters())
        self.buffers = dict(frame.named_buffers())
        self.held: dict[str, Tensor] = {}  # w~, a leaf
        self.refresh()

    def relaxed(self) -> Tensor:
        """Sigma(beta s)."""
        return torch.sigmoid(self.beta * self.s)

    def masks(self) -> Tensor:
        """Sigma(beta s) q; 1 for what cannot be removed."""
        m = self.relaxed() * self.q
        return torch.where(self.space.removable, m, torch.ones_like(m))

    def masked(self) -> dict[str, Tensor]:
        """W m for every gated parameter."""
        m = self.masks()
        result: dict[str, Tensor] = {}
        for (name, axis), units in self.space.fold.items():
            w = result.get(name, self.parameters[name])
            factor = torch.where(units >= 0, m[units.clamp(min=0)], torch.ones(1, dtype=m.dtype))
            shape = [1] * w.dim()
            if axis != WHOLE:
                shape[axis] = -1
            result[name] = w * factor.reshape(shape)
        return result

    def refresh(self) -> None:
        """Recompute the leaves w~ from w and s."""
        self.held = {n: w.detach().requires_grad_() for n, w in self.masked().items()}

    def leaves(self) -> list[Tensor]:
        """What the live network calls its parameters: w~ where there are gates, w elsewhere."""
        return [self.held.get(name, p) for name, p in self.parameters.items()]

    def __call__(self, *inputs: Any) -> Any:
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        outputs = functional_call(self.frame, {**self.held, **buffers}, inputs)
        for name, b in self.buffers.items():
            b.copy_(torch.where(self.absent(name), b, buffers[name]))
        return outputs

    def absent(self, name: str) -> Tensor:
        """Bool, broadcastable to the tensor: positions that belong to an absent unit."""
        shape = self.space.shapes[name]
        result = torch.zeros(shape, dtype=torch.bool)
        for axis in self.space.cut_axes.get(name, ()):
            units = self.space.unit_of[name, axis]
            one = [1] * len(shape)
            one[axis] = -1
            result = result | ((units >= 0) & ~self.q[units.clamp(min=0)]).reshape(one)
        return result

    def step(self, penalty: float = 0.0, rate: float = 1.0) -> None:
        """One SGD step on Eq 6, of w with the user's optimizer and of s with its own."""
        masked = self.masked()
        names = [name for name in masked if self.held[name].grad is not None and masked[name].requires_grad]
        torch.autograd.backward([masked[n] for n in names], [self.held[n].grad for n in names])
        if penalty:
            every = self.relaxed()[self.space.removable]
            (penalty * every.sum()).backward()
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        slots = {name: self.slots(name) for name in self.parameters}
        slots = {name: {key: slot.clone() for key, slot in found.items()} for name, found in slots.items()}
        self.optimizer.step()
        with torch.no_grad():
            for name, p in self.parameters.items():
                absent = self.absent(name)
                p.copy_(torch.where(absent, before[name], p))
                for key, slot in self.slots(name).items():
                    slot.copy_(torch.where(absent, slots[name].get(key, torch.zeros_like(slot)), slot))
        self.s_optimizer.param_groups[0]["lr"] = self.method.lr * rate
        self.s_optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.s_optimizer.zero_grad()
        self.refresh()

    def slots(self, name: str) -> dict[str, Tensor]:
        """Optimizer slots of the parameter's own shape."""
        parameter = self.parameters[name]
        state = self.optimizer.state.get(parameter, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}

    def update(self, q: Tensor, gamma: float, t: Tensor, shift: float = 0.0) -> None:
        """Another structure: indicators shifted alike, counters raised, temperature by Eq 7."""
        with torch.no_grad():
            self.s += shift
        self.q, self.beta = q.clone(), gamma ** t.double()
        self.zero_grad()

    def live(self, full: Mapping[str, Tensor], name: str) -> Tensor:
        """The present part of a tensor of full size."""
        part = full[name].detach()
        for axis in self.space.cut_axes.get(name, ()):
            units = self.space.unit_of[name, axis]
            part = part.index_select(axis, torch.nonzero((units < 0) | self.q[units.clamp(min=0)]).flatten())
        return part
