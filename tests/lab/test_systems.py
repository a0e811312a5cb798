"""Compared systems: each is held to a case worked out by hand."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from small_tasks import SIDE, Two, images, task_of
from torchgrow import Budget, Limits, measure, trace
from torchgrow.lab import models, recipes
from torchgrow.lab.data import ImageData
from torchgrow.lab.names import PUBLISHED, SYSTEMS
from torchgrow.lab.systems import UnfitError, system
from torchgrow.lab.systems.activations import readers
from torchgrow.lab.systems.autogrow import Growing, Turns
from torchgrow.lab.systems.bar import BETA, CAP, GAMMA, ZETA, Gated, alive, allowed, areas_of, barrier, expected
from torchgrow.lab.systems.l1_norm import L1Norm
from torchgrow.lab.systems.morphnet import Shaping, penalty, terms
from torchgrow.lab.systems.netadapt import SEARCH, NetAdapt, candidates, targets
from torchgrow.lab.systems.pfp import distinct, draws, sample_size, sensitivity
from torchgrow.lab.systems.sfp import Soft
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import fine_tuned, held_out, scaled, tuned
from torchgrow.lab.systems.thinet import ThiNet, discarded, rescaled


class Residual(nn.Module):
    """s = bn(c1(1, 4)); s + bn(c1(3, 4)(relu(bn(c1(4, 3)(s))))) -> relu -> pool -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.a, self.bn1 = nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.b, self.bn2, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        s = self.bn0(self.stem(x))
        s = F.relu(s + self.bn2(self.b(F.relu(self.bn1(self.a(s))))))
        out: Tensor = self.fc(s.mean((2, 3)))
        return out


# --- the frame ---


def test_every_system_has_a_name_and_a_line() -> None:
    for name, line in SYSTEMS.items():
        assert hasattr(system(name), "phases")
        assert line


def test_the_page_on_compared_systems_has_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "systems.md").read_text()
    assert [name for name in SYSTEMS if f"\n| `{name}` | " not in page] == []
    assert [name for name in PUBLISHED if f"`{name}`" not in page] == []


def test_published_epochs_are_scaled_to_the_recipes_and_are_two_at_least() -> None:
    recipe = replace(recipes.get("digits"), epochs=20)
    assert [scaled(40, 160, recipe), scaled(160, 160, recipe), scaled(1, 160, recipe)] == [5, 20, 2]
    assert (fine_tuned(recipe).epochs, fine_tuned(replace(recipe, then=12)).epochs) == (10, 16)
    assert fine_tuned(replace(recipe, then=12)).then == 0
    assert scaled(40, 160, replace(recipe, then=12)) == 8  # as many as the dense network trains, both parts
    calm = tuned(recipe, 5, 0.01)
    assert (calm.epochs, calm.lr, calm.milestones_in_epochs()) == (5, recipe.lr * 0.01, [])


def test_a_tenth_of_the_training_images_is_held_out() -> None:
    data = ImageData(train=images(40), test=images(20), mean=(0.5,), std=(0.25,))
    split = held_out(data, 0)
    assert (len(split.train), len(split.test)) == (36, 4)
    rows = {tuple(image.flatten().tolist()) for image in torch.cat([split.train.pixels, split.test.pixels])}
    assert rows == {tuple(image.flatten().tolist()) for image in data.train.pixels}


def test_the_same_share_of_every_pool_is_the_largest_within_the_budget() -> None:
    """Of 8 channels between 1 and 2: 3 parameters each, so 13 parameters are 4 channels, and none fits any more."""
    task = task_of(partial(Two, 8), Budget(params=13))
    whole = Structure(task.network(), task)
    assert whole.share(task.limits()) == 0.5
    keep = whole.within(torch.arange(8.0), task.limits())
    assert torch.nonzero(keep).flatten().tolist() == [4, 5, 6, 7]
    with pytest.raises(UnfitError, match="the budget is below the smallest network here, of 3 parameters and"):
        whole.within(torch.arange(8.0), Limits(2, None))


# --- L1 (Li 2017) ---


def test_l1_keeps_the_filters_of_large_sums_and_the_columns_that_read_them() -> None:
    """Filters with sums 3, 1, 2; two fit (3 parameters each): {0, 2}, and the next layer's input columns {0, 2}."""
    model: Any = Two()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, -1.0, -2.0]).view(3, 1, 1, 1))
    before = model[2].weight.detach().clone()
    (phase,) = L1Norm().phases(task_of(lambda: model, Budget(params=6)))
    assert model[0].weight.flatten().tolist() == [3.0, -2.0]
    assert torch.equal(model[2].weight, before[:, [0, 2]])
    assert phase.recipe.lr == pytest.approx(0.01 * 0.1)


