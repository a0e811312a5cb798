"""The proof: a compact network computes what the frame computes with the absent structures zeroed.

Run on the user's own model and inputs, with all weights, biases and statistics randomised on a copy (with default
initial values most comparisons are vacuous), in evaluation mode and float64. What fails is bisected down to its
groups and frozen with the reason; nothing unproven is ever removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..default_device import on_host
from ..errors import TraceError
from ..renamed import renamed_arguments
from ..structure.cost import Cost, CostModel
from ..structure.space import Frozen, Place, Space, frozen_for
from ..structure.store import is_meta
from .blocks import Named, find, gated, with_layers
from .model_call import Carries, call, check_model, examples_of, fresh
from .nested import mapped
from .passes import passes, running, twin
from .prover import TOLERANCE, Prover
from .requests import Couples
from .size_attributes import Guess, guesses
from .tracer import replay

FRACTIONS = (0.3, "ends", 0.7, 0.5, "most")
"""What the proof removes from every group: random shares, the first and the last unit ("ends"), all but one ("most").

Operations that depend on the order of channels (a roll by a fixed number) can agree by chance on a random subset, not
on the ends of an axis. Runs begin with single units, where a forward may go another way. Layers: with all of them too.
"""

TOGETHER = 16  # sets of groups, exact in halves and wrong together, that are looked into; of further ones all stay


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


def prove(
    model: nn.Module, space: Space, example_inputs: Any, seed: int = 0
) -> tuple[Space, list[tuple[Place, Place]]]:
    """Try the space on a randomised copy; freeze every group that is not exact, with the reason.

    Where a size kept in an attribute may be the reason, the attribute is made to follow, if that proves exact. Returned
    are also the axes to couple before all is tried again: of frozen groups that one attribute may count.
    """
    space = _without_lone_units(space)
    free = _free_groups(space)
    if not free:
        return replace(space, proven=True), []
    prover = Prover(model, space, example_inputs, seed)
    if space.blocks:
        space = prover.space = prover.bank.space = gated(space, prover.frame, prover._outputs, TOLERANCE)
        free = _free_groups(space)
    ways = (False, True) if space.blocks else (False,)
    draws = [(turn, fraction, whole) for whole in ways for turn, fraction in enumerate[float | str](FRACTIONS)]
    found: list[Guess] | None = None
    ties: list[tuple[Place, Place]] = []
    hopeless: set[frozenset[tuple[type[nn.Module], str]]] = set()
    while free:
        failed: dict[int, tuple[Tensor, tuple[str, str]]] = {}
        for turn, fraction, whole in draws:
            draw = prover.draw(fraction, free, turn=turn, whole=whole)
            if prover.error(draw)[0] <= TOLERANCE:
                continue
            if found is None:
                found = guesses(model, space)
                if prover.adopt(found, draw):
                    continue
            failed = _failing(prover, free, draw, iter(range(TOGETHER)))
            for group, (keep, _) in list(failed.items()):
                mine = [guess for guess in found if group in guess.groups]
                kind = frozenset((type(model.get_submodule(g.attribute.module)), g.attribute.name) for g in mine)
                if prover.adopt(mine, keep, thorough=kind not in hopeless):
                    del failed[group]
                else:  # blocks of one class fail alike, and a thorough search takes a hundred runs
                    hopeless.add(kind)
            break
        else:
            return replace(prover.space, proven=True), ties
        space = prover.space
        ties += _ties(space, found or [], failed)
        for group, (_, (reason, line)) in failed.items():
            units = torch.nonzero(space.group_of == group).flatten()
            fewest = 2 * int(space.least[group])
            if fraction == "most" and 0 < fewest < len(units):  # more of them were exact; of layers none need stay
                units, reason = units[:fewest], f"with fewer than {fewest} of them {reason}"
            space = frozen_for(space, units, "proof", space.group_names[group], reason, line)
        free = _free_groups(space)
        prover.space = prover.bank.space = space
    return replace(prover.space, proven=True), ties


def _only(space: Space, groups: list[int], draw: Tensor) -> Tensor:
    """A keep vector that drops what `draw` does, in these groups only."""
    return draw | ~torch.isin(space.group_of, torch.tensor(groups))


def _ties(space: Space, found: list[Guess], failed: Iterable[int]) -> Iterator[tuple[Place, Place]]:
    """Pairs of axes that lie alike in groups that failed, where one attribute may count both groups."""
    alike: dict[tuple[str, str, bytes], dict[int, Place]] = {}
    for guess in found:
        for group in guess.groups.intersection(failed):
            units = torch.nonzero(space.group_of == group).flatten()
            for place, vector in space.unit_of.items():
                if bool(torch.isin(vector, units).all()):
                    order = torch.searchsorted(units, vector).numpy().tobytes()
                    alike.setdefault((guess.attribute.module, guess.attribute.name, order), {}).setdefault(group, place)
    for places in alike.values():
        yield from pairwise(places.values())


def _without_lone_units(space: Space) -> Space:
    """Units alone in their group always stay, since no group is ever left empty; nothing could prove them either."""
    sizes = torch.bincount(space.group_of, minlength=space.n_groups)
    lone = torch.nonzero((sizes[space.group_of] == 1) & (space.least[space.group_of] > 0) & space.removable).flatten()
    for unit in lone[:, None]:
        name = space.group_names[int(space.group_of[unit])]
        space = frozen_for(space, unit, "proof", name, "is the only unit of its group")
    return space


def _free_groups(space: Space) -> list[int]:
    """Groups with something to remove."""
    sizes = torch.bincount(space.group_of, minlength=space.n_groups)
    return torch.nonzero(sizes > space.least).flatten().tolist()


def _failing(
    prover: Prover, groups: list[int], draw: Tensor, tries: Iterator[int], beside: Sequence[int] = ()
) -> dict[int, tuple[Tensor, tuple[str, str]]]:
    """Groups that break exactness if cut as in `draw` beside others; by group what shows it (bool [n]), and how."""
    keep = _only(prover.space, [*groups, *beside], draw)
    error, reason = prover.error(keep)
    if error <= TOLERANCE:
        return {}
    if len(groups) == 1:
        return {groups[0]: (keep, reason)}
    first, second = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    found = _failing(prover, first, draw, tries, beside) | _failing(prover, second, draw, tries, beside)
    if not found and next(tries, None) is None:
        return dict.fromkeys(groups, (keep, reason))
    if not found:  # exact apart, wrong together: those in each that are wrong beside the other
        found = _failing(prover, first, draw, tries, (*beside, *second))
        found |= _failing(prover, second, draw, tries, (*beside, *found))
    return found


@on_host()
@renamed_arguments(freeze="protect")
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    protect: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
    proof: bool = True,
) -> Space:
    """Find the units of a model and prove them on the model itself.

    Copies of the model are run a few times in evaluation and in training mode, without dropout; the model itself and
    the random state are as before. What a trainable parameter that takes part in no run could read is frozen.

    Args:
        model: a module on one device, not wrapped and not compiled. It is the frame: the largest network.
            On the meta device labels are followed and nothing is proven (`Space.proven` is False).
        example_inputs: a small batch: a tensor, a tuple of positional inputs, or a dict of keywords. A list holds
            several such examples, for forwards that take other ways on other inputs or other arguments in training:
            `[images, (images, targets)]`. Each must run in one of the modes, the first in evaluation mode.
        protect: parameters or modules that keep their shape, by qualified name or pattern ("head.*"); or single
            axes, such as ("head.weight", 1).
        couple: pairs of axes that are cut alike, position by position, such as (("a.weight", 0), ("b.weight", 0)).
        depth: whether layers may be left out as well (paper Eq 2). True finds them: blocks of one class that follow
            each other in a container and return a tensor like the one they are given, but for one in each stage.
            Or their qualified names; a tuple of names is one layer of several modules that run in that order.
        carried: outputs that become arguments of the next call and are cut as the model is, {argument: output},
            by position or name: {1: 1} for `out, state = model(x, state)`.
        proof: whether what was found is tried on copies of the model in float64, which takes many times its memory.
            False: labels are followed on a copy on the meta device, and nothing is tried; what attributes count stays.

    Returns:
        The space, in which every removable unit came out exact (relative error at most 1e-9 in float64). Groups that
        one attribute counts are cut alike.

    Raises:
        TraceError: the model cannot be run or traced; the message says what works.
    """
    check_model(model, example_inputs)
    if is_meta(model) or not proof:
        frame = model if is_meta(model) else twin(model, meta=True)
        blocks = find(frame, example_inputs, depth)
        space = replay(frame, example_inputs, protect=protect, couple=couple, carried=carried, blocks=blocks)
        space = with_layers(space, blocks)
        return space if proof else _undecided_frozen(frame, space, example_inputs)
    return proven(model, example_inputs, protect=protect, couple=couple, carried=carried, depth=depth)


def proven(
    model: nn.Module, example_inputs: Any, *, couple: Couples, depth: bool | Sequence[Named], **asked: Any
) -> Space:
    """What `trace` returns, proven even for a model on the meta device: on a copy that is not."""
    blocks = find(model, example_inputs, depth)
    failed: dict[tuple[str, ...], int] = {}
    ties: list[tuple[Place, Place]] = []
    best: tuple[int, Space] | None = None
    run = partial(replay, model, example_inputs, blocks=blocks, **asked)
    while True:
        space = with_layers(run(failed=failed, couple=(*couple, *ties)), blocks)
        found, tied = prove(model, space, example_inputs)
        if any(pair not in ties for pair in tied):
            ties += tied  # what one attribute counts is cut alike
            continue
        costs = CostModel(found)
        least = int(costs.both(costs.space.least)[0])
        if best is None or least <= best[0]:  # at equal cost, the later one, whose reasons name the place
            best = least, found
        broken = _broken_parts(space, found)
        if not broken:
            return best[1]
        failed.update({place: failed.get(place, 0) + 1 for place in broken})  # at 2 the cut counts as fixed


def _broken_parts(space: Space, proven: Space) -> set[tuple[str, str]]:
    """Places where the forward seemed to cut an axis by attributes, but the proof kept a piece whole."""
    alone = torch.bincount(space.group_of, minlength=space.n_groups)[space.group_of] == 1
    kept = space.removable & ~proven.removable & ~alone
    return {
        (parts.module, parts.line)
        for parts in space.parts
        if any(bool(kept[piece[piece >= 0]].any()) for piece in parts.pieces)
    }


@on_host()
@renamed_arguments(freeze="protect")
def verify(
    model: nn.Module,
    example_inputs: Any,
    fraction: float = 0.3,
    seed: int = 0,
    trials: int = 3,
    *,
    protect: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
    space: Space | None = None,
) -> Report:
    """Prove exactness on your own model: remove random units and compare with the frame, those units zeroed.

    Args:
        model: the frame.
        example_inputs: as for `trace`.
        fraction: share of the units removed from a group, in (0, 1); groups of one size lose different numbers.
        seed: of weights and subsets.
        trials: number of random subsets.
        protect: as for `trace`.
        couple: as for `trace`.
        depth: as for `trace`.
        carried: as for `trace`.
        space: what `trace` found for this model and these inputs, if it was called; the four before are then ignored.

    Raises:
        TraceError: as for `trace`.
    """
    if not 0 < fraction < 1:
        raise TraceError(f"fraction must lie between 0 and 1, got {fraction}")
    if space is None:
        space = trace(model, example_inputs, protect=protect, couple=couple, carried=carried, depth=depth)
    if not space.proven:
        raise TraceError("the model is on the meta device, where nothing can be proven; use trace for its units")
    prover = Prover(model, space, example_inputs, seed)
    count = trials if _free_groups(space) else 0
    ways = (False, True) if space.blocks else (False,)
    draws = [prover.draw(fraction, turn=turn, whole=whole) for turn in range(count) for whole in ways]
    errors = [prover.error(draw)[0] for draw in draws]
    costs = CostModel(space)
    full, least = int(costs.both(costs.sizes)[0]), int(costs.both(costs.space.least)[0])
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


@on_host()
def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters and FLOPs (2 x multiply-accumulates, one sample) of a model as it is.

    Args:
        model: any plain module.
        example_inputs: a small batch: a tensor, a tuple, or a dict of keywords; of a list of them the first counts.

    Raises:
        TraceError: the model cannot be run on the inputs.
    """
    space = replay(model, example_inputs, counting=True)
    return CostModel(space).cost(space.everything())


