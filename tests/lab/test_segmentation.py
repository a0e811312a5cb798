"""Classes for every pixel: the network, its loss and metric, data in VOC's layout, a run."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_resnet101
from torchvision.models.segmentation.deeplabv3 import ASPP

from torchgrow import TorchgrowError, distillation_loss, measure, trace, verify
from torchgrow.lab import compare, processes, run, shapes
from torchgrow.lab.images import ImageData, Images
from torchgrow.lab.metrics import MIOU, VOID, confusion, metric_of, miou, scores_of
from torchgrow.lab.models import MobileNetV1, Staged
from torchgrow.lab.recipes import get, with_scale
from torchgrow.lab.segmentation import DeepLabV3
from torchgrow.lab.streamed import Streamed
from torchgrow.lab.train import evaluate, fit

TINY = partial(
    DeepLabV3, unit="basic", units=(1, 2, 1, 1), widths=(4, 4, 8, 12), output_stride=8, rates=(1, 2, 3), pooled=4
)


# --- the networks


def test_deeplab_is_torchvisions_but_for_its_further_convolution() -> None:
    """The same weights give the same: the dilated ResNet-101, and the pooling behind it."""
    ours, theirs = DeepLabV3(classes=5).eval(), deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=5)
    weights = [*theirs.backbone.state_dict().values(), *theirs.classifier[0].state_dict().values()]
    names = [name for name in ours.state_dict() if not name.startswith("classifier")]
    ours.load_state_dict(dict(zip(names, weights, strict=True)), strict=False)
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        features = theirs.eval().backbone(x)["out"]
        torch.testing.assert_close(ours.backbone.features(x), features)
        pooled = theirs.classifier[0](features)
        torch.testing.assert_close(ours.pooling(features), pooled)
        scores = F.interpolate(ours.classifier(pooled), size=(65, 65), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours(x), scores)
    assert isinstance(ours.pooling, ASPP)


def test_all_of_deeplab_but_its_input_and_its_classes_can_go_exactly() -> None:
    """Units by hand: of a stage its stream and what is inside each block, six times the pooled channels."""
    model, x = TINY(), torch.randn(2, 3, 32, 32)
    space = trace(model, x)
    assert int(space.removable.sum()) == (4 + 4) + (4 + 2 * 4) + (8 + 8) + (12 + 12) + 6 * 4
    assert {place for frozen in space.frozen for place in frozen.places} <= {
        ("backbone.conv1.weight", 1),
        ("classifier.weight", 0),
        ("classifier.bias", 0),
    }
    assert verify(model, x).ok


def test_all_of_mobilenet_but_its_input_and_its_classes_can_go_exactly() -> None:
    model, x = MobileNetV1(widen=1 / 16, classes=3), torch.randn(2, 3, 32, 32)
    space = trace(model, x)
    assert int(space.removable.sum()) == 2 + sum(channels // 16 for channels, _ in MobileNetV1.units)
    assert {place for frozen in space.frozen for place in frozen.places} <= {
        ("features.0.weight", 1),
        ("fc.weight", 0),
        ("fc.bias", 0),
    }
    assert verify(model, x).ok


def test_stages_are_dilated_where_they_would_shrink_too_much() -> None:
    x = torch.randn(1, 3, 64, 64)
    sides = [Staged(units=(1,) * 4, widths=(4,) * 4, stem="large", output_stride=s).features(x) for s in (32, 16, 8, 4)]
    assert [out.shape[-1] for out in sides] == [2, 4, 8, 16]
    convolutions = [m for m in TINY().backbone.stages.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.dilation[0] for m in convolutions] == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_budgets_of_mobilenet_are_the_papers_shares_of_narrower_networks() -> None:
    """Table 6: 73 % of the FLOPs of 0.25x at 128 pixels, 83 % of those of 0.75x at 224."""
    for name, narrow, share in (("mobilenetv1-half-imagenet", 0.25, 0.73), ("mobilenetv1-imagenet", 0.75, 0.83)):
        recipe = with_scale(get(name), "full").with_classes(1000)
        x = torch.zeros(2, 3, recipe.side, recipe.side)
        with torch.device("meta"):
            frame, narrowed = recipe.build(), MobileNetV1(widen=narrow, classes=1000)
        limit = recipe.budget.limits(measure(frame, x)).flops
        assert limit == pytest.approx(share * measure(narrowed, x).flops, rel=0.01)


# --- loss and metric


def slow_miou(guesses: Tensor, labels: Tensor, classes: int) -> float:
    """Everingham et al. (2010), pixel by pixel."""
    shares = []
    for c in range(classes):
        both = either = there = 0
        for guess, label in zip(guesses.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if label == VOID:
                continue
            both += guess == c and label == c
            either += guess == c or label == c
            there += label == c
        if there:
            shares.append(both / either)
    return 100 * sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(5))
def test_miou_is_what_counting_pixel_by_pixel_gives(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    guesses = torch.randint(7, (3, 9, 8), generator=generator)
    labels = torch.randint(5, (3, 9, 8), generator=generator)  # two classes never occur, and are guessed
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = VOID
    assert miou(confusion(guesses, labels, 7)) == pytest.approx(slow_miou(guesses, labels, 7))
    parts = sum(confusion(g, y, 7) for g, y in zip(guesses, labels, strict=True))
    assert torch.equal(torch.as_tensor(parts), confusion(guesses, labels, 7))


def test_miou_by_hand() -> None:
    """Class 0: 2 of 4 pixels; class 1: 1 of 3; class 2 is guessed once and is not there."""
    labels, guesses = torch.tensor([0, 0, 0, 1, 1, VOID]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert miou(confusion(guesses, labels, 3)) == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)
    assert miou(confusion(labels.clamp(0), labels, 3)) == 100
    assert metric_of({"miou": 3.0}) is MIOU


class Fixed(nn.Module):
    """Scores that do not depend on the image but by its first pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(classes, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores * x[:, :1, :1, :1]


def test_evaluation_is_over_the_whole_set_and_not_over_batches() -> None:
    pixels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    labels = torch.randint(4, (5, 8, 8))
    labels[0, :2] = VOID
    images = Images(pixels=pixels, labels=labels)
    data = ImageData(train=images, test=images, mean=(0.5,) * 3, std=(0.2,) * 3, metric=MIOU)
    model = Fixed(4)
    scores = model(data.normalise(pixels))
    score, loss = evaluate(model, data)
    assert score == pytest.approx(slow_miou(scores.argmax(1), labels, 4))
    assert loss == pytest.approx(F.cross_entropy(scores, labels, ignore_index=VOID).item(), rel=1e-5)
    by_two = replace(data, test=images)
    object.__setattr__(by_two, "test_batches", lambda: ImageData.test_batches(data, batch_size=2))
    assert evaluate(model, by_two)[0] == score


def test_nothing_to_judge_by_is_said() -> None:
    images = Images(pixels=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), labels=torch.full((2, 8, 8), VOID))
    data = ImageData(train=images, test=images, mean=(0.5,) * 3, std=(0.2,) * 3, metric=MIOU)
    text = "no pixel of the 2 images to judge by has a class that is judged; give masks with other classes"
    with pytest.raises(TorchgrowError, match=text):
        evaluate(Fixed(4), data)