# --- SoftNet (He 2018) ---


def test_soft_pruning_zeroes_exactly_so_many_rows_and_they_recover() -> None:
    """Of 10 filters at a rate of 0.75 kept, int(10 x 0.25) = 2 are zero; a step brings them back."""
    torch.manual_seed(0)
    model: Any = Two(10, norm=True)
    whole = Structure(model, task_of(lambda: model, Budget(params="50%")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 1, SIDE, SIDE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 2).backward()
        optimizer.step()

    step()
    weight, norm = model[0].weight, model[1]
    least = set(weight.detach().flatten().abs().argsort()[:2].tolist())
    bias, momentum = norm.bias.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    Soft(whole, 0.75).ended(1)
    assert set(torch.nonzero(weight.flatten() == 0).flatten().tolist()) == least
    assert torch.equal(norm.bias, bias)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)
    step()
    assert int((weight == 0).sum()) == 0


def test_soft_pruning_leaves_weights_alone_that_could_not_recover() -> None:
    model: Any = Two(10)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    whole = Structure(model, task_of(lambda: model, Budget(params="50%")))
    Soft(whole, 0.5).ended(1)
    assert torch.equal(model[0].weight, before)


# --- ThiNet (Luo 2017) ---


def test_thinet_discards_what_adds_nothing_first_and_opposites_together() -> None:
    """Contributions a, 0, b, -b with |a| > |b|: first 0, then b, which -b makes up for, then a."""
    torch.manual_seed(0)
    b = torch.randn(50)
    x = torch.stack([5 * torch.randn(50), torch.zeros(50), b, -b], 1)
    assert discarded(x) == [1, 2, 3, 0]
    # Norms 1, 1.2 and 1.5, but the third makes up for the first, and goes before the second.
    opposites = torch.tensor([[1.0, 0.0, -1.5], [0.0, 1.2, 0.0]])
    assert discarded(opposites) == [0, 2, 1]


def test_thinet_rescales_what_is_kept_to_the_whole_sum() -> None:
    """Two equal channels: the one that is kept counts twice. Of independent ones nothing can be made up."""
    torch.manual_seed(0)
    a, c = torch.linalg.qr(torch.randn(50, 2))[0].unbind(1)
    assert rescaled(torch.stack([a, c, a], 1), torch.tensor([0, 1])).tolist() == pytest.approx([2.0, 1.0])
    assert rescaled(torch.stack([a, c], 1), torch.tensor([1])).tolist() == pytest.approx([1.0], abs=1e-6)


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.Conv2d(3, 5, 3, padding="same", bias=False)])
def test_patches_times_weights_are_what_the_layer_puts_out(conv: nn.Conv2d) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 1, 5, 5)
    (reader,) = readers(model, trace(model, x))
    inputs = model[0](x)
    expect = conv(inputs).flatten(2).transpose(1, 2)
    assert torch.allclose(reader.patches(inputs) @ reader.weight().T, expect, atol=1e-5)
    columns = reader.columns(torch.arange(3))
    assert columns.tolist() == torch.arange(27).reshape(3, 9).tolist()


def test_what_is_discarded_is_zero_for_the_layers_behind_and_the_rest_is_scaled() -> None:
    model = Two(4)
    (reader,) = readers(model, trace(model, torch.randn(2, 1, SIDE, SIDE)))
    before = reader.weight().clone()
    ThiNet().reweigh(reader, torch.arange(4), torch.tensor([0, 3]), torch.tensor([2.0, 0.5]).double())
    assert torch.equal(reader.weight(), before * torch.tensor([2.0, 0.0, 0.0, 0.5]))


def test_thinet_cuts_a_channel_that_its_reader_ignores_and_keeps_the_function() -> None:
    torch.manual_seed(0)
    model: Any = Two(4)
    with torch.no_grad():
        model[2].weight[:, 2] = 0
    task = task_of(lambda: model, Budget(params=9))  # three channels
    x = task.data.example()
    before = model.eval()(x)
    next(ThiNet().phases(task))
    assert model[0].weight.shape[0] == 3
    assert torch.allclose(model.eval()(x), before, atol=1e-5)
    assert [one.name for one in task.spent] == ["sampling"]


# --- Provable (Liebenwein 2020) ---


