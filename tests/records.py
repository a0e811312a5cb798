"""A small network with all that a record can hold: cut tensors, counting attributes, adapters, layers left out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import torchgrow

FOLDER = Path(__file__).parent / "saved" / "format-2"
"""The network as it was saved in format 2, and its outputs for `example()`."""


class Attention(nn.Module):
    """Self-attention whose number of heads is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 8] to the same shape."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(x), then x + mlp(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 8] to the same shape."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class Network(nn.Module):
    """Linear, nn.MultiheadAttention, three blocks, a plain layer of two modules, a head; [B, T, 4] to [B, T, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 2  # an int that counts nothing
        self.first = nn.Linear(4, 8)
        self.torchs = nn.MultiheadAttention(8, 4, batch_first=True)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.linear, self.relu = nn.Linear(8, 8), nn.ReLU()
        self.pool, self.last = nn.MaxPool1d(2, ceil_mode=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.first(x)
        x = x + self.torchs(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        x = self.relu(self.linear(x))
        return self.last(self.pool(x.transpose(1, 2)).transpose(1, 2))


def example() -> Tensor:
    """Two sequences of five."""
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def network() -> Network:
    """The frame, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


LAYERS: tuple[str | tuple[str, ...], ...] = ("blocks.1", ("linear", "relu"))
"""A block, and a layer of two modules of which one has no parameters."""


def cut(
    model: nn.Module, share: float = 0.5, seed: int = 0, layers: Sequence[str | tuple[str, ...]] = LAYERS
) -> torchgrow.Bank:
    """Shrink a `Network`: of every group a random share goes, and all `layers` go."""
    space = torchgrow.trace(model, example(), depth=list(layers) or False)
    keep = torch.rand(space.n_units, generator=torch.Generator().manual_seed(seed)) > share
    for group in range(space.n_groups):
        keep[torch.nonzero(space.group_of == group)[0]] = True
    for block in space.blocks:
        keep[block.unit] = False
    return torchgrow.shrink_(model, space, keep | ~space.removable)
