"""Law 1: a compact network computes what the frame computes with the absent units zeroed; and what fails is frozen."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchgrow.tracing.prover
import torchgrow.tracing.verification
import zoo
from drawn import zeroed
from torchgrow import Space, TraceError, shrink_, trace, verify
from torchgrow.structure.record import RECORD
from torchgrow.tracing.prover import TOLERANCE, Prover
from torchgrow.tracing.tracer import replay
from torchgrow.tracing.verification import prove


@pytest.mark.parametrize("name", zoo.ZOO)
def test_law_1_on_the_zoo(name: str) -> None:
    """Unproven spaces, so that nothing is hidden by the proof's own freezing (but attributes are found by it)."""
    model, example = zoo.build(name), zoo.inputs(name)
    space = zoo.space(name) if name in ("heads-counted", "shared-keys") else replay(model, example)
    prover = Prover(model, space, example, seed=1)
    for fraction in (0.1, 0.3, 0.5, 0.8, 0.95):
        for turn in range(3):
            error, reason = prover.error(prover.draw(fraction, turn=turn))
            assert error <= TOLERANCE, reason


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise", "flatten", "grouped-2", "sigmoid"])
def test_law_1_by_hand(name: str) -> None:
    """Without the prover: default weights, non-trivial statistics, one unit of each group absent."""
    torch.manual_seed(0)
    model, example = zoo.build(name).double().eval(), zoo.inputs(name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    space = trace(model, example)
    keep = space.everything()
    for group in range(space.n_groups):
        keep[torch.nonzero(space.group_of == group)[1]] = False
    expected = zeroed(model, space, keep)(example)
    assert not torch.equal(expected, model(example))
    before = sum(p.numel() for p in model.parameters())
    shrink_(model, space, keep)
    torch.testing.assert_close(model(example), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) < before


def swapped(space: Space, place: tuple[str, int], i: int, j: int) -> Space:
    """A wrong space: two positions of one axis have each other's units."""
    vector = space.unit_of[place].clone()
    vector[[i, j]] = vector[[j, i]]
    return replace(space, unit_of={**space.unit_of, place: vector})


@pytest.mark.parametrize("place", [("a.weight", 0), ("bn1.bias", 0), ("bn1.running_mean", 0), ("b.weight", 1)])
def test_a_wrong_space_is_caught_and_its_group_frozen(place: tuple[str, int]) -> None:
    model, example = zoo.build("residual"), zoo.inputs("residual")
    space = replay(model, example)
    wrong = swapped(space, place, 0, 4)
    proven, _ = prove(model, wrong, example)
    group = space.group_names.index("a")
    assert not bool(proven.removable[space.group_of == group].any())
    assert bool(proven.removable[space.group_of != group].all())
    (frozen,) = [f for f in proven.frozen if f.op == "proof"]
    assert frozen.module == "a"
    assert place in frozen.places
    assert "outputs differ by" in frozen.reason
    with pytest.raises(Exception, match="not removable"):
        proven.check_keep(~(space.group_of == group))


def test_a_missing_axis_is_caught_as_a_failing_network() -> None:
    model, example = zoo.build("plain"), zoo.inputs("plain")
    space = replay(model, example)
    cut = {**space.unit_of, ("b.weight", 1): torch.full((6,), -1)}
    proven, _ = prove(model, replace(space, unit_of=cut), example)
    (frozen,) = [f for f in proven.frozen if f.op == "proof"]
    assert frozen.reason.startswith("the compact network fails: RuntimeError: ")
    assert proven.widths(proven.everything()) == {"b": 5}


class Narrow(nn.Module):
    """fc(8, 16) -> fc(16, 12), where a width below `width` takes another way; at 0 it squeezes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return self.c(x[..., None].squeeze() if self.width == 0 else x.relu() if x.shape[1] >= self.width else x.tanh())


@pytest.mark.parametrize(("width", "fewest"), [(0, 2), (2, 2), (3, 4), (4, 4), (7, 12)])
def test_a_narrow_network_that_goes_another_way_is_never_reached(width: int, fewest: int) -> None:
    """As many units stay as make it exact; all of them where many would have to."""
    x = torch.randn(5, 8)
    space = trace(Narrow(width), x)
    assert space.least.tolist() == [1, fewest]
    told = [frozen.reason.partition("the compact network")[0] for frozen in space.frozen if frozen.op == "proof"]
    assert sorted(told) == ([f"with fewer than {n} of them " for n in (2, 4) if n <= fewest] if fewest < 12 else [""])
    keep = space.everything()
    keep[space.removable] = False
    for group in range(space.n_groups):
        units = torch.nonzero(space.group_of == group).flatten()
        keep[units[: int(space.least[group])]] = True
    model = Narrow(width).double()
    expected = zeroed(model, space, keep)(x.double())
    shrink_(model, space, keep)
    torch.testing.assert_close(model(x.double()), expected, rtol=1e-12, atol=1e-12)


class Residual(nn.Module):
    """x + fc(6, 8)(fc(8, 6)(x))"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


class Alias(nn.Module):
    """Four blocks, the first of which stays; without the other three their input is their output, and written into."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.fails = fails
        self.first, self.blocks, self.last = (
            nn.Linear(4, 8),
            nn.ModuleList(Residual() for _ in range(4)),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = before = self.blocks[0](self.first(x))
        for block in list(self.blocks)[1:]:
            x = block(x)
        if self.fails and x is before:
            raise ValueError("nothing left")
        return self.last(torch.tanh((x if self.fails else x.mul_(2.0)) + before))


@pytest.mark.parametrize("fails", [False, True])
def test_layers_that_cannot_all_go_are_frozen_and_the_proof_ends(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = itertools.count()
    error = Prover.error
    monkeypatch.setattr(
        Prover, "error", lambda self, keep: error(self, keep) if next(tried) < 200 else pytest.fail("no end")
    )
    space = trace(Alias(fails=fails), torch.randn(2, 4), depth=True)
    assert len(space.blocks) == 3
    assert not any(bool(space.removable[block.unit]) for block in space.blocks)
    assert all(frozen.places or "fewer" not in frozen.reason for frozen in space.frozen)
    assert int(space.removable.sum()) == 8 + 4 * 6  # all units inside stay free


class Together(nn.Module):
    """Four branches of widths 8, added up; where those named by `pair` are narrow together, another way is taken."""

    def __init__(self, pair: tuple[int, int]) -> None:
        super().__init__()
        self.pair = pair
        self.inner = nn.ModuleList(nn.Linear(5, 8) for _ in range(4))
        self.outer = nn.ModuleList(nn.Linear(8, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = [layer(x) for layer in self.inner]
        narrow = sum(hidden[number].shape[1] for number in self.pair) < 4
        return torch.stack(
            [layer(one.tanh() if narrow else one) for layer, one in zip(self.outer, hidden, strict=True)]
        ).sum(0)


@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)))
def test_only_groups_that_are_wrong_together_are_bound(pair: tuple[int, int]) -> None:
    space = trace(Together(pair), torch.randn(5, 5))
    assert space.least.tolist() == [2 if group in pair else 1 for group in range(4)]


def test_of_too_many_such_sets_all_groups_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchgrow.tracing.verification.TOGETHER", 0)
    assert trace(Together((0, 2)), torch.randn(5, 5)).least.tolist() == [2, 2, 2, 2]


def test_a_size_fixed_in_the_forward_is_found_by_the_proof() -> None:
    class Fixed(nn.Module):
        """c3(3, 6) -> view [N, 6, 64] with the 6 written out -> mean -> fc(6, 5) -> fc(5, 2)"""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.f, self.g = zoo.c3(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.g(torch.relu(self.f(self.a(x).reshape(len(x), 6, -1).mean(2))))

    report = verify(Fixed(), zoo.inputs("plain"))
    assert report.ok
    assert report.groups == {"f": 5}
    assert any(f.op == "proof" and f.module == "a" for f in report.frozen)


def test_report_fields() -> None:
    model = zoo.build("plain-bias")
    report = verify(model, zoo.inputs("plain-bias"), fraction=0.5, seed=3, trials=4)
    assert report.ok
    assert 0 < report.max_error <= TOLERANCE
    assert (report.trials, report.units, report.groups) == (4, 11, {"a": 6, "b": 5})
    # frame: a 3*6*9 + 6, bn 12, b 6*5*9 + 5, fc 24; least: one channel each
    full, least = (162 + 6) + 12 + (270 + 5) + 24, (27 + 1) + 2 + (9 + 1) + (4 + 4)
    assert report.removable_params == pytest.approx(1 - least / full, abs=1e-12)
    assert len(report.frozen) == 2
    assert str(report).startswith("exact: max relative error ")
    assert "11 units in 2 groups" in str(report)
    assert verify(model, zoo.inputs("plain-bias"), fraction=0.5, seed=3, trials=4) == report


def test_report_says_when_it_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = zoo.build("residual"), zoo.inputs("residual")
    wrong = swapped(replay(model, example), ("a.weight", 0), 0, 4)
    monkeypatch.setattr(
        "torchgrow.tracing.verification.trace", lambda model, example, **asked: replace(wrong, proven=True)
    )
    report = verify(model, example, fraction=0.5)
    assert not report.ok
    assert report.max_error > 1e-3
    assert str(report).startswith("NOT EXACT")


def test_nothing_to_prove() -> None:
    report = verify(zoo.build("attention"), zoo.inputs("attention"))
    assert (report.ok, report.trials, report.units, report.removable_params) == (True, 0, 0, 0.0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, float("nan")])
def test_fraction_must_lie_between(fraction: float) -> None:
    with pytest.raises(TraceError, match="fraction must lie between 0 and 1"):
        verify(zoo.build("plain"), zoo.inputs("plain"), fraction=fraction)


def test_a_dtype_named_in_the_forward_is_explained() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = zoo.c3(3, 6), zoo.c3(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).float())

    with pytest.raises(TraceError, match=r"float64.* failed: RuntimeError.*take dtypes from the tensors"):
        trace(Named(), zoo.inputs("plain"))


def test_the_model_is_left_as_it_was() -> None:
    """Weights, buffers (counted and reassigned in the forward), modes, gradients, random state."""
    for name in ("residual", "buffers", "unused"):
        model, example = zoo.build(name), zoo.inputs(name)
        model.train()
        next(model.children()).eval()
        zoo_output = model(example)
        zoo_output.sum().backward()
        state = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        modes = [module.training for module in model.modules()]
        random = torch.get_rng_state()
        verify(model, example)
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.modules()] == modes
        after = model.state_dict(keep_vars=True)
        assert after.keys() == state.keys()
        for key, (tensor, value) in state.items():
            assert after[key] is tensor, f"{key} of {name} is another object"
            assert torch.equal(tensor, value)
        assert all(torch.equal(model.get_parameter(key).grad, grad) for key, grad in grads.items())
        assert RECORD not in vars(model)


class Random(nn.Module):
    """A chain of blocks, each plain, residual, concatenating or depthwise, with widths and norms drawn."""

    def __init__(self, blocks: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.kinds, self.layers = [kind for kind, _, _ in blocks], nn.ModuleList()
        width = 3
        for kind, size, norm in blocks:
            out = width if kind in ("residual", "depthwise") else size
            conv = zoo.c3(width, out, groups=width if kind == "depthwise" else 1, bias=not norm)
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(out)) if norm else conv)
            width = width + out if kind == "concat" else out
        self.fc = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = torch.relu(layer(x))
            x = x + y if kind == "residual" else torch.cat([x, y], 1) if kind == "concat" else y
        return zoo.head(x, self.fc)


BLOCK = st.tuples(st.sampled_from(["plain", "residual", "concat", "depthwise"]), st.integers(1, 5), st.booleans())


@settings(max_examples=15, deadline=None)
@given(st.lists(BLOCK, min_size=1, max_size=5), st.floats(0.1, 0.9))
def test_law_1_on_random_networks(blocks: list[tuple[str, int, bool]], fraction: float) -> None:
    model, example = Random(blocks), zoo.inputs("plain")
    prover = Prover(model, replay(model, example), example, seed=0)
    error, reason = prover.error(prover.draw(fraction))
    assert error <= TOLERANCE, reason


class Faint(nn.Module):
    """A mean over the hidden units that shows in the sixth digit only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y + 1e-6 * torch.tanh(y).mean(1, keepdim=True))