def test_sensitivity_is_one_where_one_weight_carries_all_and_one_of_c_where_all_are_alike() -> None:
    columns = torch.arange(4)[:, None]
    ones = torch.ones(3, 4)
    assert sensitivity(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), ones, columns).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert sensitivity(torch.ones(2, 4), ones, columns).tolist() == [0.25] * 4
    # By sign: 1 and 3 share the positive part, 1 : 3; what is negative stands alone.
    mixed = sensitivity(torch.tensor([[1.0, -5.0, 3.0, 0.0]]), ones, columns)
    assert mixed.tolist() == pytest.approx([0.25, 1.0, 0.75, 0.0])


def test_sizes_of_samples_and_draws_by_hand() -> None:
    assert sample_size(3.0, 1e-16, 100) == math.ceil(3 * math.log(800 / 1e-16))
    alpha = 2 * 3 * math.log(8 * 17 * 10 / 1e-16)
    assert draws(0.5, 2.0, 16, 10, 3.0, 1e-16) == pytest.approx(3 * 7 * alpha * 2.0 / 0.25)
    assert distinct(torch.ones(2), 1) == pytest.approx(1.0)
    assert distinct(torch.ones(2), 2) == pytest.approx(1.5)
    assert distinct(torch.tensor([1.0, 0.0]), 100) == pytest.approx(1.0, abs=1e-3)


# --- ThiNet and Provable: units that no layer they know reads ---


class Sequences(nn.Module):
    """c1(1, 8) -> pixels in a row -> inner layer of 8 -> mean -> fc; a layer that reads the first one's units."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.kind, self.fc = nn.Conv2d(1, 8, 1), kind, nn.Linear(8, 2)
        if kind == "conv":
            self.inner: nn.Module = nn.Conv1d(8, 8, 1)
        elif kind == "grouped":
            self.inner = nn.Conv2d(8, 8, 1, groups=2)
        else:
            self.inner = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "grouped":
            x = self.inner(x).flatten(2)
        elif self.kind == "conv":
            x = self.inner(x.flatten(2))
        else:
            x = self.inner(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)
        found: Tensor = self.fc(x.mean(2))
        return found


class Attending(nn.Module):
    """c1(1, 8) -> an encoder layer of two heads, whose out_proj is a weight that no call passes through -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(1, 8, 1), nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))
        return found


@pytest.mark.parametrize("who", ["ThiNet", "PFP"])
@pytest.mark.parametrize(
    ("build", "group"),
    [
        (partial(Sequences, "conv"), "group stem"),
        (partial(Sequences, "grouped"), "group stem"),
        (partial(Sequences, "lstm"), "group stem"),
        (Attending, r"group encoder.self_attn.in_proj_weight\[0\]"),
    ],
)
def test_units_that_no_known_layer_reads_are_not_cut_by_their_place(build: Any, group: str, who: str) -> None:
    with pytest.raises(UnfitError, match=rf"^{who} judges units .*, and {group} has no layer that reads them so; take"):
        next(system(who.lower()).phases(task_of(build, Budget(params="60%"))))


# --- BAR (Lemaire 2019) ---


def test_the_barrier_is_zero_at_a_and_capped_at_b() -> None:
    assert barrier(10.0, 10.0, 20.0) == barrier(5.0, 10.0, 20.0) == 0.0
    assert barrier(15.0, 10.0, 20.0) == pytest.approx(0.5)  # r = 1/2: (1/4) / (1/2)
    assert barrier(20.0, 10.0, 20.0) == barrier(30.0, 10.0, 20.0) == CAP
    assert barrier(20.0 - 1e-11, 10.0, 20.0) <= CAP
    assert [allowed(p, 101.0, 20.0) for p in (0.0, 0.5, 1.0)] == pytest.approx([101.0, 60.5, 20.0])


