"""One small member of every family of torchvision: units, and one subset beyond them that is exact.

The pinned numbers of units are what no proof sees: too much frozen.
"""

from collections.abc import Callable

import pytest
import torch
from torchvision import models

from torchgrow.cost import CostModel
from torchgrow.proof import TOLERANCE, Prover
from torchgrow.replay import replay

PICTURES, FILM = (2, 3, 32, 32), (1, 3, 2, 32, 32)

# Shape of the inputs, units, and the least share of the parameters that can go.
FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], int, float]] = {
    "squeezenet1_1": (models.squeezenet1_1, PICTURES, 2944, 0.99),
    "shufflenet_v2_x0_5": (models.shufflenet_v2_x0_5, PICTURES, 1928, 0.99),
    "mnasnet0_5": (models.mnasnet0_5, PICTURES, 5744, 0.99),
    "mobilenet_v3_small": (models.mobilenet_v3_small, PICTURES, 4872, 0.99),
    "regnet_y_400mf": (models.regnet_y_400mf, PICTURES, 2333, 0.99),
    "efficientnet_b0": (models.efficientnet_b0, PICTURES, 11404, 0.99),
    "densenet121": (models.densenet121, PICTURES, 10240, 0.99),
    "googlenet": (lambda: models.googlenet(init_weights=False, aux_logits=False), PICTURES, 7280, 0.99),
    "lraspp_mobilenet_v3_large": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), PICTURES, 7544, 0.99),
    "r3d_18": (models.video.r3d_18, FILM, 2880, 0.99),
    "convnext_tiny": (models.convnext_tiny, PICTURES, 26496, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_small_members_of_the_families(name: str) -> None:
    build, shape, units, least = FAMILIES[name]
    torch.manual_seed(0)
    model, example = build(), torch.randn(shape)
    space = replay(model, example)
    assert int(space.removable.sum()) == units
    costs = CostModel(space)
    assert 1 - costs.both(costs.smallest())[0] / costs.both(costs.sizes)[0] > least
    prover = Prover(model, space, example, seed=0)
    assert prover.error(prover.draw(0.4))[0] <= TOLERANCE
