"""Small hard convolutional models, each drawn in its docstring. They drive all tests of structure.

`c3(a, b)` stands for a 3x3 convolution from a to b channels, `bn` for batch norm, `[x, y]` for a concatenation.
`ZOO` maps a name to a function that builds the model; `inputs(name)` gives a small batch for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Space, trace
from zoo_parts import c3 as c3
from zoo_parts import head as head
from zoo_rearranged import BufferPad, Chunk, Gated, Interleaved, NumberPad, Shuffle, UnequalSplit
from zoo_sequences import SEQUENCES


class Plain(nn.Module):
    """x -> c3(3, 6) -> bn -> relu -> c3(6, 5) -> relu -> pool -> fc"""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = c3(3, 6, bias=bias), nn.BatchNorm2d(6), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(F.relu(self.bn(self.a(x))))), self.fc)


class Residual(nn.Module):
    """x -> stem(3, 6) -> s;  s + bn(c3(5, 6)(relu(bn(c3(6, 5)(s))))) -> relu -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.bn1 = c3(3, 6), c3(6, 5, bias=False), nn.BatchNorm2d(5)
        self.b, self.bn2, self.fc = c3(5, 6, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        s = F.relu(self.stem(x))
        return head(F.relu(s + self.bn2(self.b(F.relu(self.bn1(self.a(s)))))), self.fc)


class Preact(nn.Module):
    """s = stem(x);  y = relu(bn(s));  shortcut 1x1(y) + c3(relu(bn(c3(y)))) -> relu(bn) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1, self.a, self.bn2 = c3(3, 5), nn.BatchNorm2d(5), c3(5, 7), nn.BatchNorm2d(7)
        self.b, self.short, self.bn3, self.fc = c3(7, 6), nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.stem(x)))
        y = self.short(y) + self.b(F.relu(self.bn2(self.a(y))))
        return head(F.relu(self.bn3(y)), self.fc)


class Concat(nn.Module):
    """[c3(3, 4)(x), 1x1(3, 5)(x)] -> bn(9) -> relu -> c3(9, 6) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn, self.c = c3(3, 4), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(9), c3(9, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        return head(self.c(y), self.fc)


class Dense(nn.Module):
    """x0 = c3(3, 4);  x1 = [x0, c3(4, 3)(relu(bn(x0)))];  x2 = [x1, c3(7, 3)(relu(bn(x1)))] -> bn -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0, self.a = c3(3, 4), nn.BatchNorm2d(4), c3(4, 3)
        self.bn1, self.b, self.bn2, self.fc = nn.BatchNorm2d(7), c3(7, 3), nn.BatchNorm2d(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(F.relu(self.bn0(x)))], 1)
        x = torch.cat([x, self.b(F.relu(self.bn1(x)))], 1)
        return head(F.relu(self.bn2(x)), self.fc)


class Depthwise(nn.Module):
    """c3(3, 6) -> bn -> depthwise c3 with multiplier 2 (6 -> 12) -> bn -> relu6 -> 1x1(12, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = c3(3, 6, bias=False), nn.BatchNorm2d(6)
        self.d, self.bn2 = c3(6, 12, groups=6, bias=False), nn.BatchNorm2d(12)
        self.p, self.fc = nn.Conv2d(12, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn1(self.a(x)))
        return head(F.relu(self.p(F.relu6(self.bn2(self.d(x))))), self.fc)


class Grouped(nn.Module):
    """1x1(3, 8) -> c3 in 4 groups of 2 (8 -> 12): whole groups go -> relu -> 1x1(12, 5) -> pool -> fc"""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 8, 1), c3(8, 12, groups=groups)
        self.p, self.fc = nn.Conv2d(12, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.p(F.relu(self.g(F.relu(self.a(x)))))), self.fc)


class SqueezeExcite(nn.Module):
    """x = relu(bn(c3(3, 6)));  x * sigmoid(1x1(3, 6)(relu(1x1(6, 3)(pool(x))))) -> c3(6, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.down, self.up = c3(3, 6), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.b, self.fc = c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return head(F.relu(self.b(x * gate)), self.fc)


class Shared(nn.Module):
    """s = c3(3, 6);  the same c3(6, 6), then the same bn, twice in a row -> pool -> fc: one group of 6"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.bn, self.fc = c3(3, 6), c3(6, 6), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.bn(self.twice(x)))
        return head(x, self.fc)


class Tied(nn.Module):
    """stem(3, 5) -> a(5, 5) -> b(5, 5), where b.weight is a.weight -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = c3(3, 5), c3(5, 5), c3(5, 5), nn.Linear(5, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x)))))), self.fc)


class GateAround(nn.Module):
    """x = c3(3, 6);  x * g + g with g = sigmoid(c3(3, 6)): g is not zero where its weights are -> c3 -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b, self.fc = c3(3, 6), c3(3, 6), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.g(x))
        return head(F.relu(self.b(F.relu(self.a(x)) * g + g)), self.fc)


