"""What compared systems do between their phases and within them: cases in which one answer alone is right."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_tasks import SIDE, Chain, Two, images, task_of, text_task
from torchgrow import Budget
from torchgrow.lab.data import ImageData
from torchgrow.lab.systems import Phase, Task, system
from torchgrow.lab.systems.autogrow import AutoGrow, Growing
from torchgrow.lab.systems.bar import BETA, GAMMA, ZETA, Barrier
from torchgrow.lab.systems.darts import Mixing
from torchgrow.lab.systems.iss import Groups
from torchgrow.lab.systems.morphnet import Shaping
from torchgrow.lab.systems.netadapt import NetAdapt
from torchgrow.lab.systems.proxyless import Binarising
from torchgrow.lab.systems.sfp import Soft
from torchgrow.lab.train import evaluate


class Three(nn.Sequential):
    """x -> c1(1, A) -> bn? -> relu -> c1(A, B) -> bn? -> relu -> c1(B, 2) -> pool"""

    def __init__(self, first: int, second: int, norm: bool = False) -> None:
        layers: list[nn.Module] = []
        for into, out in ((1, first), (first, second)):
            layers += [nn.Conv2d(into, out, 1, bias=False), *[nn.BatchNorm2d(out)] * norm, nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(second, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def widths(self) -> list[int]:
        """Of its first two convolutions."""
        return [module.out_channels for module in self if isinstance(module, nn.Conv2d)][:2]


class Forked(nn.Module):
    """s = c1(1, 3); c1(3, 2)(s) + c1(3, 2)(s) -> pool"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 1, bias=False)
        self.left, self.right = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.stem(x)
        out: Tensor = (self.left(s) + self.right(s)).mean((2, 3))
        return out


def given(model: nn.Module, **weights: Any) -> Any:
    """The network with weights of these layers, by name, numbers behind an underscore."""
    with torch.no_grad():
        for name, values in weights.items():
            weight, new = model.get_parameter(f"{name.strip('_')}.weight"), torch.tensor(values)
            weight.copy_(new.view_as(weight))
    return model


