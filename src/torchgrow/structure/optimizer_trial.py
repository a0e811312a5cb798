"""A trial of an optimizer: which slots it keeps, and what each is, found by running steps on a copy.

A copy of the optimizer takes a few steps on small random parameters, three times: unchanged, with shifted weights, and
with all gradients negated. A slot that moves with the weights is a copy of them, one that
flips its sign with the gradients is a direction, any other is a magnitude. The original is never stepped.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import OptimizerError
from .optimizer_checks import attributes_of, check_attributes, check_what_is_new, form_of, refusal

STEPS = 12
"""Of a trial: beyond those after which optimizers with slow weights first make them (5 or 6)."""

SIDE = 160
"""Longest axis of a stand-in, beyond the 32 or 128 from which on optimizers factor moments or pack them in 8 bits."""

SMALL = (5, 3, 2, 7, 4, 6, 8, 9)
"""Sizes of the axes of a small stand-in, all different, so that no slot has the parameter's shape by chance."""

Kind = Literal["number", "copy", "direction", "magnitude", "unknown"]

Signature = tuple[int, int, torch.dtype]
"""Number of the group, axes of the parameter (at least 1) and its dtype: those alike have the same kinds of slots."""


@dataclass(frozen=True)
class Slot:
    """One entry of an optimizer's state of a parameter."""

    # "number" is one for the whole parameter (a step count); the others have an element for each of its own. A
    # "copy" follows the weights, a "direction" changes its sign with the gradients, a "magnitude" does not; of
    # an "unknown" the trial showed nothing
    kind: Kind
    sample: Any  # what the trial left: the number itself, or an empty tensor of the slot's dtype
    flat: bool = False  # whether the elements are kept as a vector
    late: bool = False  # whether it was not there after the first step


@dataclass(frozen=True)
class Trial:
    """What a trial showed."""

    slots: dict[Signature, dict[str, Slot]]  # by signature and name
    settings: dict[int, dict[str, Any]]  # of every group as the steps left them, by its number


def take_trial(optimizer: torch.optim.Optimizer) -> Trial:
    """Try an optimizer out on stand-ins for its parameters; it stays as it is.

    Raises:
        OptimizerError: the steps failed, or what they left cannot be re-cut; the message names it.
    """
    stands = _stand_ins(optimizer)
    few = [stand for stand in stands if not stand.full]
    check_attributes(optimizer)
    with _left_alone(optimizer):
        try:
            mapped, small = _first_run(optimizer, few)
            _check_layout(optimizer, small)
            runs = [
                _Run(optimizer, stands, mapped, shift=shift, turn=turn)
                for shift, turn in ((False, False), (True, False), (False, True))
            ]
        except OptimizerError:
            raise
        except Exception as error:
            reason = f"a trial step failed ({type(error).__name__}{f': {error}' if str(error) else ''})"
            with suppress(Exception):
                _Run(optimizer, few, mapped=False, closure=True)
                reason = "it needs a closure for every step, and may compute the gradients several times in one"
            raise refusal(optimizer, reason) from error
    forms = _check_layout(optimizer, runs[0])
    check_what_is_new(optimizer, runs[0].probe)
    slots: dict[Signature, dict[str, Slot]] = {}
    settings: dict[int, dict[str, Any]] = {}
    for i, stand in enumerate(stands):
        for group in stand.groups:
            settings[group] = runs[0].settings[stand.groups]
        if stand.full:
            first, moved, turned = (run.slots[i] for run in runs)
            shift = runs[1].weights[i] - runs[0].weights[i]
            found = {}
            for key, value in first.items():
                form = forms[stand.groups, stand.dims, stand.dtype][key]
                kind: Kind = "number"
                if form != "number":
                    kind = _kind(value, moved.get(key), turned.get(key), shift.reshape(value.shape))
                sample = value if form == "number" else value.new_empty(0)
                found[key] = Slot(kind, sample, form == "flat", late=key not in runs[0].early[i])
            slots |= {(group, stand.dims, stand.dtype): found for group in stand.groups}
    return Trial(slots, settings)


@dataclass(frozen=True)
class _StandIn:
    """A parameter of the trial."""

    groups: tuple[int, ...]  # numbers of the groups that it stands for, all of like settings
    real: Tensor  # the largest parameter of its kind there
    shape: tuple[int, ...]  # its own
    full: bool  # whether that is the real one's shape, up to `SIDE`; else it is a small one

    @property
    def dims(self) -> int:
        return max(1, self.real.dim())

    @property
    def dtype(self) -> torch.dtype:
        return self.real.dtype


