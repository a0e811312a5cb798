"""torchgrow: grow efficient networks by structured continuous sparsification (ICLR 2021, arXiv 2007.15353).

One training run starts from a tiny seed inside your own model and grows and prunes its channels until it sits on
a parameter or FLOPs budget; what comes out is a plain, small, dense module.
"""

from .adapters import adapter
from .budget import Budget, Limits
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
from .persist import load, save
from .proof import Report, trace, verify
from .rules import Context, module_rule, rule
from .space import Frozen, Space
from .state import Event
from .surgery import Bank, shrink_

__version__ = "0.1.0"

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
    "rule",
    "save",
    "save_checkpoint",
    "shrink_",
    "trace",
    "verify",
]
