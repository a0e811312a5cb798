"""Random networks, and how many units they have: worked out on plain lists of numbers, one per channel.

A program is a list of (block, number) and a head; the number picks the block's options. `Drawn` builds the network
and keeps its own books: `Books` holds one label per channel, tied or frozen as the meaning of each block demands.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Space, shrink_

FROZEN = 0
SIDE = 8


class Books:
    """Labels of channels: a union-find written out."""

    def __init__(self) -> None:
        self.parent = [FROZEN]
        self.axes: list[list[int]] = []

    def new(self, count: int) -> list[int]:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return list(range(first, first + count))

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def tie(self, a: list[int], b: list[int]) -> None:
        for x, y in zip(a, b, strict=True):
            low, high = sorted((self.root(x), self.root(y)))
            self.parent[high] = low

    def freeze(self, labels: list[int]) -> None:
        self.tie(labels, [FROZEN] * len(labels))

    def see(self, labels: list[int]) -> None:
        """Note an axis: if it turns out to hold one unit alone, that one must stay."""
        self.axes.append(labels)

    def free(self) -> int:
        """Number of units that may go."""
        alone = [roots for roots in ({self.root(x) for x in axis} for axis in self.axes) if len(roots) == 1]
        return len({self.root(label) for label in range(len(self.parent))}.difference({FROZEN}, *alone))


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, F.gelu, F.silu, torch.sigmoid, F.hardswish, torch.tanh, F.leaky_relu, F.elu, F.softplus, torch.abs,
]  # fmt: skip


class Act(nn.Module):
    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which % len(ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.which](x)


class Block(nn.Module):
    """Named layers and a function of them and x."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.children())


