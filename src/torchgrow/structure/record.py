"""The record of all cuts, kept on the modules of a model: where each tensor lies in the original frame.

Every module carries a `Mark`: the record it belongs to and its name there. So a record stays with its modules
(in a part of the model, a larger model, a wrapper, a copy). It is always relative to the first frame, however often
the model was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..exchange import Exchange
from .attributes import replaced
from .space import PassThrough
from .store import Index

RECORD = "_torchgrow_record"
"""Name of the plain attribute under which a module carries its Mark."""

LEFT_OUT = "_torchgrow_left_out"
"""Name of a plain attribute of modules left out: TorchScript takes modules that look alike for one type."""

Named = tuple[str, str]
"""A module and one of its attributes."""


@dataclass
class Growth:
    """How far a run has come: one object for a whole run, which all its records hold."""

    updates: int  # planned calls of `update()`
    done: int = 0  # calls so far
    limits: tuple[tuple[str, int, int], ...] = ()  # what the budget limits: (what, its number now, the most it may be)
    finished: bool = False  # whether the structure is final
    copied: bool = False  # whether it came with a copy or pickle of the model, which no grower holds

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get."""
        return {**vars(self), "copied": True}

    def __str__(self) -> str:
        """Where the run stands, in words."""
        costs = ", ".join(
            f"{now:,} {what}, {now / most:.2f} x the budget of {most:,}" for what, now, most in self.limits
        )
        return f"update() was called {self.done} of {self.updates} times; the network has {costs}"


@dataclass(frozen=True)
class Record:
    """All cuts of a model, relative to the first frame; tied tensors appear under all their names."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # full shapes of the tensors that can be cut
    # per cut tensor and axis the live positions in the frame; of layers left out those that would live
    kept: Mapping[str, Index] = field(default_factory=dict)
    # values in the frame of the int attributes that count an axis
    wholes: Mapping[Named, int] = field(default_factory=dict)
    attributes: Mapping[Named, int] = field(default_factory=dict)  # their values now
    blocks: tuple[tuple[str, ...], ...] = ()  # modules that are left out together, if they are
    growth: Growth | None = None  # the run that the structure is of; None for one that was cut, or loaded

    def on(self, base: Record) -> Record:
        """This record, of a frame that `base` had cut already, relative to the frame of `base`."""
        kept = dict(base.kept)
        for name, index in self.kept.items():
            before = base.kept.get(name, {})
            later = {k: before[k][positions] if k in before else positions for k, positions in index.items()}
            kept[name] = dict(sorted({**before, **later}.items()))
        return Record(
            {**self.shapes, **base.shapes},
            kept,
            {**self.wholes, **base.wholes},
            {**base.attributes, **self.attributes},
            (*base.blocks, *self.blocks),
            self.growth,
        )


@dataclass(frozen=True)
class Mark:
    """The record that a module belongs to, and the module's name there."""

    record: Record
    path: str


def join(path: str, name: str) -> str:
    """A qualified name."""
    return f"{path}.{name}" if path and name else path or name


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself."""
    return {name: x for name, x in {**module._parameters, **module._buffers}.items() if x is not None}


def mark_of(module: nn.Module) -> Mark | None:
    """The mark a module carries."""
    mark = vars(module).get(RECORD)
    return mark if isinstance(mark, Mark) else None


def set_mark(module: nn.Module, mark: Mark | None) -> None:
    """Give a module a mark, or none."""
    if mark is None:
        vars(module).pop(RECORD, None)
    else:
        vars(module)[RECORD] = mark


def mark_(modules: Iterable[tuple[str, nn.Module]], record: Record) -> None:
    """Note a record on modules, by their names there."""
    for path, module in modules:
        set_mark(module, Mark(record, path))


def recorded(modules: Iterable[tuple[str, nn.Module]]) -> Record:
    """One record of all cuts of modules, by their present names."""
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, Index] = {}
    wholes: dict[Named, int] = {}
    attributes: dict[Named, int] = {}
    now: dict[tuple[int, str], str] = {}  # by record and name there
    blocks: dict[int, tuple[tuple[str, ...], ...]] = {}
    by_module: dict[int, dict[str, dict[str, int]]] = {}
    for path, module in modules:
        mark = mark_of(module)
        if mark is None:
            continue
        record = mark.record
        now[id(record), mark.path] = path
        blocks[id(record)] = record.blocks
        for name in own_tensors(module):
            there, here = join(mark.path, name), join(path, name)
            if there in record.shapes:
                shapes[here] = record.shapes[there]
            if there in record.kept:
                kept[here] = record.kept[there]
        for name, number in by_module.setdefault(id(record), _by_module(record.attributes)).get(mark.path, {}).items():
            wholes[path, name], attributes[path, name] = record.wholes[mark.path, name], number
    joint = [
        tuple(now[key, path] for path in block if (key, path) in now) for key, some in blocks.items() for block in some
    ]
    return Record(shapes, kept, wholes, attributes, tuple(block for block in joint if block))


def _by_module(attributes: Mapping[Named, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (path, name), number in attributes.items():
        found.setdefault(path, {})[name] = number
    return found


def growths(model: nn.Module) -> list[Growth]:
    """The runs that have not finished, of which modules of a model are part."""
    found = [mark.record.growth for module in model.modules() if (mark := mark_of(module)) is not None]
    unfinished = {id(growth): growth for growth in found if growth is not None and not growth.finished}
    return list(unfinished.values())


# --- layers left out ---


def skip_(model: nn.Module, paths: Iterable[str], skipped: Mapping[str, PassThrough]) -> None:
    """Leave out the modules named in `skipped` and put back the others of `paths`.

    A plain attribute on the module stands before the `forward` of its class; deleting it brings that one back.
    """
    for path in paths:
        module = model.get_submodule(path)
        for name in ("forward", LEFT_OUT):
            module.__dict__.pop(name, None)
        if path in skipped:
            module.forward = skipped[path].forward
            setattr(module, LEFT_OUT, True)


def rewrite(
    exchange: Exchange,
    modules: Mapping[str, nn.Module],
    record: Record,
    attributes: Mapping[Named, int],
    paths: Iterable[str],
    skipped: Mapping[str, PassThrough],
) -> None:
    """Have `exchange` write a cut to all modules: marks, attributes, and as `skip_` which of `paths` are left out."""
    for path, numbers in _by_module(attributes).items():
        exchange.fields(modules[path], **replaced(modules[path], numbers))
    for path in paths:
        if path in skipped:
            exchange.fields(modules[path], **{"forward": skipped[path].forward, LEFT_OUT: True})
        else:
            exchange.drop(vars(modules[path]), "forward")
            exchange.drop(vars(modules[path]), LEFT_OUT)
    for path, module in modules.items():
        exchange.fields(module, **{RECORD: Mark(record, path)})


def skip_of(module: nn.Module) -> PassThrough | None:
    """What a module that is left out computes instead; None for one that is not."""
    forward = vars(module).get("forward")
    found = getattr(forward, "__self__", forward)
    return found if isinstance(found, PassThrough) else None
