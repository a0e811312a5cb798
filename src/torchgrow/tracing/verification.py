"""The proof: a compact network computes what the frame computes with the absent structures zeroed.

Run on the user's own model and inputs, with all weights, biases and statistics randomised on a copy (with default
initial values most comparisons are vacuous), in evaluation mode and float64. What fails is bisected down to its
groups and frozen with the reason; nothing unproven is ever removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError
from ..structure.cost import CostModel
from ..structure.record import skip_
from ..structure.space import WHOLE, Frozen, Place, Space, live_positions
from ..structure.store import Births, is_meta
from ..structure.surgery import Bank, recut
from .blocks import Named, find, gated, with_layers
from .model_call import Carries, call, examples_of, fresh
from .nested import mapped, put_out, tensors
from .passes import BARE, HIGH, Chance, Pass, Steady, fingerprint, passes, running, storages, too_small, twin, unchanged
from .requests import Couples
from .size_attributes import Guess, choices, guesses
from .tracer import replay

TOLERANCE = 1e-9
"""Largest relative error in float64 that still counts as equal."""


BLOWN_UP, RETRIES = 1e-3, 3
"""Errors up to this may be rounding (seen: 2e-7 in EfficientNet-B4, 1e-13 on its other subsets); how often to ask."""

NOISE = 1_000_003
"""Length of the block of noise that large parameters repeat; prime, so that their rows differ."""

ZERO = 1e-100
"""What stands for zero where a parameter is zeroed: as good as nothing to a sum, but it can be normalised.

A weight-normalised row of true zeros is 0 / 0, which is no answer to compare with.
"""

FRACTIONS = (0.3, "ends", 0.7, 0.5)
"""What the proof tries to remove from every group: random shares, and the first and the last unit ("ends").

