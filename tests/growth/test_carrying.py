"""Hidden state carried from one call to the next: found, proven, and cut with the network, survivors bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from drawn import zeroed
from growing import STILL, begun_as, indicators_of, same_indicators, same_parameters, sgd, step_both
from oracle import Eq6
from planned import Planned
from torchgrow import Budget, Grower, Space, StructureError, TraceError, shrink_, trace
from torchgrow.policies import Policy
from torchgrow.structure.surgery import recut
from torchgrow.tracing.prover import TOLERANCE, Prover
from torchgrow.tracing.tracer import replay
from torchgrow.tracing.verification import FRACTIONS, prove

WORDS, BATCH, STEPS = 11, 3, 4


class Stack(nn.Module):
    """tokens -> embedding(11, first) -> dropout -> recurrent layers of one layer each -> linear(11); returns states"""

    def __init__(
        self, kind: Callable[..., nn.RNNBase], sizes: tuple[int, ...], tied: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        self.kind, self.sizes, self.layers = kind, sizes[1:], kwargs.get("num_layers", 1)
        self.embed, self.out = nn.Embedding(WORDS, sizes[0]), nn.Linear(sizes[-1], WORDS)
        self.rnns = nn.ModuleList(kind(a, b, batch_first=True, **kwargs) for a, b in pairwise(sizes))
        self.drop = nn.Dropout(0.5)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: Tensor, states: Any) -> Any:
        y, new = self.embed(x), []
        for rnn, state in zip(self.rnns, states, strict=True):
            y, state = rnn(self.drop(y), state)
            new.append(state)
        return self.out(self.drop(y)), new

    def start(self, batch: int = BATCH) -> Any:
        shapes = [(self.layers, batch, size) for size in self.sizes]
        return [(torch.zeros(s), torch.zeros(s)) if self.kind is nn.LSTM else torch.zeros(s) for s in shapes]


class Cells(nn.Module):
    """tokens -> embedding(11, 5) -> one step after another of lstm cell(5, 4) -> linear(11)"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(WORDS, 5), nn.LSTMCell(5, 4), nn.Linear(4, WORDS)

    def forward(self, x: Tensor, state: Any) -> Any:
        seen = []
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
            seen.append(self.out(state[0]))
        return torch.stack(seen, 1), state

    def start(self, batch: int = BATCH) -> Any:
        return torch.zeros(batch, 4), torch.zeros(batch, 4)


class ByHand(nn.Module):
    """h = tanh(w(5, 4) x + u(4, 4) h), written out; keywords in, a dict out, beside a count that no unit lives on"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.w, self.u = nn.Embedding(WORDS, 5), nn.Linear(5, 4), nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, WORDS)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, steps = state["h"], state["steps"]
        seen = []
        for step in self.embed(x).unbind(1):
            h = torch.tanh(self.w(step) + self.u(h))
            seen.append(self.out(h))
        return {"scores": torch.stack(seen, 1), "memory": {"h": h, "steps": steps + x.shape[1]}}

    def start(self, batch: int = BATCH) -> Any:
        return {"h": torch.zeros(batch, 4), "steps": torch.zeros(batch)}


class OneStep(nn.Module):
    """token -> embedding(11, 5) -> h = w(5, 4) x + tanh(u(4, 4) h) -> linear(11): only a next call ties h to h"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.w, self.u = nn.Embedding(WORDS, 5), nn.Linear(5, 4), nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, WORDS)

    def forward(self, x: Tensor, state: Any) -> Any:
        h = self.w(self.embed(x[:, 0])) + torch.tanh(self.u(state))
        return self.out(h), h

    def start(self, batch: int = BATCH) -> Any:
        return torch.zeros(batch, 4)


@dataclass
class Case:
    """A model and how it is called; `units` are those of its embedding and of its recurrent layers."""

    build: Callable[[], Any]
    units: int
    states: int
    carried: dict[Any, Any]


