"""ThiNet: Luo, Wu, Lin, ICCV 2017 (arXiv 1707.06342).

Steps: Roll920/ThiNet_Code@728ce54. The source halves most layers of VGG-16; here every group keeps the same share,
exactly at the budget. A group that several layers read (behind a skip connection) takes the samples of all of them.
Layers that read are convolutions of one group (Conv2d) and Linear: a network with units that others alone read cannot
be served, and others that read them too have no say. The source fine-tunes for an epoch after each layer and for 12
after the last. In short recipes that is less than an epoch a layer, so here all of it comes after the last layer;
layers still see the pruned ones before them.
Cost: the dense training (which the paper's rule leaves out), a forward pass of the sample for each layer that reads,
and fine-tuning.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgrow.lab.data import ImageData
from torchgrow.lab.systems.activations import Reader, judges, look
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, scaled, tuned


def discarded(x: Tensor) -> list[int]:
    """The order in which channels go: always the one that raises ||sum over the gone of x_j||^2 least.

    Args:
        x: what every channel adds to sampled outputs, [samples, C].
    """
    x = x.double()
    gram, cross = x.T @ x, torch.zeros(x.shape[1], dtype=torch.float64)
    left, order = torch.ones(x.shape[1], dtype=torch.bool), list[int]()
    for _ in range(x.shape[1]):
        rise = 2 * cross + gram.diagonal()  # of the squared norm of the sum, if j joins
        rise[~left] = torch.inf
        best = int(rise.argmin())
        order.append(best)
        left[best] = False
        cross += gram[best]
    return order


def rescaled(x: Tensor, kept: Tensor) -> Tensor:
    """The scales of channels that are kept (int64 [k]): w = (X'X)^-1 X'y with y the sum of all, float64 [k]."""
    x = x.double()
    return torch.linalg.lstsq(x[:, kept], x.sum(1, keepdim=True), driver="gelsd").solution[:, 0]


@dataclass(frozen=True)
class ThiNet:
    """Layer by layer, the channels without which the next layer's outputs change least.

    Attributes:
        images: of every class that are sampled.
        places: of every image.
        layer: epochs of fine-tuning a layer, where the dense training has `dense`.
        last: more of them in the end.
        dense: see there.
        lr: of fine-tuning, as a share of the recipe's (1e-3 of 0.1).
    """

    images: int = 10
    places: int = 10
    layer: int = 1
    last: int = 12
    dense: int = 90
    lr: float = 0.01

    def phases(self, task: Task) -> Iterator[Phase]:
        """Fine-tuning after all layers."""
        model, generator = task.trained(), torch.Generator().manual_seed(task.recipe.seed)
        whole, data = Structure(model, task), task.images("ThiNet")
        all_readers = judges("ThiNet", model, whole.space, data.example())
        nothing = torch.zeros(whole.space.n_units, dtype=torch.float64)
        counts = whole.costs.live(whole.within(nothing, task.limits()))  # how many stay: any units cost the same
        sample, keep, groups = self._sample(data, generator), whole.space.everything(), list[int]()
        start = time.perf_counter()
        for reader in all_readers:
            if reader.group not in groups:
                groups.append(reader.group)
        for group in groups:
            mine = [reader for reader in all_readers if reader.group == group]
            units = torch.nonzero(whole.space.group_of == group).flatten()
            parts = [self._contributions(model, reader, units, sample, generator) for reader in mine]
            order = [j for j in discarded(torch.cat(parts)) if bool(whole.space.removable[units[j]])]
            gone = torch.tensor(order[: len(units) - int(counts[group])], dtype=torch.int64)
            keep[units[gone]] = False
            kept = torch.nonzero(keep[units]).flatten()
            for reader, part in zip(mine, parts, strict=True):
                self.reweigh(reader, units, kept, rescaled(part, kept))
        looks = sum(1 for _ in all_readers) * len(sample)
        task.spend("sampling", task.cost(model).flops * looks, time.perf_counter() - start)
        rest = whole.places(keep.double())
        whole.cut(whole.exact(keep, -rest, task.limits()))
        epochs = scaled(len(groups) * self.layer + self.last, self.dense, task.recipe)
        yield Phase(name="fine-tuning", model=model, recipe=tuned(task.recipe, epochs, self.lr))

    def _sample(self, data: ImageData, generator: torch.Generator) -> Tensor:
        """So many images of every class, as networks take them."""
        labels, chosen = data.train.labels.cpu(), list[Tensor]()
        for label in labels.unique().tolist():
            own = torch.nonzero(labels == label).flatten()
            chosen.append(own[torch.randperm(len(own), generator=generator)[: self.images]])
        return data.normalise(data.train[torch.cat(chosen)].pixels)

    def _contributions(
        self, model: nn.Module, reader: Reader, units: Tensor, sample: Tensor, generator: torch.Generator
    ) -> Tensor:
        """What channels add at places and filters f drawn at random, x_j = W[f, j] patch_j: [samples, C]."""
        found = list[Tensor]()

        def use(x: Tensor) -> None:
            patches = reader.patches(x)
            images, places = patches.shape[:2]
            at = torch.randint(places, (images, min(self.places, places)), generator=generator).to(patches.device)
            drawn = torch.gather(patches, 1, at[..., None].expand(-1, -1, patches.shape[2])).flatten(0, 1)
            weight = reader.weight()
            filters = torch.randint(len(weight), (len(drawn),), generator=generator).to(weight.device)
            columns = reader.columns(units).to(weight.device)
            found.append((drawn * weight[filters])[:, columns].sum(-1).cpu())

        look(model, reader.module, sample, use)
        return torch.cat(found)

    @torch.no_grad()
    def reweigh(self, reader: Reader, units: Tensor, kept: Tensor, scale: Tensor) -> None:
        """Scale what the layer reads of units that are kept, and zero the rest, so that later layers see it."""
        factor = torch.ones(int(units.max()) + 1, dtype=torch.float64)
        factor[units] = 0.0
        factor[units[kept]] = scale
        column = torch.where(torch.isin(reader.units, units), factor[reader.units.clamp(0, int(units.max()))], 1.0)
        weight = reader.module.weight
        weight.copy_((reader.weight() * column.to(weight)).view_as(weight))