class Sigmoid(nn.Module):
    """c3(3, 6) -> sigmoid -> c3(6, 5) -> pool -> fc: a zero channel reads as 0.5"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 6), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(torch.sigmoid(self.a(x)))), self.fc)


class NormOnly(nn.Module):
    """c3(3, 6) -> bn without affine -> relu -> c3(6, 5) -> pool -> fc: the statistics shift a zero channel"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = c3(3, 6), nn.BatchNorm2d(6, affine=False), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(F.relu(self.bn(self.a(x))))), self.fc)


class Groups(nn.Module):
    """c3(3, 8) -> group norm (4 groups of 2) -> relu -> c3(8, 6) -> group norm (1 group) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1, self.b, self.n2 = c3(3, 8), nn.GroupNorm(4, 8), c3(8, 6), nn.GroupNorm(1, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(self.n2(self.b(F.relu(self.n1(self.a(x))))), self.fc)


class Flatten(nn.Module):
    """c3(3, 5) -> relu -> max pool to 4x4 -> flatten (80, each channel 16 times) -> fc(80, 7) -> fc(7, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f1, self.f2 = c3(3, 5), nn.Linear(80, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f2(F.relu(self.f1(F.max_pool2d(F.relu(self.a(x)), 2).flatten(1))))


class Cumsum(nn.Module):
    """c3(3, 6) -> cumsum over channels (mixes them: frozen) -> c3(6, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 6), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(torch.cumsum(self.a(x), 1))), self.fc)


class Fourier(nn.Module):
    """c3(3, 6) -> real part of a 2d FFT over the places -> c3(6, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 6), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(torch.fft.fft2(self.a(x)).real)), self.fc)


class Transposed(nn.Module):
    """c3(3, 6) -> relu -> transposed conv (6 -> 5, stride 2) -> bn -> relu -> c3(5, 2): a map"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.bn = c3(3, 6), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5)
        self.b = c3(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.bn(self.up(F.relu(self.a(x))))))


class TwoOutputs(nn.Module):
    """c3(3, 6) -> y;  {"scores": fc(pool(y)), "maps": (y's c3(6, 2), c3(3, 5)'s own output)}: the 5 stay"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = c3(3, 6), c3(6, 2), c3(3, 5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        return {"scores": head(y, self.fc), "maps": (self.b(y), self.c(x))}


class TwoInputs(nn.Module):
    """c3(3, 6)(x) + 1x1(2, 6)(z) -> relu -> c3(6, 5) -> pool -> fc;  called by keyword"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.z, self.b, self.fc = c3(3, 6), nn.Conv2d(2, 6, 1), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor, z: Any) -> Tensor:
        return head(F.relu(self.b(F.relu(self.a(x) + self.z(z)))), self.fc)


class RawScale(nn.Module):
    """c3(3, 6) * scale[6, 1, 1] + shift[1, 6, 1, 1] (raw parameters) -> relu -> c3(6, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 6, bias=False), c3(6, 5), nn.Linear(5, 4)
        self.scale, self.shift = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.zeros(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(F.relu(self.a(x) * self.scale + self.shift))), self.fc)


