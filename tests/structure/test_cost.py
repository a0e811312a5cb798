"""Law 6: cost counted = cost measured, with `numel` and `torch.utils.flop_counter` as the oracles."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from growing import batch
from layered import Residual, Stages
from torchgrow import Cost, Space, measure, shrink_, trace
from torchgrow.adapters.registry import adapted
from torchgrow.lab.models import ResNet
from torchgrow.structure.cost import CostModel, Tally
from torchgrow.tracing.model_call import call
from torchgrow.tracing.prover import Prover
from torchgrow.tracing.tracer import replay


def matrix_times_vector(a: Any, v: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1]


def one_lstm(x: Any, into: Any, again: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * (into[0] * into[1] + again[0] * again[1])


def bilinear(a: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * weight[0] * weight[1] * weight[2]


def measured(model: nn.Module, example: Any) -> Cost:
    """Parameters once each, FLOPs as torch counts them, for one sample."""
    first = next(iter(example.values())) if isinstance(example, dict) else example
    batch = len(first[0] if isinstance(first, tuple) else first)
    model.eval()
    # the counter knows no fused attention, no fused LSTM and no product of a matrix and a vector
    more = {
        torch.ops.aten.mv: matrix_times_vector,
        torch.ops.aten.mkldnn_rnn_layer: one_lstm,
        torch.ops.aten._trilinear: bilinear,
    }
    counter = FlopCounterMode(display=False, custom_mapping=more)
    with sdpa_kernel(SDPBackend.MATH), adapted(model), counter, torch.no_grad():
        call(model, example)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // batch)


def draws(space: Space, model: nn.Module, example: Any) -> list[torch.Tensor]:
    prover = Prover(model, space, example, seed=2)
    return [space.everything(), *(prover.draw(fraction) for fraction in (0.2, 0.5, 0.9))]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_law_6_on_the_zoo(name: str) -> None:
    model, example = zoo.build(name), zoo.inputs(name)
    space = zoo.space(name)
    costs = CostModel(space)
    for keep in draws(space, model, example):
        bank = shrink_(model, space, keep)
        assert costs.cost(keep) == measured(model, example)
        bank.restore_()


@pytest.mark.parametrize("name", [*zoo.ZOO, "layers"])
def test_what_one_group_changes_is_the_difference_of_two_costs(name: str) -> None:
    """Counted from the products that contain the group, for all groups at once and one after the other."""
    space = trace(Stages(Residual), batch(0)[0].float(), depth=True) if name == "layers" else zoo.space(name)
    costs, generator = CostModel(space), torch.Generator().manual_seed(0)
    live = costs.live(torch.rand(space.n_units, generator=generator) < 0.5)
    for more in (torch.ones_like(live), -live, costs.sizes - live):
        alone = live + torch.diag(more)
        assert torch.equal(costs.each(live, more), costs.both(alone))
        tally = Tally(costs, live)
        for group, number in enumerate(more.tolist()):
            after = costs.both(torch.tensor([*(live + more)[: group + 1].tolist(), *live[group + 1 :].tolist()]))
            less = after - torch.tensor([0, 1])
            if number:
                assert not tally.change(group, number, less)  # too dear: nothing has changed
            assert tally.change(group, number, after)
            assert tally.fits(after)
            assert not tally.fits(less)
        assert tally.live == (live + more).tolist()


@pytest.mark.parametrize(
    "build", [ResNet, torchvision.models.mobilenet_v3_small, torchvision.models.shufflenet_v2_x0_5]
)
def test_law_6_on_known_networks(build: type[nn.Module]) -> None:
    model, example = build(), torch.randn(1, 3, 32, 32)
    space = replay(model, example)
    costs = CostModel(space)
    for keep in draws(space, model, example)[:3]:
        bank = shrink_(model, space, keep)
        assert costs.cost(keep) == measured(model, example)
        bank.restore_()


def test_by_hand() -> None:
    """c3(3, 6) without bias, bn, c3(6, 5), fc(5, 4) on 8 x 8 images."""
    space = replay(zoo.build("plain"), zoo.inputs("plain"))
    costs = CostModel(space)

    def by_hand(a: int, b: int) -> Cost:
        params = 27 * a + 2 * a + 9 * a * b + b + 4 * b + 4
        return Cost(params, 2 * (27 * a * 64 + 9 * a * b * 64 + 4 * b))

    assert costs.cost(space.everything()) == by_hand(6, 5)
    keep = space.everything()
    keep[[0, 1, 8]] = False
    assert costs.cost(keep) == by_hand(4, 4)
    assert costs.both(costs.space.least).tolist() == [by_hand(1, 1).params, by_hand(1, 1).flops]
    many = torch.tensor([[6, 5], [1, 1], [3, 2]])
    expected = [by_hand(*live) for live in many.tolist()]
    assert costs.both(many).tolist() == [[cost.params, cost.flops] for cost in expected]


def test_tied_once_frozen_included_buffers_not() -> None:
    model = zoo.build("tied")
    model.stem.requires_grad_(False)
    space = replay(model, zoo.inputs("tied"))
    # stem 3*5*9 + 5, the shared weight 5*5*9 once, two biases, fc 24
    assert CostModel(space).cost(space.everything()).params == 140 + 225 + 10 + 24
    assert measure(model, zoo.inputs("tied")).params == 140 + 225 + 10 + 24
    bare, more = zoo.build("buffers"), zoo.build("buffers")
    more.register_buffer("big", torch.zeros(1000))
    example = zoo.inputs("buffers")
    assert measure(bare, example) == measure(more, example)


def test_what_must_stay_counts_as_stuck() -> None:
    space = replay(zoo.build("plain"), zoo.inputs("plain"))
    costs = CostModel(space.freeze([0, 1, 2], space.frozen[0]))
    assert costs.space.least.tolist() == [3, 1]


def test_a_batch_does_not_matter() -> None:
    for name in ("plain", "attention", "thin-middle"):
        model = zoo.build(name)
        one, five = (measure(model, zoo.inputs(name, batch=batch)) for batch in (1, 5))
        assert one == five


def test_a_network_without_units_has_a_cost() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert measure(model, torch.zeros(2, 3, 8, 8)) == Cost(386, 2 * 384)
