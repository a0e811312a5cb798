"""Recipes for images: digits, CIFAR-10, folders of classes, PASCAL VOC's masks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from torchgrow import Budget
from torchgrow.lab import models
from torchgrow.lab.attention import ViT
from torchgrow.lab.recipes.recipe import Recipe, is_small
from torchgrow.lab.segmentation import DeepLabV3

DEEP = "default:layer_lag=16"
"""For frames deeper than one would pick: their layers come late."""


def digits() -> Recipe:
    """A small residual network for scikit-learn's 8x8 digits, grown to 8 % of its parameters, layers too.

    Command: ``torchgrow run digits`` (or ``./demo``, which installs what it needs first).
    Hardware: one CPU core, no download. With 360 test images, one of them is 0.28 points. Learning rate and schedule
    were chosen on held-out images for the dense and the uniform network (docs/log.md); what ten seeds came to is in
    docs/results.md.
    """
    return Recipe(
        name="digits",
        dataset="digits",
        build=partial(models.ResNet, depth=14, widths=(32, 64, 128), in_channels=1),
        budget=Budget(params="8%"),
        depth=True,
        preset="default:ramp=0.15",  # slow enough to be watched
        epochs=8,
        batch_size=64,
        lr=0.1,
        schedule="linear",
        warmup=0.1,
        weight_decay=5e-4,
        shift=1,  # mirrored digits are other characters
        threads=1,  # nearly as fast as two on layers this small, and not slowed down by a busy neighbour
    )


def _schedule(small: bool) -> str:
    """The sources' milestones are for their length; in a short run they cost several points (docs/log.md)."""
    return "wsd" if small else "milestones"


def _cifar10(name: str, scale: str, build: Callable[..., nn.Module], budget: Budget, epochs: int = 160) -> Recipe:
    """CIFAR-10 as the paper trains on it; small: 10,000 images and 20 epochs, which fits two CPU cores.

    Why the rate of small stays until the last 30 %, and does not drop at 1/2 and 3/4: docs/log.md.
    """
    small = is_small(scale)
    return Recipe(
        name=name,
        dataset="cifar10",
        build=build,
        budget=budget,
        epochs=20 if small else epochs,
        subset=10_000 if small else None,
        batch_size=128,
        lr=0.1,
        schedule=_schedule(small),
        shift=4,
        mirror=True,
    )


def resnet20_cifar10(scale: str = "small") -> Recipe:
    """The paper's ResNet-20 on CIFAR-10, grown to 36 % of its parameters; small: layers grow too.

    The paper: 90.91 % with 35.8 % of the parameters and 50.2 % of the FLOPs, 91.3 % dense; saving 2.40.
    Command: ``torchgrow run resnet20-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's
    160 epochs on all images, to the letter.
    Hardware: 2 CPU cores for small; hours of one, or a GPU, for full.
    Here: docs/results.md, Table 1 beside the paper's.
    """
    build = partial(models.ResNet, depth=20, widths=(16, 32, 64), shortcut="A")
    recipe = _cifar10("resnet20-cifar10", scale, build, Budget(params="36%"))
    if scale == "full":
        return recipe
    return replace(recipe, depth=True, preset="default:ramp=0.01,peak=1")


def vgg16_cifar10(scale: str = "small") -> Recipe:
    """The paper's VGG-16 on CIFAR-10, grown to 5 % of its parameters; small: a quarter of its width, to 20 %.

    The paper: 92.5 % with 5.0 % of the parameters and 13.55 % of the FLOPs, 92.9 % dense; saving 4.95.
    Command: ``torchgrow run vgg16-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small; a GPU for full.
    Here: docs/results.md, Table 1 beside the paper's.
    """
    build = partial(models.VGG16, widen=0.25 if scale == "small" else 1.0)
    return _cifar10("vgg16-cifar10", scale, build, Budget(params="20%" if scale == "small" else "5%"))


