"""Gates folded into weights: the live tensor is w~ = m w, so the forward pass carries no masks.

Around every optimizer step: *unfold* (weights back to raw w, gradients times m, so that the optimizer sees dL/dw
exactly as if m w had been written out), *step*, *refold* with the new gates. The indicators' gradient is read off
what is there already: m dL/dm = <dL/dw~, w~> over the unit's gated positions.

Legend: m gate, w raw weight, w~ folded weight (what the model holds).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..default_device import on_host
from ..errors import TrainingError
from ..exchange import Exchange
from ..structure.optimizer_slots import Layout
from ..structure.space import WHOLE, Space, live_positions


def converted(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    """The error text for a tensor whose dtype or device has changed since the grower was made."""
    return (
        f"{name} is {tensor.dtype} on {tensor.device} now, but was {dtype} on {device} when Grower was made: raw "
        "weights, optimizer slots and what is stored beside them still are. Convert or move the model before "
        "Grower(...) and its optimizer are made, or after finish(), or use torch.autocast; to go on, call "
        f"model.to({str(device)!r}, {dtype})"
    )


class Fold:
    """The gated parameters of one live structure, `keep` (bool [n]); gates of layers left out have no place.

    `parameters`, by name, are at their live size, and so are the values in `raw`; of those not named there, the present
    contents are. If not `gated`, parameters hold raw contents and no copies are kept; only the positions of units are
    used, for m dL/dm with m = 1.
    """

    def __init__(
        self,
        space: Space,
        parameters: Mapping[str, nn.Parameter],
        keep: Tensor,
        raw: Mapping[str, Tensor],
        gated: bool = True,
    ) -> None:
        self.n, self.gated = space.n_units, gated
        self.names: list[str] = []
        self.parameters: list[Tensor] = []
        self.raw: list[Tensor] = []
        self._axes: list[list[int]] = []
        units: list[Tensor] = []
        places: dict[str, list[int]] = {}
        for name, axis in space.fold:
            if not space.absent(name, keep):
                places.setdefault(name, []).append(axis)
        for name, axes in places.items():
            self.names.append(name)
            self.parameters.append(parameters[name])
            if gated:
                self.raw.append(raw[name] if name in raw else parameters[name].detach().clone())
            self._axes.append(axes)
            for axis in axes:
                vector = space.fold[name, axis]
                if axis != WHOLE:
                    vector = vector[live_positions(space.unit_of[name, axis], keep)]
                units.append(torch.where(vector < 0, self.n, vector))  # entry n stands for "no gate"
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._units = torch.cat(units) if units else torch.zeros(0, dtype=torch.int64)  # the host's, as all sums are
        self._lengths = [vector.numel() for vector in units]

    def part(self, names: Collection[str]) -> Fold:
        """The same for some of the parameters; raw contents are shared."""
        part = object.__new__(Fold)
        chosen = [i for i, name in enumerate(self.names) if name in names]
        part.n, part.gated, part.device = self.n, self.gated, self.device
        part.names = [self.names[i] for i in chosen]
        part.parameters, part.raw = [self.parameters[i] for i in chosen], [self.raw[i] for i in chosen if self.gated]
        part._axes = [self._axes[i] for i in chosen]
        vectors, owners = self._units.split(self._lengths), [i for i, axes in enumerate(self._axes) for _ in axes]
        units = [vector for vector, owner in zip(vectors, owners, strict=True) if owner in chosen]
        part._units, part._lengths = torch.cat([self._units[:0], *units]), [vector.numel() for vector in units]
        return part

    @property
    def contents(self) -> dict[str, Tensor]:
        """Raw contents of the gated parameters by name."""
        return dict(zip(self.names, self.raw, strict=True)) if self.gated else {}

    def factors(self, gate: Tensor | None) -> list[Tensor]:
        """Factor of every gated parameter, broadcastable to it. `gate`: float64 [n], or None without gates."""
        if gate is None or not self.gated:
            return []
        extended = torch.cat([gate, gate.new_ones(1)]).cpu()
        values = extended[self._units].to(self.device).split(self._lengths)
        factors, i = [], 0
        for raw, axes in zip(self.raw, self._axes, strict=True):
            factor: Tensor | None = None
            for axis in axes:
                shape = [1] * raw.dim()
                if axis != WHOLE:
                    shape[axis] = -1
                one = values[i].to(raw.dtype).reshape(shape)
                factor, i = one if factor is None else factor * one, i + 1
            assert factor is not None
            factors.append(factor)
        return factors

    def folded(self, factors: list[Tensor]) -> dict[str, Tensor]:
        """Folded contents of every gated parameter, as new tensors."""
        return {name: raw * factor for (name, raw), factor in zip(self.contents.items(), factors, strict=True)}

    def gate_gradient(self, gradients: list[Tensor | None]) -> Tensor:
        """The product m dL/dm for every unit, float64 [n], from the gradients of the folded parameters.

        Summed on the host: a GPU adds by atomics, in another order each time, and ranks must come to the same bits.
        """
        products = []
        for parameter, gradient, axes in zip(self.parameters, gradients, self._axes, strict=True):
            product = torch.zeros_like(parameter) if gradient is None else gradient * parameter.conj()
            product = product.real if product.is_complex() else product
            for axis in axes:
                others = [k for k in range(product.dim()) if k != axis]
                products.append((product.sum(others) if others else product).reshape(-1))
        total = torch.zeros(self.n + 1, dtype=torch.float64, device="cpu")
        if products:
            total.index_add_(0, self._units, torch.cat(products).cpu().double())
        return total[: self.n]

    def adopt_edits(self, factors: list[Tensor]) -> None:
        """Take over edits of gated parameters made by other code since they were folded (a loaded state, say).

        Contents are compared, since an edit through `.data` leaves no other trace. `factors` are those they were
        folded with.
        """
        for parameter, raw, factor in zip(self.parameters if self.gated else (), self.raw, factors, strict=True):
            raw.copy_(unfolded(parameter, raw, factor))


def unfolded(present: Tensor, raw: Tensor, factor: Tensor) -> Tensor:
    """Raw contents of a tensor that was folded from `raw`, and perhaps edited since."""
    return torch.where(present == raw * factor, raw, present / factor)


class Folding:
    """Unfold, step, refold: hooks on the user's optimizers.

    Between steps `.grad` is the gradient of what the model holds, dL/dw~; the optimizer sees m dL/dw~ = dL/dw.
    So clipping and other changes of gradients before the step act on dL/dw~.

    Every optimizer unfolds its own parameters. With several, the indicators move once all of those that hold gates
    have stepped since the last time, by the sum of what these steps gave; until then the gates stay. With a new
    structure they wait for all of them again.

    Slots that are copies of gated weights are folded along with them: between steps, too, an optimizer may mix both.

    `layouts` are of the user's optimizers. `on_step` is called with m dL/dm (float64 [n]) when the indicators shall
    move, and `gate` returns the present gates (float64 [n]), or None. `fold` are all gated parameters of the present
    structure; `moved` tells whether the indicators were moved since `begin`.
    """

    def __init__(
        self, layouts: Sequence[Layout], on_step: Callable[[Tensor], None], gate: Callable[[], Tensor | None]
    ) -> None:
        self.fold: Fold | None = None
        self._on_step = on_step
        self._hooks = [_Hooks(layout, self._stepped, gate) for layout in layouts]
        self._waiting: list[_Hooks] = []  # for a step of theirs
        self._sum: Tensor | None = None
        self.moved = False

    def install(
        self, exchange: Exchange, fold: Fold, factors: list[Tensor], copies: Mapping[tuple[str, str], Tensor]
    ) -> None:
        """Have `exchange` install the gates of a new structure, whose parameters will be folded with `factors`.

        So will the slots that are copies of gated weights, whose raw contents are in `copies` by parameter and key.
        An unfinished optimizer step is discarded.
        """
        owner: dict[int, _Hooks] = {}
        for hooks in self._hooks:
            owner |= {id(p): hooks for group in hooks.optimizer.param_groups for p in group["params"]}
        owners = [owner.get(id(parameter), self._hooks[0]) for parameter in fold.parameters]
        waiting = []
        for hooks in self._hooks:
            own = [hooks is other for other in owners]
            part = fold.part({name for name, mine in zip(fold.names, own, strict=True) if mine})
            own_factors = [factor for factor, mine in zip(factors, own if fold.gated else (), strict=True) if mine]
            hooks.install(exchange, part, own_factors, copies)
            if part.names:
                waiting.append(hooks)
        exchange.fields(self, fold=fold, _waiting=waiting, _sum=None)

    @property
    def taken(self) -> list[int]:
        """How many steps every optimizer took since `begin`."""
        return [hooks.taken for hooks in self._hooks]

    def begin(self, exchange: Exchange, taken: Sequence[int] | None = None, moved: bool = False) -> None:
        """Have `exchange` count steps from 0, or go on from what a state says."""
        exchange.fields(self, moved=moved)
        for hooks, count in zip(self._hooks, taken or [0] * len(self._hooks), strict=True):
            exchange.fields(hooks, taken=count)

    @property
    def listens(self) -> bool:
        """Whether `on_step` is called."""
        return self.fold is not None and bool(self.fold.names)

    def folded_with(self, gate: Tensor | None) -> bool:
        """Whether the weights are folded with exactly these gates, float64 [n]."""
        return all(hooks.folded_with(gate) for hooks in self._hooks)

    def attach(self, exchange: Exchange) -> None:
        """Have `exchange` put the hooks on, if they are not there."""
        for hooks in self._hooks:
            hooks.attach(exchange)

    def state_dict(self) -> dict[str, Any]:
        """Optimizers that must still step before the indicators move, the sum of the others' steps, and counts."""
        total = None if self._sum is None else self._sum.clone()
        waiting = [hooks in self._waiting for hooks in self._hooks]
        return {"waiting": waiting, "sum": total, "taken": self.taken, "moved": self.moved}

    def load_state(self, exchange: Exchange, waiting: Sequence[bool], total: Tensor | None) -> None:
        """Have `exchange` load a checked `state_dict`; call after `install`."""
        still = [hooks for hooks, waits in zip(self._hooks, waiting, strict=True) if waits]
        exchange.fields(self, _waiting=still, _sum=total)

    def remove(self, exchange: Exchange) -> None:
        """Have `exchange` take the hooks off; the model keeps its folded weights."""
        for hooks in self._hooks:
            hooks.remove(exchange)

    def raw(self) -> dict[str, Tensor]:
        """Raw contents of the gated parameters, edits by others included.

        Raises:
            TrainingError: the last optimizer step did not finish.
        """
        self.recover()
        if self.fold is None:
            return {}
        for hooks in self._hooks:
            hooks.adopt_edits()
        return self.fold.contents

    def raw_copies(self) -> dict[tuple[str, str], Tensor]:
        """Raw contents of the slots that are copies of gated weights, by parameter and key, edits included."""
        return {place: raw for hooks in self._hooks for place, raw in hooks.raw_copies().items()}

    def recover(self) -> None:
        """If a step was interrupted half-way, fold the weights again and raise a `TrainingError`."""
        for hooks in self._hooks:
            hooks.recover()

    def _stepped(self, hooks: _Hooks, gradient: Tensor) -> None:
        self._sum = gradient if self._sum is None else self._sum + gradient
        self._waiting = [other for other in self._waiting if other is not hooks]
        if not self._waiting:
            self.moved = True
            with on_host():  # a policy of the user may make tensors
                self._on_step(self._sum)
            for other in self._hooks:
                if other is not hooks:
                    other.refold()
            self._waiting, self._sum = [other for other in self._hooks if other.fold is not None], None


