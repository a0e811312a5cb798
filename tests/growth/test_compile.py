"""torch.compile on a growing network: compiled anew when shapes change, once each, and never given up for eager."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow.exchange
from growing import batch, differences, indicators_of, make, sgd
from oracle import SmallResNet, TwoLayers
from torchgrow import Budget, Grower, trace
from torchgrow.policies import Paper

LITERAL = Paper()  # the structure changes at nearly every update


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Where Dynamo would give a function up, it raises."""
    torch.compiler.reset()
    names = ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")  # before PyTorch 2.7 the second
    name = next(name for name in names if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({name: True, "suppress_errors": False}):
        yield
    torch.compiler.reset()


def grown(how: str, backend: Any, updates: int, model: nn.Module, x: Tensor) -> tuple[Grower, Any]:
    """A grower and what is to be called: compiled before it, after it, in place, or not at all."""
    if how == "before":
        net = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
        net = model
    budget = Budget(params="50%")
    grower = Grower(model, sgd(model), example_inputs=x, budget=budget, updates=updates, policy=LITERAL, seed=1)
    if how == "after":
        net = torch.compile(model, backend=backend)
    return grower, model if how == "eager" else net


@pytest.mark.parametrize("how", ["before", "after", "in place"])
def test_one_compilation_for_every_change_of_shapes(how: str) -> None:
    """More shapes than Dynamo's limit of 8 graphs; an update that changes nothing costs no compilation."""
    backend = Backend()
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    grower, net = grown(how, backend, 30, TwoLayers(), x)
    assert backend.graphs == 0  # tracing ran the plain module
    expected = 0
    reshaped = True
    for _ in range(30):
        grower.optimizer.zero_grad()
        out = net(x)
        out.square().mean().backward()
        expected += reshaped
        assert backend.graphs == expected
        assert torch.equal(out, grower.model._call_impl(x))
        grower.optimizer.step()
        net(x)
        before = dict(grower.widths())
        grower.update()
        reshaped = before != grower.widths()
    assert 8 < expected < 30


def test_compiled_training_is_plain_training() -> None:
    """Weights, indicators and history, bit for bit; the model has batch norm and a residual sum."""
    results = []
    for how, backend in (("eager", None), ("before", "aot_eager"), ("in place", "eager")):
        torch.manual_seed(0)
        grower, net = grown(how, backend, 8, SmallResNet().double(), batch(0)[0])
        for step in range(8):
            x, target = batch(step)
            grower.optimizer.zero_grad()
            F.cross_entropy(net(x), target).backward()
            grower.optimizer.step()
            grower.update()
        results.append({**grower.model.state_dict(), "s": indicators_of(grower).s, "keep": grower.keep})
    for other in results[1:]:
        assert differences(results[0], other) == []


def test_modes_have_a_graph_each() -> None:
    """Training and evaluation: two compilations after every change, as without torchgrow."""
    backend = Backend()
    grower, net = grown("after", backend, 12, SmallResNet().double(), batch(0)[0])
    changed = True
    for step in range(6):
        before = backend.graphs
        widths = dict(grower.widths())
        net.train()(batch(step)[0])
        with torch.no_grad():
            net.eval()(batch(step)[0])
        assert backend.graphs - before == 2 * changed
        grower.update()
        changed = widths != grower.widths()


def test_other_compiled_functions_go_on() -> None:
    """Forgetting is global: what else was compiled is compiled again at its next call, with the same result."""
    backend = Backend()
    double = torch.compile(lambda x: 2 * x, backend=backend)
    grower = make()
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert grower.update().born
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert backend.graphs == 2


def test_nothing_is_loaded_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("loads the compiler"))
    torchgrow.exchange.forget_compiled()


def test_tracing_leaves_a_compiled_model_compiled() -> None:
    backend = Backend()
    model = TwoLayers()
    model.compile(backend=backend)
    model.fc1.compile(backend=backend)
    held = model._compiled_call_impl, model.fc1._compiled_call_impl
    assert trace(model, torch.randn(2, 5)).n_units == 12
    assert (model._compiled_call_impl, model.fc1._compiled_call_impl) == held
    assert backend.graphs == 0