def test_a_faint_mistake_is_not_taken_for_rounding() -> None:
    """Labels that say all hidden units are free, as they would be without the mean."""
    model, x = Faint(), torch.randn(5, 4)
    honest = trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), x)
    names = {"0.weight": "a.weight", "0.bias": "a.bias", "1.weight": "b.weight", "1.bias": "b.bias"}
    wrong = replace(
        honest,
        unit_of={(names[name], axis): units for (name, axis), units in honest.unit_of.items()},
        shapes={names[name]: shape for name, shape in honest.shapes.items()},
        parameters=tuple(names[name] for name in honest.parameters),
        fold={(names[name], axis): units for (name, axis), units in honest.fold.items()},
        columns={},
        attributes=(),
        proven=False,
    )
    space, _ = prove(model, wrong, x)
    assert not bool(space.removable.any())
    assert any("outputs differ by" in str(frozen) for frozen in space.frozen)


def test_rounding_that_a_network_blows_up_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 1e-7 on some weights and of 1e-16 on others is no mistake of the structure."""
    gaps = iter([0.0, 1e-7, 2e-5, 1e-15])
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(5, 4)
    space = replay(model, x)
    prover = Prover(model, space, x, seed=0)
    before = prover.frame.get_parameter("0.weight").clone()
    monkeypatch.setattr(torchgrow.tracing.prover, "relative_error", lambda found, expected: next(gaps))
    assert prover.error(prover.draw(0.5))[0] == 0.0
    assert torch.equal(prover.frame.get_parameter("0.weight"), before)
    assert prover.error(prover.draw(0.5))[0] == 1e-15
    assert not torch.equal(prover.frame.get_parameter("0.weight"), before)


class Late(nn.Module):
    """Multiplies by random numbers, but for its first calls; where that is kept, nothing is restored."""

    calls, quiet = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        Late.calls += 1
        x = self.first(x).relu()
        return self.last(x * torch.rand_like(x) if Late.calls > Late.quiet else x)


class Coin(nn.Module):
    """Random numbers of its own while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 0.9)) if self.training else x