def filters(*rows: tuple[float, ...]) -> Any:
    """x -> c3(1, C) -> relu -> c1(C, 2) -> pool, with the first weights of every filter; all others are 0."""
    first, last = nn.Conv2d(1, len(rows), 3, padding=1, bias=False), nn.Conv2d(len(rows), 2, 1, bias=False)
    model = nn.Sequential(first, nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return given(model, _0=[[*row, *[0.0] * (9 - len(row))] for row in rows])


def all_of(name: str, task: Task) -> list[Phase]:
    """The phases of a system, of which none is trained."""
    return list(system(name).phases(task))


# --- how long and at which rate ---

OWN = "the recipe's"


@pytest.mark.parametrize(
    ("name", "expect"),
    [
        ("l1-norm", [("fine-tuning", 3, 0.001, [])]),  # 40 of 160 epochs
        ("sfp", [("soft pruning", 12, 0.1, OWN)]),
        ("thinet", [("fine-tuning", 2, 0.001, [])]),  # (1 layer + 12) of 90 epochs
        ("pfp", [("round 1", 12, 0.1, OWN), ("round 2", 12, 0.1, OWN)]),  # 23 rounds in 182 epochs
        ("bar", [("gates", 11, 0.1, []), ("fine-tuning", 7, 0.1, None)]),  # 80 and 50 of 90 epochs
        ("morphnet", [*((f"search {s}", 12, 0.1, []) for s in ("0.3", "1", "3")), ("from scratch", 12, 0.1, OWN)]),
        ("netadapt", [("fine-tuning", 12, 0.001, [4, 8])]),
        ("darts", [("search", 12, 0.1, OWN), ("from scratch", 12, 0.1, OWN)]),
        ("proxyless", [("search", 6, 0.1, OWN), ("from scratch", 12, 0.1, OWN)]),  # 160 of 300 epochs
    ],
)
def test_phases_take_their_sources_share_of_12_epochs_at_their_rate(name: str, expect: Any, tmp_path: Path) -> None:
    """(Phase, epochs, learning rate, milestones in epochs), of a recipe whose own rate falls from 0.1 in a line."""
    task = task_of(partial(Two, 8, norm=True), Budget(params=20), 12)
    task.folder = tmp_path
    found = all_of(name, task)
    for phase, (title, epochs, lr, milestones) in zip(found, expect, strict=True):
        assert (phase.name, phase.recipe.epochs) == (title, epochs)
        assert phase.recipe.lr == pytest.approx(lr)
        assert phase.recipe.schedule == ("linear" if milestones == OWN else "milestones")
        if isinstance(milestones, list):
            assert phase.recipe.milestones_in_epochs() == milestones
            assert phase.recipe.warmup == 0


# --- L1 (Li 2017) and SoftNet (He 2018) ---


def test_l1_keeps_the_larger_sum_where_the_norm_is_smaller() -> None:
    """Filters (2) and (1, 1, 1): sums 2 < 3, norms 2 > 1.73. One fits, of 9 + 2 parameters each."""
    model = filters((2.0,), (1.0, 1.0, 1.0))
    all_of("l1-norm", task_of(lambda: model, Budget(params=11)))
    assert model[0].weight.flatten().tolist() == [1.0, 1.0, 1.0] + [0.0] * 6


def test_soft_pruning_zeroes_the_smaller_norm_at_the_beginning_after_epochs_and_at_the_end() -> None:
    """Filters (2) and (1, 1, 1): norms 2 > 1.73, sums 2 < 3. One of the two fits, and their weights change places."""
    build = partial(filters, (2.0,), (1.0, 1.0, 1.0))
    phases = system("sfp").phases(task_of(build, Budget(params=11)))
    phase = next(phases)
    model: Any = phase.model
    assert isinstance(phase.hooks, Soft)
    assert model[0].weight.flatten(1).sum(1).tolist() == [2.0, 0.0]
    model.load_state_dict(filters((1.0, 1.0, 1.0), (2.0,)).state_dict())  # as if both had recovered
    phase.hooks.ended(1)
    assert model[0].weight.flatten(1).sum(1).tolist() == [0.0, 2.0]
    model.load_state_dict(filters((2.0,), (1.0, 1.0, 1.0)).state_dict())
    assert list(phases) == []
    assert model[0].weight.flatten().tolist() == [2.0] + [0.0] * 8


# --- ThiNet (Luo 2017) ---


def test_thinet_looks_at_all_filters_and_makes_up_for_what_it_discards() -> None:
    """Three equal channels, of which filter 0 reads 1 and 0.5, filter 1 the third. The least is the second, of 0.5.

    For filter 0 the first one then has to be 1.5 times what it was; for filter 1 nothing has gone. By least squares
    over samples of both, its factor is 1.5, since filter 1 does not read it, and the third one's is 1.
    """
    model = given(Two(3), _0=[1.0, 1.0, 1.0], _2=[[1.0, 0.5, 0.0], [0.0, 0.0, 5.0]])
    all_of("thinet", task_of(lambda: model, Budget(params=6)))
    assert model[2].weight.flatten().tolist() == pytest.approx([1.5, 0.0, 0.0, 5.0], abs=1e-5)


# --- Provable (Liebenwein 2020) ---


def test_provable_keeps_few_of_a_group_in_which_one_channel_carries_all() -> None:
    """Of A only channel 2 is read, so one draw finds all; channels of B are alike, so that many draws find them.

    A + A B + 2 B parameters: 13 are A = 1 and B = 4, where equal shares would be A = 3 and B = 2.
    """
    model = given(Three(4, 4), _0=[1.0] * 4, _2=[[0.0, 0.0, 1.0, 0.0]] * 4, _4=[[1.0] * 4] * 2)
    all_of("pfp", task_of(lambda: model, Budget(params=13)))
    assert model.widths() == [1, 4]
    assert model[2].weight.flatten().tolist() == [1.0] * 4


def test_provable_keeps_what_any_of_the_layers_that_read_it_needs() -> None:
    """Channels 1 and 2 are read by one layer each, channel 0 by none; two fit, of 1 + 2 + 2 parameters."""
    left, right = [[0.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 1.0]] * 2
    model = given(Forked(), stem=[10.0, 11.0, 12.0], left=left, right=right)
    all_of("pfp", task_of(lambda: model, Budget(params=10)))
    assert model.stem.weight.flatten().tolist() == [11.0, 12.0]


# --- BAR (Lemaire 2019) ---


def test_gates_learn_from_the_dense_network_under_a_barrier_and_close_what_is_cut() -> None:
    """Four channels of 16 places, two of which fit; 9 epochs are scaled to 8, of five steps each.

    At the beginning V = 64, b = 1.01 x 64 = 64.64, a = 32 - 1e-4 x 64: r = (64 - a) / (64.64 - a), f = r^2 / (1 - r).
    """
    model = given(Two(4, norm=True), _0=[1.0, 2.0, 3.0, 4.0])
    dense = [parameter.detach().clone() for parameter in model.parameters()]
    phases = system("bar").phases(task_of(lambda: model, Budget(params=10), 9))
    phase = next(phases)
    barrier, gated, teacher = phase.hooks, phase.model, phase.teacher
    assert isinstance(barrier, Barrier)
    a = 32 - 1e-4 * 64
    r = (64 - a) / (64.64 - a)
    open_ = 1 / (1 + math.exp(BETA * math.log(-GAMMA / ZETA)))
    assert barrier.penalty().item() == pytest.approx(1e-5 / 8 * r**2 / (1 - r) * 64 * open_, rel=1e-4)
    barrier.stepped(8.0)  # b is at the target, and the barrier at its cap
    assert barrier.penalty().item() == pytest.approx(1e-5 / 8 * 1e10 * 64 * open_, rel=1e-4)
    assert (phase.recipe.epochs, phase.recipe.distil, phase.recipe.clip) == (8, 0.9, 5.0)
    assert teacher is not None
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert all(torch.equal(one, other) for one, other in zip(teacher.parameters(), dense, strict=True))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    adam: Any = phase.optimizer
    assert [len(group["params"]) for group in adam.param_groups] == [4, 1]
    assert [group["lr"] for group in adam.param_groups] == pytest.approx([1e-3, 1e-3 * 62_560 / (8 * 5)])
    assert isinstance(adam, torch.optim.Adam)
    with torch.no_grad():
        gated.get_parameter("log_alpha").copy_(torch.tensor([-20.0, 20.0, -20.0, 20.0]))
    (last,) = phases
    assert (last.model, last.teacher, last.recipe.distil) == (model, None, 0.0)
    assert isinstance(last.optimizer, torch.optim.Adam)
    assert model[0].weight.flatten().tolist() == [4.0, 8.0]


# --- MorphNet (Gordon 2018) ---


def test_morphnet_takes_the_strength_that_comes_nearest_to_the_budget() -> None:
    """3 A + A B + 4 B parameters, 120 of them. The searches leave (8, 8), (2, 6) and (1, 1), and 42 are (2, 6).

    From (8, 8) or (1, 1) widths would come that differ by one at most. The penalty at scales of 1: 8 of the first
    convolution, 2 x 64 of the second, which has two factors, 16 of the last, and 16 of each norm.
    """
    task = task_of(partial(Three, 8, 8, norm=True), Budget(params=42))
    phases = system("morphnet").phases(task)
    for strength, living in ((0.3, (8, 8)), (1.0, (2, 6)), (3.0, (1, 1))):
        phase = next(phases)
        model: Any = phase.model
        assert isinstance(phase.hooks, Shaping)
        assert phase.hooks.penalty().item() == pytest.approx(strength * (8 + 128 + 16 + 16 + 16) / 120)
        with torch.no_grad():
            for norm, alive in zip((model[1], model[4]), living, strict=True):
                norm.weight.copy_(torch.arange(8) < alive)
    last: Any = next(phases)
    assert last.model.widths() == [2, 6]
    assert list(phases) == []


# --- NetAdapt (Yang 2018) ---


def bright_or_dark() -> ImageData:
    """Images of class 1 are white, those of class 0 black."""

    def of(n: int) -> Any:
        found = images(n)
        return replace(found, pixels=(255 * found.labels).to(torch.uint8)[:, None, None, None].expand(n, 1, SIDE, SIDE))

    return ImageData(train=of(40), test=of(20), mean=(0.5,), std=(0.25,))


def seeing() -> Any:
    """A network that tells white from black by a filter of small norm in A, which one of large norm in B reads."""
    return given(
        Three(8, 8),
        _0=[1.0] * 7 + [0.1],
        _2=[[0.0] * 7 + [10.0]] + [[0.0] * 8] * 7,
        _4=[[0.0] * 8, [1.0] + [0.0] * 7],
    )


def test_netadapt_keeps_the_candidate_of_best_accuracy_and_filters_of_large_norm(tmp_path: Path) -> None:
    """A + A B + 2 B parameters, 88 for (8, 8). The budget is 48, in two steps 1 : 0.96, the first to 67.6.

    Alone, A has to have 5 channels (61 parameters) or B (58). A would lose its smallest filter, by which it sees; B
    only has to keep its largest. Then the same share of (8, 5) is (7, 4), and 48 parameters are (8, 4).
    Every parameter is 32 FLOPs. Each candidate takes 3 steps of 8 images, and is judged on 4.
    """
    task = task_of(seeing, Budget(params=48), 12, lr=1e-6)
    task.data, task.folder = bright_or_dark(), tmp_path
    (phase,) = NetAdapt(most=2, short=3).phases(task)
    (step,) = json.loads((tmp_path / "search.json").read_text())
    assert (step["group"], step["width"], step["accuracy"]) == (1, 5, 100.0)
    assert step["flops"] == 32 * (61 + 58) * (3 * 3 * 8 + 4)
    model: Any = phase.model
    assert model.widths() == [8, 4]
    assert evaluate(model, task.data)[0] == 100.0


class Grouped(nn.Sequential):
    """x -> c1(1, A) -> bn -> relu -> c3(A, B), four groups -> bn -> relu -> c1(B, 2) -> pool"""

    def __init__(self, first: int, second: int) -> None:
        inner = nn.Conv2d(first, second, 3, padding=1, groups=4, bias=False)
        super().__init__(
            *(nn.Conv2d(1, first, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()),
            *(inner, nn.BatchNorm2d(second), nn.ReLU()),
            *(nn.Conv2d(second, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )


@pytest.mark.parametrize(
    ("build", "share"), [(partial(Three, 2, 64), "10%"), (partial(Grouped, 32, 32), "10%"), (seeing, "10%")]
)
def test_netadapt_goes_on_where_groups_vanish_or_form_anew(build: Any, share: str, tmp_path: Path) -> None:
    """What is down to one unit is no group any more, and grouped convolutions lose whole groups."""
    task = task_of(build, Budget(params=share))
    task.folder = tmp_path
    (phase,) = NetAdapt(short=1).phases(task)
    first, last = (sum(p.numel() for p in model.parameters()) for model in (task.network(), phase.model))
    assert last <= float(share[:-1]) / 100 * first


def test_netadapt_keeps_to_the_multiple_of_a_group_whose_number_changes(tmp_path: Path) -> None:
    """A has 2 units, B 64: A is cut to one and is gone, and B, from then on the first group, still goes in eights."""
    task = task_of(partial(Three, 2, 64), Budget(params="10%"))
    task.folder = tmp_path
    next(NetAdapt(short=1).phases(task))
    steps = json.loads((tmp_path / "search.json").read_text())
    assert (0, 1) in [(step["group"], step["width"]) for step in steps]
    assert [step["width"] % 8 for step in steps if step["width"] > 1] == [0] * (len(steps) - 1)
    assert len(steps) > 2


def test_netadapt_searches_anew_from_a_step_that_is_none_of_its_candidates(tmp_path: Path) -> None:
    """An earlier version left a width here that is no multiple of what the group began with."""

    def searched(folder: Path) -> Any:
        task = task_of(partial(Two, 32), Budget(params="40%"))
        task.folder = folder
        next(NetAdapt(short=1).phases(task))
        return [(step["group"], step["width"]) for step in json.loads((folder / "search.json").read_text())]

    expect = searched(tmp_path / "whole")
    step = {"group": 0, "width": 27, "accuracy": 1.0, "flops": 1, "seconds": 1.0}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "search.json").write_text(json.dumps([step]))
    assert searched(tmp_path / "broken") == expect


# --- AutoGrow (Wen 2020) ---


def guessing() -> Chain:
    """A network that always says class 0."""
    model = Chain()
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([5.0, 0.0]))
    return model


def test_autogrow_judges_by_held_out_images_at_a_constant_rate() -> None:
    """All images are of class 1. A network that says 0 gets a block; that then says 1, another: 100 points paid."""
    task = task_of(guessing, Budget(params="100%"), 12)
    ones = replace(images(40), labels=torch.ones(40, dtype=torch.int64))
    task.data = replace(task.images("a test"), train=ones)
    phases = AutoGrow().phases(task)
    phase = next(phases)
    growing: Any = phase.hooks
    assert isinstance(growing, Growing)
    recipe = phase.recipe
    assert (recipe.schedule, recipe.milestones_in_epochs(), recipe.warmup, recipe.lr) == ("milestones", [], 0.0, 0.1)
    assert recipe.epochs == 12
    inner: Any = phase.data
    assert (len(inner.train), len(growing.judge.test)) == (36, 4)
    assert not rows(inner) & {tuple(image.flatten().tolist()) for image in growing.judge.test.pixels}
    assert growing.depths() == {"blocks": 1}
    growing.ended(1)
    assert growing.depths() == {"blocks": 2}
    with torch.no_grad():
        phase.model.get_parameter("fc.bias").copy_(torch.tensor([0.0, 5.0]))
    growing.ended(2)
    assert growing.depths() == {"blocks": 3}
    (last,) = phases
    assert (last.recipe.epochs, last.recipe.lr, last.recipe.milestones_in_epochs()) == (12, 0.1, [6, 9])


# --- ISS (Wen 2018) ---


def test_the_group_penalty_has_the_sources_strength_over_the_steps_of_a_sequence() -> None:
    """Four units of ones read 5 numbers, each other, and are read by 7 words.

    Of a unit: 4 x 5 weights, 4 x 4 recurrent rows, 4 x 4 recurrent columns but for 4 in those rows, and 7: 55.
    The source's 0.00245 is for a sum over the steps, of which there are 4.
    """
    task = text_task(Budget(flops=560), 12)
    phases = system("iss").phases(task)
    phase = next(phases)
    assert isinstance(phase.hooks, Groups)
    with torch.no_grad():
        for parameter in phase.model.parameters():
            parameter.fill_(1.0)
    assert phase.hooks.penalty().item() == pytest.approx(0.00245 / 4 * 4 * math.sqrt(55))
    assert (phase.recipe.epochs, phase.recipe.milestones_in_epochs()) == (12, [4, 8])
    assert phase.recipe.lr == task.recipe.lr
    (last,) = phases
    assert (last.name, last.recipe.epochs, last.recipe.milestones_in_epochs()) == ("fine-tuning", 3, [])
    assert last.recipe.lr == pytest.approx(0.1 * task.recipe.lr)
    assert last.model.get_parameter("layers.0.weight_hh_l0").shape == (8, 2)


# --- DARTS (Liu 2019) and ProxylessNAS (Cai 2019) ---


def rows(data: Any) -> set[tuple[int, ...]]:
    """Its training images."""
    return {tuple(image.flatten().tolist()) for image in data.train.pixels}


@pytest.mark.parametrize(
    ("name", "kind", "own", "other"), [("darts", Mixing, 20, 20), ("proxyless", Binarising, 36, 4)]
)
def test_weights_and_alpha_of_a_search_learn_from_images_that_they_do_not_share(
    name: str, kind: type, own: int, other: int
) -> None:
    """A half each, or all but a tenth; together they are the training images."""
    task = task_of(partial(Two, 8), Budget(params=12))
    phase = next(system(name).phases(task))
    assert type(phase.hooks) is kind
    hooks: Any = phase.hooks
    assert [len(rows(phase.data)), len(rows(hooks.images))] == [own, other]
    assert rows(phase.data) | rows(hooks.images) == rows(task.data)
