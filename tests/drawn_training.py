"""Random networks as they are trained: paths of training alone, writes in place, graphs, outputs inside objects.

As in `drawn`, a program is a list of (block, number), a head and here the kind of its output; the books say how many
units may go. A block here may note further outputs, and may do one thing in training and another in evaluation.
`check` compares a compact copy with a literal oracle in both modes: outputs, the gradient of the input, buffers.
"""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import drawn
from torchgrow import Space, shrink_

Notes = list[Tensor]


class Step(nn.Module):
    """A function of x, further outputs, whether it trains, and named layers or raw parameters."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function, self.names = function, tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, notes: Notes) -> Tensor:
        return self.function(x, notes, self.training, *(getattr(self, name) for name in self.names))


class Centred(nn.Module):
    """Without the mean of the batch; in evaluation, without the running mean, which training writes in place."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, width).view(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mean
        mean = x.mean((0, 2, 3), keepdim=True)
        self.mean.mul_(0.9).add_(0.1 * mean.detach()[0])
        return x - mean


class Graph(nn.Module):
    """Pixels as the nodes of a fixed graph: how neighbours are summed is the function's business."""

    def __init__(self, side: int, function: Callable[[Graph, Tensor], Tensor], layer: nn.Linear, kind: str) -> None:
        super().__init__()
        self.function, self.layer, self.nodes, self.kind = function, layer, side * side, kind
        generator = torch.Generator().manual_seed(side)
        edges = torch.randint(0, self.nodes, (2, 3 * self.nodes), generator=generator)
        self.sources, self.targets = edges[0], edges[1]
        self.share = torch.rand(3 * self.nodes, generator=generator, dtype=torch.float64)
        self.order = torch.randperm(self.nodes, generator=generator)
        width = layer.out_features
        if kind == "attention":
            self.of_source, self.of_target = (nn.Parameter(torch.randn(width)) for _ in range(2))
        if kind == "sparse buffer":
            self.register_buffer("adjacency", self.sparse(), persistent=False)  # which no file could hold
        elif kind in ("sparse", "rows", "dense"):
            self.adjacency = self.sparse()
        if kind == "rows":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
                self.adjacency = self.adjacency.to_sparse_csr()
        elif kind == "dense":
            self.adjacency = self.adjacency.to_dense()

    def sparse(self) -> Tensor:
        edges = torch.stack([self.targets, self.sources])
        return torch.sparse_coo_tensor(edges, self.share, (self.nodes, self.nodes), check_invariants=True).coalesce()

    def forward(self, x: Tensor) -> Tensor:
        nodes = self.function(self, self.layer(x.flatten(2).transpose(1, 2)))
        return F.relu(nodes).transpose(1, 2).unflatten(2, x.shape[2:])


def by_matrix(graph: Graph, h: Tensor) -> Tensor:
    matrix = graph.sparse() if graph.kind == "sparse, made in the forward" else graph.adjacency
    matrix = matrix.to(h.dtype)
    if graph.kind == "dense":
        return matrix @ h
    return torch.stack([torch.sparse.mm(matrix, one) for one in h])


def by_index_add(graph: Graph, h: Tensor) -> Tensor:
    messages = h[:, graph.sources] * graph.share.to(h.dtype)[:, None]
    if graph.kind == "index_add":
        return torch.zeros_like(h).index_add(1, graph.targets, messages)
    out = h.new_zeros(h.shape)
    out.index_add_(1, graph.targets, messages)
    return out


def by_scatter(graph: Graph, h: Tensor) -> Tensor:
    messages = h[:, graph.sources]
    index = graph.targets[None, :, None].expand_as(messages)
    if graph.kind == "scatter_add_":
        return torch.zeros_like(h).scatter_add_(1, index, messages)
    return torch.zeros_like(h).scatter_reduce_(1, index, messages, "mean", include_self=False)


def by_copy(graph: Graph, h: Tensor) -> Tensor:
    return torch.zeros_like(h).index_copy_(1, graph.order, h)


def by_attention(graph: Graph, h: Tensor) -> Tensor:
    score = (h * graph.of_source).sum(-1)[:, graph.sources] + (h * graph.of_target).sum(-1)[:, graph.targets]
    weight = F.leaky_relu(score, 0.2).tanh().exp()
    total = h.new_zeros(h.shape[:2]).index_add_(1, graph.targets, weight)
    messages = h[:, graph.sources] * (weight / total[:, graph.targets])[..., None]
    return torch.zeros_like(h).index_add_(1, graph.targets, messages)