def test_random_numbers_that_come_late_are_the_same_everywhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are watched for them only in passes that drew some at first; the others are run again if they do."""
    monkeypatch.setattr(Late, "calls", 0)
    monkeypatch.setattr(Late, "quiet", 10_000)
    torch.manual_seed(0)
    model, example = Late(), torch.randn(4, 5)
    expected = trace(model, example)
    assert int(expected.removable.sum()) == 7
    most = Late.calls
    assert most > 15
    for quiet in range(most):
        monkeypatch.setattr(Late, "calls", 0)
        monkeypatch.setattr(Late, "quiet", quiet)
        assert torch.equal(trace(model, example).removable, expected.removable), quiet


@pytest.mark.parametrize(
    ("between", "drawing"),
    [(nn.ReLU, False), (partial(nn.Dropout, 0.0), True), (nn.Dropout, True), (Coin, True)],
)
def test_only_passes_without_random_numbers_go_unwatched(between: Callable[[], nn.Module], drawing: bool) -> None:
    model, example = nn.Sequential(nn.Linear(5, 7), between(), nn.Linear(7, 3)), torch.randn(4, 5)
    prover = Prover(model, replay(model, example), example, seed=1)
    assert {one for one in prover.passes if not one.training or not drawing} == prover.still
    assert {one.training for one in prover.passes} == {False, True}


class Literal(nn.Module):
    """A number in the forward that only a proof finds: the view fails on a narrower layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return self.b(y.view(-1, 12))


def test_the_proof_names_the_line_that_fails() -> None:
    (frozen,) = [one for one in trace(Literal(), torch.randn(2, 4)).frozen if one.op == "proof"]
    line = Literal.forward.__code__.co_firstlineno + 2
    assert frozen.line == f"test_prover.py:{line}", frozen