class Scale(nn.Module):
    """Raw parameters, used as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor, self.offset = nn.Parameter(torch.ones(width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def glu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


class Drawn(nn.Module):
    """The network of a program.

    Attributes:
        expected: removable units, by the books.
    """

    def __init__(self, program: list[tuple[str, int]], head: tuple[str, int]) -> None:
        super().__init__()
        self.books, self.side = Books(), SIDE
        self.labels = self.books.new(8)
        blocks: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        for name, number in program:
            blocks.append(getattr(self, name)(number))
            self.books.see(self.labels)
        blocks.append(getattr(self, f"head_{head[0]}")(head[1]))
        self.blocks = nn.ModuleList(blocks)
        self.expected = self.books.free()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def width(self) -> int:
        return len(self.labels)

    # --- blocks: what they compute, and what that means for the labels ---

    def conv(self, number: int) -> nn.Module:
        out = [4, 6, 8, 12][number % 4]
        layer = nn.Conv2d(self.width, out, [1, 3][number // 4 % 2], padding=number // 4 % 2, bias=bool(number // 8 % 2))
        self.labels = self.books.new(out)
        return nn.Sequential(layer, Act(number // 16))

    def batch_norm(self, number: int) -> nn.Module:
        return nn.BatchNorm2d(self.width, affine=bool(number % 3))

    def group_norm(self, number: int) -> nn.Module:
        groups = [g for g in (1, 2, 4) if self.width % g == 0]
        g = groups[number % len(groups)]
        rows = [self.labels[i : i + self.width // g] for i in range(0, self.width, self.width // g)]
        for row in rows:
            self.books.tie(row, row[:1] * len(row))
        if g == 1:
            self.books.freeze(self.labels)
        return nn.GroupNorm(g, self.width)

    def act(self, number: int) -> nn.Module:
        return Act(number)

    def pool(self, number: int) -> nn.Module:
        if self.side < 4:
            return nn.Identity()
        self.side //= 2
        return nn.MaxPool2d(2) if number % 2 else nn.AvgPool2d(2)

    def depthwise(self, number: int) -> nn.Module:
        return nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width)

    def grouped(self, number: int) -> nn.Module:
        choices = [g for g in (2, 4) if self.width % g == 0 and self.width > g]
        if not choices:
            return nn.Identity()
        g = choices[number % len(choices)]
        each, out = self.width // g, [8, 12][number // 2 % 2]
        layer = nn.Conv2d(self.width, out, 3, padding=1, groups=g)
        if g >= each:  # whole groups
            heads = [self.labels[i * each] for i in range(g) for _ in range(each)]
            self.books.tie(self.labels, heads)
            self.labels = [self.labels[i * each] for i in range(g) for _ in range(out // g)]
        else:  # the same slot of every group
            self.books.tie(self.labels, self.labels[:each] * g)
            self.labels = self.books.new(out // g) * g
        return layer

    def residual(self, number: int) -> nn.Module:
        inner = [4, 6][number % 2]
        self.books.new(inner)
        body = nn.Sequential(
            nn.Conv2d(self.width, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            Act(number // 2),
            nn.Conv2d(inner, self.width, 1),
        )
        self.books.tie(self.labels, self.books.new(self.width))
        return Block(lambda x, f: x + f(x), f=body)

    def dense(self, number: int) -> nn.Module:
        if self.width > 24:
            return nn.Identity()
        more = [3, 4][number % 2]
        layer = nn.Conv2d(self.width, more, 3, padding=1)
        self.labels = self.labels + self.books.new(more)
        return Block(lambda x, f: torch.cat([x, f(x)], 1), f=layer)

    def branches(self, number: int) -> nn.Module:
        a, b = nn.Conv2d(self.width, 4, 1), nn.Conv2d(self.width, 6, 3, padding=1)
        self.labels = self.books.new(4) + self.books.new(6)
        return Block(lambda x, f, g: torch.cat([f(x), g(x)], 1), f=a, g=b)

    def gate(self, number: int) -> nn.Module:
        if self.width % 2 or self.width < 4:
            return nn.Identity()
        half = self.width // 2
        self.books.tie(self.labels[:half], self.labels[half:])
        self.labels = self.labels[:half]
        return Block(glu)

    def shuffle(self, number: int) -> nn.Module:
        if self.width % 2 or self.width < 6:
            return nn.Identity()
        half = self.width // 2
        self.books.tie(self.labels[:half], self.labels[half:])
        self.labels = [self.labels[i + j * half] for i in range(half) for j in range(2)]
        return Block(shuffled)

    def pixel_shuffle(self, number: int) -> nn.Module:
        if self.width % 4 or self.width < 8 or self.side > 8:
            return nn.Identity()
        for i in range(0, self.width, 4):
            self.books.tie(self.labels[i : i + 4], self.labels[i : i + 1] * 4)
        self.labels = self.labels[::4]
        self.side *= 2
        return nn.PixelShuffle(2)

    def squeeze_excite(self, number: int) -> nn.Module:
        down, up = nn.Linear(self.width, 3), nn.Linear(3, self.width)
        self.books.new(3)
        self.books.tie(self.labels, self.books.new(self.width))
        return Block(
            lambda x, f, g: x * torch.sigmoid(g(F.relu(f(x.mean((2, 3))))))[:, :, None, None], down=down, up=up
        )

    def shared(self, number: int) -> nn.Module:
        layer = nn.Conv2d(self.width, self.width, 3, padding=1)
        rows = self.books.new(self.width)
        self.books.tie(self.labels, rows)
        self.labels = rows
        return Block(lambda x, f: f(F.relu(f(x))), f=layer)

    def scale(self, number: int) -> nn.Module:
        self.books.tie(self.labels, self.books.new(self.width))
        return Scale(self.width)

    def dropout(self, number: int) -> nn.Module:
        return nn.Dropout2d(0.1)

    # --- heads ---

    def head_pooled(self, number: int) -> nn.Module:
        self.books.new(7)
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, 7), Act(number), nn.Linear(7, 3)
        )

    def head_flat(self, number: int) -> nn.Module:
        small = nn.AdaptiveAvgPool2d(2)
        return nn.Sequential(small, nn.Flatten(), nn.Linear(4 * self.width, 3))

    def tokens(self) -> nn.Module:
        return Block(lambda x: F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2))

    def head_recurrent(self, number: int) -> nn.Module:
        kind = [nn.LSTM, nn.GRU, nn.RNN][number % 3]
        both = bool(number // 3 % 2)
        layer = kind(self.width, 5, num_layers=1 + number // 6 % 2, bidirectional=both, batch_first=True)
        self.books.new(5)
        out = nn.Linear(10 if both else 5, 3)
        return Block(lambda x, t, r, f: f(r(t(x))[0]), t=self.tokens(), r=layer, f=out)

    def head_attention(self, number: int) -> nn.Module:
        heads, width = [(2, 6), (4, 8), (3, 6)][number % 3]
        embed, layer = nn.Linear(self.width, width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.books.new(width), self.books.new(heads)
        after = self.books.new(width)
        out: nn.Module = nn.Linear(width, 3)
        if number // 3 % 2:  # a norm over the features
            self.books.freeze(after)
            out = nn.Sequential(nn.LayerNorm(width), out)
        return Block(lambda x, t, e, a, f: f(attend(a, e(t(x)))), t=self.tokens(), e=embed, a=layer, f=out)

    def head_conv(self, number: int) -> nn.Module:
        return nn.Conv2d(self.width, 3, 1)


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x, x, x, need_weights=False)[0]
    return out


BLOCKS = [
    "conv", "batch_norm", "group_norm", "act", "pool", "depthwise", "grouped", "residual", "dense", "branches", "gate",
    "shuffle", "pixel_shuffle", "squeeze_excite", "shared", "scale", "dropout",
]  # fmt: skip
HEADS = ["pooled", "flat", "recurrent", "attention", "conv"]


def program(seed: int) -> tuple[list[tuple[str, int]], tuple[str, int]]:
    """A random program of one to nine blocks."""
    draw = random.Random(seed)
    blocks = [(draw.choice(BLOCKS), draw.randrange(1000)) for _ in range(draw.randint(1, 9))]
    return blocks, (draw.choice(HEADS), draw.randrange(1000))


def build(blocks: list[tuple[str, int]], head: tuple[str, int], seed: int = 0) -> Drawn:
    """The network, with random weights and statistics far from their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Drawn(blocks, head)
        randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    """Weights and statistics far from their defaults."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)


def found(space: Space) -> int:
    """Units that may go, and those that stay only because they are alone in their group."""
    lone = [frozen for frozen in space.frozen if frozen.reason == "is the only unit of its group"]
    whole = [f for f in lone if any(len(space.unit_of[place].unique()) == 1 for place in f.places)]
    return int(space.removable.sum()) + len(lone) - len(whole)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy that shares tensors in compressed rows: PyTorch cannot copy those, and nothing writes into them."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value for value in held if value.layout == torch.sparse_csr}
    return copy.deepcopy(model, memo)


def zeroed(model: nn.Module, space: Space, keep: Tensor) -> nn.Module:
    """A copy of the frame with every position of every absent unit set to zero, one by one."""
    model = copied(model)
    for (name, axis), units in space.unit_of.items():
        for position, unit in enumerate(units.tolist()):
            if unit >= 0 and not keep[unit] and name in space.parameters:
                model.get_parameter(name).data.select(axis, position).zero_()
    return model


def without(space: Space, share: float, seed: int) -> Tensor:
    """A keep vector without a random share of every group, down to one unit."""
    generator, keep = torch.Generator().manual_seed(seed), space.everything()
    for group in range(space.n_groups):
        units = torch.nonzero((space.group_of == group) & space.removable).flatten()
        most = int((space.group_of == group).sum()) - 1
        gone = units[torch.randperm(len(units), generator=generator)[: min(most, max(1, round(share * len(units))))]]
        keep[gone] = False
    return keep


def error(model: nn.Module, space: Space, share: float, seed: int, x: Tensor) -> float:
    """Relative error of a compact copy against the literal oracle."""
    keep = without(space, share, seed)
    compact = copy.deepcopy(model)
    shrink_(compact, space, keep)
    with torch.no_grad():
        expected, out = zeroed(model, space, keep)(x), compact(x)
    return float((out - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def example(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
