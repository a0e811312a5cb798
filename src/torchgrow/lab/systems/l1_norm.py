"""L1: Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv 1608.08710).

Steps and settings: Eric-mingjie/rethinking-network-pruning@2ac473d, cifar/l1-norm-pruning. The source lists by hand how
many filters each layer keeps, and cuts the first convolution of a block only; here every group keeps the same share,
exactly at the budget, and units that a skip connection ties go together, by the sum over all filters that make them.
Cost: the dense training (which the paper's rule leaves out), and a quarter of its epochs at the pruned size.
`l1` of the comparison is another arithmetic: Torch-Pruning's, which adds the weights that read a filter, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torchgrow import policies
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, scaled, tuned


@dataclass(frozen=True)
class L1Norm:
    """Train, drop the filters of the smallest sum of absolute weights, fine-tune.

    Attributes:
        epochs: of fine-tuning, where the dense training has `dense`.
        dense: see there.
        lr: of fine-tuning, as a share of the recipe's; it stays (1e-3 of 0.1).
    """

    epochs: int = 40
    dense: int = 160
    lr: float = 0.01

    def phases(self, task: Task) -> Iterator[Phase]:
        """Fine-tuning after one cut."""
        model = task.trained()
        whole = Structure(model, task)
        whole.cut(whole.within(whole.scores(policies.importance.l1), task.limits()))
        yield Phase(
            name="fine-tuning",
            model=model,
            recipe=tuned(task.recipe, scaled(self.epochs, self.dense, task.recipe), self.lr),
        )
