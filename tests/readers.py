"""Networks whose units are read in different ways: by exact readers, which can be compensated, and by others."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(0)
FLAT = [torch.randn(7, 6, generator=GENERATOR).double() for _ in range(3)]
PICTURES = [torch.randn(5, 3, 8, 8, generator=GENERATOR).double() for _ in range(3)]
WORDS = [torch.randint(11, (4, 5), generator=GENERATOR) for _ in range(3)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 20), nn.Sigmoid(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 4))


def convolutions() -> nn.Sequential:
    """3x3 without padding, 1x1, a stride, padding by reflection, and a linear layer on 3 x 3 positions a channel."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 12, 1), nn.ReLU()),
        *(nn.Conv2d(12, 9, 2, stride=2), nn.Tanh(), nn.Conv2d(9, 7, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(63, 10), nn.ReLU(), nn.Linear(10, 4)),
    )


class Transposed(nn.Module):
    """GPT-2's linear map, as transformers has it."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m) / n), nn.Parameter(torch.randn(m))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], -1)


class Gpt(nn.Module):
    """Embedding, attention, two FFNs (of two kinds of linear maps), norms, a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.queries, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.fc, self.proj = Transposed(8, 18), Transposed(18, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        q, k, v = self.queries(self.norm(x)).view(*tokens.shape, 3, 2, 4).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        x = x + self.proj(F.gelu(self.fc(x)))
        return F.linear(self.norm(x), self.words.weight)


class Concatenated(nn.Module):
    """One reader of two producers, and another of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 12)
        self.both, self.one, self.last = nn.Linear(22, 9), nn.Linear(10, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.sigmoid(self.a(x)), torch.relu(self.b(x))
        return self.last(torch.relu(self.both(torch.cat([a, b], 1)) + self.one(a)))


class Mixed(nn.Module):
    """Channels that are read by one convolution with zeros around, one without, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.padded = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, padding=1)
        self.plain, self.bare = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1, bias=False)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        return self.last(torch.relu(self.padded(x) + self.plain(x) + self.bare(x)).mean((2, 3)))


LAWS: dict[str, tuple[Callable[[], nn.Module], list[Tensor], str]] = {
    "mlp": (mlp, FLAT, "2 4"),
    "convolutions": (convolutions, PICTURES, "2 4 6 9 11"),
    "gpt": (Gpt, WORDS, "out down proj"),
    "concatenated": (Concatenated, FLAT, "both one last"),
    "mixed": (Mixed, PICTURES, "plain last"),
}
"""Network, batches, and which of its modules are exact readers."""


class Odd(nn.Module):
    """`way` says how the hidden units are read."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.last = way, nn.Conv2d(3, 12, 1), nn.Conv2d(8, 2, 1)
        self.reader: Any = nn.Conv2d(12, 8, 1)
        if way == "zeros around":
            self.reader = nn.Conv2d(12, 8, 3, padding=(0, 1))
        elif way == "same":
            self.reader = nn.Conv2d(12, 8, 3, padding="same")
        elif way == "no bias":
            self.reader = nn.Conv2d(12, 8, 1, bias=False)
        elif way == "two groups":
            self.reader = nn.Conv2d(12, 8, 1, groups=2)
        elif way == "transposed":
            self.reader = nn.ConvTranspose2d(12, 8, 1)
        elif way == "two modules":
            self.other = nn.Conv2d(12, 8, 1)
            self.other.weight = self.reader.weight
        elif way == "one bias":
            self.other = nn.Conv2d(12, 8, 1)
            self.other.bias = self.reader.bias

    def forward(self, x: Tensor) -> Tensor:
        x, read = torch.sigmoid(self.first(x)), self.reader
        if self.way == "twice":
            y = read(x) + read(x.flip(0))
        elif self.way in ("two modules", "one bias"):
            y = read(x) + self.other(x)
        elif self.way == "a function":
            y = read(x) + F.conv2d(x, read.weight)
        elif self.way == "its bias":
            y = read(x) + torch.relu(read.bias).sum()
        elif self.way == "in another type":
            y = F.conv2d(x.float(), read.weight.float(), read.bias.float()).double()
        elif self.way == "scaled":
            y = F.conv2d(x, read.weight * 2, read.bias)
        else:
            y = read(x)
        return self.last(torch.relu(y)).mean((2, 3))


WAYS = ["zeros around", "same", "no bias", "two groups", "transposed", "two modules", "one bias", "twice"]
WAYS += ["a function", "its bias", "in another type", "scaled"]