def test_large_images_are_evaluated_in_small_batches() -> None:
    for side, size in ((32, 500), (64, 500), (128, 125), (513, 7)):
        images = Images(
            pixels=torch.empty(600, 1, side, side, dtype=torch.uint8, device="meta"), labels=torch.ones(600)
        )
        data = ImageData(train=images, test=images, mean=(0.5,), std=(0.2,))
        seen: list[int] = []
        object.__setattr__(data, "normalise", lambda pixels, seen=seen: seen.append(len(pixels)))
        next(data.test_batches())
        assert seen == [size], side


class InOrder(ImageData):
    """Batches are of images that stand beside each other."""

    def train_batches(self, *, batch_size: int, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.train), batch_size):
            yield self.normalise(self.train.pixels[start:][:batch_size]), self.train.labels[start:][:batch_size]


class Plain(nn.Module):
    """Five classes by a 1x1 layer: every image is by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def fitted(model: nn.Module, train: Images | Streamed, lr: float = 0.0, **more: Any) -> float:
    """The training loss of an epoch, two images at a time."""
    data = InOrder(**{**vars(shapes.shapes(16, masks=True)), "train": train})
    recipe = replace(with_scale(get("deeplabv3-voc"), "smoke"), epochs=2, then=0, batch_size=2)
    if "teacher" in more:
        recipe = replace(recipe, weights="of the teacher", distil=0.5)
    record = next(fit("masks", model, torch.optim.SGD(model.parameters(), lr), data, recipe, **more))
    return record.loss


def test_a_batch_without_a_label_is_passed_over() -> None:
    """It changes nothing, and the loss of an epoch is the mean over the others."""
    some = shapes.shapes(16, masks=True).train[:4]
    void = torch.full_like(some.labels, VOID)
    model = Plain()
    before = [parameter.clone() for parameter in model.parameters()]
    mixed = Images(pixels=some.pixels.repeat(2, 1, 1, 1), labels=torch.cat([some.labels, void]))
    assert fitted(model, mixed) == pytest.approx(fitted(model, some), rel=1e-6)
    assert fitted(model, Images(pixels=some.pixels, labels=void), lr=0.1) == 0
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_what_a_teacher_says_is_learned_where_there_is_no_label() -> None:
    some = shapes.shapes(16, masks=True)
    model, teacher = Plain(), Plain()
    void = Images(pixels=some.train.pixels[:4], labels=torch.full_like(some.train.labels[:4], VOID))
    scores, wanted = (scores_of(net, some.normalise(void.pixels))[0].detach() for net in (model, teacher))
    soft = distillation_loss(scores, wanted, torch.zeros(len(scores), dtype=torch.int64), share=1.0)
    assert fitted(model, void, teacher=teacher) == pytest.approx(0.5 * float(soft), rel=1e-5)
    assert fitted(model, void, teacher=teacher, lr=1.0) > fitted(model, void, teacher=teacher)


# --- masks are augmented with their images


def test_masks_are_shifted_and_mirrored_with_their_images() -> None:
    """Every pixel shows its own label, so it must do so afterwards; what comes in is black, and void."""
    labels = torch.randint(1, 200, (50, 8, 8))
    images = Images(pixels=labels[:, None].to(torch.uint8), labels=labels)
    out = images.augmented(shift=2, mirror=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.pixels[:, 0].long(), out.labels.masked_fill(out.labels == VOID, 0))
    assert (out.labels == VOID).any()
    assert not torch.equal(out.labels, labels)


# --- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = replace(with_scale(get("deeplabv3-voc"), "smoke"), subset=None, epochs=8, optimizer="adamw", lr=0.02)
    return run.run(
        recipe, console=Console(quiet=True), out=tmp_path_factory.mktemp("runs") / "masks", beside=("uniform",)
    )


def test_a_run_learns_masks(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    grown = [record for record in records if record["network"] == "grown"]
    assert grown[-1]["loss"] < grown[0]["loss"]
    labels = shapes.shapes(32, masks=True).test.labels
    background = miou(confusion(torch.zeros_like(labels), labels, 5))
    assert grown[-1]["miou"] > background + 5  # it has found more than that
    results = json.loads((finished / "results.json").read_text())
    assert all(math.isfinite(result["miou"]) and result["accuracy"] is None for result in results.values())


@pytest.mark.parametrize(
    ("changes", "size", "text"),
    [
        ({"subset": 1}, 1, "1 training image and a batch of 16"),
        ({"subset": 3}, 2, "3 training images and a batch of 16"),
        ({"batch_size": 2}, 2, "64 training images and a batch of 2"),
    ],
)
def test_masks_need_two_images_of_every_process(
    changes: dict[str, int], size: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One branch of the network is normalised over the images of a batch alone."""
    monkeypatch.setattr(processes, "size", lambda: size)
    recipe = replace(with_scale(get("deeplabv3-voc"), "smoke"), **changes)  # type: ignore[arg-type]
    text = f"masks are trained on with 2 images a step and process at least, .*{text}.*--subset {2 * size}"
    monkeypatch.setattr(processes, "first_alone", contextlib.nullcontext)
    with pytest.raises(TorchgrowError, match=text):
        run.run(recipe, console=Console(quiet=True), out=tmp_path / "run", beside=())
    assert not list(tmp_path.iterdir())


def test_systems_for_classes_of_images_say_so(tmp_path: Path) -> None:
    recipe = replace(with_scale(get("deeplabv3-voc"), "smoke"), subset=32)
    console = Console(record=True, width=200, quiet=True)
    compare.compare(recipe, methods=["thinet"], seeds=range(1), budgets=[], console=console, out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "deeplabv3-voc.jsonl").read_text().splitlines()]
    errors = [row["error"] for row in rows if row["method"] == "thinet"]
    assert errors == ["ThiNet is written for classes of images, and recipe 'deeplabv3-voc' trains on masks"]


def test_shapes_have_masks() -> None:
    data = shapes.shapes(16, masks=True)
    assert (len(data.train), len(data.test), data.metric) == (256, 64, MIOU)
    assert data.train.labels.shape == (256, 16, 16)
