"""torchgrow: grow efficient networks by structured continuous sparsification (ICLR 2021, arXiv 2007.15353).

One training run starts from a tiny seed inside your own model and grows and prunes its channels until it sits on
a parameter or FLOPs budget; what comes out is a plain, small, dense module.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import Finder

if TYPE_CHECKING:
    from . import policies
    from .adapters.registry import adapter
    from .errors import (
        BudgetError,
        OptimizerError,
        SavedModelError,
        StructureError,
        TorchgrowError,
        TraceError,
        TrainingError,
    )
    from .growth.event import Event
    from .growth.grower import Grower
    from .growth.one_shot import measure_rises, prune_
    from .growth.schedule import warmup_stable_decay
    from .growth.search import Search, Trial, search
    from .growth.teacher import distillation_loss, recalibrate
    from .onednn_guard import guard_
    from .persistence.checkpoint import load_checkpoint, save_checkpoint
    from .persistence.network import load, save
    from .persistence.portable import portable_, shrink_
    from .policies.method import Method
    from .policies.named import PRESETS
    from .structure.bank import Bank
    from .structure.cost import Cost
    from .structure.limits import Budget, Limits
    from .structure.space import Frozen, Space
    from .tracing.rules.registry import Context, module_rule, rule
    from .tracing.verification import Report, measure, trace, verify

__version__ = "0.1.0"

sys.meta_path.append(Finder())

# Loaded when first asked for: `torchgrow --help`, or a budget that cannot be read, need not wait for PyTorch.
_HOMES = {
    "adapters.registry": ["adapter"],
    "persistence.checkpoint": ["load_checkpoint", "save_checkpoint"],
    "structure.cost": ["Cost"],
    "errors": [
        "BudgetError", "OptimizerError", "SavedModelError", "StructureError", "TorchgrowError", "TraceError",
        "TrainingError",
    ],
    "growth.grower": ["Grower"],
    "growth.one_shot": ["measure_rises", "prune_"],
    "growth.schedule": ["warmup_stable_decay"],
    "growth.search": ["Search", "Trial", "search"],
    "growth.teacher": ["distillation_loss", "recalibrate"],
    "onednn_guard": ["guard_"],
    "policies.method": ["Method"],
    "policies.named": ["PRESETS"],
    "structure.limits": ["Budget", "Limits"],
    "persistence.network": ["load", "save"],
    "persistence.portable": ["portable_", "shrink_"],
    "policies": ["policies"],
    "tracing.verification": ["Report", "measure", "trace", "verify"],
    "tracing.rules.registry": ["Context", "module_rule", "rule"],
    "structure.space": ["Frozen", "Space"],
    "growth.event": ["Event"],
    "structure.bank": ["Bank"],
}  # fmt: skip

__all__ = [
    "PRESETS", "Bank", "Budget", "BudgetError", "Context", "Cost", "Event", "Frozen", "Grower", "Limits", "Method",
    "OptimizerError", "Report", "SavedModelError", "Search", "Space", "StructureError", "TorchgrowError",
    "TraceError", "TrainingError", "Trial", "adapter", "distillation_loss", "guard_", "load", "load_checkpoint",
    "measure", "measure_rises", "module_rule", "policies", "portable_", "prune_", "recalibrate", "rule", "save",
    "save_checkpoint", "search", "shrink_", "trace", "verify", "warmup_stable_decay",
]  # fmt: skip


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
