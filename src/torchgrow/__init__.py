"""torchgrow: grow efficient networks by structured continuous sparsification (ICLR 2021, arXiv 2007.15353).

One training run starts from a tiny seed inside your own model and grows and prunes its channels until it sits on
a parameter or FLOPs budget; what comes out is a plain, small, dense module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import policies
    from .adapters import adapter
    from .checkpoint import load_checkpoint, save_checkpoint
    from .cost import Cost
    from .errors import (
        BudgetError,
        OptimizerError,
        SavedModelError,
        StructureError,
        TorchgrowError,
        TraceError,
        TrainingError,
    )
    from .grower import Grower, measure
    from .guard import guard_
    from .indicators import PRESETS, Method
    from .limits import Budget, Limits
    from .persist import load, save
    from .proof import Report, trace, verify
    from .rules import Context, module_rule, rule
    from .space import Frozen, Space
    from .state import Event
    from .surgery import Bank, shrink_

__version__ = "0.1.0"

# Loaded when first asked for: `torchgrow --help`, or a budget that cannot be read, need not wait for PyTorch.
_HOMES = {
    "adapters": ["adapter"],
    "checkpoint": ["load_checkpoint", "save_checkpoint"],
    "cost": ["Cost"],
    "errors": [
        "BudgetError",
        "OptimizerError",
        "SavedModelError",
        "StructureError",
        "TorchgrowError",
        "TraceError",
        "TrainingError",
    ],
    "grower": ["Grower", "measure"],
    "guard": ["guard_"],
    "indicators": ["PRESETS", "Method"],
    "limits": ["Budget", "Limits"],
    "persist": ["load", "save"],
    "policies": ["policies"],
    "proof": ["Report", "trace", "verify"],
    "rules": ["Context", "module_rule", "rule"],
    "space": ["Frozen", "Space"],
    "state": ["Event"],
    "surgery": ["Bank", "shrink_"],
}

__all__ = [
    "PRESETS",
    "Bank",
    "Budget",
    "BudgetError",
    "Context",
    "Cost",
    "Event",
    "Frozen",
    "Grower",
    "Limits",
    "Method",
    "OptimizerError",
    "Report",
    "SavedModelError",
    "Space",
    "StructureError",
    "TorchgrowError",
    "TraceError",
    "TrainingError",
    "adapter",
    "guard_",
    "load",
    "load_checkpoint",
    "measure",
    "module_rule",
    "policies",
    "rule",
    "save",
    "save_checkpoint",
    "shrink_",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, the first time it is asked for."""
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(f"{__name__}.{home}")
            value = module if name == home else getattr(module, name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
