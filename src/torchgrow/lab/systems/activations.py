"""What goes into the layers that read a group of units: patches of convolutions, rows of linear layers.

A *reader* of a group is the weight of a convolution (of one group) or a linear layer that has the group's units on axis
1. Patches are what one row of such a weight is multiplied with: [P, K] with K = inputs x kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Space
from torchgrow.lab.systems.system import UnfitError

AT_ONCE = 128
"""Images of a forward pass."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group.

    Attributes:
        path: its module's qualified name.
        module: the layer.
        units: int64 [K], the unit that each column of its weight belongs to, -1 for none.
        group: of these units.
    """

    path: str
    module: nn.Conv2d | nn.Linear
    units: Tensor
    group: int

    def weight(self) -> Tensor:
        """[filters, K]."""
        return self.module.weight.detach().flatten(1)

    def patches(self, x: Tensor) -> Tensor:
        """Of an input: [images, places, K]."""
        if isinstance(self.module, nn.Linear):
            return x.reshape(len(x), -1, x.shape[-1])
        conv = self.module
        if isinstance(conv.padding, str):
            same = conv.padding == "same"
            sides = [same * (k - 1) * d // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
            padding = sides[0], sides[1]
        else:
            padding = conv.padding[0], conv.padding[1]
        found = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
        return found.transpose(1, 2)

    def columns(self, units: Tensor) -> Tensor:
        """Columns of the weight that read each of these units (all of the group, rising ids [C]): int64 [C, each]."""
        inside = torch.nonzero(torch.isin(self.units, units)).flatten()
        return inside[torch.argsort(self.units[inside], stable=True)].reshape(len(units), -1)


def readers(model: nn.Module, space: Space) -> list[Reader]:
    """All readers of groups that may shrink, in the order of the model's modules."""
    found = []
    for path, module in model.named_modules():
        place = (f"{path}.weight", 1)
        plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if not plain or place not in space.unit_of:
            continue
        vector = space.unit_of[place]
        owned = vector[vector >= 0]
        inner = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        for group in space.group_of[owned[space.removable[owned]]].unique().tolist():
            found.append(Reader(path, module, vector.repeat_interleave(inner), group))
    return found


@torch.no_grad()
def judges(who: str, model: nn.Module, space: Space, x: Tensor) -> list[Reader]:
    """The readers that are called, in the order of the model's modules: those by which a system can judge all units.

    Some are never called: attention of PyTorch hands the weight of its `out_proj` on, and nothing passes through it.

    Args:
        who: the system.
        model: the network.
        space: its units.
        x: images to try it on.

    Raises:
        UnfitError: a group that may shrink has none.
    """
    found, called = readers(model, space), set[nn.Module]()

    def note(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(note) for module in {reader.module for reader in found}]
    try:
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    found = [reader for reader in found if reader.module in called]
    groups = set(space.group_of[space.removable].tolist()) - {reader.group for reader in found}
    names = [space.group_names[group] for group in sorted(groups)]
    if names:
        which = f"each of the groups {', '.join(names)}" if names[1:] else f"group {names[0]}"
        raise UnfitError(
            f"{who} judges units by the Conv2d (groups=1) or Linear that reads them, and {which} has no layer that "
            "reads them so; take a system that judges by their own weights, such as l1-norm"
        )
    return found


@torch.no_grad()
def look(model: nn.Module, module: nn.Module, x: Tensor, use: Callable[[Tensor], None]) -> None:
    """Run the model on images in evaluation mode and hand what goes into one of its modules to a function.

    The function is called once for so many images as fit into memory, `AT_ONCE`, and again for the next.
    """
    handle = module.register_forward_pre_hook(lambda _, inputs: use(inputs[0].detach()))
    try:
        model.eval()
        for part in x.split(AT_ONCE):
            model(part)
    finally:
        handle.remove()