def wrn28_10_cifar10(scale: str = "small") -> Recipe:
    """The paper's WRN-28-10 on CIFAR-10, grown to 9.4 % of its parameters; small: WRN-16-2, to 30 %.

    The paper: 95.32 % with 9.4 % of the parameters (it prints 9.3) and 28.25 % of the FLOPs, 96.2 % dense; saving 3.12.
    Command: ``torchgrow run wrn28-10-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small; a GPU for full.
    Here: docs/results.md, Table 1 beside the paper's.
    """
    depth, widen, share = (16, 2, "30%") if scale == "small" else (28, 10, "9.4%")
    build = partial(models.WideResNet, depth=depth, widen=widen)
    recipe = _cifar10("wrn28-10-cifar10", scale, build, Budget(params=share), epochs=200)
    return replace(recipe, lr_milestones=(0.3, 0.6, 0.8), lr_factor=0.2, weight_decay=5e-4)


def basic3resnet_cifar10(scale: str = "small") -> Recipe:
    """AutoGrow's Basic3ResNet: layers and channels grow from one block of one channel a stage, in a 42-42-42 frame.

    Small: a 9-9-9 frame, to the parameters of ResNet-20, which is 3-3-3.
    The paper: 94.5 % with 23-29-31 blocks.
    Command: ``torchgrow run basic3resnet-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the
    paper's, whose nets are then fine-tuned for 40 epochs.
    Hardware: 2 CPU cores for small; a GPU for full.
    Here: docs/results.md, Table 3 beside the paper's.
    """
    small = scale == "small"
    build = partial(models.ResNet, depth=6 * (9 if small else 42) + 2, shortcut="B")
    recipe = _cifar10("basic3resnet-cifar10", scale, build, Budget(params=275_572 if small else "50%"))
    return replace(recipe, depth=True, meta=True, preset=DEEP, then=0 if small else 40)


def plain3net_cifar10(scale: str = "small") -> Recipe:
    """AutoGrow's Plain3Net: the same without shortcuts, in a 23-23-23 frame; small: 5-5-5, to half its parameters.

    The paper: 90.99 % with 11-14-19 blocks.
    Command: ``torchgrow run plain3net-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's,
    whose nets are then fine-tuned for 40 epochs.
    Hardware: 2 CPU cores for small; a GPU for full.
    Here: docs/results.md, Table 3 beside the paper's.
    """
    small = scale == "small"
    build = partial(models.Staged, unit="plain", units=(5, 5, 5) if small else (23, 23, 23), widths=(16, 32, 64))
    recipe = _cifar10("plain3net-cifar10", scale, build, Budget(params="50%"))
    return replace(recipe, depth=True, meta=True, preset=DEEP, then=0 if small else 40)


def vit_cifar10() -> Recipe:
    """A small vision transformer on CIFAR-10: heads and hidden neurons grow to half the FLOPs.

    Command: ``torchgrow run vit-cifar10 --data FOLDER``.
    Hardware: 2 CPU cores; for a try there, add ``--subset 10000 --epochs 10``.
    Here: not measured yet.
    """
    return Recipe(
        name="vit-cifar10",
        dataset="cifar10",
        build=partial(ViT, features=128, layers=6, heads=4, head=32, neurons=512),
        budget=Budget(flops="50%"),
        epochs=100,
        batch_size=128,
        optimizer="adamw",
        lr=1e-3,
        schedule="cosine",
        warmup=0.05,
        weight_decay=0.05,
        clip=1.0,
        shift=4,
        mirror=True,
    )


def _imagenet(name: str, scale: str, build: Callable[..., nn.Module]) -> Recipe:
    """Folders of images, as ImageNet's; small: 64 pixels and 20 epochs, for ten classes or so.

    Full: the usual augmentation, a random part of every image, streamed from disk.
    """
    small = is_small(scale)
    return Recipe(
        name=name,
        dataset="imagefolder",
        build=build,
        budget=Budget(params="50%"),
        epochs=20 if small else 90,
        batch_size=128 if small else 256,
        side=64 if small else 224,
        lr=0.1,
        schedule=_schedule(small),
        lr_milestones=(1 / 3, 2 / 3),
        shift=4 if small else 0,
        crop=not small,
        mirror=True,
    )