def _stand_ins(optimizer: torch.optim.Optimizer) -> list[_StandIn]:
    """Three for every kind of parameter: small, one unit wide as at the start of a run, and up to the real size."""
    alike: dict[Any, list[int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        alike.setdefault(_form_of_settings(group), []).append(number)
    stands = []
    for numbers in alike.values():
        largest: dict[tuple[int, torch.dtype], Tensor] = {}
        for p in (p for number in numbers for p in optimizer.param_groups[number]["params"]):
            kind = (max(1, p.dim()), p.dtype)
            if p.requires_grad and p.numel() and (kind not in largest or p.numel() > largest[kind].numel()):
                largest[kind] = p
        for (dims, _), real in largest.items():
            full = [min(SIDE, size) for size in real.shape] or [1]
            full[-1] = max(3, full[-1]) if math.prod(full) == 1 else full[-1]
            small = [SMALL[axis % len(SMALL)] for axis in range(dims)]
            narrow = [1] * (dims - 1) + [3 if dims > 1 else 1]
            shapes = ((small, False), (narrow, False), (full, True))
            stands += [_StandIn(tuple(numbers), real, tuple(shape), whole) for shape, whole in shapes]
    return stands


def _form_of_settings(group: dict[str, Any]) -> Any:
    """What of a group's settings may decide which slots there are: flags, texts, and which numbers are 0."""

    def form(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(form, value))
        if isinstance(value, Tensor):
            return value.numel() == 1 and bool(value != 0)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value != 0
        return value if value is None or isinstance(value, (bool, str)) else str(type(value))

    left_out = ("params", "param_names", "lr", "initial_lr")
    return tuple(sorted((key, repr(form(value))) for key, value in group.items() if key not in left_out))


class _Run:
    """Steps of a copy of an optimizer on stand-ins, `stands`, which it holds and nothing else.

    It begins with state as the original's, made over for them, if `mapped`, else with none; with other weights by
    `shift`. `turn`: all gradients have the other sign. `closure`: every step is given one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stands: Sequence[_StandIn],
        mapped: bool,
        *,
        shift: bool = False,
        turn: bool = False,
        closure: bool = False,
    ) -> None:
        self.stands = stands
        drawn = torch.Generator().manual_seed(0)
        self.parameters = []
        for stand in stands:
            weight, moved = _random(stand, drawn), _random(stand, drawn)
            self.parameters.append(nn.Parameter(weight + moved if shift else weight))
        self.weights = [parameter.detach().clone() for parameter in self.parameters]  # before the steps
        self.probe = self._copy(optimizer, mapped)
        kind = type(optimizer)
        step = kind.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]  # hooks of all optimizers would take the copy for one
        train = getattr(self.probe, "train", None)
        with _quiet([stand.real.device for stand in stands]):
            if callable(train):
                train()
            for number in range(STEPS):
                for stand, parameter in zip(stands, self.parameters, strict=True):
                    gradient = _random(stand, drawn)
                    parameter.grad = -gradient if turn else gradient
                step(self.probe, *([lambda: 0.0] if closure else []))
                if not number:  # keys of the slots that are there after the first
                    self.early = [set(self.probe.state.get(parameter, {})) for parameter in self.parameters]
        self.slots = [dict(self.probe.state.get(parameter, {})) for parameter in self.parameters]
        keys = dict.fromkeys(stand.groups for stand in stands)
        groups = self.probe.param_groups
        self.settings = {
            key: {name: value for name, value in group.items() if name != "params"}
            for key, group in zip(keys, groups, strict=True)
        }

    def _copy(self, optimizer: torch.optim.Optimizer, mapped: bool) -> torch.optim.Optimizer:
        """A copy of the optimizer in which every reference to the original or its parameters is replaced."""
        kind = type(optimizer)
        probe: torch.optim.Optimizer = object.__new__(kind)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        memo: dict[int, Any] = {id(optimizer): probe}
        memo |= {id(p): nn.Parameter(torch.zeros([1] * p.dim(), dtype=p.dtype)) for p in held}
        memo |= {id(stand.real): own for stand, own in zip(self.stands, self.parameters, strict=True)}
        groups = []
        for numbers in dict.fromkeys(stand.groups for stand in self.stands):
            group = optimizer.param_groups[numbers[0]]
            own = [p for stand, p in zip(self.stands, self.parameters, strict=True) if stand.groups == numbers]
            groups.append({key: own if key == "params" else _copied(value, memo) for key, value in group.items()})
            if "param_names" in group:
                groups[-1]["param_names"] = [f"stand-in {i}" for i in range(len(own))]
            if isinstance(group.get("weight_decay"), (int, float)):
                groups[-1]["weight_decay"] = 0.0  # it lets every slot follow the weights a little
            if isinstance(group.get("lr"), (int, float)) and group["lr"] == 0:
                groups[-1]["lr"] = 1e-3  # a warm-up from 0
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for key, value in optimizer.state.items():
            if not isinstance(key, Tensor):
                state[key] = _copied(value, memo)
        for stand, own_parameter in zip(self.stands, self.parameters, strict=True) if mapped else ():
            slots = optimizer.state.get(stand.real, {})
            state[own_parameter] = {k: _made_over(v, stand.real, own_parameter) for k, v in slots.items()}
        memo |= {id(optimizer.param_groups): groups, id(optimizer.state): state}
        for name, value in attributes_of(optimizer).items():
            vars(probe)[name] = _copied(value, memo)
        probe.__setstate__({"state": state, "param_groups": groups, "defaults": _copied(optimizer.defaults, memo)})
        return probe


def _first_run(optimizer: torch.optim.Optimizer, stands: Sequence[_StandIn]) -> tuple[bool, _Run]:
    """A run from empty state, else from the present one: some optimizers create state at construction."""
    try:
        return False, _Run(optimizer, stands, mapped=False)
    except Exception:
        if not optimizer.state:
            raise
    return True, _Run(optimizer, stands, mapped=True)


def _random(stand: _StandIn, drawn: torch.Generator) -> Tensor:
    values = torch.randn(stand.shape, generator=drawn, dtype=torch.complex64 if stand.dtype.is_complex else None)
    return values.to("cpu" if stand.real.is_meta else stand.real.device, stand.dtype)


def _made_over(slot: Any, real: Tensor, stand_in: Tensor) -> Any:
    """Convert a slot of a real parameter for a stand-in: a constant, the weights, or zeros."""
    if not isinstance(slot, Tensor) or slot.shape != real.shape or slot.numel() < 2:
        return copy.deepcopy(slot)
    own = stand_in.detach().to(slot.dtype)
    if bool((slot == slot.flatten()[0]).all()):
        return torch.full_like(own, slot.flatten()[0].item())
    near = torch.linalg.vector_norm(slot - real.detach()) <= 0.5 * torch.linalg.vector_norm(real.detach())
    return own.clone() if bool(near) else torch.zeros_like(own)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy with everything in it; what cannot be copied (a process group, say) is shared."""
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


@contextmanager
def _quiet(devices: Iterable[torch.device]) -> Iterator[None]:
    """Without warnings, and with a fixed random seed; random states are restored."""
    cuda = sorted({device.index for device in devices if device.type == "cuda"})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=cuda):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(0)
        yield


@contextmanager
def _left_alone(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore the original's parameters, state and settings if the block changed them, and raise."""
    if type(optimizer).__module__.startswith("torch.optim."):
        yield
        return
    held = [p for group in optimizer.param_groups for p in group["params"] if not p.is_meta]
    weights = [p.detach().clone() for p in held]
    slots = {key: _snapshot(kept) for key, kept in optimizer.state.items()}
    settings = [_snapshot(group) for group in optimizer.param_groups]
    try:
        yield
    finally:
        moved = [p for p, before in zip(held, weights, strict=True) if not _same(p.detach(), before)]
        same = optimizer.state.keys() == slots.keys() and all(
            _same_entries(optimizer.state[key], kept) for key, kept in slots.items()
        )
        same = same and all(map(_same_entries, optimizer.param_groups, settings))
        if moved or not same:
            for p, before in zip(held, weights, strict=True):
                p.data.copy_(before)
            optimizer.state.clear()
            optimizer.state.update(slots)
            for group, before_it in zip(optimizer.param_groups, settings, strict=True):
                group.clear()
                group.update(before_it)
            what = f"moved {len(moved)} of the model's weights" if moved else "changed its own state or settings"
            raise refusal(optimizer, f"a step of a copy of it {what} (which were put back)")


def _snapshot(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in entries.items()}


def _same_entries(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(
        _same(value, before[key]) if isinstance(value, Tensor) else value is before[key] or value == before[key]
        for key, value in now.items()
        if key != "params"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _kind(base: Tensor, moved: Any, turned: Any, shift: Tensor) -> Kind:
    """The kind of a slot, from its values after the three runs and the shift of the weights in the second.

    A slot may follow the weights only in part (a mean that began at 0), but then it does so along `shift`.
    """
    if not all(isinstance(other, Tensor) and other.shape == base.shape for other in (moved, turned)):
        return "unknown"
    given = (tensor.detach() for tensor in (base, moved, turned, shift))
    one, two, three, along = ((torch.view_as_real(x) if x.is_complex() else x).double().flatten() for x in given)
    change = two - one
    slope = change.dot(along) / along.dot(along)
    if float(slope) > 0.02 and float((change - slope * along).norm()) <= 0.1 * float((slope * along).norm()):
        return "copy"
    size = float(one.norm())
    if size > 0 and float((one + three).norm()) <= 0.1 * size:
        return "direction"
    if size > 0 and float((one - three).norm()) <= 0.1 * size:
        return "magnitude"
    return "unknown"


def _check_layout(optimizer: torch.optim.Optimizer, run: _Run) -> dict[Any, dict[str, str]]:
    """The form of every slot, by kind of parameter; refused if it is not the same for stand-ins of all sizes."""
    forms: dict[Any, dict[str, str]] = {}
    for stand, parameter, slots in zip(run.stands, run.parameters, run.slots, strict=True):
        own = {key: form_of(optimizer, key, value, parameter) for key, value in slots.items()}
        other = forms.setdefault((stand.groups, stand.dims, stand.dtype), own)
        single = parameter.numel() == 1
        differing = [k for k in own.keys() | other.keys() if k not in own or k not in other]
        differing += [k for k in own.keys() & other.keys() if not single and own[k] != other[k]]
        if differing:
            raise refusal(
                optimizer,
                f"what it keeps depends on a parameter's size (for one of shape {stand.shape} "
                f"{sorted(map(str, differing))[0]!r} is not as for a smaller one), which changes as the model grows",
            )
    return forms
