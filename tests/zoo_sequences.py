"""Small hard models of sequences, each drawn in its docstring; a part of the zoo."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Language(nn.Module):
    """tokens -> embedding(11, 6) -> recurrent layer(6, 5) -> linear(11)"""

    def __init__(self, kind: Callable[..., nn.RNNBase], **kwargs: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 6), kind(6, 5, **kwargs)
        width = (kwargs.get("proj_size") or 5) * (2 if kwargs.get("bidirectional") else 1)
        self.out = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(x))[0])


class Packed(nn.Module):
    """vectors -> linear(6, 5) -> packed sequence -> gru(5, 4), 2 layers -> unpacked, and its last state -> linear"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.out = nn.Linear(6, 5), nn.GRU(5, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        lengths = torch.arange(x.shape[0], 0, -1)
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), lengths, batch_first=True)
        steps, last = self.rnn(packed)
        return self.out(nn.utils.rnn.pad_packed_sequence(steps, batch_first=True)[0]), self.out(last[-1])


class States(nn.Module):
    """(h, c) = linear(6, 4)(x_0), twice -> lstm(6, 4) from that state -> its last h and c -> linear"""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.c, self.rnn, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.LSTM(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.rnn(x, (self.h(x[:1]), self.c(x[:1])))
        return self.out(h[0] + c[0])


class Cell(nn.Module):
    """three steps of a recurrent cell(6, 5) from zeros -> linear(5, 3)"""

    def __init__(self, kind: Callable[..., nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.out = kind(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Heads(nn.Module):
    """x + o(attention(q(x), k(x), v(x))), 4 heads of 3, `kv` key/value heads; sizes taken from tensors"""

    def __init__(self, kv: int = 4, rotary: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.kv, self.fused = kv, fused
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 3 * kv), nn.Linear(6, 3 * kv), nn.Linear(12, 6)
        self.angle: Tensor | None
        self.register_buffer("angle", torch.tensor([0.1, 0.2, 0.3]) if rotary else None)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.angle is not None:
            turn = (torch.arange(x.shape[1], device=x.device)[:, None] * self.angle).cos()
            q, k = q * turn, k * turn
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv != 4)
        else:
            y = (q @ k.mT).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).flatten(2))


class CountedHeads(nn.Module):
    """attention over qkv(6, 3 x 12) with 4 heads, whose number and total width are attributes"""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.all_head_size, self.dim = 4, 12, 6
        self.qkv, self.o = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, 3).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, length, self.all_head_size)
        return self.o(y)


class Multihead(nn.Module):
    """a(x) -> nn.MultiheadAttention(6, 3 heads) on itself -> o;  its weights are thrown away"""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.o(self.attention(y, y, y)[0])


class Experts(nn.Module):
    """the likelier of two experts up[2, 5, 6], down[2, 6, 5] for every row, added up by index"""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(2, 5, 6)), nn.Parameter(torch.randn(2, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, choice = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for expert in range(2):
            mine = torch.nonzero(choice == expert).flatten()
            y = F.linear(F.silu(F.linear(rows[mine], self.up[expert])), self.down[expert])
            out.index_add_(0, mine, y * weight[mine, None])
        return out


class Vectors(nn.Module):
    """relu(a(6, 5) x) . w(5), matrix times vector"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(6, 5), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x[0])) @ self.w


class TwoSides(nn.Module):
    """nn.Bilinear(5, 4, 6) of relu(a(6, 5) x) and relu(b(6, 4) x) -> c(6, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.c = nn.Linear(6, 5), nn.Linear(6, 4), nn.Bilinear(5, 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.mix(F.relu(self.a(x)), F.relu(self.b(x)))))


class Bag(nn.Module):
    """tokens -> nn.EmbeddingBag(11, 6) -> relu -> linear(6, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(11, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.bag(x)))


class SharedKeys(nn.Module):
    """attention with 4 query and 2 key/value heads, whose numbers, ratio and total width are attributes"""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.groups, self.head_dim, self.hidden = 4, 2, 2, 3, 12
        self.q, self.k, self.v, self.o = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 12)
        self.a = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.a(x), (12,))
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        y = (q @ k.mT).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, length, self.hidden))


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Language(nn.LSTM),
    "lstm-bidirectional": lambda: Language(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm-projected": lambda: Language(nn.LSTM, num_layers=2, proj_size=3),
    "gru": lambda: Language(nn.GRU, batch_first=True),
    "rnn": lambda: Language(nn.RNN, nonlinearity="relu", bias=False),
    "packed": Packed,
    "states": States,
    "lstm-cell": lambda: Cell(nn.LSTMCell),
    "gru-cell": lambda: Cell(nn.GRUCell),
    "rnn-cell": lambda: Cell(nn.RNNCell),
    "heads": Heads,
    "heads-grouped": lambda: Heads(kv=2),
    "heads-rotary": lambda: Heads(rotary=True),
    "heads-by-hand": lambda: Heads(fused=False),
    "heads-counted": CountedHeads,
    "multihead": Multihead,
    "multihead-extra": lambda: Multihead(bias=False, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=6),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), 1),
    "decoder": lambda: nn.TransformerDecoderLayer(6, 2, 5, batch_first=True),
    "experts": Experts,
    "vectors": Vectors,
    "two-sides": TwoSides,
    "bag": Bag,
    "shared-keys": SharedKeys,
}
"""Models of sequences: [2, 4, 6] vectors, or [2, 4] tokens where they have an embedding."""