def bottleneck4resnet_imagenet(scale: str = "small") -> Recipe:
    """AutoGrow's Bottleneck4ResNet for ImageNet, from one unit a stage; small: a quarter of the width, 3-4-6-3.

    The paper: 77.41 % top-1 with 5-6-5-7 blocks.
    Command: ``torchgrow run bottleneck4resnet-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs for full.
    Here: docs/results.md, Table 3 beside the paper's.
    """
    small = scale == "small"
    widths, units = ((64, 128, 256, 512), (3, 4, 6, 3)) if small else ((256, 512, 1024, 2048), (6, 8, 12, 10))
    build = partial(models.Staged, unit="bottleneck", units=units, widths=widths, stem="large")
    recipe = _imagenet("bottleneck4resnet-imagenet", scale, build)
    return replace(recipe, depth=True, meta=True, then=0 if small else 20)


def nas_imagenet(scale: str = "small") -> Recipe:
    """The paper's search on ImageNet (Table 4): layers and widths grown to under 7M parameters, then trained.

    The paper: 75.1 % top-1 with 6.9M parameters after 140 GPU hours, 74.3 % after 80. It names no frame, nor how its
    hours part; here it is AutoGrow's Bottleneck4ResNet, and growing takes a quarter of the epochs. Small: a quarter of
    the width, 3-4-6-3, to the same share of it, and growing takes half of the epochs.
    Command: ``torchgrow run nas-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and ``val/CLASS/*``;
    with ``--scale full`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs, and cores to read for them, for full.
    Here: docs/results.md, Table 4 beside the paper's.
    """
    small, recipe = is_small(scale), bottleneck4resnet_imagenet(scale)
    budget = Budget(params=165_000 if small else 7_000_000)
    epochs, then = (10, 10) if small else (30, 90)
    return replace(recipe, name="nas-imagenet", preset="nas", budget=budget, epochs=epochs, then=then)


def plain4net_imagenet(scale: str = "small") -> Recipe:
    """AutoGrow's Plain4Net for ImageNet, from one unit a stage; small: a quarter of the width, 2-2-2-2.

    The paper: 70.79 % top-1 with 3-4-4-5 blocks.
    Command: ``torchgrow run plain4net-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs for full.
    Here: docs/results.md, Table 3 beside the paper's.
    """
    small = scale == "small"
    widths, units = ((16, 32, 64, 128), (2, 2, 2, 2)) if small else ((64, 128, 256, 512), (6, 6, 6, 6))
    build = partial(models.Staged, unit="plain", units=units, widths=widths, stem="large")
    recipe = _imagenet("plain4net-imagenet", scale, build)
    return replace(recipe, depth=True, meta=True, then=0 if small else 20)


def resnet18_imagenette() -> Recipe:
    """ResNet-18 on small pictures in folders, such as Imagenette, grown to 36 % of its parameters, layers too.

    Command: ``torchgrow run resnet18-imagenette --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``.
    Hardware: 2 CPU cores.
    Here: docs/results.md, under its name.
    """
    return Recipe(
        name="resnet18-imagenette",
        dataset="imagefolder",
        build=partial(models.Staged, unit="basic", units=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem="large"),
        budget=Budget(params="36%"),
        depth=True,
        preset="default:ramp=0.01,peak=1",
        epochs=20,
        batch_size=128,
        side=64,
        lr=0.1,
        schedule="wsd",
        weight_decay=5e-4,
        shift=4,
        mirror=True,
    )


