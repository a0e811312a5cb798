"""Adapters for timm: the same outputs at full width, and heads that can go; each module on its own, tiny."""

import inspect
import pickle
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchgrow import load, save, shrink_, trace, verify
from torchgrow.adapters.registry import ADAPTERS, adapted

timm = pytest.importorskip("timm")


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


FOUR = tokens(2, 4, 12)
PICTURE = tokens(2, 4, 4, 12)
KEYS = {"key_dim": 4, "attn_ratio": 2, "resolution": (2, 2)}
UNITS = {"window_size": 2, "use_mask_unit_attn": True}
POOLED = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (1, 1), "stride_kv": (2, 2)}

USUAL = {"dim": 12, "num_heads": 3}

# Where in timm; what it is built with; what it is given. All have 3 heads, or 3 channels in a single one.
CASES: list[tuple[str, Mapping[str, object], tuple[object, ...]]] = [
    ("layers.attention_pool.AttentionPoolLatent", {"in_features": 12, "num_heads": 3}, (FOUR,)),
    ("models.beit.Attention", {**USUAL, "qkv_bias": True}, (FOUR,)),
    ("models.cait.ClassAttn", USUAL, (FOUR,)),
    ("models.cait.TalkingHeadAttn", USUAL, (FOUR,)),
    ("models.convit.GPSA", USUAL, (FOUR,)),
    ("models.convit.MHSA", USUAL, (FOUR,)),
    ("models.crossvit.CrossAttention", USUAL, (FOUR,)),
    ("models.davit.ChannelAttention", USUAL, (FOUR,)),
    ("models.davit.ChannelAttentionV2", USUAL, (FOUR,)),
    ("models.davit.WindowAttention", {**USUAL, "window_size": (2, 2)}, (FOUR,)),
    ("models.edgenext.CrossCovarianceAttn", USUAL, (FOUR,)),
    ("models.efficientformer.Attention", {**USUAL, **KEYS, "resolution": 2}, (FOUR,)),
    ("models.eva.EvaAttention", {**USUAL, "scale_norm": False}, (FOUR,)),
    ("models.fastvit.Attention", {"dim": 12, "head_dim": 4}, (PICTURE.permute(0, 3, 1, 2),)),
    ("models.gcvit.WindowAttentionGlobal", {**USUAL, "window_size": (2, 2), "use_global": False}, (FOUR,)),
    ("models.hiera.MaskUnitAttention", {"dim": 12, "dim_out": 12, "heads": 3}, (FOUR,)),
    ("models.hiera.MaskUnitAttention", {"dim": 12, "dim_out": 12, "heads": 3, "q_stride": 2, **UNITS}, (FOUR,)),
    ("models.hiera.MaskUnitAttention", {"dim": 12, "dim_out": 3, "heads": 1, **UNITS}, (FOUR,)),  # its channels
    ("models.levit.Attention", {**USUAL, **KEYS}, (FOUR,)),
    (
        "models.levit.AttentionDownsample",
        {"in_dim": 12, "out_dim": 10, "num_heads": 3, **KEYS, "resolution": (4, 4)},
        (PICTURE.flatten(1, 2),),
    ),
    (
        "models.mvitv2.MultiScaleAttention",
        {"dim": 12, "dim_out": 12, "num_heads": 3, "feat_size": (4, 4), **POOLED},
        (tokens(2, 17, 12), [4, 4]),
    ),
    ("models.nest.Attention", USUAL, (PICTURE,)),
    ("models.pvt_v2.Attention", {**USUAL, "sr_ratio": 2}, (PICTURE.flatten(1, 2), [4, 4])),
    ("models.swin_transformer_v2.WindowAttention", {**USUAL, "window_size": (2, 2)}, (FOUR,)),
    ("models.swin_transformer_v2_cr.WindowMultiHeadAttention", {**USUAL, "window_size": (2, 2)}, (FOUR,)),
    ("models.tiny_vit.Attention", {**USUAL, **KEYS, "attn_ratio": 1}, (FOUR,)),
    ("models.twins.GlobalSubSampleAttn", {**USUAL, "sr_ratio": 2}, (PICTURE.flatten(1, 2), (4, 4))),
    ("models.twins.LocallyGroupedAttn", {**USUAL, "ws": 2}, (tokens(2, 15, 12), (3, 5))),
    ("models.volo.Attention", USUAL, (PICTURE,)),
    ("models.volo.OutlookAttention", {**USUAL, "kernel_size": 3, "padding": 1}, (PICTURE,)),
    ("models.xcit.XCA", USUAL, (FOUR,)),
]


