"""What the models of the zoo are made of."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def c3(a: int, b: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)


def head(x: Tensor, fc: nn.Linear) -> Tensor:
    return fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
