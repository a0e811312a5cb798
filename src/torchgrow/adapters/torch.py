"""Adapters for PyTorch: attention of any number of heads, and encoders that never take the fused path."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import adapter


@adapter(nn.MultiheadAttention)
class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` for any number of heads; heads keep their width."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        packed, offset = self.in_proj_weight, self.in_proj_bias
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None, None, None) if offset is None else offset.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        batch, masks = q.shape[0], [_additive(attn_mask, q), _additive(key_padding_mask, q)]
        if masks[0] is not None and masks[0].dim() == 3:
            masks[0] = masks[0].unflatten(0, (batch, -1))  # one mask per head
        if masks[1] is not None:
            masks[1] = masks[1][:, None, None]
        extra: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.expand(batch, -1, -1), self.bias_v.expand(batch, -1, -1)))
        if self.add_zero_attn:
            extra.append((torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])))
        for more_k, more_v in extra:
            k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
            masks = [None if mask is None else F.pad(mask, (0, 1)) for mask in masks]
        mask = masks[0] if masks[1] is None else masks[1] if masks[0] is None else masks[0] + masks[1]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        weighting = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            share = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            out = share @ v
            weighting = share.mean(1) if average_attn_weights else share
            weighting = weighting if batched else weighting[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (out[0] if not batched else out if self.batch_first else out.transpose(0, 1)), weighting


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask to be added to scores; True in a bool mask forbids."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


@adapter(nn.TransformerEncoderLayer)
class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Never takes the fused path, which reads sizes from attributes and goes round the attention's forward."""

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        """0: neither, as far as the fused path is concerned."""
        return 0


@adapter(nn.TransformerEncoder)
class TransformerEncoder(nn.TransformerEncoder):
    """Never makes nested tensors, which only the fused path takes."""

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        """No."""
        return False
