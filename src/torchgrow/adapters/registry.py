"""Adapters: replacement forwards for modules whose own forward has sizes written into it.

An adapter is a subclass that computes the same from the sizes of the weights at hand. `adapt_` swaps the class of a
module, and nothing else: its parameters, names, hooks and `isinstance` stay. Fast paths that bypass `forward` are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TypeVar

from torch import nn

from ..errors import TorchgrowError

ADAPTERS: dict[type, type] = {}
"""Class -> the subclass that takes its place."""

SHIPPED = {name: f"torchgrow.adapters.{name}" for name in ("timm", "torchvision", "ultralytics")}
"""Adapters of other libraries, by the package of the module they serve; imported when one is met."""


Kind = TypeVar("Kind", bound=type)


def adapter(base: type) -> Callable[[Kind], Kind]:
    """Register a subclass of `base` with a replacement forward, for exactly that class.

    Raises:
        TorchgrowError: it is no subclass, or changes the layout of instances.
    """

    def register(subclass: Kind) -> Kind:
        if not issubclass(subclass, base):
            raise TorchgrowError(f"{subclass.__name__} must be a subclass of {base.__name__}, whose place it takes")
        ADAPTERS[base] = subclass
        return subclass

    return register


def adaptable(model: nn.Module) -> list[str]:
    """Qualified names of the modules that have an adapter."""
    for module in model.modules():
        package = type(module).__module__.partition(".")[0]
        if package in SHIPPED:
            import_module(SHIPPED.pop(package))
    return [path for path, module in model.named_modules() if type(module) in ADAPTERS]


def adapt_(model: nn.Module, paths: Iterable[str]) -> None:
    """Give the named modules their adapters; those that have them already stay.

    Raises:
        TorchgrowError: a name is unknown, or its module has no adapter here.
    """
    adaptable(model)
    modules = dict(model.named_modules())
    for path in paths:
        kind = type(modules.get(path))
        if kind in ADAPTERS:
            modules[path].__class__ = ADAPTERS[kind]
        elif kind not in ADAPTERS.values():
            raise TorchgrowError(
                f"{path!r} is {kind.__name__}, which has no adapter; import the one it was saved with, "
                "or register it with torchgrow.adapter"
            )


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """A context in which all adapters are in place."""
    modules, paths = dict(model.named_modules()), adaptable(model)
    before = [(modules[path], type(modules[path])) for path in paths]
    try:
        if paths:
            adapt_(model, paths)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
