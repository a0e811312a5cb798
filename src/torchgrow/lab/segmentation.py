"""Networks that give every pixel a class, of the parts of the classifying ones."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from torchgrow.lab.models import Staged, scaled


class DeepLabV3(nn.Module):
    """DeepLab-v3 (Chen et al., 2017, arXiv 1706.05587): a dilated ResNet, pooling at several rates, a 1x1 layer.

    The pooling (ASPP) is torchvision's. torchvision's own DeepLab-v3 has one more 3x3 convolution behind it, which the
    paper has not; without it the ResNet-101 has the 58.0M parameters of Yuan et al. (2021), Table 7.

    Args:
        width: factor on ``widths`` and on ``pooled``.
        unit: as for `torchgrow.lab.models.Staged`.
        units: how many in each stage; (3, 4, 23, 3) bottlenecks are a ResNet-101.
        widths: channels of the stages.
        output_stride: the image's side over that of the last stage.
        rates: dilations of the three 3x3 convolutions of the pooling.
        pooled: channels of each of its branches.
        classes: number of outputs.

    Shape: ``[N, 3, H, W] -> [N, classes, H, W]``; in training N is at least 2, as a branch is normalised over it alone.

    Raises:
        TorchgrowError: stages without units, or not as many widths as stages; another unit.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        unit: Literal["basic", "bottleneck", "plain"] = "bottleneck",
        units: Sequence[int] = (3, 4, 23, 3),
        widths: Sequence[int] = (256, 512, 1024, 2048),
        output_stride: int = 8,
        rates: Sequence[int] = (12, 24, 36),
        pooled: int = 256,
        classes: int = 21,
    ) -> None:
        super().__init__()
        self.backbone = Staged(width, unit=unit, units=units, widths=widths, stem="large", output_stride=output_stride)
        del self.backbone.fc
        self.pooling = ASPP(scaled(widths[-1], width), list(rates), scaled(pooled, width))
        self.classifier = nn.Conv2d(scaled(pooled, width), classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        scores = self.classifier(self.pooling(self.backbone.features(x)))
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)
