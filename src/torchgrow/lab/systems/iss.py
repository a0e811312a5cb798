"""ISS: Wen et al.: Learning Intrinsic Sparse Structures within Long Short-Term Memory, ICLR 2018 (arXiv 1709.05027).

Steps and settings: wenwei202/iss-rnns@88cc1a7, ptb. The source's loss is a sum over the steps of a sequence, and the
lab's is their mean, so its penalty is divided by their number. Dropout is that of the recipe's grown network. The
source cuts units that have become zero and knows no budget: where the budget takes others too, those of the smallest
groups go, and the network is fine-tuned for a quarter of the epochs at a tenth of the learning rate, which is ours.
Cost: one training at dense size, and this fine-tuning.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgrow import Space
from torchgrow.lab.from_recipe import make_network
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, UnfitError, scaled, tuned


@dataclass(frozen=True)
class Part:
    """A weight matrix with rows or columns of recurrent units.

    Attributes:
        rows: int64 [rows], unit of each row, -1 for none; None where no row has one.
        columns: likewise of columns.
        twice: int64 [2, m], row and column of the entries that both belong to one unit.
    """

    weight: nn.Parameter
    rows: Tensor | None
    columns: Tensor | None
    twice: Tensor


class Groups(Hooks):
    """Adds strength x sum over units of sqrt(sum of w^2 + 1e-8), and zeroes small weights after every step.

    The group of a unit: rows of its gates in the input and the recurrent weight, its column of the recurrent one, and
    its column of whatever reads its output. An entry in a row and a column of the group counts once.

    Args:
        model: the network.
        space: its units, n of them.
        strength: lambda.
        threshold: weights below it in size become 0.

    Raises:
        UnfitError: the network has no recurrent units that may go.
    """

    def __init__(self, model: nn.Module, space: Space, strength: float, threshold: float) -> None:
        self.model, self.strength, self.threshold = model, strength, threshold
        self.recurrent = torch.zeros(space.n_units, dtype=torch.bool)
        for path, module in model.named_modules():
            if isinstance(module, nn.RNNBase):
                for name, _ in module.named_parameters():
                    place = (f"{path}.{name}" if path else name, 1)
                    if name.startswith("weight_hh") and place in space.unit_of:
                        units = space.unit_of[place]
                        self.recurrent[units[units >= 0]] = True
        self.recurrent &= space.removable
        if not bool(self.recurrent.any()):
            raise UnfitError("ISS is written for recurrent units, and this network has none that may go")
        self.parts = [self._part(parameter, name, space) for name, parameter in model.named_parameters()]

    def _part(self, weight: nn.Parameter, name: str, space: Space) -> Part:
        """A parameter's rows and columns of recurrent units; none for what is no matrix."""
        vectors = []
        for axis in (0, 1):
            vector = space.unit_of.get((name, axis)) if weight.dim() == 2 else None
            if vector is not None:
                vector = torch.where((vector >= 0) & self.recurrent[vector.clamp(min=0)], vector, -1)
            vectors.append(vector if vector is not None and bool((vector >= 0).any()) else None)
        rows, columns = vectors
        twice = torch.zeros(2, 0, dtype=torch.int64)
        if rows is not None and columns is not None:
            twice = torch.nonzero((rows[:, None] == columns[None]) & (rows >= 0)[:, None]).T
        return Part(weight, rows, columns, twice)

    def squares(self) -> Tensor:
        """Sum of squares of every unit's group, float [n]; 0 of units that are not recurrent."""
        like = next(self.model.parameters())
        found = torch.zeros(len(self.recurrent) + 1, dtype=like.dtype, device=like.device)  # the last: of no unit

        def add(found: Tensor, vector: Tensor, sums: Tensor) -> Tensor:
            index = torch.where(vector < 0, len(self.recurrent), vector).to(found.device)
            return found.index_add(0, index, sums)

        for part in self.parts:
            if part.rows is None and part.columns is None:
                continue
            squares = part.weight**2
            if part.rows is not None:
                found = add(found, part.rows, squares.sum(1))
            if part.columns is not None:
                found = add(found, part.columns, squares.sum(0))
            if part.rows is not None and part.twice.numel():
                i, j = part.twice.to(found.device)
                found = add(found, part.rows[part.twice[0]], -squares[i, j])
        return found[:-1]

    def penalty(self) -> Tensor:
        """Of the present weights."""
        own = self.recurrent.to(next(self.model.parameters()).device)
        return self.strength * (self.squares()[own].clamp(min=0) + 1e-8).sqrt().sum()

    @torch.no_grad()
    def stepped(self, done: float) -> None:
        """Small weights become 0."""
        for parameter in self.model.parameters():
            parameter.masked_fill_(parameter.abs() < self.threshold, 0.0)


@dataclass(frozen=True)
class ISS:
    """One training with the penalty, then the cut.

    Attributes:
        strength: lambda, for a loss summed over the steps of a sequence.
        threshold: weights below it become 0 after every step.
        lr: of fine-tuning, as a share of the recipe's.
        share: of the epochs that fine-tuning takes.
    """

    strength: float = 0.00245
    threshold: float = 1e-4
    lr: float = 0.1
    share: float = 0.25

    def phases(self, task: Task) -> Iterator[Phase]:
        """The training (learning rate / 10 at each third), and fine-tuning where units went that were not zero."""
        recipe = task.recipe
        model = make_network(recipe.build_grown or recipe.build, 1.0, task.data.device)
        whole = Structure(model, task)
        groups = Groups(model, whole.space, self.strength / recipe.steps, self.threshold)
        training = tuned(recipe, scaled(1, 1, recipe), 1.0, (1 / 3, 2 / 3))
        yield Phase(name="group penalty", model=model, recipe=training, hooks=groups)
        squares = groups.squares().detach().cpu().double()
        keep = whole.at_most((squares > 0) | ~groups.recurrent, squares, task.limits())
        lost = bool((squares[groups.recurrent & ~keep] > 0).any())
        whole.cut(keep)
        if lost:
            epochs = scaled(self.share, 1, recipe)
            yield Phase(name="fine-tuning", model=model, recipe=tuned(recipe, epochs, self.lr))
