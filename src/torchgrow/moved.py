"""Old names of modules, which pickles of an earlier version refer to (whole models, budgets, histories)."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MOVED = {
    "torchgrow.adapters_timm": "torchgrow.adapters.timm",
    "torchgrow.adapters_torchvision": "torchgrow.adapters.torchvision",
    "torchgrow.adapters_ultralytics": "torchgrow.adapters.ultralytics",
    "torchgrow.cost": "torchgrow.structure.cost",
    "torchgrow.indicators": "torchgrow.policies.method",
    "torchgrow.limits": "torchgrow.structure.limits",
    "torchgrow.record": "torchgrow.structure.record",
    "torchgrow.space": "torchgrow.structure.space",
    "torchgrow.state": "torchgrow.growth.event",  # of what was there, histories are pickled
}
"""Modules with classes whose instances sit in users' models and settings, by the name they had in version 0.1."""


class Finder(MetaPathFinder, Loader):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old name, None for any other."""
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in its place."""
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])
