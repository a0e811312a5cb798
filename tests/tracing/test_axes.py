"""Labels over several axes: the axis that is given up is the one that costs least, however a network is spelled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import verify
from torchgrow.tracing.tracer import replay
from zoo import c3

PICTURE = (2, 3, 8, 8)


class Upsampled(nn.Module):
    """a = c3(3, 6);  [shuffled(1x1(5, 4 x 4)(stride-2 c3(6, 5)(a))), a] -> 1x1(10, 4)

    `last` puts the skip last, `norm` a batch norm on the shuffled part, `image` takes x itself for the skip.
    """

    def __init__(self, last: bool = True, norm: bool = False, image: bool = False) -> None:
        super().__init__()
        self.last, self.image = last, image
        self.a, self.down, self.up = c3(3, 6), nn.Conv2d(6, 5, 3, 2, 1), nn.Conv2d(5, 16, 1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.out = nn.Conv2d(7 if image else 10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        parts = [self.norm(F.pixel_shuffle(self.up(F.relu(self.down(a))), 2)), x if self.image else a]
        return self.out(torch.cat(parts if self.last else parts[::-1], 1))


class TwoShuffled(nn.Module):
    """[shuffled(1x1(3, 4 x 5)), shuffled(1x1(3, 4 x 6))] -> c3(11, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 20, 1), nn.Conv2d(3, 24, 1), c3(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(torch.cat([F.pixel_shuffle(self.a(x), 2), F.pixel_shuffle(self.b(x), 2)], 1)))


class ShuffledByHand(nn.Module):
    """a = c3(3, 6);  1x1(6, 4 x 6) viewed and permuted to twice the size, times a enlarged -> c3(6, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.out = c3(3, 6), nn.Conv2d(6, 24, 1), c3(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        n, _, h, w = a.shape
        y = self.up(a).view(n, 2, 2, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, 2 * h, 2 * w)
        return self.out(y * F.interpolate(a, scale_factor=2))


class DownAndUp(nn.Module):
    """c3(3, 4) -> unshuffled, 1x1(16, 6), relu, 1x1(6, 16), shuffled -> plus the first -> c3(4, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = c3(3, 4), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1), c3(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        return self.out(a + F.pixel_shuffle(self.c(F.relu(self.b(F.pixel_unshuffle(a, 2)))), 2))


class Masks(nn.Module):
    """f = relu(conv(1, 6)(wave));  masks [N, 2, 6, T] of f, each times f -> 2 waves (Conv-TasNet)"""

    def __init__(self, sources: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sources = sources
        self.encoder, self.hidden = nn.Conv1d(1, 6, 4, 2, bias=False), nn.Conv1d(6, 5, 1)
        self.masks, self.decoder = nn.Conv1d(5, 12, 1), nn.ConvTranspose1d(6, 1, 4, 2)

    def forward(self, wave: Tensor) -> Tensor:
        f = F.relu(self.encoder(wave))
        parts = self.sources(torch.sigmoid(self.masks(F.relu(self.hidden(f))))) * f[:, None]
        n, sources, channels, steps = parts.shape
        return self.decoder(parts.reshape(n * sources, channels, steps)).view(n, sources, -1)


class Restored(nn.Module):
    """y = c3(3, 8);  y + o(heads of channels attending to channels, over all pixels) -> c3(8, 3) (Restormer)"""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.a, self.qkv, self.wide = c3(3, 8), nn.Conv2d(8, 24, 1), c3(24, 24, groups=24)
        self.o, self.out = nn.Conv2d(8, 8, 1), c3(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, _, h, w = y.shape
        q, k, v = (t.reshape(n, self.heads, -1, h * w) for t in self.wide(self.qkv(y)).chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        z = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return self.out(y + self.o(z.reshape(n, -1, h, w)))


# Removable units per group, worked out from the drawings.
MAPS: list[tuple[str, nn.Module, tuple[int, ...], dict[str, int]]] = [
    ("shuffled first", Upsampled(), PICTURE, {"a": 6, "down": 5, "up": 4}),
    ("shuffled last", Upsampled(last=False), PICTURE, {"a": 6, "down": 5, "up": 4}),
    ("normalised", Upsampled(norm=True), PICTURE, {"a": 6, "down": 5, "up": 4}),
    ("beside the image", Upsampled(image=True), PICTURE, {"a": 6, "down": 5, "up": 4}),
    ("two shuffled", TwoShuffled(), PICTURE, {"a": 5, "b": 6}),
    ("by hand", ShuffledByHand(), PICTURE, {"a": 6}),
    ("down and up", DownAndUp(), PICTURE, {"a": 4, "b": 6}),
    ("masks by view", Masks(lambda m: m.view(len(m), 2, -1, m.shape[-1])), (2, 1, 32), {"encoder": 6, "hidden": 5}),
    ("masks by chunk", Masks(lambda m: torch.stack(m.chunk(2, 1), 1)), (2, 1, 32), {"encoder": 6, "hidden": 5}),
    ("masks turned", Masks(lambda m: m.unflatten(1, (-1, 2)).transpose(1, 2)), (2, 1, 32), {"encoder": 6, "hidden": 5}),
    ("channels attend", Restored(), PICTURE, {"a": 8, "temperature[0]": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "shape", "groups"), [case[1:] for case in MAPS], ids=[case[0] for case in MAPS])
def test_channels_stay_where_maps_of_them_meet_others(
    model: nn.Module, shape: tuple[int, ...], groups: dict[str, int]
) -> None:
    torch.manual_seed(0)
    report = verify(model, torch.randn(shape), fraction=0.4)
    assert report.ok, report
    assert report.groups == groups


class Queries(nn.Module):
    """x + o(4 query heads of 3 over one key/value head), put down in one of many ways; sizes taken from tensors"""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, 3)).transpose(1, 2)
        return x + self.o(self.attend(q, self.k(x)[:, None], self.v(x)[:, None]).transpose(1, 2).flatten(2))


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.expand_as(q).mT).softmax(-1) @ v.expand_as(q)


def broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1], 1) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))


