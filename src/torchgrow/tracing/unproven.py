"""Without a proof: freeze units that an attribute may count which the forward reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..structure.space import Space, frozen_for
from .model_call import call, examples_of, fresh
from .nested import mapped
from .passes import passes, running
from .size_attributes import guesses


def undecided_frozen(model: nn.Module, space: Space, example_inputs: Any) -> Space:
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
