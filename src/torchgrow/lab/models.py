"""Convolutional networks of the experiments, in plain PyTorch, written so that their channels can be cut.

No ``forward`` names a channel count: every size is read from the tensors at hand, so that the same code
runs at any width, before and after surgery. Each ``width`` scales all channel counts by one factor.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import TorchgrowError

Shortcut = Literal["A", "B"]


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded to the nearest integer, at least 1."""
    return max(1, round(channels * width))


class HeConv2d(nn.Conv2d):
    """A convolution whose own rule is He's initialisation by fan-out, so that births on a meta frame follow it too."""

    def reset_parameters(self) -> None:
        """Draw the weights anew; the bias, if there is one, is 0."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PadShortcut(nn.Module):
    """Shortcut kind A of He et al. (2016): every second pixel, padded with zero channels on both sides.

    The zeros are buffers, not arguments of ``F.pad``: as tensors with a channel axis they can be traced
    and cut like any other, where a number in the code could not follow.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``in_channels``.
        stride: step in pixels along both image axes.

    Shape: ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    before: Tensor
    after: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        if extra < 0:
            raise TorchgrowError(
                f"shortcut A only adds channels, it cannot go from {in_channels} to {out_channels}; "
                'use widths that do not shrink, or shortcut="B"'
            )
        self.stride = stride
        self.register_buffer("before", torch.zeros(1, extra // 2, 1, 1))
        self.register_buffer("after", torch.zeros(1, extra - extra // 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x[:, :, :: self.stride, :: self.stride]
        n, _, h, w = x.shape
        return torch.cat([self.before.expand(n, -1, h, w), x, self.after.expand(n, -1, h, w)], 1)


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "A":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        HeConv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> HeConv2d:
    return HeConv2d(in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride, dilation)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, 1, dilation)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016): a 3x3 stem, three stages of basic blocks, one linear layer.

    Args:
        width: factor on ``widths``; 1.0 is the published network.
        depth: 6n + 2 layers: 8, 14, 20, 32, 44, 56, 110.
        widths: channels of the three stages.
        shortcut: ``"A"`` (padding, as published for CIFAR) or ``"B"`` (1x1 convolution and batch norm)
            where a stage begins.
        in_channels: 3 for colour images, 1 for grey ones.
        classes: number of outputs.

    Shape: ``[N, in_channels, H, W] -> [N, classes]``, for any H and W.

    Raises:
        TorchgrowError: an impossible depth, widths that are not three positive numbers, another shortcut.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        depth: int = 20,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: Shortcut = "A",
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise TorchgrowError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
        if len(widths) != 3 or min(widths) < 1:
            raise TorchgrowError(f"widths are three positive channel counts such as (16, 32, 64), got {widths}")
        if shortcut not in ("A", "B"):
            raise TorchgrowError(f'shortcut is "A" (padding) or "B" (1x1 convolution), got {shortcut!r}')
        blocks = (depth - 2) // 6
        channels = [scaled(w, width) for w in widths]
        self.conv1 = HeConv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.layer1 = _stage(channels[0], channels[0], blocks, 1, shortcut)
        self.layer2 = _stage(channels[0], channels[1], blocks, 2, shortcut)
        self.layer3 = _stage(channels[1], channels[2], blocks, 2, shortcut)
        self.fc = nn.Linear(channels[2], classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, kind: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, kind)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, kind) for _ in range(blocks - 1)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch norm beside a shortcut; inside a quarter of the channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        inside = max(1, out_channels // 4)
        self.conv1, self.bn1 = HeConv2d(in_channels, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2 = _conv3x3(inside, inside, stride, dilation)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = HeConv2d(inside, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut("B", in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class PlainUnit(nn.Module):
    """A 3x3 convolution, batch norm and ReLU, with nothing beside them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _conv3x3(in_channels, out_channels, stride, dilation)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(self.bn(self.conv(x)))


class Staged(nn.Module):
    """A stem, some stages of like units, one linear layer: ResNet-18 and the like, AutoGrow's other families.

    Args:
        width: factor on ``widths``.
        unit: ``"basic"`` (ResNet-18 and -34; He et al., 2016), ``"bottleneck"`` (Bottleneck4ResNet) or ``"plain"``
            (Plain3Net, Plain4Net; Wen et al., 2020).
        units: how many in each stage; the first of every stage but the first one halves the image.
        widths: channels of the stages.
        stem: ``"small"`` (a 3x3 convolution) or ``"large"`` (7x7 and a pooling, a quarter of the image's side).
        output_stride: the image's side over that of the last stage, at most; where a stage would go beyond it, it is
            dilated instead (Chen et al., 2017).
        in_channels: 3 for colour images, 1 for grey ones.
        classes: number of outputs.

    Shape: ``[N, in_channels, H, W] -> [N, classes]``.

    Raises:
        TorchgrowError: stages without units, or not as many widths as stages; another unit or stem.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        unit: Literal["basic", "bottleneck", "plain"] = "plain",
        units: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        stem: Literal["small", "large"] = "small",
        output_stride: int = 32,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if len(units) != len(widths) or not units or min(*units, *widths) < 1:
            raise TorchgrowError(f"every stage has units and a width, all at least 1, got {units} and {widths}")
        basic = partial(BasicBlock, shortcut="B")
        kinds: dict[str, Callable[..., nn.Module]] = {"basic": basic, "bottleneck": Bottleneck, "plain": PlainUnit}
        if unit not in kinds or stem not in ("small", "large"):
            raise TorchgrowError(f"a unit is one of {', '.join(kinds)} and a stem small or large, got {unit}, {stem}")
        channels = [scaled(w, width) for w in widths]
        before = max(1, channels[0] // 4) if unit == "bottleneck" else channels[0]
        large = stem == "large"
        self.conv1 = HeConv2d(in_channels, before, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        stages, reached, dilation = [], 4 if large else 1, 1
        for stage, (count, after) in enumerate(zip(units, channels, strict=True)):
            stride, dilated = 2 if stage else 1, dilation
            if stride * reached > output_stride:
                stride, dilation = 1, 2 * dilation
            reached *= stride
            first = kinds[unit](before, after, stride, dilation=dilated)
            others = (kinds[unit](after, after, 1, dilation=dilation) for _ in range(count - 1))
            stages.append(nn.Sequential(first, *others))
            before = after
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(before, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last stage puts out."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class VGG16(nn.Module):
    """VGG-16 with batch norm for CIFAR: 13 convolutions, one linear layer, 14.73M parameters at width 1.

    Convolutions keep their bias although batch norm follows, as in torchvision's ``vgg16_bn``, so that
    parameter counts agree with those published.

    Args:
        width: factor on every channel count, on top of ``widen``.
        widen: another such factor.
        in_channels: 3 for colour images, 1 for grey ones.
        classes: number of outputs.

    Shape: ``[N, in_channels, H, W] -> [N, classes]``, H and W at least 32.
    """

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, width: float = 1.0, *, widen: float = 1.0, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in self.stages:
            for channels in stage:
                out_channels = scaled(channels, width * widen)
                layers.append(HeConv2d(in_channels, out_channels, 3, padding=1))
                layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = HeConv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = HeConv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = HeConv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)  # published code feeds the shortcut what was already normalised
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return x + y


class WideResNet(nn.Module):
    """WRN-d-k for CIFAR (Zagoruyko and Komodakis, 2016): three stages of pre-activation blocks.

    Args:
        width: factor on every channel count, on top of ``widen``.
        depth: d = 6n + 4: 10, 16, 22, 28, 40.
        widen: k; the stages have 16k, 32k and 64k channels. WRN-28-10 has 36.5M parameters.
        in_channels: 3 for colour images, 1 for grey ones.
        classes: number of outputs.

    Shape: ``[N, in_channels, H, W] -> [N, classes]``, for any H and W.

    Raises:
        TorchgrowError: an impossible depth or widening factor.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        depth: int = 28,
        widen: int = 10,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise TorchgrowError(f"a CIFAR WRN has 6n + 4 layers (10, 16, 22, 28, 40), not {depth}")
        if widen < 1:
            raise TorchgrowError(f"widen is a factor of at least 1, got {widen}")
        channels = scaled(16, width)
        self.conv1 = HeConv2d(in_channels, channels, 3, padding=1, bias=False)
        stages = []
        for base, stride in ((16, 1), (32, 2), (64, 2)):
            out_channels = scaled(base * widen, width)
            blocks = [PreActivationBlock(channels, out_channels, stride)]
            blocks += [PreActivationBlock(out_channels, out_channels, 1) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out_channels
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017): 13 depthwise separable convolutions behind a 3x3 stem, one linear layer.

    Args:
        width: factor on every channel count, on top of ``widen``.
        widen: another such factor, the paper's width multiplier. At 1.0 and 1,000 classes: 4.23M parameters.
        in_channels: 3 for colour images, 1 for grey ones.
        classes: number of outputs.

    Shape: ``[N, in_channels, H, W] -> [N, classes]``, H and W at least 32.
    """

    units = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
    """Channels and stride of each."""

    def __init__(self, width: float = 1.0, *, widen: float = 1.0, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        now = scaled(32, width * widen)
        layers = [HeConv2d(in_channels, now, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(now), nn.ReLU()]
        for channels, stride in self.units:
            # PyTorch's own initialisation: He's by fan-out would take all channels for the output of each of them.
            depthwise = nn.Conv2d(now, now, 3, stride=stride, padding=1, groups=now, bias=False)
            layers += [depthwise, nn.BatchNorm2d(now), nn.ReLU()]
            before, now = now, scaled(channels, width * widen)
            layers += [HeConv2d(before, now, 1, bias=False), nn.BatchNorm2d(now), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(now, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