GRAPHS: dict[str, Callable[[Graph, Tensor], Tensor]] = {
    "sparse": by_matrix, "rows": by_matrix, "dense": by_matrix, "sparse buffer": by_matrix,
    "sparse, made in the forward": by_matrix, "index_add": by_index_add, "index_add_": by_index_add,
    "scatter_add_": by_scatter, "scatter_reduce_": by_scatter, "index_copy_": by_copy, "attention": by_attention,
}  # fmt: skip


# --- writes in place: functions of a fresh h and a parameter along its channels ---


def mask(h: Tensor) -> Tensor:
    return torch.arange(h.shape[3]) % 2 == 0


def row_zeroed(h: Tensor) -> Tensor:
    h[:, :, 0] = 0.0
    return h


def rows_halved(h: Tensor) -> Tensor:
    h[:, :, 1:].mul_(0.5)
    return h


def into_fresh_zeros(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :, ::2] = h[:, :, ::2]
    return out


PLAIN_WRITES: list[Callable[[Tensor], Tensor]] = [
    torch.relu_, torch.Tensor.sigmoid_, lambda h: h.clamp_(min=0), lambda h: h.masked_fill_(mask(h), 0.0), row_zeroed,
    rows_halved, into_fresh_zeros, lambda h: F.leaky_relu(h, 0.1, inplace=True), lambda h: h.div_(2).sub_(0.1),
    lambda h: torch.empty_like(h).copy_(h).square_(), lambda h: h.add_(h.detach().mean((2, 3), keepdim=True)),
]  # fmt: skip
WRITES_WITH_A_PARAMETER: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda h, p: h.add_(p), lambda h, p: h.mul_(p), lambda h, p: h.addcmul_(p, p), lambda h, p: h.sub_(p.abs()),
    lambda h, p: h.lerp_(p.expand_as(h), 0.25), lambda h, p: h.clamp_(min=0).mul_(p).relu_(),
]  # fmt: skip


def summed_in_place(x: Tensor, notes: Notes, training: bool, f: nn.Module, g: nn.Module) -> Tensor:
    h = f(x)
    h += g(x)
    return h


def side_by_side(x: Tensor, notes: Notes, training: bool, f: nn.Conv2d, g: nn.Conv2d) -> Tensor:
    a, b = f.weight.shape[0], g.weight.shape[0]
    out = x.new_zeros(x.shape[0], a + b, *x.shape[2:])
    out[:, :a] = f(x)
    out[:, a:] = g(x)
    return out


def dropped_path(x: Tensor, notes: Notes, training: bool, f: nn.Module) -> Tensor:
    if not training:
        return x + f(x)
    return x + f(x) * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8)


# --- outputs ---


@dataclasses.dataclass
class Found:
    levels: list[Any]
    hidden: Any = None


class Slotted:
    __slots__ = ("first", "rest")

    def __init__(self, first: Any, rest: Any) -> None:
        self.first, self.rest = first, rest


Pair = namedtuple("Pair", "scores levels")

OUTPUTS: dict[str, Callable[[Tensor, Notes], Any]] = {
    "tuple": lambda y, notes: (y, *notes),
    "dataclass in a tuple": lambda y, notes: (y, Found(notes)),
    "dataclass in a dataclass": lambda y, notes: Found([y], Found(notes)),
    "namespaces in a list": lambda y, notes: [SimpleNamespace(scores=y), SimpleNamespace(levels=notes)],
    "slots in a dict": lambda y, notes: {"scores": y, "more": {"deep": Slotted(None, notes)}},
    "named tuple": lambda y, notes: Pair(y, tuple(Found([note]) for note in notes)),
    "generator in a tuple": lambda y, notes: (y, (note for note in notes)),
}


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in nested outputs, in order; written out here, since the library's own way is on trial."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if outputs is None or isinstance(outputs, (str, int, float)):
        return []
    if isinstance(outputs, dict):
        return [tensor for value in outputs.values() for tensor in tensors(value)]
    if hasattr(outputs, "__slots__") and not isinstance(outputs, tuple):
        return [tensor for name in outputs.__slots__ for tensor in tensors(getattr(outputs, name))]
    if hasattr(outputs, "__dict__") and not isinstance(outputs, (list, tuple, Iterator)):
        return tensors(vars(outputs))
    return [tensor for value in outputs for tensor in tensors(value)]


