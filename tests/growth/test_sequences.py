"""Law 3 on recurrent layers and attention: growing them is Eq 6 written out, step by step, structure by structure."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zoo
from growing import LITERAL, begun_as, indicators_of, same_indicators, same_parameters, sgd, step_both
from oracle import Eq6
from planned import Planned
from torchgrow import Budget, Grower

NAMES = [
    "lstm", "lstm-bidirectional", "lstm-projected", "gru", "rnn", "states", "lstm-cell", "gru-cell", "heads",
    "heads-grouped", "heads-rotary", "heads-counted", "multihead", "two-sides", "experts", "bag", "windows",
    "interleaved", "transposed-slots",
]  # fmt: skip
EPOCHS = 8


def loss(outputs: object) -> Tensor:
    """Pulls every output to its own sine."""
    total = torch.zeros((), dtype=torch.float64)
    for out in tree_leaves(outputs):
        total = total + (out - torch.arange(out.numel()).reshape(out.shape).sin()).square().mean()
    return total


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("preset", ["paper", "plan"])
@pytest.mark.parametrize("name", NAMES)
def test_growing_is_literal_eq6(name: str, preset: str) -> None:
    method = LITERAL if preset == "paper" else Planned(ramp=0.5)
    model, frame = zoo.build(name).double(), zoo.build(name).double()
    grower = Grower(
        model,
        sgd(model),
        example_inputs=double(zoo.inputs(name)),
        budget=Budget(params="100%" if name == "heads-grouped" else "85%"),  # which has two units in all
        updates=EPOCHS,
        policy=method,
        seed=1,
    )
    space, indicators = grower.space, indicators_of(grower)
    t = torch.zeros(space.n_units, dtype=torch.int64)
    begun_as(grower, frame)
    oracle = Eq6(
        frame, sgd(frame), space, method, s=indicators.s, q=grower.keep, beta=torch.ones(space.n_units).double()
    )
    changed = 0
    for epoch in range(EPOCHS - 1):
        for step in range(2):
            x = double(zoo.inputs(name, seed=2 * epoch + step))
            grower.optimizer.zero_grad()
            penalty = grower.history[-1].pressure if preset == "paper" else 0.0
            step_both(grower, oracle, loss(model(x)), loss(oracle(x)), penalty)
        same_indicators(grower, oracle)
        event = grower.update()
        t += grower.keep
        oracle.update(grower.keep, 100 ** (1 / EPOCHS), t, 0.0 if preset == "paper" else event.pressure)
        raw = {**dict(model.named_parameters()), **grower.run.live.raw()}
        same_parameters(grower, oracle, raw, f"in epoch {epoch}")
        changed += event.born + event.detached + event.regrown
    assert changed > 0, "nothing ever changed, so nothing was compared"


def test_a_grown_lstm_is_a_plain_lstm_of_that_size() -> None:
    model = zoo.build("lstm")
    grower = Grower(
        model, sgd(model), example_inputs=zoo.inputs("lstm"), budget=Budget(params="80%"), updates=2, seed=0
    )
    grower.finish()
    plain = nn.LSTM(model.rnn.input_size, model.rnn.hidden_size)
    plain.load_state_dict(model.rnn.state_dict())
    x = torch.randn(4, 2, plain.input_size)
    assert type(model.rnn) is nn.LSTM
    assert plain.hidden_size < 5
    torch.testing.assert_close(plain(x), model.rnn(x))
