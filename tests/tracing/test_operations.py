"""Operations that treat every channel by itself, or that add up what is zero when it goes: nothing is kept for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import trace, verify
from torchgrow.tracing.tracer import replay

BOXES = torch.tensor([[0.0, 0, 0, 5, 5], [1, 1, 1, 6, 6]])
PERMUTED = torch.tensor([1, 0])


class Maps(nn.Module):
    """c(3, 6) -> relu -> something on maps [2, 6, 8, 8] -> 1x1(6, 4)"""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(torch.relu(self.a(x))))


def grid(x: Tensor) -> Tensor:
    places = torch.linspace(-1, 1, 50, dtype=x.dtype, device=x.device).sin()
    return places.reshape(1, 5, 5, 2).expand(x.shape[0], -1, -1, -1)


def put(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[PERMUTED] = x
    return out


def cut_column(x: Tensor, value: float = 0.0) -> Tensor:
    x = x.clone()
    x[:, :, 0] = value
    return x


def half_by_index(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    out[:, :, torch.arange(4)] += x[:, :, 4:]
    return out


def on_a_canvas(x: Tensor) -> Tensor:
    """Columns of features put at places of maps, as detectors do with points; the index is apart, and comes first."""
    features, places = x[:, :, 2, :7], torch.arange(7)
    canvas = x.new_zeros(2, x.shape[1], 4, 4)
    canvas[0, :, places // 4, places % 4] = features[0]
    canvas[torch.ones_like(places), :, places % 4, places // 4] += features[1].T
    canvas.flatten(2)[:, :, 15] = 0.25
    return canvas


def boxes_by_level(x: Tensor) -> Tensor:
    """As a region extractor gathers what is found on several levels."""
    out = x.new_zeros(3, x.shape[1], 3, 3)
    for level, index in ((0, torch.tensor([0, 2])), (1, torch.tensor([1])), (2, torch.tensor([], dtype=torch.long))):
        rois = BOXES[torch.zeros(len(index), dtype=torch.long)].to(x) + level / 4
        out[index] = torchvision.ops.roi_align(x, rois, 3)
    return out


def spectrum(x: Tensor) -> Tensor:
    y = torch.fft.rfft2(x)
    y = torch.cat([y[:, :, :2] * torch.polar(torch.ones(5), torch.arange(5.0)).to(y), torch.zeros_like(y[:, :, 2:])], 2)
    return torch.fft.irfft2(y, s=x.shape[2:])


def places_of(x: Tensor) -> Tensor:
    return x.gather(3, x.argmax(3, keepdim=True))


def per_channel_fake_quantize(x: Tensor) -> Tensor:
    scale = torch.full((x.shape[1],), 0.05)
    return torch.fake_quantize_per_channel_affine(x, scale, torch.zeros_like(scale, dtype=torch.int32), 1, -128, 127)


MAPS: list[Callable[[Tensor], Any]] = [
    lambda x: x.max(-1)[0][..., None],
    lambda x: x.min(-1, keepdim=True).values,
    lambda x: x.median(3, keepdim=True).values + x.nanmedian(2, keepdim=True).values,
    lambda x: torch.kthvalue(x, 3, -1, keepdim=True)[0] * torch.mode(x, 2, keepdim=True)[0],
    lambda x: x.sort(3, descending=True)[0],
    lambda x: x.topk(3, 2)[0],
    lambda x: x.cummax(2)[0] + x.cummin(3)[0] + x.cumsum(2) + x.cumprod(3),
    lambda x: torch.logcumsumexp(x, 2).cumsum_(3).sigmoid_(),
    lambda x: sum(torch.aminmax(x, dim=3, keepdim=True)),
    lambda x: x.argmax(-1, keepdim=True).to(x.dtype) + x.argsort(-1).to(x.dtype),
    places_of,
    lambda x: F.grid_sample(x, grid(x), align_corners=False),
    lambda x: F.grid_sample(x[:, :, None], torch.ones(2, 1, 3, 3, 3).to(x) / 3, align_corners=True)[:, :, 0],
    lambda x: torchvision.ops.roi_align(x, BOXES.to(x), 3),
    lambda x: torchvision.ops.roi_pool(x, BOXES.to(x), 3),
    boxes_by_level,
    on_a_canvas,
    put,
    cut_column,
    lambda x: cut_column(x, 2.5),
    half_by_index,
    lambda x: x.new_zeros(x.shape).scatter_reduce(2, torch.zeros(x.shape, dtype=torch.long), x, "amax"),
    lambda x: x.new_full(x.shape, -9.0).index_reduce_(3, torch.arange(8) // 2, x, "amax"),
    lambda x: x.index_fill(2, torch.tensor([1, 3]), 0.5),
    lambda x: torch.zeros_like(x).masked_fill_(x > 0.5, 3.0) + x,
    lambda x: x.unfold(3, 2, 2).mean(-1),
    lambda x: x.unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2)),
    lambda x: torch.fft.fft2(x).abs(),
    lambda x: torch.fft.fftshift(torch.fft.fft(x), (2, 3)).real,
    spectrum,
    lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (4, 2)).contiguous()).conj_physical()).flatten(3),
    lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127),
    lambda x: torch.renorm(x.transpose(0, 1), 2, 0, 1.0).transpose(0, 1),
    lambda x: torch.renorm(x, 2, 0, 1.0),  # over the channels too: zeros add nothing
    lambda x: x + torch.randn_like(x) * 0 + torch.rand_like(x) * 0,
    lambda x: x.fill_(1.5),
    lambda x: F.normalize(x, dim=1) + x.norm(dim=(1, 2), keepdim=True) + x.sum(1, keepdim=True),
]


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("index", range(len(MAPS)))
def test_channels_pass(index: int) -> None:
    torch.manual_seed(0)
    report = verify(Maps(MAPS[index]), torch.randn(2, 3, 8, 8), fraction=0.4, trials=2)
    assert report.ok, report
    assert report.groups == {"a": 6}, report


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: x.sort(1)[0], "mixes values along this axis"),
        (lambda x: torch.fft.fft(x, dim=1).abs(), "mixes values along this axis"),
        (lambda x: x + x.max(1, keepdim=True)[0], "reduces over this axis"),
        (lambda x: x + x.sigmoid().sum(1, keepdim=True), "reduces over this axis"),
        (lambda x: x + x.mean(1, keepdim=True), "reduces over this axis"),
        (lambda x: x[:, [5, 4, 3, 2, 1, 0]], "looks this axis up by index"),
        (lambda x: x.index_add(1, torch.arange(6), x), "is written to by index"),
        (lambda x: x.unfold(1, 3, 1).amax(-1).repeat_interleave(2, 1)[:, :6], "slides a window along this axis"),
        (lambda x: torch.take(x, torch.arange(x.numel()).reshape(x.shape)), "has no rule"),
    ],
)
def test_channels_that_are_mixed_stay(middle: Callable[[Tensor], Tensor], reason: str) -> None:
    torch.manual_seed(0)
    space = trace(Maps(middle), torch.randn(2, 3, 8, 8))
    assert not space.removable.any()
    assert any(reason in frozen.reason and ("a.weight", 0) in frozen.places for frozen in space.frozen), space.frozen


def test_windows_side_by_side_go_as_a_whole() -> None:
    class Windows(nn.Module):
        """a(3, 6) -> windows of 2 channels -> their sums -> b(3, 4)"""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).unfold(1, 2, 2).amax(-1))

    report = verify(Windows(), torch.randn(4, 3), fraction=0.4)
    assert report.ok
    assert report.groups == {"a": 3}


@pytest.mark.parametrize(("groups", "offset_groups", "units"), [(1, 1, 8), (2, 1, 4), (1, 2, 4)])
def test_deformed_convolutions(groups: int, offset_groups: int, units: int) -> None:
    class Deformed(nn.Module):
        """a(3, 8) -> relu -> offsets and mask of the same maps -> deformed 3x3(8, 4) -> 1x1(4, 2)"""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.where = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 27 * offset_groups, 3, padding=1)
            self.b, self.c = torchvision.ops.DeformConv2d(8, 4, 3, padding=1, groups=groups), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            offset, mask = self.where(x).split([18 * offset_groups, 9 * offset_groups], 1)
            return self.c(torch.relu(self.b(x, offset, mask.sigmoid())))

    torch.manual_seed(0)
    report = verify(Deformed(), torch.randn(2, 3, 6, 6), fraction=0.4)
    assert report.ok
    assert report.groups["a"] == units
    assert report.groups["b"] == (2 if groups == 2 else 4)


def test_position_sensitive_regions_take_blocks_of_channels() -> None:
    class Blocks(nn.Module):
        """a(3, 12) -> 3 channels of 2 x 2 places of boxes -> 1x1(3, 2)"""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torchvision.ops.ps_roi_align(self.a(x), BOXES.to(x), 2))

    report = verify(Blocks(), torch.randn(2, 3, 8, 8), fraction=0.4)
    assert report.ok
    assert report.groups == {"a": 3}


# --- what is zero when it goes adds nothing -------------------------------------------------------------------------


class Towers(nn.Module):
    """Two embeddings of 8, compared"""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.u, self.v, self.compare = nn.Embedding(9, 8), nn.Embedding(7, 8), compare

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        return self.compare(self.u(i), self.v(j))


def factorisation_machine(a: Tensor, b: Tensor) -> Tensor:
    fields = torch.stack([a, b], 1)
    return 0.5 * (fields.sum(1).pow(2) - fields.pow(2).sum(1)).sum(-1)


@pytest.mark.parametrize(
    ("compare", "units"),
    [
        (lambda a, b: (a * b).sum(-1), 8),
        (lambda a, b: ((a - b) ** 2).sum(1), 8),
        (F.cosine_similarity, 8),
        (lambda a, b: F.pairwise_distance(a, b, eps=0), 8),
        (lambda a, b: F.normalize(a) @ F.normalize(b).T, 8),
        (lambda a, b: torch.linalg.vector_norm(a - b, ord=1, dim=-1), 8),
        (lambda a, b: (a - b).norm(float("inf"), dim=-1), 8),
        (torch.cdist, 8),
        (lambda a, b: torch.cdist(a, b, p=1.0), 8),
        (factorisation_machine, 8),
        (lambda a, b: (a * b).sum(-1) + (a * b).sigmoid().mean(0) @ b.T, 8),
        (lambda a, b: F.pairwise_distance(a, b), 0),  # adds 1e-6 for every unit
        (lambda a, b: (a + b).exp().sum(-1), 0),
        (lambda a, b: (a * b).mean(-1), 0),
        (lambda a, b: torch.cdist(a.exp(), b), 0),
    ],
)
def test_sums_over_units(compare: Callable[[Tensor, Tensor], Tensor], units: int) -> None:
    torch.manual_seed(0)
    example = torch.randint(9, (4,)), torch.randint(7, (4,))
    report = verify(Towers(compare), example, fraction=0.4)
    assert report.ok, report
    assert report.units == units, report


def test_units_that_are_summed_up_are_gated_where_they_are_made() -> None:
    example = torch.randint(7, (4,)), torch.randint(7, (4,))
    space = trace(Towers(lambda a, b: (a * b).sum(-1)), example)
    assert set(space.fold) == {("u.weight", 1)}  # one of the factors is enough

    class Attended(nn.Module):
        """Additive attention: v . tanh(q(query) + k(key)) over places"""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(5, 6), nn.Linear(5, 6, bias=False), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            scores = (self.v * torch.tanh(self.q(x[:, :1]) + self.k(x))).sum(-1)
            return (scores.softmax(-1)[..., None] * x).sum(1)

    report = verify(Attended(), torch.randn(3, 4, 5), fraction=0.4)
    assert report.ok
    assert report.units == 6


# --- scatters into fresh tensors ------------------------------------------------------------------------------------

NODES, EDGES = 6, torch.tensor([[0, 1, 1, 2, 3, 5, 0, 2, 4], [1, 0, 2, 3, 1, 4, 5, 5, 0]])
FROM, TO = EDGES


def fresh(x: Tensor) -> Tensor:
    return x.new_zeros(NODES, x.shape[1])


def spread(x: Tensor) -> Tensor:
    return TO[:, None].expand(-1, x.shape[1])


def by_hand(x: Tensor) -> Tensor:
    out = fresh(x)
    for edge, node in enumerate(TO):
        out[node] += x[edge]
    return out


def by_row(x: Tensor) -> Tensor:
    out = fresh(x)
    for node in range(NODES):
        out[node] = x[node == TO].sum(0)
    return out


def in_a_view(x: Tensor) -> Tensor:
    out = x.new_zeros(2, 3, x.shape[1])
    out.view(NODES, -1).index_add_(0, TO, x)
    return out.flatten(0, 1)


def accumulated(x: Tensor) -> Tensor:
    out = fresh(x)
    out.index_put_((TO,), x, accumulate=True)
    return out


SCATTERS: list[Callable[[Tensor], Tensor]] = [
    lambda x: fresh(x).index_add(0, TO, x),
    lambda x: fresh(x).index_add_(0, TO, x),
    lambda x: torch.zeros(NODES, x.shape[1], dtype=x.dtype).scatter_add_(0, spread(x), x),
    lambda x: fresh(x).scatter_reduce_(0, spread(x), x, "mean", include_self=False),
    lambda x: x.new_full((NODES, x.shape[1]), -9.0).scatter_reduce_(0, spread(x), x, "amax"),
    lambda x: fresh(x).scatter_(0, spread(x), x),
    lambda x: torch.empty_like(x).index_copy_(0, torch.arange(9).flip(0), x)[:NODES],
    accumulated,
    by_hand,
    by_row,
    in_a_view,
    lambda x: fresh(x).index_reduce_(0, TO, x, "prod"),
    lambda x: fresh(x).index_add_(0, TO, x) / fresh(x)[:, :1].index_add_(0, TO, x.new_ones(9, 1)).clamp(min=1),
]


class Messages(nn.Module):
    """relu(a(5, 8)) of what edges come from -> scattered to what they go to -> relu -> b(8, 3)"""

    def __init__(self, scatter: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.scatter = nn.Linear(5, 8), nn.Linear(8, 3), scatter

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.scatter(torch.relu(self.a(x))[FROM])))


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("index", range(len(SCATTERS)))
def test_messages_are_gathered_without_keeping_their_channels(index: int) -> None:
    torch.manual_seed(0)
    report = verify(Messages(SCATTERS[index]), torch.randn(NODES, 5), fraction=0.4)
    assert report.ok, report
    assert report.groups == {"a": 8}, report


def test_zeros_added_to_stay_zero_where_a_channel_is() -> None:
    """So that gates may sit where the channels are made."""
    space = replay(Messages(SCATTERS[1]), torch.randn(NODES, 5))
    assert set(space.fold) == {("a.weight", 0), ("a.bias", 0)}
    space = replay(Messages(SCATTERS[4]), torch.randn(NODES, 5))
    assert set(space.fold) == {("b.weight", 1)}


class Attentive(nn.Module):
    """Two heads of 4 over edges; each edge has its share of what arrives at a node (softmax by scatter)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
        self.source, self.target = nn.Parameter(torch.randn(1, 2, 4)), nn.Parameter(torch.randn(1, 2, 4))
        self.heads, self.width = 2, 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(-1, self.heads, self.width)
        score = F.leaky_relu((h * self.source).sum(-1)[FROM] + (h * self.target).sum(-1)[TO], 0.2)
        places = TO[:, None].expand_as(score)
        top = score.new_full((NODES, score.shape[1]), float("-inf")).scatter_reduce_(0, places, score, "amax")
        share = (score - top[TO]).exp()
        share = share / share.new_zeros(NODES, share.shape[1]).scatter_add_(0, places, share)[TO]
        out = torch.zeros_like(h).index_add_(0, TO, share[..., None] * h[FROM])
        return self.b(F.elu(out.flatten(1)))


