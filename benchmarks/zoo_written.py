"""Models of kinds that no package of the zoo holds: graph networks, and a 3D U-Net with deep supervision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GCN(nn.Module):
    """Graph convolution (Kipf and Welling 2017): relu(A X W) twice, A a sparse tensor that is given."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Scores of all nodes."""
        adjacency = adjacency.to(x.dtype)
        x = F.relu(torch.sparse.mm(adjacency, self.first(x)))
        x = F.dropout(F.relu(torch.sparse.mm(adjacency, self.second(x))), 0.5, self.training)
        return self.head(x)


class GATLayer(nn.Module):
    """Graph attention (Velickovic et al. 2018) over a list of edges, heads side by side."""

    def __init__(self, inputs: int, heads: int, each: int) -> None:
        super().__init__()
        self.heads, self.each = heads, each
        self.lift = nn.Linear(inputs, heads * each, bias=False)
        self.of_source, self.of_target = (nn.Parameter(torch.randn(heads, each)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads * each))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Nodes [N, inputs] and edges [2, E] to [N, heads * each]."""
        source, target = edges
        h = self.lift(x).view(x.shape[0], self.heads, self.each)
        score = (h * self.of_source).sum(-1)[source] + (h * self.of_target).sum(-1)[target]
        score = F.leaky_relu(score, 0.2)
        index = target[:, None].expand_as(score)
        most = score.new_full((x.shape[0], self.heads), -torch.inf).scatter_reduce(0, index, score, "amax")
        weight = (score - most[target]).exp()
        weight = weight / weight.new_zeros(x.shape[0], self.heads).scatter_add(0, index, weight)[target]
        out = torch.zeros_like(h).index_add_(0, target, h[source] * weight[..., None])
        return out.flatten(1) + self.bias


class GAT(nn.Module):
    """Two layers of graph attention and a linear head."""

    def __init__(self, inputs: int, heads: int, each: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = GATLayer(inputs, heads, each), GATLayer(heads * each, heads, each)
        self.head = nn.Linear(heads * each, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Scores of all nodes."""
        return self.head(F.elu(self.second(F.elu(self.first(x, edges)), edges)))


class SAGELayer(nn.Module):
    """GraphSAGE (Hamilton et al. 2017): own features and the mean of the neighbours', gathered by scatter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.neighbours = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Nodes [N, inputs] and edges [2, E] to [N, outputs]."""
        source, target = edges
        total = x.new_zeros(x.shape)
        total.scatter_add_(0, target[:, None].expand(-1, x.shape[1]), x[source])
        count = x.new_zeros(x.shape[0]).index_add_(0, target, x.new_ones(len(target))).clamp(min=1)
        return self.own(x) + self.neighbours(total / count[:, None])


class GraphSAGE(nn.Module):
    """Two layers and a linear head."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = SAGELayer(inputs, hidden), SAGELayer(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Scores of all nodes."""
        return self.head(F.relu(self.second(F.relu(self.first(x, edges)), edges)))


def twice(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Two convolutions with instance norm and leaky ReLU, the first one with a stride."""
    layers: list[nn.Module] = []
    for k, channels in enumerate((inputs, outputs)):
        layers.append(nn.Conv3d(channels, outputs, 3, stride if k == 0 else 1, padding=1))
        layers += [nn.InstanceNorm3d(outputs, affine=True), nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """nnU-Net's plain 3D U-Net: skips, transposed convolutions, and in training an output at every resolution.

    x -> down 0 -> down 1 -> ... -> bottom;  up k = conv(cat(transposed(below), down k)) -> head k
    """

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32), inputs: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            twice(inputs if k == 0 else widths[k - 1], width, 1 if k == 0 else 2) for k, width in enumerate(widths)
        )
        above = list(reversed(widths[:-1]))
        self.lift = nn.ModuleList(
            nn.ConvTranspose3d(below, width, 2, 2) for below, width in zip(reversed(widths[1:]), above, strict=True)
        )
        self.up = nn.ModuleList(twice(2 * width, width, 1) for width in above)
        self.heads = nn.ModuleList(nn.Conv3d(width, classes, 1) for width in above)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Scores of every voxel; in training of all resolutions, finest first."""
        skips: list[Tensor] = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        skips.pop()
        outputs = []
        for lift, stage, head in zip(self.lift, self.up, self.heads, strict=True):
            x = stage(torch.cat([lift(x), skips.pop()], 1))
            if self.training:
                outputs.append(head(x))
        return outputs[::-1] if self.training else self.heads[-1](x)
