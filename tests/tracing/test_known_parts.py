"""Known networks in small whose sizes are attributes: parts of projections, heads, groups of heads and their states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import verify
from zoo import c3


class PartialConv(nn.Module):
    """FasterNet: s + 1x1(12, 8)(relu(bn(1x1(8, 12)([c3(2, 2) of the first 2, the other 6])))), s of 8 channels"""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced, self.dim_conv3, self.dim_untouched = sliced, 2, 6
        self.conv3, self.up, self.bn = c3(2, 2, bias=False), nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.down = nn.Conv2d(12, 8, 1, bias=False)

    def forward(self, s: Any) -> Tensor:
        if self.sliced:
            first, rest = s[:, : self.dim_conv3], s[:, self.dim_conv3 :]
        else:
            first, rest = torch.split(s, [self.dim_conv3, self.dim_untouched], 1)
        return s + self.down(F.relu(self.bn(self.up(torch.cat([self.conv3(first), rest], 1)))))


class Faster(nn.Module):
    """c3(3, 8) -> two partial convolutions -> 1x1(8, 4)"""

    def __init__(self, sliced: bool = False) -> None:
        super().__init__()
        self.stem, self.out = c3(3, 8), nn.Conv2d(8, 4, 1)
        self.blocks = nn.Sequential(PartialConv(sliced), PartialConv(sliced))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)))


class StateSpace(nn.Module):
    """Mamba-2: gate, values, states' inputs and outputs, and steps out of one projection; groups of 2 heads of 3"""

    def __init__(self, groups: int = 3, heads: int = 6, width: int = 3, state: int = 4) -> None:
        super().__init__()
        self.n_groups, self.num_heads, self.head_dim, self.ssm_state_size = groups, heads, width, state
        self.intermediate_size = heads * width
        self.conv_dim = self.intermediate_size + 2 * groups * state
        self.in_proj = nn.Linear(5, self.intermediate_size + self.conv_dim + heads, bias=False)
        self.conv = nn.Conv1d(self.conv_dim, self.conv_dim, 4, groups=self.conv_dim, padding=3)
        self.rate, self.skip, self.scale = (nn.Parameter(torch.ones(n)) for n in (heads, heads, heads * width))
        self.out_proj = nn.Linear(self.intermediate_size, 5, bias=False)

    def forward(self, u: Any) -> Tensor:
        n, length, _ = u.shape
        gate, mixed, step = self.in_proj(u).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., :length].transpose(1, 2))
        held = self.n_groups * self.ssm_state_size
        x, b, c = torch.split(mixed, [self.intermediate_size, held, held], -1)
        x = x.reshape(n, length, -1, self.head_dim)
        b, c = (t.reshape(n, length, self.n_groups, self.ssm_state_size) for t in (b, c))
        b, c = (t.repeat_interleave(self.num_heads // self.n_groups, 2) for t in (b, c))
        step = F.softplus(step)
        state = x.new_zeros(n, self.num_heads, self.head_dim, self.ssm_state_size)
        steps = []
        for t in range(length):
            decay = torch.exp(-step[:, t] * self.rate.exp())[..., None, None]
            state = state * decay + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
            steps.append(
                (state * c[:, t, :, None]) @ state.new_ones(self.ssm_state_size) + self.skip[:, None] * x[:, t]
            )
        y = torch.stack(steps, 1).reshape(n, length, -1) * F.silu(gate)
        grouped = y.view(n, length, self.n_groups, -1)
        grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + 1e-5)
        return u + self.out_proj(self.scale * grouped.view(n, length, -1))


class BigCode(nn.Module):
    """GPT-BigCode: 4 query heads of 3 over one key/value head, out of one projection split by attributes"""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.kv_dim = 12, 4, 3, 3
        self.c_attn, self.c_proj, self.up = nn.Linear(12, 18), nn.Linear(12, 12), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.up(x), (12,))
        q, k, v = self.c_attn(x).unsqueeze(1).split((self.embed_dim, self.kv_dim, self.kv_dim), dim=3)
        q = q.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1))
        return x + self.c_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class Gated(nn.Module):
    """Qwen3-Next: 4 heads of 3, each with a gate beside its query, 2 key/value heads, norms of queries and keys"""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = 3, 2
        self.q, self.k, self.v, self.o = nn.Linear(5, 24), nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(12, 5)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.angle: torch.Tensor
        self.register_buffer("angle", torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, gate = torch.chunk(self.q(x).view(*x.shape[:-1], -1, self.head_dim * 2), 2, dim=-1)
        k, v = self.k(x).view(shape).transpose(1, 2), self.v(x).view(shape).transpose(1, 2)
        q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) for t in (q.transpose(1, 2), k))
        turn = torch.arange(x.shape[1], device=x.device)[:, None] * self.angle
        q, k = (self.turned(t, turn.cos(), turn.sin()) for t in (q * self.q_scale, k * self.k_scale))
        n, heads, length, width = k.shape
        k, v = (
            t[:, :, None].expand(n, heads, self.num_key_value_groups, length, width).reshape(n, -1, length, width)
            for t in (k, v)
        )
        y = ((q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1) @ v).transpose(1, 2)
        return x + self.o(y.reshape(*x.shape[:-1], -1) * torch.sigmoid(gate.reshape(*x.shape[:-1], -1)))

    def turned(self, t: Any, cos: Any, sin: Any) -> Any:
        """The first two of a head's three turned, the last as it is."""
        a, b, rest = t[..., :1], t[..., 1:2], t[..., 2:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Delta(nn.Module):
    """Qwen3-Next's other kind: 3 heads of 2, whose queries, keys and values are cut off one after the other"""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 2
        self.key_dim, self.value_dim = 6, 6
        self.qkv, self.beta, self.o = nn.Linear(5, 18), nn.Linear(5, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.silu(self.qkv(x))
        q = mixed[..., : self.key_dim]
        k, v = mixed[..., self.key_dim : 2 * self.key_dim], mixed[..., 2 * self.key_dim :]
        q, k, v = (t.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        beta = self.beta(x).sigmoid().transpose(1, 2)[..., None]
        lower = ((k * beta) @ k.transpose(2, 3)).tril(-1) + torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        values = torch.linalg.solve_triangular(lower, v * beta, upper=False)
        y = (q @ k.transpose(2, 3)).tril() @ values
        return x + self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class Positions(nn.Module):
    """YOLO11: queries and keys narrower than values, split inside every head; values also through a depthwise c3"""

    def __init__(self, heads: int, key: int, value: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.head_dim, self.scale = heads, key, value, key**-0.5
        dim = heads * value
        self.qkv, self.pe = nn.Conv2d(3, heads * (2 * key + value), 1), c3(dim, dim, groups=dim)
        self.proj = nn.Conv2d(dim, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        joined = self.qkv(x).view(n, self.num_heads, self.key_dim * 2 + self.head_dim, h * w)
        q, k, v = joined.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        y = v @ (q.transpose(-2, -1) @ k * self.scale).softmax(-1).transpose(-2, -1)
        return self.proj(y.reshape(n, -1, h, w) + self.pe(v.reshape(n, -1, h, w)))


# Removable units per group, worked out from the drawings.
KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    # the stream in its two parts; of every block its own three channels and the inner width
    "partial convolution": (Faster, (2, 3, 6, 6), [2, 6, 2, 12, 2, 12]),
    "partial convolution, sliced": (lambda: Faster(sliced=True), (2, 3, 6, 6), [2, 6, 2, 12, 2, 12]),
    "state space": (StateSpace, (2, 3, 5), [3]),
    "state space, numbers alike": (lambda: StateSpace(2, 4, 4, 4), (2, 3, 5), [2]),
    "one key head by split": (BigCode, (2, 4, 5), [4]),
    "gated heads": (Gated, (2, 4, 5), [2]),
    "delta rule": (Delta, (2, 4, 5), [3]),
    "split in heads": (lambda: Positions(3, 2, 4), (2, 3, 4, 4), [3]),
    "split in one head": (lambda: Positions(1, 3, 5), (2, 3, 4, 4), [3, 5]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_units_of_known_blocks(name: str) -> None:
    build, shape, units = KNOWN[name]
    torch.manual_seed(0)
    report = verify(build(), torch.randn(shape), fraction=0.4)
    assert report.ok, report
    assert sorted(report.groups.values()) == sorted(units), report.groups