def fused_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


def in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and queries in one axis, as GPT-BigCode has it."""
    n, heads, length, width = q.shape
    scores = torch.empty(n, heads * length, length, dtype=q.dtype, device=q.device)
    weights = torch.baddbmm(scores, q.reshape(n, -1, width), k[:, 0].mT, beta=0, alpha=0.5).softmax(-1)
    return torch.bmm(weights, v[:, 0]).view(n, heads, length, width)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, length, width = q.shape
    k, v = (t.expand_as(q).reshape(n * heads, length, width) for t in (k, v))
    return torch.bmm(torch.bmm(q.reshape(-1, length, width), k.mT).softmax(-1), v).view(n, -1, length, width)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    mask = torch.ones_like(scores).tril()
    return scores.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    "attend", [expanded, broadcast, repeated, fused, fused_grouped, summed, in_rows, batched, masked]
)
def test_query_heads_over_one_key_head(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    report = verify(Queries(attend), torch.randn(2, 4, 6), fraction=0.4)
    assert report.ok, report
    assert report.groups == {"q": 4}


class FixedKeyBias(nn.Module):
    """attention with 3 heads of 2, whose bias is [q_bias, zeros, v_bias] (Swin v2, BEiT)"""

    def __init__(self, zeros: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.zeros, self.qkv, self.o = zeros, nn.Linear(5, 18, bias=False), nn.Linear(6, 5)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.zeros(self.v_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)
        return x + self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("zeros", [torch.zeros_like, torch.ones_like, lambda v: torch.full_like(v, 0.5)])
def test_a_constant_like_a_labelled_tensor_is_cut_with_it(zeros: Callable[[Tensor], Tensor]) -> None:
    report = verify(FixedKeyBias(zeros), torch.randn(2, 4, 5), fraction=0.4)
    assert report.ok, report
    assert report.groups == {"q_bias[0]": 3}


def test_a_constant_like_one_tensor_ties_it_to_what_it_meets() -> None:
    """ones like a(x) have as many positions as a(x): what is multiplied by them must keep as many."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.c(b * torch.ones_like(a)) + self.d(a)

    space = replay(Scaled(), torch.randn(4, 3))
    assert torch.equal(space.unit_of["a.weight", 0], space.unit_of["b.weight", 0])
    report = verify(Scaled(), torch.randn(4, 3), fraction=0.4)
    assert report.ok, report
    assert report.groups == {"a": 6}


def test_what_follows_an_axis_of_no_parameter_is_no_unit() -> None:
    """Positions shown several times are as many as the labels they meet; alone they are nothing that could go."""

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[..., None].expand(-1, -1, 5)).flatten(1)

    space = replay(Shown(), torch.randn(4, 3))
    assert space.n_units == 0
    assert "reads values that cannot be removed" in str(space.frozen)
