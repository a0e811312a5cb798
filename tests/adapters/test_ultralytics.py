"""The adapter for ultralytics: the same outputs at full width, and heads that can go."""

from typing import Any

import pytest
import torch
from torch import nn

from torchgrow import verify
from torchgrow.adapters.registry import adapted

block = pytest.importorskip("ultralytics.nn.modules.block")

PICTURE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("inner", "groups"),
    [
        # what reads it, heads, what it puts out
        (lambda: block.Attention(24, 3), {"0": 24, "1.qkv.conv": 3, "1.proj.conv": 24}),
        # of a single head the slots of queries and keys, and those of values
        (lambda: block.Attention(24, 1), {"0": 24, "1.qkv.conv": 12, "1.qkv.conv#2": 24, "1.proj.conv": 24}),
        (
            lambda: block.PSABlock(24, num_heads=3, shortcut=False),
            {"0": 24, "1.attn.qkv.conv": 3, "1.attn.proj.conv": 24, "1.ffn.0.conv": 48, "1.ffn.1.conv": 24},
        ),
        (
            lambda: block.C2PSA(256, 256),
            {"0": 256, "1.cv1.conv": 128, "1.cv2.conv": 256, "1.m.0.attn.qkv.conv": 2, "1.m.0.ffn.0.conv": 256},
        ),
    ],
    ids=["several heads", "one head", "block", "c2psa"],
)
def test_attention_computes_the_same_and_loses_heads(inner: Any, groups: Any) -> None:
    torch.manual_seed(0)
    module = inner()
    model = nn.Sequential(nn.Conv2d(3, groups["0"], 1), module, nn.Conv2d(groups["0"], 5, 1)).eval()
    with torch.no_grad():
        expected = model(PICTURE)
        with adapted(model):
            torch.testing.assert_close(model(PICTURE), expected)
    report = verify(model, PICTURE, fraction=0.4, trials=2)
    assert report.ok, report
    assert report.groups == groups