def test_a_gate_is_open_with_the_probability_of_the_hard_concrete_distribution() -> None:
    for value in (-2.0, 0.0, 1.5):
        by_hand = 1 / (1 + math.exp(-(value - BETA * math.log(-GAMMA / ZETA))))
        assert float(alive(torch.tensor(value))) == pytest.approx(by_hand)
    assert expected(torch.tensor([-10.0, 0.0, 10.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_closed_gates_compute_what_the_cut_network_does() -> None:
    torch.manual_seed(0)
    model: Any = Residual()
    x = torch.randn(3, 1, SIDE, SIDE)
    model(x)
    whole = Structure(model, task_of(lambda: model, Budget(params="50%")))
    gated = Gated(model, whole.space).eval()
    keep = whole.space.everything()
    keep[[1, 5]] = False
    with torch.no_grad():
        gated.log_alpha.copy_(torch.where(keep, 20.0, -20.0))
    expect = gated(x)
    assert areas_of(model, whole.space, x).tolist() == [16.0] * 7
    whole.cut(keep)
    assert torch.allclose(model.eval()(x), expect, atol=1e-6)


# --- MorphNet (Gordon 2018) ---


def test_the_penalty_of_two_convolutions_by_hand() -> None:
    """c1(1, 3) - bn - c1(3, 2) at 4 x 4 pixels, gammas 0.5, 0.001 and 2, the second not alive.

    FLOPs: c = 2 x 16. The first costs c x 1 x sum |gamma| = 32 x 2.501, the second c x 2 x 2.501 (its two outputs
    always live and have no scale). Parameters: c = 1, and the batch norm's own two numbers a channel.
    """
    model: Any = Two(3, norm=True)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -0.001, 2.0]))
    whole = Structure(model, task_of(lambda: model, Budget(params="50%")))
    shaping = Shaping(whole, 1.0, 0.01, flops=True)
    assert shaping.alive().tolist() == [True, False, True]
    assert shaping.penalty().item() == pytest.approx(
        (32 * 2.501 + 64 * 2.501) / whole.cost(whole.space.everything())[1]
    )
    size = penalty(terms(whole.space, flops=False), shaping.scale(), shaping.alive(), shaping.scaled)
    assert size.item() == pytest.approx(2.501 * (1 + 1 + 1 + 2))


def test_alive_inputs_weigh_outputs_and_a_skip_connection_ties_by_the_largest() -> None:
    """The stream has 4 channels, scaled by bn0 and bn2: the larger counts. a: 32 (alive_in out + alive_out in)."""
    model: Any = Residual()
    with torch.no_grad():
        model.bn0.weight.copy_(torch.tensor([1.0, 0.0, 0.0, 3.0]))
        model.bn2.weight.copy_(torch.tensor([0.0, 0.0, -2.0, 1.0]))
        model.bn1.weight.copy_(torch.tensor([1.0, 0.0, 0.5]))
    whole = Structure(model, task_of(lambda: model, Budget(params="50%")))
    shaping = Shaping(whole, 1.0, 0.01, flops=True)
    streams, inner = whole.space.unit_of["stem.weight", 0], whole.space.unit_of["a.weight", 0]
    assert shaping.scale()[streams].tolist() == [1.0, 0.0, 2.0, 3.0]
    assert shaping.alive()[inner].tolist() == [True, False, True]
    a = 32 * (3 * 1.5 + 2 * 6.0)
    by_hand = 32 * 6.0 + a + a + 2 * 2 * 6.0  # stem, a, b, and the classifier at one place
    total = penalty(shaping.terms, shaping.scale(), shaping.alive(), shaping.scaled)
    assert total.item() == pytest.approx(by_hand)


def test_widening_multiplies_all_widths_to_the_budget() -> None:
    """Two of eight channels live; 3 parameters each (5 with the norm): for 20 they are doubled, the best four."""
    torch.manual_seed(0)
    task = task_of(partial(Two, 8, norm=True), Budget(params=20))
    whole = Structure(task.network(), task)
    scale = torch.tensor([0.0, 0.1, 0.2, 0.9, 0.3, 0.0, 0.8, 0.0])
    keep = whole.widened(scale > 0.5, scale, task.limits())
    assert torch.nonzero(keep).flatten().tolist() == [2, 3, 4, 6]


def test_widening_is_by_a_factor_and_not_by_a_number() -> None:
    """Widths 1 and 4 become 2 and 8: 2 + 4 + 16 + 16 + 16 = 54 parameters; 3 and 6 fit too."""

    def build() -> nn.Module:
        first, second, last = nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False), Two(8, norm=True)
        return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, *list(last)[1:])

    task = task_of(build, Budget(params=54))
    whole = Structure(task.network(), task)
    scale = torch.tensor([0.9] + [0.1] * 7 + [0.9] * 4 + [0.1] * 4)
    keep = whole.widened(scale > 0.5, scale, task.limits())
    assert list(whole.space.widths(keep).values()) == [2, 8]


def test_morphnet_says_where_it_has_nothing_to_read() -> None:
    task = task_of(Two, Budget(params="50%"))
    with pytest.raises(UnfitError, match="MorphNet reads the scales of batch norms, and there is none"):
        next(system("morphnet").phases(task))


# --- NetAdapt (Yang 2018) ---


def test_one_step_with_a_linear_table_by_hand() -> None:
    """Widths 16, 16, 16 at 10, 5, 1 a unit cost 256. For 216 the first may have 12, so 8; the second 8; no third."""
    price = torch.tensor([10, 5, 1])
    live, ones = torch.full((3,), 16), torch.ones(3, dtype=torch.int64)
    found = candidates(lambda widths: float((widths * price).sum()), live, ones, torch.full((3,), 8), 216)
    assert found == [(0, 8), (1, 8)]
    fine = candidates(lambda widths: float((widths * price).sum()), live, ones, ones, 246)
    assert fine == [(0, 15), (1, 14), (2, 6)]