class Unused(nn.Module):
    """Plain, beside a parameter, a layer and a buffer that the forward never reads"""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.idle, self.alone = Plain(), c3(6, 6), nn.Parameter(torch.ones(6))
        self.register_buffer("steps", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Buffers(nn.Module):
    """(c3(3, 6) - mean[6, 1, 1]) * mask[1, 6, 1, 1] (buffers, one of them counting calls) -> c3(6, 5) -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 6), c3(6, 5), nn.Linear(5, 4)
        self.register_buffer("mean", torch.arange(6.0).reshape(6, 1, 1))
        self.register_buffer("mask", torch.arange(1.0, 7).reshape(1, 6, 1, 1))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean().reshape(1)
        return head(F.relu(self.b((self.a(x) - self.mean) * self.mask)), self.fc)


class ThinMiddle(nn.Module):
    """c3(3, 4) -> c3(4, 1) -> 1x1(1, 1) -> c3(1, 4) -> pool -> fc: axes of size one carry no units"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = c3(3, 4), c3(4, 1), nn.Conv2d(1, 1, 1), c3(1, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.d(self.c(self.b(F.relu(self.a(x)))))), self.fc)


class Attention(nn.Module):
    """y = c3(3, 6) as [N, 64, 6];  (y softmax(y^T y)) -> mean over places -> fc: products of activations"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = c3(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2).transpose(1, 2)
        return self.fc((y @ torch.softmax(y.transpose(1, 2) @ y, -1)).mean(1))


class MoreTransposed(nn.Module):
    """c3(3, 8) -> grouped transposed 2x2(8, 12) -> relu -> pool -> f(12, 4): whole groups, or slots of groups"""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.up = c3(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=groups)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.up(F.relu(self.a(x)))), self.fc)


class Windows(nn.Module):
    """c3(3, 4) -> unfold 2x2 -> 1x1(16, 8) on columns -> fold 2x2 -> c3(2, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.b, self.fc = c3(3, 4), nn.Conv1d(16, 8, 1), c3(2, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.mix(F.unfold(self.a(x), 2, stride=2))
        return head(F.relu(self.b(F.fold(columns, x.shape[2:], 2, stride=2))), self.fc)


class WeightNorm(nn.Module):
    """weight-normalised c3(3, 6) -> relu -> weight-normalised c3(6, 5) -> relu -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.utils.parametrizations.weight_norm(conv) for conv in (c3(3, 6), c3(6, 5)))
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return head(F.relu(self.b(F.relu(self.a(x)))), self.fc)


class Unpooled(nn.Module):
    """zeros around c3(3, 6) -> pool -> ones around and mirrored c3(6, 6) -> back to where pooling found them -> c3"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = c3(3, 6), nn.Conv2d(6, 6, 5), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, places = F.max_pool2d(F.pad(F.relu(self.a(x)), (0, 2, 2, 0)), 2, return_indices=True)
        y = self.b(F.pad(F.pad(y, (1, 1, 1, 1), value=1.0), (1, 1, 1, 1), mode="reflect"))
        return head(F.relu(self.c(F.max_unpool2d(y, places, 2))), self.fc)  # type: ignore[arg-type]


ZOO: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "plain-bias": lambda: Plain(bias=True),
    "residual": Residual,
    "preact": Preact,
    "concat": Concat,
    "dense": Dense,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "grouped-2": lambda: Grouped(groups=2),
    "squeeze-excite": SqueezeExcite,
    "shuffle": Shuffle,
    "chunk": Chunk,
    "gated": Gated,
    "unequal-split": UnequalSplit,
    "number-pad": NumberPad,
    "buffer-pad": BufferPad,
    "shared": Shared,
    "tied": Tied,
    "gate-around": GateAround,
    "sigmoid": Sigmoid,
    "norm-only": NormOnly,
    "group-norm": Groups,
    "flatten": Flatten,
    "cumsum": Cumsum,
    "fourier": Fourier,
    "transposed": Transposed,
    "two-outputs": TwoOutputs,
    "two-inputs": TwoInputs,
    "raw-scale": RawScale,
    "unused": Unused,
    "buffers": Buffers,
    "thin-middle": ThinMiddle,
    "attention": Attention,
    "transposed-groups": lambda: MoreTransposed(4),
    "transposed-slots": lambda: MoreTransposed(2),
    "windows": Windows,
    "interleaved": Interleaved,
    "weight-norm": WeightNorm,
    "unpooled": Unpooled,
    **SEQUENCES,
}


def build(name: str, seed: int = 0) -> Any:
    """A zoo model with weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ZOO[name]()


def inputs(name: str, seed: int = 0, batch: int = 2) -> Any:
    """A small batch for a zoo model; keywords where it takes two inputs."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("lstm", "lstm-bidirectional", "lstm-projected", "gru", "rnn", "bag"):
        return torch.randint(11, (batch, 4), generator=generator)
    if name in SEQUENCES:
        y = torch.randn(batch, 4, 6, generator=generator)
        return (y, y.flip(1)) if name == "decoder" else y
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return {"z": torch.randn(batch, 2, 8, 8, generator=generator), "x": x} if name == "two-inputs" else x


@functools.cache
def space(name: str) -> Space:
    """The proven space of a zoo model, traced once."""
    return trace(build(name), inputs(name))