class Trained(drawn.Drawn):
    """The network of a program; `drawn.Drawn`'s blocks and those below.

    Attributes:
        sparse: whether it holds sparse products, which torch's FLOP counter takes for dense ones.
    """

    def __init__(self, program: list[tuple[str, int]], head: tuple[str, int], output: str) -> None:
        self.sparse = False
        super().__init__(program, head)
        self.output = output

    def forward(self, x: Tensor) -> Any:
        notes: Notes = []
        for block in self.blocks:
            x = block(x, notes) if isinstance(block, Step) else block(x)
        return OUTPUTS[self.output](x, notes)

    def _raw(self) -> nn.Parameter:
        """A parameter along the channels."""
        self.books.tie(self.labels, self.books.new(self.width))
        return nn.Parameter(torch.ones(self.width, 1, 1))

    def _same(self, size: int = 3) -> nn.Conv2d:
        """A convolution from the channels onto themselves."""
        self.books.tie(self.labels, self.books.new(self.width))
        return nn.Conv2d(self.width, self.width, size, padding=size // 2)

    # --- paths of one mode ---

    def auxiliary(self, number: int) -> nn.Module:
        """A head of training alone."""
        detached, kind = number // 4 % 2, number % 4
        if kind == 0:
            head: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, 2))
        elif kind == 1:
            self.books.new(4)
            head = nn.Sequential(nn.Conv2d(self.width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            head = nn.Sequential(head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        elif kind == 2:
            head = nn.Conv2d(self.width, 2, 1)
        else:
            self.books.new(5)
            head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * self.width, 5), nn.ReLU())
            head = nn.Sequential(head, nn.Dropout(0.7), nn.Linear(5, 2))

        def function(x: Tensor, notes: Notes, training: bool, head: nn.Module) -> Tensor:
            if training:
                notes.append(head(x.detach() if detached else x))
            return x

        return Step(function, head=head)

    def noise(self, number: int) -> nn.Module:
        """Noise of a learned size."""
        return Step(
            lambda x, notes, training, size: x + torch.randn_like(x) * size if training else x, size=self._raw()
        )

    def training_branch(self, number: int) -> nn.Module:
        """A branch of training alone, or of evaluation alone."""
        when = bool(number % 2)
        return Step(lambda x, notes, training, f: x + f(x) if training is when else x, f=self._same())

    def either(self, number: int) -> nn.Module:
        """One layer in training, another one in evaluation."""
        out = [4, 6, 9][number % 3]
        f, g = nn.Conv2d(self.width, out, 1), nn.Conv2d(self.width, out, 3, padding=1)
        self.labels = self.books.new(out)
        self.books.tie(self.labels, self.books.new(out))
        return Step(lambda x, notes, training, f, g: F.relu(f(x) if training else g(x)), f=f, g=g)

    def centred(self, number: int) -> nn.Module:
        return Centred(self.width)

    def path(self, number: int) -> nn.Module:
        """A residual branch that is dropped for some samples."""
        self.books.new(4)
        body = nn.Sequential(nn.Conv2d(self.width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.books.tie(self.labels, self.books.new(self.width))
        return Step(dropped_path, f=nn.Sequential(body, nn.Conv2d(4, self.width, 1)))

    def penalty(self, number: int) -> nn.Module:
        """A loss on the activations, of training alone: the mean and the sum count every channel."""
        self.books.freeze(self.labels)
        means: list[Callable[[Tensor], Tensor]] = [torch.mean, torch.sum]
        size = means[number % 2]

        def function(x: Tensor, notes: Notes, training: bool) -> Tensor:
            if training:
                notes.append(size(x.square()) + size(x.sigmoid()))
            return x

        return Step(function)

    def exposed(self, number: int) -> nn.Module:
        """Features that are an output as well, in both modes or one."""
        self.books.freeze(self.labels)
        modes = [(True, False), (True,), (False,)][number % 3]

        def function(x: Tensor, notes: Notes, training: bool) -> Tensor:
            if training in modes:
                notes.append(x.mean((2, 3)) if number // 3 % 2 else x)
            return x

        return Step(function)

    # --- writes in place ---

    def written(self, number: int) -> nn.Module:
        out = [4, 6, 8][number % 3]
        layer = nn.Conv2d(self.width, out, 3, padding=1)
        self.labels = self.books.new(out)
        if number // 3 % 2:
            write = WRITES_WITH_A_PARAMETER[number // 6 % len(WRITES_WITH_A_PARAMETER)]
            return Step(lambda x, notes, training, f, p: write(f(x), p), f=layer, p=self._raw())
        plain = PLAIN_WRITES[number // 6 % len(PLAIN_WRITES)]
        return Step(lambda x, notes, training, f: plain(f(x)), f=layer)

    def written_sum(self, number: int) -> nn.Module:
        if number % 2:
            return Step(lambda x, notes, training, f: f(x).add_(x), f=self._same())
        out = [5, 8][number // 2 % 2]
        f, g = nn.Conv2d(self.width, out, 1), nn.Conv2d(self.width, out, 3, padding=1)
        self.labels = self.books.new(out)
        self.books.tie(self.labels, self.books.new(out))
        return Step(summed_in_place, f=f, g=g)

    def written_beside(self, number: int) -> nn.Module:
        a, b = [(4, 6), (3, 5)][number % 2]
        layers = {"f": nn.Conv2d(self.width, a, 1), "g": nn.Conv2d(self.width, b, 3, padding=1)}
        self.labels = self.books.new(a) + self.books.new(b)
        return Step(side_by_side, **layers)

    # --- graphs ---

    def graph(self, number: int) -> nn.Module:
        kind, out = list(GRAPHS)[number % len(GRAPHS)], [4, 6, 8][number // len(GRAPHS) % 3]
        self.sparse |= kind in ("sparse", "rows", "sparse buffer", "sparse, made in the forward")
        layer = nn.Linear(self.width, out)
        self.labels = self.books.new(out)
        return Graph(self.side, GRAPHS[kind], layer, kind)


BLOCKS = [
    "auxiliary", "noise", "training_branch", "either", "centred", "path", "penalty", "exposed", "written",
    "written_sum", "written_beside", "graph",
]  # fmt: skip
KINDS = [4, 4, 4, 4, 4, 4, 1]
"""How often each kind of output is drawn: what a generator holds cannot be known, so it is refused."""

WEIGHTS = [4, 2, 2, 2, 2, 2, 1, 1, 5, 2, 1, 4]

Program = tuple[list[tuple[str, int]], tuple[str, int], str]


def program(seed: int) -> Program:
    """A random program of two to eight blocks, at least one of them of those above."""
    draw = random.Random(f"training {seed}")
    names = [draw.choices(BLOCKS, WEIGHTS)[0], *(
        draw.choices(BLOCKS, WEIGHTS)[0] if draw.random() < 0.5 else draw.choice(drawn.BLOCKS)
        for _ in range(draw.randint(1, 7))
    )]  # fmt: skip
    draw.shuffle(names)
    blocks = [(name, draw.randrange(1000)) for name in names]
    return blocks, (draw.choice(drawn.HEADS), draw.randrange(1000)), draw.choices(list(OUTPUTS), KINDS)[0]


def build(drawn_program: Program, seed: int = 0) -> Trained:
    """The network in float64 and training mode, with random weights and statistics far from their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Trained(*drawn_program)
        drawn.randomize(model)
    return model.double().train()


class Still(TorchFunctionMode):
    """No random numbers: noise is 1 and nothing is dropped. What is drawn depends on shapes, and those differ."""

    DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.DROPOUTS:
            return args[0]
        if func in (torch.randn_like, torch.rand_like):
            return torch.ones_like(args[0])
        if func is Tensor.bernoulli_:
            return args[0].fill_(1.0)
        return func(*args, **(kwargs or {}))


def results(model: nn.Module, x: Tensor, training: bool, noisy: bool = False) -> list[Tensor]:
    """Outputs; in training the gradient of the input as well, and the model's buffers move."""
    model.train(training)
    if not training:
        with torch.no_grad():
            return tensors(model(x))
    given = x.clone().requires_grad_()
    if noisy:
        found = tensors(model(given))
    else:
        with Still():
            found = tensors(model(given))
    loss = torch.stack([out.square().sum() for out in found]).sum()
    (gradient,) = torch.autograd.grad(loss, given)
    return [out.detach() for out in found] + [gradient]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference; infinite where number or shapes differ or something is no number."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def check(compact: nn.Module, full: nn.Module, x: Tensor) -> float:
    """Largest relative error of a compact network beside the full one with zeros, in both modes.

    Evaluation, a training step's forward and backward, evaluation again with the buffers that this has moved; at last
    the compact network must also run with its noise.
    """
    worst = max(gap(results(compact, x, training), results(full, x, training)) for training in (False, True, False))
    results(compact, x, training=True, noisy=True)
    return worst


def error(model: nn.Module, space: Space, share: float, seed: int, x: Tensor) -> float:
    """`check` for a random share of the units cut out of a copy."""
    keep = drawn.without(space, share, seed)
    compact = drawn.copied(model)
    shrink_(compact, space, keep)
    return check(compact, drawn.zeroed(model, space, keep), x)


def from_files(folder: Path, model: nn.Module) -> nn.Module:
    """A full network with the saved weights at the positions that were kept, and zeros at the others."""
    kept = json.loads((folder / "structure.json").read_text())["kept"]
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, saved in load_file(folder / "model.safetensors").items():
        full = own[name].data.zero_() if name in dict(model.named_parameters()) else own[name].data
        at = [torch.tensor(kept.get(name, {}).get(str(axis), range(size))) for axis, size in enumerate(full.shape)]
        if full.dim():
            full[torch.meshgrid(*at, indexing="ij")] = saved
        else:
            full.copy_(saved)
    return model
