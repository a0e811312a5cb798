"""Forwards that do odd things: each gets an answer, never a wrong network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Budget, Grower, SavedModelError, TraceError, load, measure, save, trace, verify
from torchgrow.tracing.tracer import replay


class Odd(nn.Module):
    """a(3, 6) -> something odd -> b(6, 4) -> c(4, 2)"""

    def __init__(self, odd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.odd = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2), odd

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.odd(self.a(x)))))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * gradient


def half_in_place(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :3].mul_(2)
    return y


def all_in_place(y: Tensor) -> Tensor:
    y = y.clone()
    y.mul_(2).add_(1).relu_()
    return y


def row_by_row(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    for i in range(len(y)):
        out[i] = y[i].tanh()
    return out


def masked(y: Tensor) -> Tensor:
    y = y.clone()
    y[y < 0] = 0
    return y


def which_way(y: Tensor) -> Tensor:
    return y.relu() if float(y.detach().flatten()[0]) > 1e9 else y.sigmoid()


def by_width(y: Tensor) -> Tensor:
    return y * 2 if y.shape[1] == 6 else y * 3


def as_complex(y: Tensor) -> Tensor:
    return torch.polar(y.abs(), y).real


def turned_in_place(y: Tensor) -> Tensor:
    y = y * 1
    y.t_()
    y.unsqueeze_(0).transpose_(1, 2)
    return y.squeeze_(0)


def turned_in_place_square(y: Tensor) -> Tensor:
    y = y[:1].expand(6, -1) * 1  # where shapes do not tell
    return y.t_().relu().t_()


# what it does -> removable units of a (6) and b (4): 10 if it passes, 4 if a must stay
ANSWERS = [
    (F.relu, 10),
    (Square.apply, 10),
    (all_in_place, 10),
    (row_by_row, 10),
    (masked, 10),
    (half_in_place, 4),
    (by_width, 4),
    (lambda y: y + torch.randn_like(y), 10),  # noise that no reader of a removed unit sees
    (lambda y: F.dropout(y, 0.5, training=True), 10),
    (lambda y: y * torch.rand(1), 10),
    (lambda y: y / y.norm(), 10),  # a norm is the same without what is zero
    (lambda y: y / y.sigmoid().norm(), 4),
    (lambda y: torch.from_numpy(y.detach().numpy()), 4),
    (lambda y: y[:, torch.randperm(6)], 4),
    (lambda y: y.sort(-1).values, 4),
    (lambda y: torch.cat([y[:, :2], y[:, 2:]], 1), 4),
    (lambda y: y @ torch.eye(6, dtype=y.dtype), 4),
    (as_complex, 10),
    (turned_in_place, 10),
    (turned_in_place_square, 10),
    (torch.func.vmap(torch.relu), 10),
]


@pytest.mark.parametrize(("odd", "units"), ANSWERS, ids=lambda v: getattr(v, "__name__", "") if callable(v) else "")
def test_odd_operations_get_the_right_answer(odd: Callable[[Tensor], Tensor], units: int) -> None:
    torch.manual_seed(0)
    report = verify(Odd(odd), torch.randn(5, 3), fraction=0.4)
    assert report.ok, report
    assert report.units == units, report


class Holding(Odd):
    """Multiplies by constants that are neither parameters nor buffers"""

    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.turn = torch.randn(3, 3)
        self.held: dict[str, Any] = {"more": [torch.randn(3, 3), (torch.randn(3, 3), 2)]}

    def forward(self, x: Tensor) -> Tensor:
        for matrix in (self.turn, self.held["more"][0], self.held["more"][1][0]):
            x = x @ matrix
        return super().forward(x)


def test_constants_in_attributes_are_no_hindrance_to_double_precision() -> None:
    model = Holding()
    report = verify(model, torch.randn(5, 3))
    assert report.ok, report
    assert report.units == 10
    assert model.held["more"][1][0].dtype == torch.float32


class Nested(Odd):
    """Puts out tensors of different lengths in one"""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__(F.relu)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        parts = [super(Nested, self).forward(part) for part in (x[:2], x[2:])]
        return torch.nested.as_nested_tensor(parts, layout=self.layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("layout", "units"), [(torch.strided, 10), (torch.jagged, 0)])
def test_nested_outputs_are_compared_part_by_part(layout: torch.layout, units: int) -> None:
    """Or, in the newer layout, keep everything, with an answer all the same."""
    report = verify(Nested(layout), torch.randn(5, 3))
    assert report.ok, report
    assert report.units == units, report


def test_reading_a_value_freezes_nothing_but_says_so_if_it_matters() -> None:
    report = verify(Odd(which_way), torch.randn(5, 3))
    assert report.ok
    assert report.units in (4, 10)


def test_lazy_modules_are_refused_with_the_fix() -> None:
    with pytest.raises(TraceError, match=r"not materialised yet; run one forward pass before"):
        verify(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), torch.randn(2, 3))


class Spectral(nn.Module):
    """Channels mixed frequency by frequency, by complex weights, of which the lowest 5 are kept"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 5, dtype=torch.complex64) / width)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x)
        out = torch.zeros(len(x), self.weight.shape[1], found.shape[-1], dtype=found.dtype)
        out[:, :, :5] = torch.einsum("bix,iox->box", found[:, :, :5], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


class Operator(nn.Module):
    """A small Fourier neural operator"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.beside = nn.Conv1d(2, 6, 1), Spectral(6), nn.Conv1d(6, 6, 1)
        self.b, self.c = nn.Conv1d(6, 8, 1), nn.Conv1d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(F.gelu(self.b(F.gelu(self.mix(h) + self.beside(h)))))


class States(nn.Module):
    """A linear recurrence of complex states"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.decay = nn.Parameter(torch.randn(8, dtype=torch.complex64) * 0.3)
        self.into = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))
        self.out = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x).to(self.into.dtype)
        h, found = torch.zeros_like(u[:, 0] @ self.into.t()), []
        for t in range(x.shape[1]):
            h = h * self.decay + u[:, t] @ self.into.t()
            found.append((h @ self.out.t()).real)
        return self.b(torch.stack(found, 1))


