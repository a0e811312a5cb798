"""Networks that others have searched for, as torchvision has them, for comparison."""

from functools import partial

import torch
from torch import nn

from torchgrow.lab.data import Data, ImageData
from torchgrow.lab.frames import library_network
from torchgrow.lab.from_recipe import make_network
from torchgrow.lab.metrics import ACCURACY
from torchgrow.lab.names import PUBLISHED
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems import UnfitError


def published_network(method: str, recipe: Recipe, data: Data) -> nn.Module:
    """The network as published but for its number of classes, with new weights.

    Args:
        method: of `PUBLISHED`.
        recipe: whose network has as many classes.
        data: what it is to read.

    Raises:
        UnfitError: what it is to read are no images of three colours, or pixels have classes.
        TorchgrowError: torchvision is not installed.
    """
    colours = data.example().shape[1] if isinstance(data, ImageData) else 0
    if colours != 3:
        other = f"images of {colours}" if colours else "a text"
        raise UnfitError(f"{method} reads images of three colours, and recipe {recipe.name!r} trains on {other}")
    if data.metric is not ACCURACY:
        raise UnfitError(f"{method} gives classes of images, and recipe {recipe.name!r} trains on masks")
    with torch.no_grad():
        classes = make_network(recipe.build, 1.0, data.device).eval()(data.example()).shape[-1]
    build = partial(library_network, model=PUBLISHED[method], classes=classes)
    return make_network(build, 1.0, data.device)
