"""Biases that take over what leaving units gave on average.

A linear map or convolution that reads unit u loses W[:, u] a_u when it leaves. Were a_u its mean, a constant would be
lost, and the bias can give that exactly (Ye et al., 2018, arXiv:1802.00124, do so with constant channels). With zeros
padded it is no constant: such a reader stays as it is, and so does one without a bias, or whose weight or bias is used
for anything else. Readers are found by the calls in a forward, not by modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import TorchgrowError
from ..policies import Policy
from ..structure.space import Space, live_positions
from ..tracing.model_call import feed
from ..tracing.passes import Pass, running

_ALIKE = ("input", "weight", "bias")
READERS: dict[Any, tuple[str, ...]] = {
    F.linear: _ALIKE,
    torch.addmm: ("bias", "input", "weight"),  # GPT-2's linear map; its weight is [inputs, outputs]
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (*_ALIKE, "stride", "padding", "dilation", "groups")),
}
"""Functions that read units, and what their arguments are."""

Read = tuple[str, int, Tensor, int]
"""Of a weight: name of the bias, axis of the weight's inputs, sum of inputs (float64 [inputs]), number of terms."""


class Readers(TorchFunctionMode):
    """While it is on, notes what exact readers read, and which parameters are used otherwise."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.read: dict[str, Read] = {}  # what exact readers read, by names of their weights
        self.others = set[str]()  # parameters that no exact reader uses, or that a forward uses twice
        self.seen = set[str]()  # those that the present forward has used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call, and note it."""
        out = func(*args, **(kwargs or {}))
        used = [self._names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self._names]
        if used and any(isinstance(x, Tensor) for x in tree_leaves(out)):  # else its shape or dtype was asked for
            given = {**dict(zip(READERS.get(func, ()), args, strict=False)), **(kwargs or {})}
            if len(used) != 2 or not self._noted(func, given):
                self.others.update(used)
            self.others |= self.seen.intersection(used)
            self.seen.update(used)
        return out

    def _noted(self, func: Any, given: Any) -> bool:
        """Note what a call reads; False if no bias can give a constant of it."""
        x, weight, bias = map(given.get, _ALIKE)
        padding, axis = given.get("padding", 0), 0 if func is torch.addmm else 1
        sides = padding if isinstance(padding, (tuple, list)) else [padding != "valid" and padding]
        plain = [given.get(name, 1) == 1 for name in ("groups", "alpha", "beta")]
        if {id(weight), id(bias)} - self._names.keys() or any(sides) or not all(plain) or weight.dim() < 2:
            return False
        if bias.shape != weight.shape[1 - axis : 2 - axis] or x.is_nested or x.layout != torch.strided:
            return False
        inputs, x = x.dim() - weight.dim() + 2, x[None]
        dtype = torch.promote_types(x.dtype, torch.float64)
        total = x.sum([i for i in range(x.dim()) if i != inputs], dtype=dtype).cpu()
        _, _, before, count = self.read.get(self._names[id(weight)], ("", 0, torch.zeros_like(total), 0))
        count += x.numel() // x.shape[inputs]
        self.read[self._names[id(weight)]] = self._names[id(bias)], axis, before + total, count
        return True


def check_plain(policy: Policy, batches: Iterable[Any] | None) -> None:
    """Refuse to compensate where units are scaled.

    Raises:
        TorchgrowError: they are.
    """
    if batches is not None and policy.gate is not None:
        raise TorchgrowError(
            f"biases take over exactly only from units that count in full, and {type(policy).__name__} folds gates "
            'into weights; leave out batches, or grow by a policy without gates, such as preset="shrink"'
        )


def _watched(model: nn.Module, batches: Iterable[Any]) -> tuple[dict[str, Read], set[str]]:
    """What readers read of some batches, in evaluation mode, and others; modes, buffers and random states stay.

    Raises:
        TorchgrowError: there are no batches.
    """
    readers, modes = Readers(model), {module: module.training for module in model.modules()}
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    empty = True
    try:
        with running(model, Pass()), eager:
            for given in batches:
                readers.seen, empty = set(), False
                with readers:
                    feed(model, given)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if empty:
        raise TorchgrowError(
            "units leave, and batches is empty, so nothing says what they give on average; nothing was changed. Pass "
            "some, anew at every call: batches=itertools.islice(loader, 20)"
        )
    return readers.read, readers.others


@torch.no_grad()
def shifts_of(
    model: nn.Module,
    space: Space,
    before: Tensor,
    keep: Tensor,
    batches: Iterable[Any] | None,
    gather: Callable[[Any], list[Any]] = lambda found: [found],
) -> dict[str, Tensor]:
    """What biases take over from units that leave: W[:, gone] mean(a[gone]), for exact readers that stay.

    The model has the units `before` (bool [n]), and nothing of it changes; `keep` stay or come. `batches` (see
    `Grower.update`) are read only if units leave. `gather` returns what every rank has: means are over all of them.

    Returns:
        By name of the bias, float64 on the host, of the bias's present size.

    Raises:
        TorchgrowError: there are no batches, or a mean is not finite.
    """
    leave = batches is not None and bool((before & ~keep).any())
    every = [one for one in gather(_watched(model, () if batches is None else batches) if leave else None) if one]
    others, read = set[str]().union(*(one for _, one in every)), dict[str, list[Read]]()
    for weight, one in (item for found, _ in every for item in found.items()):
        read.setdefault(weight, []).append(one)
    parameters, shifts = dict(model.named_parameters()), dict[str, Tensor]()
    for weight, found in read.items():
        bias, axis = found[0][:2]
        units = space.unit_of.get((weight, axis))
        if units is None or {weight, bias} & others or space.absent(weight, keep):
            continue
        units = units[live_positions(units, before)]
        gone = torch.nonzero(~live_positions(units, keep)).flatten()
        if not len(gone) or not (count := sum(one[3] for one in found)):
            continue
        mean = torch.stack([one[2] for one in found]).sum(0)[gone] / count
        lost = parameters[weight].index_select(axis, gone.to(parameters[weight].device)).cpu().to(mean.dtype)
        shift = torch.tensordot(lost, mean, dims=([axis], [0]))
        shifts[bias] = shift.reshape(len(parameters[bias]), -1).sum(1)  # over the positions of a convolution's kernel
        if not bool(shifts[bias].isfinite().all()):
            raise TorchgrowError(
                f"what {weight} reads from units that leave is not finite on average, so {bias} cannot take it over; "
                "nothing was changed. Pass batches on which the network computes finite numbers"
            )
    return shifts
