"""Small models whose channels are shuffled, split, gated, padded or interleaved; a part of the zoo."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_parts import c3, head


class Shuffle(nn.Module):
    """c3(3, 8) -> view [N, 2, 4, H, W] -> transpose -> view back (channel shuffle) -> c3(8, 6) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 8), c3(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return head(F.relu(self.b(x)), self.fc)


class Chunk(nn.Module):
    """c3(3, 8) -> chunk in two -> c3(4, 5)(first) + c3(4, 5)(second) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = c3(3, 8), c3(4, 5), c3(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)).chunk(2, 1)
        return head(F.relu(self.b(first) + self.c(second)), self.fc)


class Gated(nn.Module):
    """c3(3, 12) -> first half * sigmoid(second half) (GLU) -> c3(6, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = c3(3, 12), c3(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, 1)
        return head(F.relu(self.b(value * torch.sigmoid(gate))), self.fc)


class UnequalSplit(nn.Module):
    """c3(3, 8) -> split 5 + 3, places fixed in the forward -> c3(5, 6), c3(3, 6) -> add -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = c3(3, 8), c3(5, 6), c3(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return head(F.relu(self.b(x[:, :5]) + self.c(x[:, 5:])), self.fc)


class NumberPad(nn.Module):
    """s = c3(3, 4);  F.pad(s by 1 + 3 channels) + c3(6, 8)(relu(c3(4, 6)(s))) -> pool -> fc: the 4 pads stay"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = c3(3, 4), c3(4, 6), c3(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return head(F.pad(x, (0, 0, 0, 0, 1, 3)) + self.b(F.relu(self.a(x))), self.fc)


class BufferPad(nn.Module):
    """As NumberPad, but the added channels are zero buffers of 1 and 3 channels: everything is free"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = c3(3, 4), c3(4, 6), c3(6, 8), nn.Linear(8, 4)
        self.before: Tensor
        self.after: Tensor
        self.register_buffer("before", torch.zeros(1, 2, 1, 1))
        self.register_buffer("after", torch.zeros(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        n, _, h, w = x.shape
        wide = torch.cat([self.before.expand(n, -1, h, w), x, self.after.expand(n, -1, h, w)], 1)
        return head(wide + self.b(F.relu(self.a(x))), self.fc)


class Interleaved(nn.Module):
    """glu(c3(3, 8)) -> channel shuffle, 2 groups -> [y, -y] stacked channel by channel -> c3(8, 5) -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b, self.fc = c3(3, 8), nn.ChannelShuffle(2), c3(8, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(F.glu(self.a(x), 1))
        return head(F.relu(self.b(torch.stack([y, -y], 2).flatten(1, 2))), self.fc)