CASES = {
    "lstm-stack": Case(lambda: Stack(nn.LSTM, (5, 6, 4)), 15, 4, {1: 1}),
    "gru-stack": Case(lambda: Stack(nn.GRU, (5, 6, 4)), 15, 2, {1: 1}),
    "rnn-stack": Case(lambda: Stack(nn.RNN, (5, 6, 4)), 15, 2, {1: 1}),
    "lstm-two-layers": Case(lambda: Stack(nn.LSTM, (5, 6), num_layers=2, dropout=0.3), 11, 2, {1: 1}),
    "lstm-tied": Case(lambda: Stack(nn.LSTM, (5, 6, 5), tied=True), 11, 4, {1: 1}),
    "lstm-cells": Case(Cells, 9, 2, {1: 1}),
    "one-step": Case(OneStep, 9, 1, {1: 1}),
    "by-hand": Case(ByHand, 9, 1, {"state": "memory"}),
}


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return CASES[name].build().double()


def words(seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (BATCH, STEPS), generator=torch.Generator().manual_seed(seed))


def noise(state: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64), state)


def example(name: str, model: Any) -> Any:
    state = tree_map(Tensor.double, model.start())
    return {"state": state, "x": words()} if name == "by-hand" else (words(), state)


def forward(model: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    out = model(x, state)
    return (out["scores"], out["memory"]) if isinstance(out, dict) else out


def cut(space: Space, state: Any, old: Tensor, new: Tensor) -> Any:
    """Cut the state as surgery does; leaves without units stay."""
    places = iter(space.carried)
    return tree_map(lambda x: recut(x, next(places).units, old, new), state)


def growing(name: str, method: Policy = STILL, updates: int = 30, seed: int = 0) -> Grower:
    model = build(name).eval()  # without dropout, which draws as many numbers as there are units
    return Grower(
        model,
        sgd(model),
        example_inputs=example(name, model),
        budget=Budget(params="85%"),
        updates=updates,
        policy=method,
        seed=seed,
        carried=CASES[name].carried,
    )


# --- found, and exact ---


@pytest.mark.parametrize("name", CASES)
def test_every_hidden_unit_is_found_and_law_1_holds_with_any_state(name: str) -> None:
    """Replayed without proof, so that no freezing by the proof hides anything."""
    model, case = build(name), CASES[name]
    space = replay(model, example(name, model), carried=case.carried)
    assert int(space.removable.sum()) == case.units
    assert [bool(place.units) for place in space.carried].count(True) == case.states
    prover = Prover(model, space, example(name, model), seed=1)
    for fraction in FRACTIONS:
        error, reason = prover.error(prover.draw(fraction))
        assert error <= TOLERANCE, reason
    assert len(trace(model, example(name, model), carried=case.carried).frozen) == len(space.frozen)


@pytest.mark.parametrize("name", CASES)
def test_law_1_by_hand_over_several_calls(name: str) -> None:
    """The state handed on three times, from noise: scores agree, and states in the entries that are left."""
    frame = build(name).eval()
    space = trace(frame, example(name, frame), carried=CASES[name].carried)
    keep = space.everything()
    for group in range(space.n_groups):
        keep[torch.nonzero((space.group_of == group) & space.removable)[1::2]] = False
    compact, absent = build(name).eval(), zeroed(frame, space, keep)
    shrink_(compact, space, keep)
    full = noise(tree_map(Tensor.double, frame.start()))
    small = cut(space, full, space.everything(), keep)
    for call in range(3):
        expected, full = forward(absent, words(call), full)
        found, small = forward(compact, words(call), small)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(small, cut(space, full, space.everything(), keep), rtol=1e-12, atol=1e-12)


def test_a_wrong_state_is_caught_by_the_proof_and_its_group_frozen() -> None:
    model = build("lstm-stack")
    space = replay(model, example("lstm-stack", model), carried={1: 1})
    first, *rest = space.carried
    wrong = replace(space, carried=(replace(first, units={2: first.units[2].flip(0)}), *rest))
    proven, _ = prove(model, wrong, example("lstm-stack", model))
    frozen = [f for f in proven.frozen if f.op == "proof"]
    assert [f.module for f in frozen] == ["rnns.0.weight_ih_l0[0]"]
    assert int(proven.removable.sum()) == CASES["lstm-stack"].units - 6


def test_a_state_that_is_not_declared_freezes_its_layer_and_says_how_to_declare_it() -> None:
    model = build("lstm-stack")
    space = trace(model, example("lstm-stack", model))
    assert int(space.removable.sum()) == 5  # the embedding
    assert any("if the model put it out before, declare carried=..." in str(f) for f in space.frozen)


def test_what_is_also_a_plain_output_stays() -> None:
    class Both(Cells):
        def forward(self, x: Tensor, state: Any) -> Any:
            scores, state = super().forward(x, state)
            return scores, state, state[0]

    model = Both().double()
    space = trace(model, example("lstm-cells", model), carried={1: 1})
    assert int(space.removable.sum()) == 5
    assert any(f.op == "output" and f.reason == "is an output of the model" for f in space.frozen)


def test_a_state_that_comes_back_as_something_else_stays() -> None:
    """h comes back as four numbers of its own: as many as the hidden units, and none of them can go."""

    class Reset(OneStep):
        def forward(self, x: Tensor, state: Any) -> Any:
            return super().forward(x, state)[0], state.new_zeros(len(state), 4)

    model = Reset().double()
    space = replay(model, example("one-step", model), carried={1: 1})
    assert "is carried over from positions that cannot be removed" in [f.reason for f in space.frozen]
    assert not any(place.units for place in space.carried)


# --- carried over an update ---


def by_unit(space: Space, state: Any, keep: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """Entries of a state by tensor, axis and unit."""
    found = {}
    for i, (x, place) in enumerate(zip(tree_leaves(state), space.carried, strict=True)):
        for axis, units in place.units.items():
            live = [u for u in units.tolist() if keep[u]]
            assert x.shape[axis] == len(live)
            found.update({(i, axis, u): x.select(axis, position) for position, u in enumerate(live)})
    return found


@pytest.mark.parametrize("name", CASES)
def test_survivors_are_the_same_bit_for_bit_and_newborns_are_zero(name: str) -> None:
    grower = growing(name, seed=1)
    space, came, stayed, left = grower.space, 0, 0, 0
    state = grower.carry(noise(tree_map(Tensor.double, build(name).start())))
    for update in range(8):
        scores, state = forward(grower.model, words(update), state)
        scores.sum().backward()
        grower.optimizer.step()
        grower.optimizer.zero_grad()
        before = by_unit(space, tree_map(Tensor.clone, state), grower.keep)
        grower.update()
        state = grower.carry(state)
        assert not any(x.requires_grad for x in tree_leaves(state))
        after = by_unit(space, state, grower.keep)
        for key, entries in after.items():
            assert torch.equal(entries, before.get(key, torch.zeros_like(entries)))
        came, stayed, left = (
            came + len(after.keys() - before.keys()),
            stayed + len(after.keys() & before.keys()),
            left + len(before.keys() - after.keys()),
        )
    assert min(came, stayed, left) > 0, (came, stayed, left)
    if isinstance(grower.model, Stack):
        assert {type(rnn) for rnn in grower.model.rnns} == {grower.model.kind}, "not a plain layer"


@pytest.mark.parametrize("name", ["lstm-stack", "gru-stack", "rnn-stack", "lstm-tied", "by-hand"])
def test_growing_with_a_carried_state_is_literal_eq6(name: str) -> None:
    """Law 3 under truncated backpropagation: losses, indicators and weights, the oracle's state at full size."""
    updates, method = 8, Planned(ramp=0.5)
    grower, frame = growing(name, method, updates, seed=1), build(name).eval()
    space, indicators = grower.space, indicators_of(grower)
    t = torch.zeros(space.n_units, dtype=torch.int64)
    begun_as(grower, frame)
    oracle = Eq6(
        frame, sgd(frame), space, method, s=indicators.s, q=grower.keep, beta=torch.ones(space.n_units).double()
    )
    full = tree_map(Tensor.double, frame.start())
    state = grower.carry(full)

    def literal(x: Tensor) -> tuple[Tensor, Any]:
        out = oracle(x, full)
        return (out["scores"], out["memory"]) if isinstance(out, dict) else out

    changed = 0
    for epoch in range(updates - 1):
        for step in range(2):
            x = words(2 * epoch + step)
            grower.optimizer.zero_grad()
            scores, state = forward(grower.model, x, tree_map(Tensor.detach, state))
            whole, full = literal(x)
            full = tree_map(Tensor.detach, full)
            target = torch.arange(scores.numel()).reshape(scores.shape).sin()
            step_both(grower, oracle, (scores - target).square().mean(), (whole - target).square().mean(), 0.0)
        same_indicators(grower, oracle)
        old = grower.keep
        event = grower.update()
        state = grower.carry(state)
        new = grower.keep
        full = cut(space, cut(space, full, space.everything(), old & new), old & new, space.everything())
        t += new
        oracle.update(new, 100 ** (1 / updates), t, event.pressure)
        raw = {**dict(grower.model.named_parameters()), **grower.run.live.raw()}
        same_parameters(grower, oracle, raw, f"in epoch {epoch}")
        torch.testing.assert_close(state, cut(space, full, space.everything(), new), rtol=1e-9, atol=1e-9)
        changed += event.born + event.detached + event.regrown
    assert changed > 0


def test_law_11_with_a_state() -> None:
    """A loss kept over an update leaves the next backward right; a graph through the old state refuses its own."""
    grower = growing("lstm-stack", Planned(ramp=0.5), updates=4)
    model = grower.model
    scores, state = model(words(0), grower.carry(example("lstm-stack", build("lstm-stack"))[1]))
    loss = scores.square().mean()
    grower.update()
    carried = grower.carry(state)
    model(words(1), carried)[0].square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.zero_grad()
    model(words(1), carried)[0].square().mean().backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_the_state_of_another_batch_size_and_the_end_of_the_run() -> None:
    grower = growing("gru-stack", Planned(ramp=0.5), updates=4)
    state = grower.carry(tree_map(Tensor.double, build("gru-stack").start(batch=7)))
    x = torch.randint(WORDS, (7, 2))
    for end in (grower.update, grower.update, grower.finish):
        _, state = grower.model(x, state)
        end()
        state = grower.carry(state)
    grower.model(x, state)
    assert [type(m) for m in grower.model.get_submodule("rnns").children()] == [nn.GRU, nn.GRU]


# --- errors carry the fix ---


def test_carry_without_declaration_says_how_to_declare() -> None:
    model = build("lstm-stack")
    grower = Grower(
        model, sgd(model), example_inputs=example("lstm-stack", model), budget=Budget(params="90%"), updates=2
    )
    with pytest.raises(StructureError, match=r"no state was declared; construct Grower\(\.\.\., .* carried={1: 1}\)"):
        grower.carry(model.start())


def test_a_state_that_does_not_fit_is_refused() -> None:
    grower = growing("lstm-stack", Planned(ramp=0.5), updates=4)
    whole = build("lstm-stack").start()
    with pytest.raises(StructureError, match="the state holds 2 tensors, but 4 were declared as carried; pass"):
        grower.carry(whole[0])
    state = grower.carry(whole)
    for _ in range(3):
        grower.update()
    with pytest.raises(StructureError, match=r"tensor 0 of the state is \(1, 3, 1\), but axis 2 had \d positions"):
        grower.carry(state)


@pytest.mark.parametrize(
    ("carried", "text"),
    [
        ({2: 1}, r"carried names argument 2, in which example_inputs holds no floating-point tensor .* in \[0, 1\]\)"),
        ({0: 1}, "carried names argument 0, .* give an initial state of zeros there"),
        ({"state": 1}, "carried names argument 'state'"),
        ({1: 2}, r"output 2 becomes argument 1 .* of shapes \[\] and \[\(1, 3, 6\), .*; name the output"),
        ({1: 0}, r"output 0 becomes argument 1 of the next call, but their tensors are of shapes \[\(3, 4, 11\)\]"),
    ],
)
def test_a_wrong_declaration_says_what_there_is(carried: dict[Any, Any], text: str) -> None:
    model = build("lstm-stack")
    with pytest.raises(TraceError, match=text):
        trace(model, example("lstm-stack", model), carried=carried)
