"""Adapters for torchvision: window attention whose head width is computed from the width of its input."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention as MaxVitBase
from torchvision.models.swin_transformer import ShiftedWindowAttention as SwinBase
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2 as SwinV2Base
from torchvision.models.video import swin_transformer as video

from .inferred_sizes import inferring
from .registry import adapter


@adapter(SwinBase)
class ShiftedWindowAttention(SwinBase):  # type: ignore[misc]
    """Swin's window attention for any number of heads; heads keep their width."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to the same shape."""
        return windowed(self, x, None)


@adapter(SwinV2Base)
class ShiftedWindowAttentionV2(SwinV2Base):  # type: ignore[misc]
    """Swin V2's cosine attention for any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to the same shape."""
        return windowed(self, x, torch.clamp(self.logit_scale, max=math.log(100.0)).exp())


def windowed(module: SwinBase, x: Tensor, cosine_scale: Tensor | None) -> Tensor:
    """Attention inside shifted windows; with `cosine_scale` between normalised queries and keys."""
    height, width = x.shape[1:3]
    high, wide = module.window_size
    x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
    rows, columns = x.shape[1:3]
    shift = [0 if w >= n else s for w, n, s in zip((high, wide), (rows, columns), module.shift_size, strict=True)]
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = _windows(x, high, wide)  # [B, windows, positions, C]
    weights = module.qkv.weight.chunk(3)
    biases = (None, None, None) if module.qkv.bias is None else module.qkv.bias.chunk(3)
    if cosine_scale is not None:
        biases = (biases[0], None, biases[2])  # keys have no bias in V2
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(-2, -3)
        for weight, bias in zip(weights, biases, strict=True)
    )  # [B, windows, heads, positions, head width]
    if cosine_scale is None:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * cosine_scale
    scores = scores + module.get_relative_position_bias()
    if any(shift):
        scores = scores + _mask(rows, columns, high, wide, shift, x)
    share = F.dropout(scores.softmax(-1), module.attention_dropout, module.training)
    x = F.linear((share @ v).transpose(-2, -3).flatten(-2), module.proj.weight, module.proj.bias)
    x = F.dropout(x, module.dropout, module.training)
    x = x.unflatten(1, (rows // high, columns // wide)).unflatten(3, (high, wide))
    x = x.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)
    if any(shift):
        x = x.roll((shift[0], shift[1]), (1, 2))
    return x[:, :height, :width].contiguous()


def _windows(x: Tensor, high: int, wide: int) -> Tensor:
    """[B, H, W, C] to [B, windows, positions in a window, C]."""
    x = x.unflatten(2, (-1, wide)).unflatten(1, (-1, high))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def _mask(rows: int, columns: int, high: int, wide: int, shift: list[int], like: Tensor) -> Tensor:
    """-100 between positions that only the roll has brought together, [1, windows, 1, positions, positions]."""
    region = torch.zeros(rows, columns, device=like.device, dtype=like.dtype)
    for axis, (size, window, by) in enumerate(((rows, high, shift[0]), (columns, wide, shift[1]))):
        place = torch.arange(size, device=like.device)
        stripe = (place >= size - window).to(like.dtype) + (place >= size - by).to(like.dtype) if by else place * 0.0
        region = region * 3 + (stripe[:, None] if axis == 0 else stripe[None])
    region = _windows(region[None, :, :, None], high, wide)[..., 0]  # [1, windows, positions]
    apart = region[..., None] != region[..., None, :]
    return torch.where(apart, -100.0, 0.0).to(like.dtype)[:, :, None]


attention_3d = inferring(
    video.shifted_window_attention_3d, {"q * (c // num_heads) ** -0.5": "q * q.shape[-1] ** -0.5"}, width="c"
)


@adapter(video.ShiftedWindowAttention3d)
class ShiftedWindowAttention3d(video.ShiftedWindowAttention3d):  # type: ignore[misc]
    """Video Swin's window attention for any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] to the same shape."""
        window, shift = video._get_window_and_shift_size(
            self.shift_size.copy(), list(x.shape[1:4]), self.window_size.copy()
        )
        out: Tensor = attention_3d(
            x, self.qkv.weight, self.proj.weight, self.get_relative_position_bias(window), window, self.num_heads,
            shift, self.attention_dropout, self.dropout, self.qkv.bias, self.proj.bias, self.training,
        )  # fmt: skip
        return out


@adapter(MaxVitBase)
class RelativePositionalMultiHeadAttention(MaxVitBase):  # type: ignore[misc]
    """MaxViT's attention for any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, G, P, D] to the same shape."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3) for y in self.to_qkv(x).chunk(3, -1))
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        out: Tensor = self.merge((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))
        return out