def test_graph_attention_by_scatter() -> None:
    torch.manual_seed(0)
    report = verify(Attentive(), torch.randn(NODES, 5), fraction=0.4)
    assert report.ok, report
    assert report.units == 2, report


# --- sparse and empty tensors ---------------------------------------------------------------------------------------

ADJACENCY = torch.zeros(NODES, NODES).index_put((TO, FROM), torch.rand(9) + 0.5)


class Convolved(nn.Module):
    """A relu(A x w) v: a graph convolution with a given adjacency"""

    def __init__(self, times: Callable[[Tensor, Tensor], Tensor] = torch.mm, adjacency: Tensor | None = None) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 3))
        self.adjacency, self.times = adjacency, times

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        given = self.adjacency if adjacency is None else adjacency
        assert given is not None
        given = given.to(x.dtype)
        return self.times(given, torch.relu(self.times(given, x @ self.w)) @ self.v)


def built_inside(given: Tensor, x: Tensor) -> Tensor:
    return torch.sparse.mm(torch.sparse_coo_tensor(EDGES.flip(0), given[TO, FROM], (NODES, NODES)), x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("times", [torch.mm, torch.matmul, torch.sparse.mm, lambda a, x: torch.addmm(x, a, x)])
def test_sparse_adjacencies(layout: torch.layout, times: Callable[[Tensor, Tensor], Tensor]) -> None:
    adjacency = ADJACENCY if layout == torch.strided else ADJACENCY.to_sparse(layout=layout)
    x = torch.randn(NODES, 5)
    frames: list[tuple[nn.Module, Any]] = [(Convolved(times), (x, adjacency))]
    if layout != torch.sparse_csr:  # of which torch makes no deep copies
        frames.append((Convolved(times, adjacency), x))
    for model, example in frames:
        report = verify(model, example, fraction=0.4, trials=1)
        assert report.ok, report
        assert report.groups == {"w[1]": 8}, report


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_a_sparse_tensor_made_in_the_forward() -> None:
    report = verify(Convolved(built_inside), (torch.randn(NODES, 5), ADJACENCY), fraction=0.4)
    assert report.ok, report
    assert report.groups == {"w[1]": 8}


class Routed(nn.Module):
    """a(5, 6) -> one of 3 experts e(6, 6), the last of which no row goes to -> b(6, 3)"""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(5, 6), nn.Linear(6, 3), how
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        choice = torch.arange(len(x)) % 2
        out, parts = torch.zeros_like(x), []
        for index, expert in enumerate(self.experts):
            mine = (choice == index).nonzero().flatten() if self.how != "mask" else choice == index
            y = torch.relu(expert(x[mine].unflatten(1, (2, -1)).flatten(1)))
            if self.how == "index_add":
                out = out.index_add(0, mine, y)
            elif self.how == "cat":
                parts.append(y)
            else:
                out[mine] = y
        return self.b(torch.cat(parts) if parts else out)


@pytest.mark.parametrize("how", ["index_add", "cat", "put", "mask"])
def test_an_expert_without_rows_is_cut_as_the_others_are(how: str) -> None:
    torch.manual_seed(0)
    space = trace(Routed(how), torch.randn(4, 5))
    used, idle = (space.unit_of[f"experts.{i}.weight", 0] for i in (0, 2))
    assert torch.equal(used, idle)
    assert torch.equal(space.unit_of["experts.0.weight", 1], space.unit_of["experts.2.weight", 1])
    assert int(space.removable.sum()) == {"cat": 3 + 6}.get(how, 3)  # `zeros_like` has the units of what it is like


class Rotary(nn.Module):
    """heads [h, d] of a(5, 12), the first 4 places turned, the rest, which is none, as it is -> b(12, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).unflatten(1, (-1, 4))
        turned, rest = y[..., :4], y[..., 4:]
        first, second = turned.split([4, 0], -1)
        return self.b(torch.cat([torch.cat([first, second], -1) * 2, rest], -1).softmax(-1).flatten(1))


def test_a_rest_of_nothing_costs_nothing() -> None:
    report = verify(Rotary(), torch.randn(4, 5), fraction=0.4)
    assert report.ok
    assert report.groups == {"a": 3}, report
