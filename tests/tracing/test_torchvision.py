"""One small member of every family of torchvision: units, and one subset beyond them that is exact.

The pinned numbers of units are what no proof sees: too much frozen.
"""

from collections.abc import Callable

import pytest
import torch
from torchvision import models

from torchgrow import Budget, Grower, Space, shrink_
from torchgrow.structure.cost import CostModel
from torchgrow.tracing.prover import TOLERANCE, Prover
from torchgrow.tracing.tracer import replay

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
    assert 1 - costs.both(costs.space.least)[0] / costs.both(costs.sizes)[0] > least
    prover = Prover(model, space, example, seed=0)
    assert prover.error(prover.draw(0.4))[0] <= TOLERANCE


def thinned(space: Space) -> torch.Tensor:
    """A keep vector with an eighth of every group."""
    keep = space.everything()
    for group in range(space.n_groups):
        units = torch.nonzero((space.group_of == group) & space.removable).flatten()
        keep[units[units.numel() // 8 + 1 :]] = False
    return keep


@pytest.mark.parametrize(
    ("name", "pixels", "units"),
    [("googlenet", 64, 9584), ("inception_v3", 299, 18112)],  # of fewer pixels Inception's auxiliary head has none
)
def test_auxiliary_heads_are_cut_and_trained_with_the_rest(name: str, pixels: int, units: int) -> None:
    torch.manual_seed(0)
    model, images = getattr(models, name)(init_weights=False), torch.randn(2, 3, pixels, pixels)
    space = replay(model, images[:1])
    assert int(space.removable.sum()) == units
    assert not [str(frozen) for frozen in space.frozen if frozen.op == "unused"]
    shrink_(model, space, thinned(space))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    outputs = model.train()(images)
    assert len(outputs) == (3 if name == "googlenet" else 2)
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 1000)


def test_googlenet_grows_with_its_auxiliary_heads() -> None:
    torch.manual_seed(0)
    model, images = models.googlenet(num_classes=5, init_weights=False), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    grower = Grower(model, optimizer, example_inputs=images, budget=Budget(params="20%"), updates=2)
    for _ in range(2):
        sum(output.square().mean() for output in model.train()(images)).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.update()
    assert all(0 < grower.widths()[f"aux{k}.fc1"] < 1024 for k in (1, 2))
    assert grower.cost().params <= (grower.limits.params or 0)
