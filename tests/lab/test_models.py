"""The lab's networks: published sizes, and no channel count that surgery could not follow."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn

from torchgrow import TorchgrowError, trace, verify
from torchgrow.lab.attention import GPT, ViT
from torchgrow.lab.models import VGG16, PadShortcut, ResNet, Staged, WideResNet, scaled
from torchgrow.lab.recurrent import LSTM

TINY: dict[str, Callable[..., Any]] = {
    "lstm": lambda width=1.0: LSTM(width, words=11, embedding=6, hidden=(8, 5)),
    "gpt": lambda width=1.0: GPT(width, words=11, features=8, layers=1, heads=3, head=2, neurons=7, context=6),
    "vit": lambda width=1.0: ViT(width, size=8, features=8, layers=1, heads=3, head=2, neurons=7),
}


def inputs(name: str, model: Any) -> Any:
    """A batch of two, with the state that the LSTM carries."""
    x = torch.randn(2, 3, 8, 8) if name == "vit" else torch.randint(11, (2, 6))
    return (x, model.start(2)) if name == "lstm" else x


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta(build: Callable[..., nn.Module], *arguments: Any, **keywords: Any) -> nn.Module:
    with torch.device("meta"):
        return build(*arguments, **keywords)


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (meta(ResNet), 269_722),  # 0.27M in He et al.
        (meta(ResNet, depth=110), 1_727_962),  # 1.7M
        (meta(ResNet, shortcut="B"), 272_474),
        (meta(VGG16), 14_728_266),  # 14.73M
        (meta(WideResNet), 36_479_194),  # 36.5M in Zagoruyko and Komodakis
        (meta(WideResNet, depth=16, widen=2), 691_674),  # 0.7M
        (meta(LSTM, embedding=1500, hidden=(1500, 1500)), 66_034_000),  # 66.0M in the paper's Table 8
    ],
)
def test_published_parameter_counts(model: Any, params: int) -> None:
    assert count(model) == params


@pytest.mark.parametrize("build", [ResNet, VGG16, lambda w: WideResNet(w, depth=10, widen=1)])
@pytest.mark.parametrize("width", [1e-9, 0.1, 0.37])
def test_any_width_runs_forward_and_backward(build: Callable[..., nn.Module], width: float) -> None:
    model = build(width)
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 10)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_takes_grey_images_of_eight_pixels(shortcut: Literal["A", "B"]) -> None:
    model = ResNet(depth=8, widths=(3, 5, 8), shortcut=shortcut, in_channels=1, classes=7)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_widths_scale_every_stage() -> None:
    model: Any = ResNet(0.5, depth=8, widths=(16, 30, 64))
    assert [model.conv1.out_channels, model.layer2[0].conv1.out_channels, model.fc.in_features] == [8, 15, 32]


@pytest.mark.parametrize(("channels", "width", "expected"), [(16, 1.0, 16), (16, 0.1, 2), (16, 1e-9, 1), (16, 1.5, 24)])
def test_scaled(channels: int, width: float, expected: int) -> None:
    assert scaled(channels, width) == expected


@pytest.mark.parametrize(("into", "out_of"), [(4, 4), (4, 5), (4, 9)])
def test_pad_shortcut_is_pad_and_stride(into: int, out_of: int) -> None:
    x = torch.randn(2, into, 7, 8)
    extra = out_of - into
    expected = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra - extra // 2))
    out = PadShortcut(into, out_of, 2)(x)
    assert torch.equal(out, expected)
    assert out.is_contiguous()


def test_pad_shortcut_follows_its_buffers() -> None:
    """Surgery cuts the buffers and what comes in; forward must need nothing else."""
    shortcut = PadShortcut(4, 8, 2)
    shortcut.before, shortcut.after = shortcut.before[:, :1], shortcut.after[:, :0]
    assert shortcut(torch.ones(2, 3, 4, 4)).sum(dim=(0, 2, 3)).tolist() == [0, 8, 8, 8]


def test_same_seed_same_weights() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(ResNet(depth=8))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: ResNet(depth=18), r"6n \+ 2 layers \(8, 14, 20, ...\), not 18"),
        (lambda: ResNet(widths=(16, 32)), r"three positive channel counts such as \(16, 32, 64\), got \(16, 32\)"),
        (lambda: ResNet(widths=(0, 32, 64)), "three positive channel counts"),
        (
            lambda: ResNet(shortcut="C"),  # type: ignore[arg-type]
            'shortcut is "A" .* or "B" .*, got \'C\'',
        ),
        (
            lambda: ResNet(widths=(32, 16, 16)),
            'cannot go from 32 to 16; use widths that do not shrink, or shortcut="B"',
        ),
        (lambda: WideResNet(depth=20), r"6n \+ 4 layers .*, not 20"),
        (lambda: WideResNet(widen=0), "widen is a factor of at least 1, got 0"),
    ],
)
def test_impossible_shapes_are_refused(build: Callable[..., nn.Module], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        build()


@pytest.mark.parametrize(("name", "units"), [("lstm", 8 + 5), ("gpt", 3 + 7), ("vit", 3 + 7)])
def test_hidden_units_heads_and_neurons_can_go_exactly(name: str, units: Any) -> None:
    """With the embedding kept, as the recipes do; the residual stream of a transformer stays by itself."""
    model = TINY[name]()
    x, carried = inputs(name, model), getattr(model, "carried", None)
    protect = ("embedding",) if name == "lstm" else ()
    space = trace(model, x, protect=protect, carried=carried)
    assert int(space.removable.sum()) == units
    assert not [frozen for frozen in space.frozen if frozen.op == "proof"]
    assert verify(model, x, protect=protect, carried=carried).ok


@pytest.mark.parametrize(("name", "names"), [("lstm", ("layers",)), ("gpt", ("blocks",)), ("vit", ("blocks",))])
def test_width_scales_what_growing_scales_and_nothing_else(name: str, names: Any) -> None:
    whole, half = (dict(TINY[name](width).named_parameters()) for width in (1.0, 0.5))
    changed = {key.partition(".")[0] for key in whole if whole[key].shape != half[key].shape}
    assert changed == {*names, *(("decoder",) if name == "lstm" else ())}
    assert whole.keys() == half.keys()


def test_gpt_sees_no_word_that_comes_later() -> None:
    model = TINY["gpt"]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # its blocks begin by handing on what comes in, and would let nothing through
    words = torch.arange(6)[None]
    changed = words.clone()
    changed[0, 4] = 9
    a, b = model(words), model(changed)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_a_transformer_begins_with_blocks_that_hand_their_input_on_and_learn_at_once(name: str) -> None:
    model = TINY[name]()
    h = torch.randn(2, 6, 8)
    assert torch.equal(model.blocks(h), h)
    model(inputs(name, model)).square().mean().backward()
    assert all(block.attention.out.weight.grad.any() and block.down.weight.grad.any() for block in model.blocks)


def test_gpt_ties_its_decoder() -> None:
    model = TINY["gpt"]()
    assert model.decoder.weight is model.embedding.weight


def test_lstm_goes_on_from_its_state() -> None:
    """Two halves of a text, the state handed on, are the whole."""
    model = TINY["lstm"]().eval()
    words = torch.randint(11, (2, 6))
    whole, end = model(words)
    first, state = model(words[:, :3])
    second, after = model(words[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(after, end)
    torch.testing.assert_close(model(words, model.start(2)), (whole, end))


def test_lstm_drops_before_between_and_after_its_layers() -> None:
    """With nearly everything dropped, scores are the decoder's bias, whatever the words are."""
    model = LSTM(words=11, embedding=6, hidden=(8, 5), dropout=0.999999)
    scores, _ = model(torch.randint(11, (2, 6)))
    assert torch.equal(scores, model.decoder.bias.expand_as(scores))
    assert not torch.equal(model.eval()(torch.randint(11, (2, 6)))[0], scores)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: LSTM(hidden=()), r"hidden are the positive unit counts of one or more layers, got \(\)"),
        (lambda: LSTM(hidden=(4, 0)), "hidden are the positive unit counts"),
        (lambda: LSTM(dropout=1.0), "dropout is the share that is dropped, at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_lstms_are_refused(build: Callable[..., nn.Module], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        build()


@pytest.mark.parametrize(
    "build",
    [
        partial(ResNet, depth=14),
        partial(WideResNet, depth=10, widen=1),
        VGG16,
        partial(Staged, unit="plain", units=(2, 2, 2), widths=(16, 32, 64)),
    ],
)
def test_weights_begin_by_the_modules_own_rules(build: Callable[..., nn.Module]) -> None:
    """What a meta frame gives birth to is drawn by reset_parameters: no constructor may know better."""
    torch.manual_seed(0)
    model = build()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            before = module.weight.std().item()
            module.reset_parameters()
            fan_out = module.weight.numel() / module.in_channels
            assert module.weight.std().item() == pytest.approx(before, rel=0.25), name
            assert before == pytest.approx((2 / fan_out) ** 0.5, rel=0.25), name
