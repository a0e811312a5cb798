"""Systems of other papers, each in a file named by its source: on our tracing and surgery, in the lab's one loop.

`shrink` is torchgrow's own, beside them.

What they have in common, and how they are counted, is in `torchgrow.lab.systems.system`.
"""

from torchgrow.lab.systems.autogrow import AutoGrow
from torchgrow.lab.systems.bar import BAR
from torchgrow.lab.systems.darts import DARTS
from torchgrow.lab.systems.iss import ISS
from torchgrow.lab.systems.l1_norm import L1Norm
from torchgrow.lab.systems.morphnet import MorphNet
from torchgrow.lab.systems.netadapt import NetAdapt
from torchgrow.lab.systems.pfp import PFP
from torchgrow.lab.systems.proxyless import ProxylessNAS
from torchgrow.lab.systems.running import PHASES, run
from torchgrow.lab.systems.sfp import SFP
from torchgrow.lab.systems.shrink import Shrinking
from torchgrow.lab.systems.statistics import estimate_anew
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Spent, System, Task, UnfitError, fine_tuned
from torchgrow.lab.systems.thinet import ThiNet

__all__ = [
    "BEGIN_TRAINED",
    "LEAVE_LAYERS_OUT",
    "PHASES",
    "Phase",
    "Spent",
    "Structure",
    "System",
    "Task",
    "UnfitError",
    "estimate_anew",
    "fine_tuned",
    "run",
    "system",
]

CLASSES: dict[str, type[System]] = {
    "l1-norm": L1Norm,
    "sfp": SFP,
    "thinet": ThiNet,
    "pfp": PFP,
    "bar": BAR,
    "morphnet": MorphNet,
    "netadapt": NetAdapt,
    "autogrow": AutoGrow,
    "darts": DARTS,
    "proxyless": ProxylessNAS,
    "iss": ISS,
    "shrink": Shrinking,
}
"""The class of every system, by its name."""

BEGIN_TRAINED = ("l1-norm", "thinet", "pfp", "bar", "netadapt", "shrink")
"""Those that begin with the trained dense network, or learn from it."""

LEAVE_LAYERS_OUT = ("autogrow", "darts", "proxyless")
"""Those that may come to a network without some of its layers."""


def system(name: str) -> System:
    """A system by its name in `torchgrow.lab.names.SYSTEMS`, with the constants of its source.

    Args:
        name: of "shrink" with other settings behind a colon, if any, as `torchgrow.policies.named` reads them.

    Raises:
        TorchgrowError: there is no such setting.
    """
    return Shrinking(name) if ":" in name else CLASSES[name]()
