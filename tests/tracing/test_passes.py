"""Both modes, several examples, chance held still, and a model that is as before."""

import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import zoo
from torchgrow import Budget, Grower, Space, TraceError, measure, shrink_, trace, verify
from torchgrow.lab import devices
from torchgrow.persistence import randomness
from torchgrow.tracing.dispatch import SHAPES
from torchgrow.tracing.passes import RECURRENT, Pass, running
from torchgrow.tracing.rules.registry import RULES


def halved(space: Space) -> Tensor:
    """A keep vector without about half the units of every group."""
    keep = space.everything()
    for group in range(space.n_groups):
        units = torch.nonzero((space.group_of == group) & space.removable).flatten()
        keep[units[: units.numel() // 2]] = False
    return keep


class Training(nn.Module):
    """h = relu(a(3, 6)); y = b(6, 4)(h) -> c(4, 2); in training something more is made of h"""

    def __init__(self, more: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.more = zoo.c3(3, 6), zoo.c3(6, 4), nn.Linear(4, 2), more
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        y = zoo.head(F.relu(self.b(h)), self.c)
        return (y, self.more(self, h)) if self.training else y


def skipped_by_chance(m: Any, h: Tensor) -> Tensor:
    return m.aux(h).mean() if torch.rand(1) < 0.5 else h.new_zeros(())


def skipped_by_python(m: Any, h: Tensor) -> Tensor:
    return m.aux(h).mean() if random.random() < 0.7 else h.new_zeros(())


IN_TRAINING: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "auxiliary head": (lambda: Training(lambda m, h: m.aux(h.mean((2, 3))), aux=nn.Linear(6, 5)), {"a": 6, "b": 4}),
    "deep supervision": (
        lambda: Training(lambda m, h: [{"low": m.aux(h)}, [m.aux(F.avg_pool2d(h, 2))]], aux=nn.Conv2d(6, 2, 1)),
        {"a": 6, "b": 4},
    ),
    "features": (lambda: Training(lambda m, h: h), {"b": 4}),
    "batch statistics": (
        lambda: Training(lambda m, h: m.aux(m.norm(h)), norm=nn.BatchNorm2d(6), aux=nn.Conv2d(6, 2, 1)),
        {"a": 6, "b": 4},
    ),
    "scale": (lambda: Training(lambda m, h: (h * m.scale).sum(1), scale=nn.Parameter(torch.ones(6, 1, 1))), {"b": 4}),
    "dropout": (lambda: Training(lambda m, h: m.aux(F.dropout(h, 0.7)), aux=nn.Conv2d(6, 2, 1)), {"a": 6, "b": 4}),
    "stochastic depth": (
        lambda: Training(
            lambda m, h: m.aux(h + m.drop(m.body(h))),
            drop=_stochastic_depth(),
            body=zoo.c3(6, 6),
            aux=nn.Conv2d(6, 2, 1),
        ),
        {"a": 6, "b": 4},
    ),
    "skipped by chance": (lambda: Training(skipped_by_chance, aux=nn.Conv2d(6, 2, 1)), {"a": 6, "b": 4}),
    "skipped by Python's chance": (lambda: Training(skipped_by_python, aux=nn.Conv2d(6, 2, 1)), {"a": 6, "b": 4}),
    "a fixed slice": (lambda: Training(lambda m, h: h[:, :3].mean()), {"b": 4}),
}


def _stochastic_depth() -> nn.Module:
    from torchvision.ops import StochasticDepth

    return StochasticDepth(0.4, "row")


@pytest.mark.parametrize("name", IN_TRAINING)
def test_what_runs_in_training_only_is_followed_and_proven(name: str) -> None:
    """And the network that was cut can be trained."""
    build, widths = IN_TRAINING[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(4, 3, 8, 8)
    space = trace(model, x)
    if name == "scale":  # summed over the channels: whether that can go is another room's matter
        widths = {**space.widths(space.everything()), **widths}
    assert space.widths(space.everything()) == widths
    assert not [str(frozen) for frozen in space.frozen if frozen.op == "proof"]
    shrink_(model, space, halved(space))
    model.train()
    for _ in range(4):
        model(x)


def test_the_proof_runs_in_training_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that know nothing of training are not believed."""
    model, x = IN_TRAINING["auxiliary head"][0](), torch.randn(4, 3, 8, 8)
    monkeypatch.setattr("torchgrow.tracing.tracer.passes", lambda examples: [Pass()])
    monkeypatch.setattr("torchgrow.tracing.tracer.Tracer.freeze_unused", lambda self: None)
    space = trace(model, x)
    assert space.widths(space.everything()) == {"b": 4}
    assert "proof" in [frozen.op for frozen in space.frozen if frozen.module == "a"]


def test_a_batch_of_one_has_no_statistics_and_is_no_hindrance() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2))
    report = verify(model, torch.randn(1, 3), trials=1)
    assert report.groups == {"0": 6}
    assert report.ok


class Levels(nn.Module):
    """Two levels of features; the second input says which of them a row reads"""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.a, self.b = zoo.c3(3, 6), zoo.c3(6, 4)
        self.heads = nn.ModuleList([nn.Linear(6, 5), nn.Linear(4, 5)])

    def forward(self, x: Tensor, level: Tensor) -> Any:
        one = F.relu(self.a(x))
        features, out = [one, F.relu(self.b(one))], 0
        for k in range(2):
            if bool((level == k).any()):
                out = out + self.heads[k](features[k].mean((2, 3)))
        return out


X, LOW, BOTH = torch.randn(2, 3, 8, 8), torch.tensor([0, 0]), torch.tensor([0, 1])


def test_a_parameter_that_no_example_uses_keeps_what_it_could_read() -> None:
    model = Levels()
    space = trace(model, (X, LOW))
    assert space.widths(space.everything()) == {}  # a matrix [5, 4] can read a slice of the 6 as well
    reasons = [
        frozen for frozen in space.frozen if "could be read by heads.1.weight, which no example used" in str(frozen)
    ]
    assert {place for frozen in reasons for place in frozen.places} >= {("a.weight", 0), ("b.weight", 0)}
    assert "example_inputs=[..., ...]" in reasons[0].reason


class Scaled(nn.Module):
    """One output, scaled by a parameter of one row and one column that no unit meets."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 1)
        self.scale = nn.Linear(1, 1, bias=False) if layer else nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(F.relu(self.a(x)))
        return self.scale(out) if isinstance(self.scale, nn.Linear) else out * self.scale


@pytest.mark.parametrize("layer", [True, False])
def test_a_parameter_that_meets_no_unit_is_used_all_the_same(layer: bool) -> None:
    """It was taken for one of another run, which could read anything: nothing of the model could go."""
    space = trace(Scaled(layer), torch.randn(4, 8))
    assert space.widths(space.everything()) == {"a": 6}
    assert not any("no example used" in str(frozen) for frozen in space.frozen)


def test_several_examples_reach_what_one_does_not() -> None:
    model = Levels()
    space = trace(model, [(X, LOW), (X, BOTH)])
    assert space.widths(space.everything()) == {"a": 6, "b": 4}
    assert verify(model, [(X, LOW), (X, BOTH)], trials=1).ok
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Grower(model, optimizer, example_inputs=[(X, LOW), (X, BOTH)], budget=Budget(params="60%"), updates=2)
    assert model(X, LOW).shape == model(X, BOTH).shape == (2, 5)


class Sliced(nn.Module):
    """A large batch goes another way, where a layer reads or writes a part of the 13 features"""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 13), nn.Linear(13, 2), how
        self.aux: Any = nn.Linear(*((1, 1) if how == "read one" else (5, 5)), bias=how != "read one")
        if how == "scale":
            self.aux = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if len(x) > 4 and self.how.startswith("read"):
            return self.b(h) + self.aux(h[:, : self.aux.in_features]).sum()
        if len(x) > 4 and self.how == "write":
            h = torch.cat([self.aux(x[:, [0, 1, 2, 0, 1]]) + h[:, :5], h[:, 5:]], 1)
        return self.b(h)


@pytest.mark.parametrize("how", ["read", "read one", "write"])
def test_a_parameter_that_no_example_uses_could_meet_a_slice(how: str) -> None:
    model = Sliced(how)
    space = trace(model, torch.randn(2, 3))
    assert space.widths(space.everything()) == {}
    shrink_(model, space, halved(space))
    model(torch.randn(6, 3))


def test_a_single_number_that_no_example_uses_meets_no_position() -> None:
    space = trace(Sliced("scale"), torch.randn(2, 3))
    assert space.widths(space.everything()) == {"a": 13}


def test_a_parameter_out_of_training_keeps_nothing() -> None:
    model = Levels()
    model.heads[1].requires_grad_(False)
    space = trace(model, (X, LOW))
    assert space.widths(space.everything()) == {"a": 6}


def test_what_is_computed_inside_of_other_modules_stays_free() -> None:
    """An idle layer beside two blocks cannot reach what these do not return."""
    block = nn.Sequential(zoo.c3(6, 5), nn.ReLU(), zoo.c3(5, 6))
    net = nn.Sequential(zoo.c3(3, 6), block, nn.Flatten(), nn.Linear(6 * 64, 2))
    space = trace(Around(net), X)
    assert space.widths(space.everything()) == {"net.1.0": 5}


class Around(nn.Module):
    """Calls the parts of a sequence one by one, and a layer never"""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net, self.idle = net, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def test_units_without_a_reader_are_kept() -> None:
    """Both levels have one head: nothing tells that it would read the second one too."""

    class Shared(Levels):
        def __init__(self) -> None:
            super().__init__()
            self.b, head = zoo.c3(6, 6), nn.Linear(6, 5)
            self.heads = nn.ModuleList([head, head])

    space = trace(Shared(), (X, LOW))
    assert space.widths(space.everything()) == {"a": 6}
    assert [f.reason for f in space.frozen if ("b.weight", 0) in f.places] == [
        "is computed, but nothing reads it in any run; add an example that does: example_inputs=[..., ...]"
    ]


def test_an_example_that_only_training_takes() -> None:
    class WithLoss(Training):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
            y = super().forward(x)
            if not self.training:
                return y
            assert target is not None, "targets are needed in training"
            return F.cross_entropy(y[0], target) + self.get_submodule("aux")(y[1]).mean()

    model = WithLoss(lambda m, h: h, aux=nn.Conv2d(6, 2, 1))
    targets = torch.tensor([0, 1])
    space = trace(model, [X, {"x": X, "target": targets}])
    assert space.widths(space.everything()) == {"a": 6, "b": 4}
    with pytest.warns(UserWarning, match=r"in training mode the forward failed on all of.*targets are needed"):
        space = trace(WithLoss(lambda m, h: h, aux=nn.Conv2d(6, 2, 1)), X)
    assert space.widths(space.everything()) == {}


def test_an_example_that_fails_in_both_modes_is_an_error() -> None:
    with pytest.raises(TraceError, match=r"failed on example_inputs of shapes \[\(2, 4\)\].*a list holds several exam"):
        trace(nn.Linear(3, 2), [torch.randn(2, 3), torch.randn(2, 4)])


def test_a_fault_of_the_tracer_is_not_blamed_on_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(SHAPES, "convolution", failing)
    with pytest.raises(TraceError, match=r"tracing failed.*no such thing; the forward itself runs on these inputs"):
        trace(zoo.build("plain"), zoo.inputs("plain"))


def test_a_stack_that_is_too_shallow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setitem(SHAPES, "convolution", failing)
    with pytest.raises(TraceError, match=r"deeper stack than Python allows.*sys\.setrecursionlimit"):
        trace(zoo.build("plain"), zoo.inputs("plain"))


def test_a_stack_that_is_too_shallow_for_a_rule_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setitem(RULES, "relu", failing)
    with pytest.raises(TraceError, match=r"deeper stack than Python allows.*sys\.setrecursionlimit"):
        trace(zoo.build("plain"), zoo.inputs("plain"))


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_chance_does_not_depend_on_widths(draw: int) -> None:
    """The same numbers for every unit, whatever was drawn before and however much of it."""
    found = []
    for width in (6, 4):
        with running(nn.Identity(), Pass(draw=draw)) as chance, chance:
            torch.randn(3, width)
            found.append(
                [torch.rand(3, width), torch.randn(3, width), torch.empty(3, width).uniform_(-2, 4), torch.rand(3)]
            )
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[..., :3], other[..., :3])
    assert all(not torch.equal(x[0], x[1]) for x in found[0][:3])


def test_no_warning_where_both_modes_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(zoo.build("plain"), zoo.inputs("plain"))


class WritesIntoItsInput(nn.Module):
    """What a forward in place does to the batch must reach no other run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        scores: Tensor = self.second(torch.relu(self.first(x)))
        return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_example_stays_as_it_is_where_the_forward_writes_into_it(dtype: torch.dtype) -> None:
    model, x = WritesIntoItsInput().to(dtype), torch.ones(4, 6, dtype=dtype)
    assert verify(model, x).groups == {"first": 16}
    measure(model, x)
    assert torch.equal(x, torch.ones(4, 6, dtype=dtype))


def test_a_given_state_in_double_precision_stays_as_it_is() -> None:
    """The proof puts random numbers in the place of the zeros that most examples begin with."""
    model = nn.LSTM(3, 8, batch_first=True).double()
    state = (torch.zeros(1, 4, 8, dtype=torch.float64), torch.zeros(1, 4, 8, dtype=torch.float64))
    trace(model, (torch.randn(4, 5, 3, dtype=torch.float64), state), carried={1: 1})
    assert not any(bool(part.any()) for part in state)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_between_recurrent_layers_is_off(kind: type[nn.RNNBase], packed: bool) -> None:
    """On a GPU one operation draws it, whose numbers nothing holds still."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made: Any = kind
            self.inner, self.out = made(4, 6, 2, dropout=0.5), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            put_in: Any = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
            return self.out(self.inner(put_in)[1][0] if kind is nn.LSTM else self.inner(put_in)[1])

    seen: list[tuple[bool, float]] = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in RECURRENT:
                at = 6 if packed else 5
                seen.append((args[at + 1], args[at]))
            return func(*args, **(kwargs or {}))

    with Spy():
        space = trace(Model(), torch.randn(5, 2, 4))
    assert set(seen) == {(False, 0.0), (True, 0.0)}
    assert any(name.startswith("inner") for name in space.widths(space.everything()))


def test_a_copy_asks_no_other_process() -> None:
    """SyncBatchNorm, in a group of two of which this is one: its statistics are those of the batch at hand."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(6, 2))
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            space = trace(model, torch.randn(4, 3, 6, 6))
    finally:
        dist.destroy_process_group()
    assert space.widths(space.everything()) == {"0": 6}
    assert not any(frozen.op == "proof" for frozen in space.frozen)
    assert "forward" not in vars(model[1])


def test_gpus_that_nobody_uses_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run on the CPU would take memory on each, and fail in a process forked from one that has a GPU in use."""

    def started() -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    model = nn.Sequential(nn.Linear(4, 6), nn.RReLU(), nn.Linear(6, 3))
    trace(model, torch.randn(2, 4))
    assert randomness.random_state()["cuda"] == devices.random_state()[1] == []


def test_a_model_on_mps_is_refused() -> None:
    class Elsewhere(nn.Linear):
        def named_parameters(self, *arguments: Any, **more: Any) -> Any:
            yield "weight", SimpleNamespace(device=torch.device("mps:0"))

    with pytest.raises(TraceError, match=r"the model is on MPS, which has no float64.* grow it on the CPU \(model\.to"):
        trace(Elsewhere(3, 4), torch.randn(2, 3))