def test_reductions_fall_by_their_decay_and_reach_the_budget() -> None:
    found = targets(100.0, 90.0, 0.025, 0.96, 40)
    assert found[:2] == pytest.approx([97.5, 95.1])
    assert found[-1] == 90.0
    deep = targets(100.0, 8.0, 0.025, 0.96, 40)  # the published reductions end at 37.5
    assert len(deep) == 40
    assert deep[-1] == pytest.approx(8.0)
    assert (deep[0] - deep[1]) / (100 - deep[0]) == pytest.approx(0.96)


def test_a_search_that_goes_on_keeps_to_multiples_of_what_groups_began_with(tmp_path: Path) -> None:
    """32 channels: in fours, also once there are 28; an eighth of what is left would be 25 next."""
    task = task_of(partial(Two, 32), Budget(params="40%"))
    task.folder = tmp_path
    next(replace(NetAdapt(), short=1).phases(task))
    widths = [step["width"] for step in json.loads((tmp_path / SEARCH).read_text())]
    assert len(widths) > 2
    assert [width % 4 for width in widths] == [0] * len(widths)


# --- AutoGrow (Wen 2020) ---


def counts(accuracies: list[float], spare: list[int], period: int = 1) -> tuple[list[int], bool]:
    turns = Turns(spare, period, 0.05)
    for accuracy in accuracies:
        turns.step(accuracy)
    return [1 + whole - left for whole, left in zip(spare, turns.spare, strict=True)], turns.over


def test_accuracies_in_block_counts_out() -> None:
    """A block goes to each stage in turn; the third one brought 0.04 points, so the last stage stops."""
    assert counts([10.0], [9, 9, 9]) == ([2, 1, 1], False)
    assert counts([10.0, 20.0, 30.0], [9, 9, 9]) == ([2, 2, 2], False)
    assert counts([10.0, 20.0, 30.0, 30.04, 40.0, 50.0], [9, 9, 9]) == ([4, 3, 2], False)
    assert counts([10.0] * 4, [9, 9, 9]) == ([2, 2, 2], True)  # nothing pays: each has had one try
    assert counts([10.0, 20.0, 30.0, 40.0], [1, 2, 0]) == ([2, 3, 1], True)  # no block is left
    assert counts([10.0, 20.0, 5.0, 30.0], [9, 9, 9], period=2) == ([2, 2, 1], False)


def test_blocks_come_in_with_the_optimizers_state_and_are_counted() -> None:
    torch.manual_seed(0)
    build = partial(models.ResNet, depth=14, widths=(4, 8, 8), in_channels=1)
    task = task_of(build, Budget(params="50%"))
    model: Any = task.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = task.images("a test")
    growing = Growing(model, optimizer, task, held_out(data, 0), 1, 0.05, 1.0)
    assert growing.depths() == {"layer1": 1, "layer2": 1, "layer3": 1}
    x = data.example()
    F.cross_entropy(model.train()(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    weight = model.get_submodule("layer1.0.conv1").weight
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    judged = growing.cost().flops * 4  # a tenth of 40 images, forward
    growing.ended(1)
    assert growing.flops == judged
    assert growing.depths() == {"layer1": 2, "layer2": 1, "layer3": 1}
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)
    assert growing.cost() == measure(model, x)
    gamma = model.get_submodule("layer1.1.bn2").weight
    assert float(gamma.detach().std()) > 0.1  # drawn; the first norm begins at 1
    assert model.get_submodule("layer1.1.bn1").weight.tolist() == [1.0] * 4


def test_growth_goes_on_from_its_state() -> None:
    build = partial(models.ResNet, depth=14, widths=(4, 8, 8), in_channels=1)
    task = task_of(build, Budget(params="50%"))

    def begun() -> tuple[nn.Module, Growing]:
        torch.manual_seed(0)
        model = task.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, Growing(model, optimizer, task, held_out(task.images("a test"), 0), 1, 0.05, 1.0)

    model, growing = begun()
    growing.ended(1)
    other, resumed = begun()
    resumed.load_state_dict(growing.state_dict())
    other.load_state_dict(model.state_dict())
    growing.ended(2)
    resumed.ended(2)
    assert growing.depths() == resumed.depths() == {"layer1": 2, "layer2": 2, "layer3": 1}
    assert growing.flops == resumed.flops
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
