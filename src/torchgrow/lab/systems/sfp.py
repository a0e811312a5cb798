"""SoftNet: He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep CNNs, IJCAI 2018 (arXiv 1808.06866).

Steps: he-y/soft-filter-pruning@919c399. The source has one rate for all layers; here it is the largest at which the
network meets the budget, and the last cut fills the budget up. Units that are tied by a skip connection go together, by
the norm of all their filters, since nothing else can be cut. Weights that are frozen are not set to zero, since nothing
would bring them back. A filter of zeros still puts out its batch norm's shift, which goes with the cut: statistics of
the norms behind it are estimated anew on training data, and counted.
Cost: one training of the dense size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchgrow import policies
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.systems.statistics import estimate_anew
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task


class Soft(Hooks):
    """After every epoch all filters but a share of those with the largest L2 norm are set to zero; they may recover.

    Args:
        whole: the network, whose biases and momentum are left alone.
        share: of every group that is kept.
    """

    def __init__(self, whole: Structure, share: float) -> None:
        self.whole, self.share = whole, share

    def kept(self) -> Tensor:
        """The units (bool [n]) that are kept now: of every C all but int(C (1 - share)), at least one."""
        space, norms = self.whole.space, self.whole.scores(policies.importance.l2)
        keep = space.everything()
        for pool in policies.kit.pools(space):
            few = int(pool.numel() * (1 - self.share) + 1e-9)
            keep[pool[torch.argsort(norms[pool], stable=True)][:few]] = False
        return policies.kit.one_per_group(space, keep, norms)

    def zero(self) -> None:
        """Zero the others."""
        self.whole.zero_rows(~self.kept())

    def ended(self, epoch: int) -> None:
        """Zero them after every epoch."""
        self.zero()


@dataclass(frozen=True)
class SFP:
    """One training from scratch, with soft pruning after every epoch.

    Attributes:
        batches: of training data on which statistics are estimated after the cut.
    """

    batches: int = 20

    def phases(self, task: Task) -> Iterator[Phase]:
        """The training; its network is cut in the end."""
        model, limits = task.network(), task.limits()
        whole = Structure(model, task)
        soft = Soft(whole, whole.share(limits))
        soft.zero()
        yield Phase(name="soft pruning", model=model, recipe=task.recipe, hooks=soft)
        soft.zero()
        places = whole.places(whole.scores(policies.importance.l2))
        whole.cut(whole.exact(soft.kept(), -places, limits))
        task.spent.append(estimate_anew(model, task.data, task.recipe, self.batches))
