"""Functions whose views infer the size that came from the width of the input."""

import traceback

import pytest
import torch

from torchgrow.adapters.inferred_sizes import inferring


def heads(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    B, N, C = x.shape
    y = (x @ weight).reshape(B, N, count, C // count).transpose(1, 2)
    return y.transpose(1, 2).reshape(B, N, C)


def channels(x: torch.Tensor) -> torch.Tensor:
    B, C, H, W = x.shape
    if B == 3:
        raise ValueError("three")
    return x.view(B, C, -1).view(B * C, H * W).view(B, -1)


def test_views_of_fewer_heads_than_the_input_is_wide() -> None:
    x, narrow = torch.randn(2, 5, 12), torch.randn(12, 8)
    torch.testing.assert_close(inferring(heads)(x, narrow, 2), x @ narrow)
    wide = torch.randn(12, 12)
    assert torch.equal(inferring(heads)(x, wide, 3), heads(x, wide, 3))


def test_what_infers_a_size_already_or_names_another_width_stays() -> None:
    assert inferring(channels, width="D") is channels
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(inferring(channels)(x), channels(x))


def test_edits_come_first_and_lines_stay() -> None:
    made = inferring(channels, {"three": "3", "B == 3": "B == 2"})
    with pytest.raises(ValueError, match="3") as caught:
        made(torch.randn(2, 4, 3, 3))
    frame = traceback.extract_tb(caught.tb)[-1]
    assert (frame.filename, frame.line) == (__file__, 'raise ValueError("three")')
