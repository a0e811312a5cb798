"""DARTS and ProxylessNAS: what they search among, and their steps, worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from small_tasks import Chain, Two, images, task_of
from torchgrow import Budget, Limits, measure
from torchgrow.lab.data import ImageData
from torchgrow.lab.systems import UnfitError, system
from torchgrow.lab.systems.darts import Mixing, halves
from torchgrow.lab.systems.proxyless import Binarising, Sampled, binarised, pairs
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.supernet import Searching, Supernet, chosen, rate

# --- what DARTS and ProxylessNAS search among ---


def searched(build: Callable[[], nn.Module], shares: tuple[float, ...], kind: type[Supernet] = Supernet) -> Any:
    """A supernet, in training mode, and what it is judged on."""
    torch.manual_seed(0)
    task = task_of(build, Budget(params="50%"))
    supernet = kind(Structure(task.network(), task, depth=True), shares)
    x, labels = next(task.images("a test").test_batches())
    return supernet, x, labels, task


def test_choices_are_shares_of_groups_and_blocks_and_a_wide_one_holds_the_narrow_ones() -> None:
    supernet, *_ = searched(Chain, (0.25, 0.5, 1.0))
    choices, space = supernet.choices, supernet.whole.space
    assert choices.there.sum(1).tolist() == [2, 2, 3]
    weights = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    stream = space.unit_of["conv.weight", 0]
    gates = choices.gates(weights)
    assert gates[stream].tolist() == [1.0, 0.5, 0.25, 0.25]
    assert gates[[block.unit for block in space.blocks]].tolist() == [0.25, 1.0]
    few, *_ = searched(partial(Two, 3), (0.25, 0.5, 0.75, 1.0))  # shares of three channels: 1, 2, 2 and 3
    assert few.choices.there.sum(1).tolist() == [3]


def test_a_mixture_puts_out_the_weighted_sum_of_its_options() -> None:
    """Of x -> c -> relu -> c the first 2 or all 4 channels, 0.3 to 0.7."""
    supernet, x, *_ = searched(partial(Two, 4), (0.5, 1.0))
    first, last = supernet.model[0].weight.detach(), supernet.model[2].weight.detach()

    def option(width: int) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, first[:width])), last[:, :width]).mean((2, 3))

    expect = 0.3 * option(2) + 0.7 * option(4)
    assert torch.allclose(supernet.at(torch.tensor([[0.3, 0.7]]), x), expect, atol=1e-5)
    assert torch.allclose(supernet.at(torch.tensor([[1.0, 0.0]]), x), option(2), atol=1e-5)  # 0 but for the floor


def test_a_block_that_is_not_chosen_hands_its_input_on() -> None:
    supernet, x, *_ = searched(Chain, (1.0,))
    model: Any = supernet.model.eval()
    stem = F.relu(model.bn(model.conv(x)))
    stem = model.blocks[0](stem)
    expect = model.fc(model.blocks[2](stem).mean((2, 3)))
    assert torch.allclose(supernet.at(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), x), expect, atol=1e-5)
    between = F.relu(stem + 0.25 * model.blocks[1].bn(model.blocks[1].conv(stem)))
    half = supernet.at(torch.tensor([[0.75, 0.25], [1.0, 0.0]]), x)
    assert torch.allclose(half, model.fc(between.mean((2, 3))), atol=1e-5)


def test_what_was_chosen_is_widened_to_the_budget_without_the_blocks_that_were_not() -> None:
    """One stream of C: stem, two blocks and fc of C + 2C, CC + 2C each, 2C + 2; of C = 2 chosen, for 50 C = 3."""
    supernet, *_, task = searched(Chain, (0.5, 1.0))
    task.recipe = replace(task.recipe, budget=Budget(params=50))
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    model: Any = chosen(task, supernet)
    assert task.cost(model).params == 3 + 6 + 2 * (9 + 6) + 8
    assert model.blocks[1].conv.weight.numel() == 0
    assert model.blocks[2].conv.weight.shape == (3, 3, 1, 1)
    assert model(task.data.example()).shape == (2, 2)


def test_blocks_that_do_not_come_to_the_budget_are_told_with_numbers() -> None:
    """One unit wide, as above: 1 + 2, three blocks of 1 + 2 each, and 2 + 2 are 16 parameters; without a block, 13."""
    supernet, *_, task = searched(Chain, (0.5, 1.0))
    task.recipe = replace(task.recipe, budget=Budget(params=14))
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    text = (
        r"the blocks that the search has chosen have 16 parameters and .* one unit wide, more than params <= 14 allows"
    )
    with pytest.raises(UnfitError, match=text):
        chosen(task, supernet)
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    assert task.cost(chosen(task, supernet)).params <= 14


@pytest.mark.parametrize(("params", "said"), [(16, 0), (14, 1)])
@pytest.mark.parametrize("name", ["darts", "proxyless"])
def test_before_a_search_it_is_said_what_the_budget_takes(name: str, params: int, said: int) -> None:
    lines: list[str] = []
    task = replace(task_of(Chain, Budget(params=params)), say=lines.append)
    next(iter(system(name).phases(task)))
    assert len(lines) == said
    assert all("with all blocks, one unit wide, the network has 16 parameters and" in line for line in lines)
    with pytest.raises(UnfitError, match="the budget is below the smallest network here"):
        next(iter(system(name).phases(replace(task, recipe=replace(task.recipe, budget=Budget(params=6))))))


def test_rates_of_alpha_grow_by_the_root_of_the_steps_that_are_missing() -> None:
    assert [rate(0.001, 400, 100), rate(0.001, 400, 800)] == pytest.approx([0.002, 0.001])


def test_a_search_says_where_there_is_nothing_to_choose() -> None:
    with pytest.raises(UnfitError, match="a search chooses among widths and blocks, and nothing may go"):
        searched(partial(Two, 1), (0.5, 1.0))


# --- DARTS (Liu 2019) ---


def test_one_step_of_alpha_on_a_mixture_of_two_by_hand() -> None:
    """Logits are p o_1 + (1 - p) o_2 with p = sigmoid(a_1 - a_2): da_1 = -da_2 = <dL/dlogits, o_1 - o_2> p (1 - p).

    Plain SGD at a rate of 0.5 stands for Adam, whose first step has but the gradient's sign.
    """
    supernet, x, labels, task = searched(partial(Two, 4), (0.5, 1.0))
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([[0.2, -0.1]]))
        p = 1 / (1 + math.exp(-0.3))
        options = [supernet.at(torch.tensor([[1.0 - i, float(i)]]), x) for i in (0, 1)]
        logits = p * options[0] + (1 - p) * options[1]
        slope = (logits.softmax(1) - F.one_hot(labels, 2)) / len(x)
        da = float((slope * (options[0] - options[1])).sum()) * p * (1 - p)
    weights = [parameter.detach().clone() for parameter in supernet.model.parameters()]
    sgd: Any = torch.optim.SGD([supernet.alpha], lr=0.5)
    mixing = Mixing(supernet, task.images("a test"), task.recipe, sgd)
    flops = mixing.step(x, labels)
    assert supernet.alpha[0].tolist() == pytest.approx([0.2 - 0.5 * da, -0.1 + 0.5 * da], abs=1e-6)
    assert abs(da) > 1e-4
    assert flops == 3 * measure(supernet.model, x[:1]).flops
    assert all(torch.equal(a, b) for a, b in zip(weights, supernet.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_weights_and_alpha_learn_from_halves_that_share_no_image() -> None:
    data = ImageData(train=images(40), test=images(20), mean=(0.5,), std=(0.25,))
    own, other = halves(data, 0)
    rows = [tuple(image.flatten().tolist()) for half in (own, other) for image in half.train.pixels]
    assert (len(own.train), len(other.train)) == (20, 20)
    assert sorted(rows) == sorted(tuple(image.flatten().tolist()) for image in data.train.pixels)


# --- ProxylessNAS (Cai 2019) ---


def test_the_gradient_of_binary_gates_by_hand() -> None:
    """d alpha_i = sum over j of g_j p_j (delta_ij - p_i), of the two that were sampled; the third has none."""
    alpha = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    p = pairs(alpha, torch.tensor([[True, False, True]]))
    gates = binarised(p, torch.tensor([[0.0, 0.0, 1.0]]))
    assert gates.tolist() == [[0.0, 0.0, 1.0]]
    g = torch.tensor([[2.0, 7.0, -1.0]])
    (gates * g).sum().backward()
    p0 = 1 / (1 + math.exp(0.7))
    by_hand = [p0 * (1 - p0) * (2.0 + 1.0), 0.0, -p0 * (1 - p0) * (2.0 + 1.0)]
    assert alpha.grad is not None
    assert alpha.grad[0].tolist() == pytest.approx(by_hand)


def test_the_path_that_is_not_active_has_its_gradient_too() -> None:
    """g_j = <o_j, dL/dout>, of the wide option as well while the narrow one is active; ReLUs let it through."""
    supernet, x, labels, _ = searched(partial(Two, 4), (0.5, 1.0))
    gates = torch.tensor([[1.0, 0.0]], requires_grad=True)
    F.cross_entropy(supernet.at(gates, x), labels).backward()
    with torch.no_grad():
        options = [supernet.at(torch.tensor([[1.0 - i, float(i)]]), x) for i in (0, 1)]
        slope = (options[0].softmax(1) - F.one_hot(labels, 2)) / len(x)
    assert gates.grad is not None
    by_hand = [float((slope * option).sum()) for option in options]
    assert gates.grad[0].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand[1] - by_hand[0]) > 1e-4


def test_expected_costs_are_means_over_paths() -> None:
    """Of 3 blocks the second with 1/4; widths 1, 2 or 4 of the stream with 1/2, 1/4, 1/4.

    A block's convolution goes from the stream to itself, so its product counts E[C]^2 and not E[C^2].
    """
    supernet, *_, task = searched(Chain, (0.25, 0.5, 1.0), Sampled)
    adam = torch.optim.Adam([supernet.alpha])
    binarising = Binarising(supernet, task.images("a test"), task.recipe, adam, 0, 1, task.limits(), 0.2, 0.3)
    p = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    c = 0.5 * 1 + 0.25 * 2 + 0.25 * 4
    by_hand = 3 * c + 2.25 * (c * c + 2 * c) + 2 * c + 2
    assert binarising.expected(p)[0].item() == pytest.approx(by_hand)
    path = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert binarising.flops_of(path) == 2 * 16 * (2 + 2 * 4) + 2 * 4
    assert binarising.expected(path)[1].item() == binarising.flops_of(path)


def test_a_step_of_binary_gates_by_hand_keeps_the_probability_of_the_two() -> None:
    """With two options both are sampled. Loss 0.2 CE (log E / log 6)^0.3, E of 3 parameters a channel, 2 or 4 of them.

    The softmax over the two sums to 1 whatever alpha is, so alpha moves along its difference alone.
    """
    supernet, x, labels, task = searched(partial(Two, 4), (0.5, 1.0), Sampled)
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([[0.2, -0.1]]))
        p = 1 / (1 + math.exp(-0.3))
    sgd: Any = torch.optim.SGD([supernet.alpha], lr=0.5)
    binarising = Binarising(supernet, task.images("a test"), task.recipe, sgd, 0, 1, Limits(6, None), 0.2, 0.3)
    torch.manual_seed(1)
    both = torch.multinomial(torch.tensor([[p, 1 - p]]), 2)
    active = int(both[0, torch.multinomial(torch.tensor([p, 1 - p])[both], 1)[0, 0]])
    with torch.no_grad():
        options = [supernet.at(torch.tensor([[1.0 - i, float(i)]]), x) for i in (0, 1)]
        out = options[active]
        ce = F.cross_entropy(out, labels).item()
        slope = (out.softmax(1) - F.one_hot(labels, 2)) / len(x)
        g = [float((slope * option).sum()) for option in options]
    e = 6 * p + 12 * (1 - p)
    excess = math.log(e) / math.log(6)
    dp = 0.2 * (excess**0.3 * (g[0] - g[1]) + ce * 0.3 * excess ** (0.3 - 1) * (6 - 12) / e / math.log(6))
    moved = [0.2 - 0.5 * dp * p * (1 - p), -0.1 + 0.5 * dp * p * (1 - p)]
    shift = math.log(sum(map(math.exp, moved)) / (math.exp(0.2) + math.exp(-0.1)))
    torch.manual_seed(1)
    flops = binarising.step(x, labels)
    assert supernet.alpha[0].tolist() == pytest.approx([a - shift for a in moved], abs=1e-6)
    assert abs(shift) > 1e-7
    narrow, wide = 2 * 16 * 3 * 2, 2 * 16 * 3 * 4
    assert flops == (3 * narrow + wide if active == 0 else 3 * wide + narrow)


def test_paths_are_drawn_in_training_and_the_likeliest_in_evaluation() -> None:
    supernet, *_ = searched(Chain, (0.25, 0.5, 1.0), Sampled)
    with torch.no_grad():
        supernet.alpha[2] = torch.tensor([0.0, math.log(2), 0.0])
    drawn = torch.stack([supernet.train().path() for _ in range(400)])
    assert torch.equal(drawn.sum(2), torch.ones(400, 3))
    assert drawn.mean(0)[2].tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.08)
    assert supernet.eval().path()[2].tolist() == [0.0, 1.0, 0.0]


class Waiting(Searching):
    """Takes batches, and learns nothing from them."""

    def step(self, x: Tensor, labels: Tensor) -> int:
        return 0


def test_alpha_sees_every_image_once_a_pass_and_goes_on_in_the_middle_of_one() -> None:
    """40 images in batches of 8: five steps a pass. A loader anew for every step would read ahead for nothing."""
    supernet, *_, task = searched(Chain, (0.5, 1.0))
    recipe = replace(task.recipe, shift=0, mirror=False)

    def begun() -> Waiting:
        return Waiting(supernet, task.images("a test"), recipe, torch.optim.Adam([supernet.alpha]))

    searching, resumed = begun(), begun()
    seen = [row for _ in range(5) for row in searching.batch()[0].flatten(1).tolist()]
    assert len({tuple(row) for row in seen}) == 40
    searching.batch()
    resumed.load_state_dict(searching.state_dict())
    for _ in range(7):
        assert torch.equal(searching.batch()[0], resumed.batch()[0])


def test_alpha_waits_for_its_turn() -> None:
    supernet, *_, task = searched(Chain, (0.5, 1.0))
    taken: list[int] = []

    class Counted(Searching):
        def step(self, x: Tensor, labels: Tensor) -> int:
            taken.append(len(x))
            return 7

    adam = torch.optim.Adam([supernet.alpha])
    searching = Counted(supernet, task.images("a test"), task.recipe, adam, warm=1, every=2)
    for step in range(1, 11):
        searching.stepped(step / 5)  # two epochs of five steps
    assert (taken, searching.flops) == ([8, 8, 8], 3 * 7 * 8)