def resnet50_imagenet(scale: str = "small") -> Recipe:
    """The paper's ResNet-50 on ImageNet (Table 2), grown to 61.2 % of its parameters; small: a quarter of the width.

    The paper: 75.2 % top-1 with 61.2 % of the parameters and 50.3 % of the FLOPs, 76.1 % dense; for both limits add
    ``--budget params=61.2%,flops=50.3%``.
    Command: ``torchgrow run resnet50-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs, and cores to read for them, for full.
    Here: docs/results.md, Table 2 beside the paper's.
    """
    widths = (64, 128, 256, 512) if is_small(scale) else (256, 512, 1024, 2048)
    build = partial(models.Staged, unit="bottleneck", units=(3, 4, 6, 3), widths=widths, stem="large")
    return replace(_imagenet("resnet50-imagenet", scale, build), budget=Budget(params="61.2%"))


def mobilenetv1_imagenet(scale: str = "small") -> Recipe:
    """The paper's MobileNetV1 at 224 pixels (Table 6), grown to 83 % of the FLOPs of 0.75x; small: of half the width.

    The paper: 69.3 % top-1, 68.8 % for the network with 0.75 of every width. With little weight decay, as Howard et al.
    (2017) advise.
    Command: ``torchgrow run mobilenetv1-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs, and cores to read for them, for full.
    Here: docs/results.md, Table 6 beside the paper's.
    """
    small = is_small(scale)
    recipe = _imagenet("mobilenetv1-imagenet", scale, partial(models.MobileNetV1, widen=0.5 if small else 1.0))
    return replace(recipe, budget=Budget(flops="47.5%"), weight_decay=4e-5)


def mobilenetv1_half_imagenet(scale: str = "small") -> Recipe:
    """The paper's MobileNetV1 0.5x at 128 pixels (Table 6), grown to 73 % of the FLOPs of 0.25x; small: at 64 pixels.

    The paper: 46.0 % top-1, 45.1 % for the network with 0.25 of every width.
    Command: ``torchgrow run mobilenetv1-half-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); a GPU, and cores to read for it, for full.
    Here: docs/results.md, Table 6 beside the paper's.
    """
    small = is_small(scale)
    recipe = _imagenet("mobilenetv1-half-imagenet", scale, partial(models.MobileNetV1, widen=0.5))
    return replace(recipe, side=64 if small else 128, budget=Budget(flops="20.2%"), weight_decay=4e-5)


RARE = (1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 16, 18, 19, 20)
"""Classes of PASCAL VOC but for background, cat, cow, dog, horse, person and sheep."""


def deeplabv3_voc(scale: str = "small") -> Recipe:
    """The paper's DeepLab-v3-ResNet-101 on PASCAL VOC (Table 7), grown to 50.2 % of its parameters, pooling too.

    The paper: 76.4 % mIoU with 50.2 % of the parameters and 41.5 % of the FLOPs, 76.5 % dense. Small: half a ResNet-18
    at 96 pixels, to the same share, on background, people and five animals; the other classes are void.
    Full: batches, rate and about as many steps as Chen et al. (2017), whose rate falls by nearly the same line.
    Command: ``torchgrow run deeplabv3-voc --data FOLDER``, the folder holding ``VOCdevkit/VOC2012/``, with augmented
    list and masks if they are there; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small; several GPUs for full.
    Here: docs/results.md, Table 7 beside the paper's.
    """
    small = is_small(scale)
    narrow: dict[str, Any] = {"unit": "basic", "units": (2, 2, 2, 2), "widths": (32, 64, 128, 256)}
    narrow |= {"output_stride": 16, "rates": (1, 2, 3), "pooled": 64}
    return Recipe(
        name="deeplabv3-voc",
        dataset="voc",
        build=partial(DeepLabV3, **(narrow if small else {"units": (3, 4, 23, 3)})),
        budget=Budget(params="50.2%"),
        epochs=40 if small else 50,
        batch_size=16,
        side=96 if small else 513,
        lr=0.05 if small else 0.007,
        schedule="linear",
        warmup=0.05 if small else 0.0,
        weight_decay=5e-4 if small else 1e-4,
        shift=8 if small else 0,
        crop=not small,
        void=RARE if small else (),
        mirror=True,
    )