def attached(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a growing network already has its hooks on an optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    found = [getattr(hook, "__self__", None) for hook in hooks]
    return any(isinstance(one, _Hooks) and one._handles for one in found)


class _Hooks:
    """Those on one optimizer; methods are as those of `Folding`, of its parameters only."""

    def __init__(
        self, layout: Layout, on_step: Callable[[_Hooks, Tensor], None], gate: Callable[[], Tensor | None]
    ) -> None:
        self.optimizer, self._layout, self._on_step, self._gate = layout.optimizer, layout, on_step, gate
        self.fold: Fold | None = None
        self.taken = 0
        self._factors: list[Tensor] = []
        self._raw_copies: dict[tuple[str, str], Tensor] = {}
        self._unfolded = False
        self._gradient: Tensor | None = None  # m dL/dm of the present step; None if the step changes nothing
        self._lent: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, its own gradient, the optimizer's
        self._handles: list[RemovableHandle] = []  # empty: the hooks do nothing

    def attach(self, exchange: Exchange) -> None:
        if self._handles:
            return
        before = self.optimizer.register_step_pre_hook(self._before)
        after = self.optimizer.register_step_post_hook(self._after)
        for handle, hook in ((before, self._before), (after, self._after)):
            handle.remove()  # its place among the hooks is known now
            exchange.put(_hooks_of(handle), handle.id, hook)
        exchange.fields(self, _handles=[before, after])

    def install(
        self, exchange: Exchange, fold: Fold, factors: list[Tensor], copies: Mapping[tuple[str, str], Tensor]
    ) -> None:
        own = {place: raw for place, raw in copies.items() if place[0] in fold.names}
        exchange.fields(self, fold=fold if fold.names else None, _factors=factors, _raw_copies=own)
        exchange.fields(self, _unfolded=False, _gradient=None, _lent=[])

    def folded_with(self, gate: Tensor | None) -> bool:
        factors = self.fold.factors(gate) if self.fold is not None else []
        return all(map(torch.equal, factors, self._factors))

    def remove(self, exchange: Exchange) -> None:
        for handle in self._handles:
            exchange.drop(_hooks_of(handle), handle.id)
        exchange.fields(self, _handles=[])

    @torch.no_grad()
    def adopt_edits(self) -> None:
        """Take over edits of gated parameters and of copies of them, made by other code."""
        if self.fold is not None:
            self.fold.adopt_edits(self._factors)
            self._raw_copies = self.raw_copies()

    def _copies(self) -> list[tuple[tuple[str, str], Tensor, Tensor]]:
        """Slots that are copies of gated weights: parameter and key, the slot, its present factor."""
        if self.fold is None or not self.fold.gated:
            return []
        found = self._layout.copies(self.fold.parameters)
        return [((self.fold.names[i], key), slot, self._factors[i]) for (i, key), slot in found.items()]

    @torch.no_grad()
    def raw_copies(self) -> dict[tuple[str, str], Tensor]:
        found = {}
        for place, slot, factor in self._copies():
            raw = self._raw_copies.get(place)
            found[place] = slot / factor if raw is None or raw.shape != slot.shape else unfolded(slot, raw, factor)
        return found

    def refold(self) -> None:
        """Fold again after gates have moved without a step of this optimizer."""
        if self.fold is None or not self.fold.gated:
            return
        if not self._unfolded:  # a failed step is folded in `recover`
            self.adopt_edits()
            self._refold()

    def recover(self) -> None:
        if self._unfolded:
            self._refold()
            raise TrainingError(
                "the last optimizer.step() did not finish; the weights were put back in order. "
                "Call optimizer.zero_grad(), compute the gradients again, and go on"
            )

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Pre-step hook: unfold, now or, with a closure, as soon as it has computed the gradients."""
        if self.fold is None or not self._handles:  # no hooks wanted: cost nothing
            return None
        self.recover()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        if closure is None:
            self._unfold()
            return None

        def wrapped() -> Any:
            if self._unfolded:  # an optimizer that evaluates several times
                self._refold()
            loss = closure()
            self._unfold()
            return loss

        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    @torch.no_grad()
    def _unfold(self) -> None:
        fold = self.fold
        if fold is None:
            return
        for parameter, (name, raw) in zip(fold.parameters if fold.gated else (), fold.contents.items(), strict=True):
            if parameter.dtype != raw.dtype or parameter.device != raw.device:
                raise TrainingError(converted(name, parameter, raw.dtype, raw.device))
        gradients = [parameter.grad for parameter in fold.parameters]
        risen = {id(p) for group in self.optimizer.param_groups if group.get("maximize") for p in group["params"]}
        gradient = fold.gate_gradient(  # of what is minimised
            [-g if g is not None and id(p) in risen else g for p, g in zip(fold.parameters, gradients, strict=True)]
        )
        scale = getattr(self.optimizer, "grad_scale", None)  # fused optimizers unscale inside step
        overflow = getattr(self.optimizer, "found_inf", None)
        if scale is not None:
            gradient = gradient / float(scale)
        if overflow is None and not bool(torch.isfinite(gradient).all()):
            given = zip(fold.names, gradients, strict=True)
            bad = [name for name, g in given if g is not None and not bool(g.isfinite().all())]
            raise TrainingError(
                f"gradients of {', '.join(bad[:3]) or 'gated weights'} are NaN or infinite; nothing was changed. "
                "Skip this batch (optimizer.zero_grad()), lower the learning rate, or clip the gradients"
            )
        self._gradient = None if overflow is not None and bool(overflow) else gradient
        if not fold.gated:
            return
        self.adopt_edits()
        gated = zip(fold.parameters, gradients, self._factors, strict=True)
        present = [(p, g, f) for p, g, f in gated if g is not None]
        products = torch._foreach_mul([g for _, g, _ in present], [f for _, _, f in present]) if present else ()
        self._lent = [(p, g, product) for (p, g, _), product in zip(present, products, strict=True)]
        self._unfolded = True
        for parameter, _, product in self._lent:
            parameter.grad = product
        torch._foreach_copy_(fold.parameters, fold.raw)
        for place, slot, _ in self._copies():
            slot.copy_(self._raw_copies[place])

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Post-step hook: call the policy, then fold the weights with the new gates."""
        self.taken += 1
        if self.fold is None:
            return
        if self.fold.gated:
            self._move()
        else:
            gradient, self._gradient = self._gradient, None
            if gradient is not None:
                self._on_step(self, gradient)

    @torch.no_grad()
    def _move(self) -> None:
        """Move the gates after a step and fold again."""
        assert self.fold is not None
        if not self._unfolded:  # a closure that was never called
            return
        torch._foreach_copy_(self.fold.raw, self.fold.parameters)
        self._raw_copies = {place: slot.clone() for place, slot, _ in self._copies()}
        if self._gradient is not None:
            self._on_step(self, self._gradient)
        self._refold()

    @torch.no_grad()
    def _refold(self) -> None:
        assert self.fold is not None
        for parameter, gradient, product in self._lent:
            if parameter.grad is product:  # else other code has dropped it since
                parameter.grad = gradient
        self._factors = self.fold.factors(self._gate())
        torch._foreach_copy_(self.fold.parameters, self.fold.raw)
        torch._foreach_mul_(self.fold.parameters, self._factors)
        for place, slot, factor in self._copies():
            raw = self._raw_copies.setdefault(place, slot.clone())  # made by a step that failed
            torch.mul(raw, factor, out=slot)
        self._lent, self._gradient, self._unfolded = [], None, False


def _hooks_of(handle: RemovableHandle) -> dict[int, Any]:
    """Where the hook of a handle is, or was, by `handle.id`."""
    hooks: dict[int, Any] | None = handle.hooks_dict_ref()
    assert hooks is not None
    return hooks