@pytest.mark.parametrize(("path", "build", "inputs"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_attention_computes_the_same_and_loses_heads(path: Any, build: Any, inputs: Any) -> None:
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(f"timm.{module}"), name)
    torch.manual_seed(0)
    model = kind(**build)
    model.eval()  # some of timm's return nothing
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        expected = model(*inputs)
        with adapted(model):
            assert type(model) is not kind
            torch.testing.assert_close(model(*inputs), expected)
    report = verify(model, inputs, fraction=0.4, trials=2)
    assert report.ok, report
    assert 3 in report.groups.values(), report


def test_parts_of_a_mixed_convolution_become_narrower() -> None:
    from timm.layers import MixedConv2d

    model = nn.Sequential(nn.Conv2d(3, 6, 1), MixedConv2d(6, 6, [1, 3], depthwise=True), nn.Conv2d(6, 2, 1))
    report = verify(model, tokens(2, 3, 5, 5), fraction=0.4, trials=2)
    assert report.ok, report
    assert report.groups == {"0": 3}  # a channel of every part


def test_paths_of_a_selective_kernel_become_narrower() -> None:
    from timm.layers import SelectiveKernel

    kernel = SelectiveKernel(8, 8, split_input=True, rd_channels=8, rd_divisor=1)
    report = verify(nn.Sequential(nn.Conv2d(3, 8, 1), kernel, nn.Conv2d(8, 2, 1)), tokens(2, 3, 5, 5), trials=2)
    assert report.ok, report
    assert report.groups["0"] == 4  # a channel of every path


def test_a_blur_that_takes_its_groups_from_the_input() -> None:
    from timm.layers import BlurPool2d

    report = verify(nn.Sequential(nn.Conv2d(3, 8, 1), BlurPool2d(8), nn.Conv2d(8, 2, 1)), tokens(2, 3, 6, 6), trials=2)
    assert report.ok, report
    assert report.groups == {"0": 8}


def test_every_class_of_this_release_is_adapted_once() -> None:
    from torchgrow import adapters_timm

    classes = adapters_timm.CLASSES
    wanted = [getattr(import_module(f"timm.{path}"), name) for path, names in classes.items() for name in names]
    assert [kind for kind in wanted if kind not in ADAPTERS] == []
    for kind in wanted:
        subclass = ADAPTERS[kind]
        assert pickle.loads(pickle.dumps(subclass)) is subclass
        assert inspect.getsourcefile(subclass.forward) == inspect.getsourcefile(kind.forward)


def test_what_was_adapted_and_cut_is_saved_and_loaded(tmp_path: Path) -> None:
    from timm.models.eva import EvaAttention

    def build() -> Any:
        return nn.Sequential(nn.Linear(6, 12), EvaAttention(12, num_heads=3, scale_norm=False), nn.Linear(12, 2))

    model, x = build().eval(), tokens(2, 5, 6)
    space = trace(model, x)
    keep = space.everything()
    heads = next(g for g, name in enumerate(space.group_names) if name.startswith("1."))
    keep[torch.nonzero(space.group_of == heads)[1]] = False
    shrink_(model, space, keep)
    assert model[1].num_heads == 2
    save(model, tmp_path / "net")
    torch.testing.assert_close(load(tmp_path / "net", build).eval()(x), model(x))