def grown(model: nn.Module, x: Tensor) -> Grower:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="60%"), updates=2)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.update()
    return grower


@pytest.mark.parametrize(
    ("build", "shape", "groups"),
    [
        (Operator, (3, 2, 16), {"a": 6, "mix.weight[1]": 6, "b": 8}),
        (States, (3, 4, 3), {"decay[0]": 8, "into[1]": 6, "out[0]": 6}),
    ],
)
def test_complex_weights_are_cut_like_others(
    build: Callable[[], nn.Module], shape: tuple[int, ...], groups: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    report = verify(model, x, fraction=0.4)
    assert report.ok, report
    assert report.groups == groups
    grower = grown(model, x)
    assert grower.widths() != groups
    save(model, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", build)(x), model(x))


def test_complex_buffers_pass() -> None:
    class Complex(Odd):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.turn: Tensor
            self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * self.turn).real)

    assert verify(Complex(), torch.randn(4, 3)).units == 10


class Graph(nn.Module):
    """Two layers of a graph network over a sparse adjacency"""

    def __init__(self, kind: str, held: str, multiply: Callable[[Tensor, Tensor], Tensor] = torch.sparse.mm) -> None:
        super().__init__()
        self.a, self.b, self.multiply = nn.Linear(5, 16), nn.Linear(16, 3), multiply
        dense = (torch.arange(64.0).reshape(8, 8) % 3 == 0) / 3
        adjacency = dense.to_sparse() if kind == "coo" else dense.to_sparse_csr()
        if held == "attribute":
            self.adjacency = adjacency
        else:
            self.register_buffer("adjacency", adjacency, persistent=held == "persistent")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.multiply(self.adjacency, F.relu(self.a(self.multiply(self.adjacency, x)))))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("held", ["attribute", "buffer", "persistent"])
@pytest.mark.parametrize("kind", ["coo", "csr"])
def test_sparse_tensors_that_a_model_holds_stay_whole(kind: str, held: str, tmp_path: Path) -> None:
    """And the rest of the network is cut, trained, saved and resumed."""
    torch.manual_seed(0)
    model, x = Graph(kind, held), torch.randn(8, 5)
    for multiply in (torch.sparse.mm, torch.mm, torch.matmul):
        report = verify(Graph(kind, held, multiply), x, trials=1)
        assert report.ok, report
        assert report.groups == {"a": 16}
    grower = grown(model, x)
    other = Graph(kind, held)
    optimizer = torch.optim.Adam(other.parameters(), 0.01)
    Grower(other, optimizer, example_inputs=x, budget=Budget(params="60%"), updates=2).load_state_dict(
        grower.state_dict()
    )
    assert torch.equal(other(x), model(x))
    if held == "persistent":
        with pytest.raises(SavedModelError, match=r"adjacency is a torch\.sparse.*persistent=False"):
            save(model, tmp_path / "small")
        model.register_buffer("adjacency", model.adjacency, persistent=False)
    save(model, tmp_path / "small")
    frame = Graph(kind, "buffer" if held == "persistent" else held)
    assert torch.equal(load(tmp_path / "small", lambda: frame)(x), model(x))


def test_a_sparse_parameter_is_refused_with_the_fix() -> None:
    model = Odd(F.relu)
    model.extra = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TraceError, match=r"extra is torch\.sparse_coo, quantized=False; only dense tensors can be cut"):
        verify(model, torch.randn(4, 3))


@pytest.mark.parametrize("buffer", [False, True])
def test_weights_tied_by_their_memory_are_refused_with_the_fix(buffer: bool) -> None:
    """Growing would give each its own, and they would drift apart; one parameter under two names is tied for good."""
    words, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    model = nn.Sequential(words, head)
    if buffer:
        model.register_buffer("weights", words.weight.data)
    else:
        head.weight.data = words.weight.data
    with pytest.raises(TraceError, match=r"(1\.weight|weights) and 0\.weight are two tensors in one memory.*make them"):
        trace(model, torch.randint(0, 12, (4, 3)))


def test_a_constant_is_judged_by_what_it_was_when_it_was_used() -> None:
    """Labels are looked at some operations later."""
    states = []

    def changed_after_use(y: Tensor) -> Tensor:
        scale = torch.ones(y.shape[1])
        y = y * scale  # the same for every unit then
        scale += torch.arange(y.shape[1])
        states.append(scale)
        return y.relu_()

    assert replay(Odd(changed_after_use), torch.randn(5, 3)).n_units == 10
    assert states[0].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_by_name_is_padding_by_number(padding: str, dims: int) -> None:
    """PyTorch hands "valid" on as one 0 for all sides."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]

    def build(how: Any) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(conv(3, 6, 3, padding=how), nn.ReLU(), conv(6, 5, 3, padding=how), pool(1))

    x = torch.randn(2, 3, *[7] * dims)
    assert int(trace(build(padding), x).removable.sum()) == 6
    assert measure(build(padding), x) == measure(build(int(padding == "same")), x)