Operations that depend on the order of channels (a roll by a fixed number, a cut at a fixed place) can agree by
chance on a random subset; the ends of an axis give them away.
"""


@dataclass(frozen=True)
class Report:
    """Result of `verify`.

    Attributes:
        ok: every trial's relative error was at most 1e-9 (float64).
        max_error: largest relative error seen.
        trials: number of random subsets tried.
        removable_params: share of the frame's parameters that can go (down to one unit per group).
        units: number of removable units.
        groups: removable units per group, by name.
        frozen: what can never be removed, and why.
    """

    ok: bool
    max_error: float
    trials: int
    removable_params: float
    units: int
    groups: dict[str, int]
    frozen: tuple[Frozen, ...]

    def __str__(self) -> str:
        if not self.units:
            return "nothing can go: " + "; ".join(str(frozen) for frozen in self.frozen[:5])
        verdict = "exact" if self.ok else "NOT EXACT"
        return (
            f"{verdict}: max relative error {self.max_error:.1e} over {self.trials} random subsets; {self.units} units "
            f"in {len(self.groups)} groups, {self.removable_params:.1%} of the parameters can go, "
            f"{len(self.frozen)} places frozen"
        )


class Prover:
    """A randomised float64 copy of a frame, against which subsets are tried."""

    def __init__(self, model: nn.Module, space: Space, example_inputs: Any, seed: int) -> None:
        self.space = space
        self.counting: frozenset[str] = frozenset()  # names of attributes that had to follow
        self.generator = torch.Generator().manual_seed(seed)
        self.frame = twin(model)
        examples = examples_of(example_inputs)
        if is_meta(model):
            births = Births(model, seed)
            self.frame.to_empty(device=_device(examples))
            for name, tensor in [*self.frame.named_parameters(), *self.frame.named_buffers()]:
                tensor.detach().copy_(births.full(name))
        self.frame._apply(_doubled)
        for module in self.frame.modules():
            _double_inside({name: value for name, value in vars(module).items() if name not in BARE}, vars(module))
        self.examples = [mapped(example, lambda x: _doubled(x.detach().clone())) for example in examples]
        self._randomize()
        for state in space.carried:  # anything, not the zeros that most examples begin with
            for example in self.examples:
                given = tensors(example)[state.input]
                given.copy_(torch.randn(given.shape, generator=self.generator, dtype=torch.float64))
        self.small: set[int] = set()  # examples too small for statistics over a batch
        self.restless = False  # whether a forward writes into the parameters every time
        try:
            self.passes = self._settled(storages(model))
            plain = self._outputs()
            self.bank = Bank(self.frame, space)
            gap = _gap(self._outputs(), plain) if self.bank.adapted else 0.0
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"the proof runs in float64, and there the model's forward failed: {type(error).__name__}: {error}; "
                "take dtypes from the tensors at hand (x.to(weight.dtype)) instead of naming them, and leave out fused "
                "kernels that know no float64 (in transformers: attn_implementation and experts_implementation 'eager')"
            ) from error
        if gap > TOLERANCE:
            kinds = sorted({type(module).__name__ for module in map(self.frame.get_submodule, self.bank.adapted)})
            raise TraceError(
                f"the adapters in place of {', '.join(kinds)} change the model's outputs by {gap:.1e}; an adapter must "
                "compute what the module it replaces computes (correct the subclass given to torchgrow.adapter)"
            )

    def _settled(self, original: dict[int, str]) -> list[Pass]:
        """The passes that run, after one of each: what a forward does at its first call only has been done then.

        Raises:
            TraceError: the forward reads tensors of the model itself.
        """
        waiting, found, wrote = passes(len(self.examples)), [], False
        while waiting:
            one = waiting.pop(0)
            try:
                with self._running(one, original) as chance:
                    before = fingerprint(self.frame)
                    call(self.frame, fresh(self.examples[one.example]))
                    wrote |= fingerprint(self.frame) != before
            except TraceError:
                raise
            except Exception as error:
                if one == Pass():
                    raise
                if too_small(error) and one.example not in self.small:
                    self.small.add(one.example)
                    waiting.insert(0, one)
                continue
            found.append(one)
            if chance.decides and one.draw == HIGH:
                waiting += one.drawn_anew()
        if wrote:
            self._randomize()
            for one in found:
                with self._running(one, {}):
                    before = fingerprint(self.frame)
                    call(self.frame, fresh(self.examples[one.example]))
                    self.restless |= fingerprint(self.frame) != before
            self._randomize()
        return found

    @contextmanager
    def _running(self, one: Pass, original: dict[int, str]) -> Iterator[Chance]:
        """Everything held still that must not differ between two runs."""
        small = one.training and one.example in self.small
        with running(self.frame, one, still_norms=small) as chance, _no_fast_path(), Steady(), chance:
            chance.original = original
            yield chance

    def _randomize(self) -> None:
        """Scales and offsets around 1, statistics away from 0 and 1, and weights neither large nor small.

        With twice their variance, as for training, EfficientNet-B6 blows rounding up from 1e-15 to 2e-7.
        """
        given = [p.detach() for p in self.frame.parameters() if p.is_floating_point() or p.is_complex()]
        parameters = [torch.view_as_real(p) if p.is_complex() else p for p in given]
        length = min(NOISE, sum(p.numel() for p in parameters))
        block = torch.randn(length, generator=self.generator, dtype=torch.float64)  # repeated: large layers are many
        start = 0  # go on where the last one ended: no two parameters alike
        with torch.no_grad():
            for parameter in parameters:
                noise, size = block[start : start + parameter.numel()], parameter.numel()
                if noise.numel() < size:
                    noise = torch.cat([noise, block.repeat(-(-size // length))])[:size]
                start = (start + size) % max(1, length)
                noise = noise.reshape(parameter.shape)
                fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
                parameter.copy_(noise * fan_in**-0.5 if parameter.dim() > 1 else 1 + noise / 4)
            for module in self.frame.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                    draw = torch.rand(2, module.num_features, generator=self.generator, dtype=torch.float64)
                    module.running_mean.copy_(draw[0] - 0.5)
                    assert module.running_var is not None
                    module.running_var.copy_(draw[1] + 0.5)

    def draw(self, fraction: float | str, groups: list[int] | None = None) -> Tensor:
        """A keep vector that drops about `fraction` of the removable units of each group (all groups if None).

        "ends" drops the first and the last one (the first only where that would leave none).
        """
        space = self.space
        keep = space.everything()
        groups = list(range(space.n_groups)) if groups is None else groups
        layers = torch.tensor([s.unit for s in space.slots if int(space.group_of[s.unit]) in groups], dtype=torch.int64)
        for group in groups:
            units = torch.nonzero((space.group_of == group) & space.removable).flatten()
            size = int((space.group_of == group).sum())
            if isinstance(fraction, str):
                order = torch.tensor([0, -1])
            else:
                order = torch.randperm(units.numel(), generator=self.generator)
                order = order[: max(1, round(fraction * units.numel()))]
            chosen = order[: min(units.numel(), size - 1)]
            keep[units[chosen]] = False
        layers = layers[space.removable[layers]]
        if layers.numel():
            order = torch.tensor([0, -1])
            if not isinstance(fraction, str):
                order = torch.randperm(layers.numel(), generator=self.generator)
                order = order[: max(1, round(fraction * layers.numel()))]
            keep[layers[order]] = False
        return keep

    def error(self, keep: Tensor) -> tuple[float, str]:
        """Relative error between compact network and zeroed frame, and what went wrong if the first fails.

        An error that may be rounding, blown up by a deep network, is looked at again on other random weights: a
        mistake in the structure shows on all of them.
        """
        worst, reason = self._error(keep)
        for _ in range(RETRIES):
            if not TOLERANCE < worst <= BLOWN_UP:
                break
            self._randomize()
            del self.bank  # before there is another
            self.bank = Bank(self.frame, self.space)
            worst, reason = self._error(keep)
        return worst, reason

    def _error(self, keep: Tensor) -> tuple[float, str]:
        with torch.no_grad():
            for name in self.space.parameters:
                for axis in self.space.cut_axes.get(name, ()):
                    dead = torch.nonzero(~live_positions(self.space.unit_of[name, axis], keep)).flatten()
                    self.bank.tensors[name].index_fill_(axis, dead.to(self.bank.tensors[name].device), ZERO)
            plain = {}  # layers whose gate of 0 is not removal: the frame without them is the reference (Eq 2)
            for slot in self.space.slots:
                if not keep[slot.unit] and not slot.residual:
                    plain.update(dict.fromkeys(slot.modules, slot.skip))
                elif not keep[slot.unit]:
                    for name, axis in self.space.fold:
                        if axis == WHOLE and self.space.slot_of[name] == slot.unit:
                            self.bank.tensors[name].fill_(ZERO)
            skip_(self.frame, plain, plain)
            expected = self._outputs(shown=keep)
            skip_(self.frame, plain, {})
        try:
            self.bank.recut_(keep)
            found = self._outputs(keep)
        except Exception as error:
            return float("inf"), f"the compact network fails: {type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            self.bank.recut_(self.space.everything())
        worst = _gap(found, expected)
        return worst, f"the compact network's outputs differ by {worst:.1e}"

    def adopt(self, found: list[Guess], keep: Tensor, *, thorough: bool = False) -> bool:
        """Let the first choice of attributes follow the surgery that makes `keep` exact; False if none does."""
        before = self.space
        for choice in choices(found, self.counting, thorough=thorough):
            chosen = {(guess.attribute.module, guess.attribute.name): guess.attribute for guess in choice}
            others = tuple(a for a in before.attributes if (a.module, a.name) not in chosen)
            self.space = self.bank.space = replace(before, attributes=(*others, *chosen.values()))
            if self.error(keep)[0] <= TOLERANCE:
                self.counting |= {guess.attribute.name for guess in choice}
                return True
        self.space = self.bank.space = before
        return False

    def _outputs(self, keep: Tensor | None = None, *, shown: Tensor | None = None) -> list[Tensor]:
        """All tensors and numbers the network puts out, in all passes, which begin in the same state every time.

        Args:
            keep: the units of the network: given states are cut as it is.
            shown: units of which the carried outputs show no others; what a removed one carries on is nobody's
                business.
        """
        found: list[Tensor] = []
        with unchanged(self.frame):
            for one in self.passes:
                example = self.examples[one.example]
                if keep is not None and self.space.carried:
                    example = self._cut_states(example, keep)
                values = [p.detach().clone() for p in self.frame.parameters()] if self.restless else []
                with self._running(one, {}):
                    outputs = call(self.frame, fresh(example))
                    own = [leaf.value.clone() for leaf in put_out(outputs)]  # of a buffer, before it is as it was
                if shown is not None:
                    for state in self.space.carried:
                        own[state.output] = recut(own[state.output], state.units, self.space.everything(), shown)
                found += own
                for parameter, value in zip(self.frame.parameters(), values, strict=False):
                    parameter.data = value
        found = [part for x in found for part in (x.unbind() if x.is_nested else [x])]
        found = [x.to_dense() if x.layout != torch.strided else x for x in found]
        return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in found]

    def _cut_states(self, example: Any, keep: Tensor) -> Any:
        """An example with its carried states as the network with the units in `keep` takes them."""
        units, whole = {state.input: state.units for state in self.space.carried}, self.space.everything()
        cut = iter([recut(x, units.get(i, {}), whole, keep) for i, x in enumerate(tensors(example))])
        return mapped(example, lambda x: next(cut))


def _gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error of outputs; infinite where their number or shapes differ, or there is a NaN."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.numel():
            gap = float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-12)
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without the fused encoder layers, which put zeros where they skip padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _device(examples: list[Any]) -> torch.device:
    return tensors(examples[0])[0].device


def _doubled(x: Tensor) -> Tensor:
    """In double precision, real or complex; integers as they are."""
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x


def _double_inside(held: Mapping[str, Any] | list[Any], container: Any) -> None:
    """Give a container doubled tensors in place of those it holds, in dicts and lists inside too; parameters stay."""
    for key, value in list(held.items() if isinstance(held, Mapping) else enumerate(held)):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            container[key] = _doubled(value.detach())
        elif type(value) is tuple and any(isinstance(x, Tensor) for x in value):
            entries = list(value)
            _double_inside(entries, entries)
            container[key] = tuple(entries)
        elif type(value) in (dict, list):
            _double_inside(value, value)


def prove(model: nn.Module, space: Space, example_inputs: Any, seed: int = 0) -> Space:
    """Try the space on a randomised copy; freeze, with the reason, every group that does not come out exact.

    Where a size kept in an attribute may be the reason, the attribute is made to follow, if that proves exact.
    """
    space = _without_lone_units(space)
    free = _free_groups(space)
    if not free:
        return replace(space, proven=True)
    prover = Prover(model, space, example_inputs, seed)
    if space.slots:
        space = prover.space = prover.bank.space = gated(space, prover.frame, prover._outputs, TOLERANCE)
        free = _free_groups(space)
    found: list[Guess] | None = None
    while free:
        failed: dict[int, str] = {}
        for fraction in FRACTIONS:
            draw = prover.draw(fraction, free)
            if prover.error(draw)[0] <= TOLERANCE:
                continue
            if found is None:
                found = guesses(model, space)
                if prover.adopt(found, draw):
                    continue
            failed = _failing(prover, free, draw)
            for group in list(failed):
                mine = [guess for guess in found if group in guess.groups]
                if prover.adopt(mine, _only(prover.space, [group], draw), thorough=True):
                    del failed[group]
            break
        else:
            return replace(prover.space, proven=True)
        space = prover.space
        for group, reason in failed.items():
            units = torch.nonzero(space.group_of == group).flatten().tolist()
            name = space.group_names[group]
            places = tuple(
                place for place, v in space.unit_of.items() if bool(torch.isin(v, torch.tensor(units)).any())
            )
            space = space.freeze(units, Frozen("proof", name, "", reason, places))
        free = _free_groups(space)
        prover.space = prover.bank.space = space
    return replace(prover.space, proven=True)


def _only(space: Space, groups: list[int], draw: Tensor) -> Tensor:
    """A keep vector that drops what `draw` does, in these groups only."""
    return draw | ~torch.isin(space.group_of, torch.tensor(groups))


def _without_lone_units(space: Space) -> Space:
    """Units alone in their group always stay, since no group is ever left empty; nothing could prove them either."""
    sizes = torch.bincount(space.group_of, minlength=space.n_groups)
    lone = torch.nonzero((sizes[space.group_of] == 1) & (space.least[space.group_of] > 0) & space.removable).flatten()
    for unit in lone.tolist():
        name = space.group_names[int(space.group_of[unit])]
        places = tuple(place for place, vector in space.unit_of.items() if bool((vector == unit).any()))
        space = space.freeze([unit], Frozen("proof", name, "", "is the only unit of its group", places))
    return space


def _free_groups(space: Space) -> list[int]:
    """Groups with something to remove."""
    sizes = torch.bincount(space.group_of, minlength=space.n_groups)
    return torch.nonzero(sizes > space.least).flatten().tolist()


def _failing(prover: Prover, groups: list[int], draw: Tensor) -> dict[int, str]:
    """The groups that break exactness when cut as in `draw` (a keep vector), found by bisection."""
    error, reason = prover.error(_only(prover.space, groups, draw))
    if error <= TOLERANCE:
        return {}
    if len(groups) == 1:
        return {groups[0]: reason}
    half = len(groups) // 2
    found = {**_failing(prover, groups[:half], draw), **_failing(prover, groups[half:], draw)}
    return found or dict.fromkeys(groups, reason)  # exact apart, wrong together: none of them is proven


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    freeze: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
) -> Space:
    """Find the units of a model and prove them on the model itself.

    Copies of the model are run a few times in evaluation and in training mode, without dropout; the model itself, with
    its parameters, buffers, modes and random state, is as before. What no run reaches cannot be followed: what a
    trainable parameter that takes part in none of them could read is frozen.

    Args:
        model: a module on one device, not wrapped and not compiled. It is the frame: the largest network.
            On the meta device labels are followed and nothing is proven (`Space.proven` is False).
        example_inputs: a small batch: a tensor, a tuple of positional inputs, or a dict of keywords. A list holds
            several such examples, for forwards that take other ways on other inputs or other arguments in training:
            `[images, (images, targets)]`. Each is run in both modes, and must run in one of them; the first must in
            evaluation mode.
        freeze: parameters or modules that keep their shape, by qualified name or pattern ("head.*"); or single
            axes, such as ("head.weight", 1).
        couple: pairs of axes that are cut alike, position by position, such as (("a.weight", 0), ("b.weight", 0)).
        depth: whether layers may be left out as well (paper Eq 2). True finds them: blocks of one class that follow
            each other in a container and return a tensor like the one they are given, but for one in each stage.
            Or their qualified names; a tuple of names is one layer of several modules that run in that order.
        carried: outputs that become arguments of the next call and are cut as the model is, {argument: output},
            by position or name: {1: 1} for `out, state = model(x, state)`.

    Returns:
        The space, in which every removable unit came out exact (relative error at most 1e-9 in float64).

    Raises:
        TraceError: the model cannot be run or traced; the message says what works.
    """
    slots = find(model, example_inputs, depth)
    failed: dict[tuple[str, str], int] = {}
    best: tuple[int, Space] | None = None
    while True:
        found = replay(model, example_inputs, freeze=freeze, couple=couple, carried=carried, slots=slots, failed=failed)
        space = with_layers(found, slots)
        if is_meta(model):
            return space
        proven = prove(model, space, example_inputs)
        costs = CostModel(proven)
        least = int(costs.both(costs.smallest())[0])
        if best is None or least <= best[0]:  # if as much can go, the one that names the place
            best = least, proven
        broken = _broken_parts(space, proven)
        if not broken:
            return best[1]
        failed.update({place: failed.get(place, 0) + 1 for place in broken})  # at 2 the place is taken for fixed


def _broken_parts(space: Space, proven: Space) -> set[tuple[str, str]]:
    """Where the forward cuts an axis by attributes, as it seemed, and the proof kept a piece whole."""
    alone = torch.bincount(space.group_of, minlength=space.n_groups)[space.group_of] == 1
    kept = space.removable & ~proven.removable & ~alone
    return {
        (parts.module, parts.line)
        for parts in space.parts
        if any(bool(kept[piece[piece >= 0]].any()) for piece in parts.pieces)
    }


def verify(
    model: nn.Module,
    example_inputs: Any,
    fraction: float = 0.3,
    seed: int = 0,
    trials: int = 3,
    *,
    freeze: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
    space: Space | None = None,
) -> Report:
    """Prove exactness on your own model: remove random units and compare with the frame, those units zeroed.

    Args:
        model: the frame.
        example_inputs: as for `trace`.
        fraction: share of the units removed from every group, in (0, 1).
        seed: of weights and subsets.
        trials: number of random subsets.
        freeze: as for `trace`.
        couple: as for `trace`.
        depth: as for `trace`.
        carried: as for `trace`.
        space: what `trace` found for this model and these inputs, if it was called; the four before then have no say.

    Raises:
        TraceError: as for `trace`.
    """
    if not 0 < fraction < 1:
        raise TraceError(f"fraction must lie between 0 and 1, got {fraction}")
    if space is None:
        space = trace(model, example_inputs, freeze=freeze, couple=couple, carried=carried, depth=depth)
    if not space.proven:
        raise TraceError("the model is on the meta device, where nothing can be proven; use trace for its units")
    prover = Prover(model, space, example_inputs, seed)
    errors = [prover.error(prover.draw(fraction))[0] for _ in range(trials if _free_groups(space) else 0)]
    costs = CostModel(space)
    full, least = int(costs.both(costs.sizes)[0]), int(costs.both(costs.smallest())[0])
    worst = max(errors, default=0.0)
    return Report(
        ok=worst <= TOLERANCE,
        max_error=worst,
        trials=len(errors),
        removable_params=1 - least / full if full else 0.0,
        units=int(space.removable.sum()),
        groups=space.widths(space.everything()),
        frozen=space.frozen,
    )