# --- without a proof ---


def _undecided_frozen(model: nn.Module, space: Space, example_inputs: Any) -> Space:
    """The space of a copy on the meta device, with units frozen that attributes may count.

    Only a proof could tell whether these must follow.
    """
    found = [guess for guess in guesses(model, space) if guess.sure]
    paths = {guess.attribute.module for guess in found}
    examples = [mapped(example, lambda x: x.to("meta")) for example in examples_of(example_inputs)]
    seen: set[tuple[str, str]] = set()
    with _watched({path: model.get_submodule(path) for path in paths}, seen):
        for one in passes(len(examples)):
            with running(model, one):
                try:
                    call(model, fresh(examples[one.example]))
                except Exception:
                    continue  # it does not run in this mode or on meta; it was traced before
    for guess in found:
        module, name = guess.attribute.module, guess.attribute.name
        units = torch.isin(space.group_of, torch.tensor(sorted(guess.groups))) & space.removable
        if (module, name.partition("[")[0]) in seen and bool(units.any()):
            reason = f"{module or 'the model'}.{name} may count these units, which only the proof can tell (proof=True)"
            space = frozen_for(space, torch.nonzero(units).flatten(), "attribute", module, reason)
    return space


@contextmanager
def _watched(modules: dict[str, nn.Module], seen: set[tuple[str, str]]) -> Iterator[None]:
    """Note in `seen` which attributes of modules are read, by the module's name and theirs."""

    def watching(path: str, kind: type[nn.Module]) -> type[nn.Module]:
        def read(self: nn.Module, name: str) -> Any:
            seen.add((path, name))
            return kind.__getattribute__(self, name)

        return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})

    kinds = {path: type(module) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__class__ = watching(path, kinds[path])
        yield
    finally:
        for path, module in modules.items():
            object.__setattr__(module, "__class__", kinds[path])
