"""What compared systems cost, phase by phase, against numbers worked out by hand.

FLOPs of training are 3 x those of a forward pass x samples x epochs, of a forward pass alone 1 x. A convolution of one
pixel from A to B channels takes 2 x 16 places x A B FLOPs, so `Two` of C channels takes 96 C, and has 5 C parameters.
There are 40 training images in 5 batches of 8, and 12 epochs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from small_tasks import Chain, Two, task_of, text_task
from torchgrow import Budget
from torchgrow.lab.systems import Phase, System, Task, estimate_anew, run, system
from torchgrow.lab.systems.autogrow import AutoGrow
from torchgrow.lab.systems.netadapt import NetAdapt
from torchgrow.lab.systems.proxyless import ProxylessNAS
from torchgrow.lab.systems.sfp import SFP
from torchgrow.lab.systems.thinet import ThiNet

Line = tuple[str, bool, int, int]
"""Name, whether the paper's rule counts it, epochs and FLOPs of what was spent."""


class Prepared:
    """A system with something done to each phase before it is trained."""

    def __init__(self, inner: System, prepare: Callable[[Phase], None]) -> None:
        self.inner, self.prepare = inner, prepare

    def phases(self, task: Task) -> Iterator[Phase]:
        for phase in self.inner.phases(task):
            self.prepare(phase)
            yield phase


def spent(inner: System, task: Task, folder: Path, prepare: Callable[[Phase], None] = lambda phase: None) -> list[Line]:
    """What a system has spent when all of its phases are trained."""
    task.folder = folder
    whole: Any = Prepared(inner, prepare)
    for _ in run("a system", whole, task, lambda *_: None):
        pass
    return [(one.name, one.counted, one.epochs, one.flops) for one in task.spent]


def two(channels: int = 8) -> Task:
    """`Two` of 768 FLOPs, for half of its channels: 384 FLOPs."""
    return task_of(partial(Two, channels, norm=True), Budget(params=5 * channels // 2), 12)


def test_l1_costs_its_fine_tuning_at_the_size_that_is_left(tmp_path: Path) -> None:
    """A quarter of the epochs."""
    assert spent(system("l1-norm"), two(), tmp_path) == [("fine-tuning", True, 3, 3 * 384 * 40 * 3)]


def test_soft_pruning_costs_a_dense_training_and_a_pass_for_statistics_after_the_cut(tmp_path: Path) -> None:
    """Three batches of eight images."""
    training = ("soft pruning", True, 12, 3 * 768 * 40 * 12)
    assert spent(SFP(batches=3), two(), tmp_path) == [training, ("statistics", True, 0, 384 * 24)]


def test_thinet_costs_a_dense_pass_of_the_sample_for_each_reader_and_fine_tuning(tmp_path: Path) -> None:
    """Seven images of each of two classes, and one layer that reads; 13 of 90 epochs, which are 2 of 12."""
    expect = [("sampling", True, 0, 768 * 14), ("fine-tuning", True, 2, 3 * 384 * 40 * 2)]
    assert spent(ThiNet(images=7), two(), tmp_path) == expect


def test_provable_costs_a_sample_and_a_training_in_each_round(tmp_path: Path) -> None:
    """The sample would be of more than 100 images, so it is all 40. Two rounds, from 40 parameters over 28 to 20.

    So from 8 channels over 5 (28 parameters are 5.6 channels) to 4: 768, 480 and 384 FLOPs.
    """
    assert spent(system("pfp"), two(), tmp_path) == [
        ("sampling", True, 0, 768 * 40),
        ("round 1", True, 12, 3 * 480 * 40 * 12),
        ("sampling", True, 0, 480 * 40),
        ("round 2", True, 12, 3 * 384 * 40 * 12),
    ]


def test_gates_cost_the_dense_size_and_a_forward_pass_of_the_teacher(tmp_path: Path) -> None:
    """80 and 50 of 90 epochs, which are 11 and 7 of 12."""
    gates = ("gates", True, 11, (3 * 768 + 768) * 40 * 11)
    assert spent(system("bar"), two(), tmp_path) == [gates, ("fine-tuning", True, 7, 3 * 384 * 40 * 7)]


def test_morphnet_costs_a_dense_training_for_each_strength_and_the_last_one_is_not_counted(tmp_path: Path) -> None:
    """Three of them."""
    searches = [(f"search {strength}", True, 12, 3 * 768 * 40 * 12) for strength in ("0.3", "1", "3")]
    last = ("from scratch", False, 12, 3 * 384 * 40 * 12)
    assert spent(system("morphnet"), two(), tmp_path) == [*searches, last]


def test_netadapt_costs_short_trainings_and_evaluations_of_all_candidates_and_fine_tuning(tmp_path: Path) -> None:
    """From 40 parameters to 20 in two steps, 1 : 0.96, the first to 29.8: its one candidate has 5 channels, 480 FLOPs.

    It takes 3 steps of 8 images, and is judged on the 4 that are held out.
    """
    expect = [("search", True, 0, 480 * (3 * 3 * 8 + 4)), ("fine-tuning", True, 12, 3 * 384 * 40 * 12)]
    assert spent(NetAdapt(most=2, short=3), two(), tmp_path) == expect


@pytest.mark.parametrize(("budget", "counted", "last"), [(70, False, 1168), (50, True, 684)])
def test_autogrow_costs_epochs_at_the_size_that_there_is_and_counts_the_last_training_after_a_cut(
    budget: int, counted: bool, last: int, tmp_path: Path
) -> None:
    """A chain of width C and B blocks has 32 C + B x 32 C^2 + 4 C FLOPs: 656 for C = 4 and B = 1, 1168 for B = 2.

    A network that cannot learn gets one block in vain, after an epoch, and is done after another, on 4 batches of the
    36 images that are left; 4 judge it after each. It has 70 parameters; for 50 C is 3, of 2 C^2 + 9 C + 2 = 47
    parameters and 684 FLOPs.
    """
    task = task_of(Chain, Budget(params=budget), 12, lr=1e-9)
    with_training = [one for one in spent(AutoGrow(), task, tmp_path, guessing) if one[2]]
    assert with_training == [
        ("growth", True, 2, (656 + 1168) * (3 * 32 + 4)),
        ("last training", counted, 12, 3 * last * 40 * 12),
    ]


def guessing(phase: Phase) -> None:
    """Its network puts out the same for all images."""
    with torch.no_grad():
        phase.model.get_parameter("fc.weight").zero_()


def test_the_group_penalty_costs_a_dense_training_and_fine_tuning_where_units_went_that_lived(tmp_path: Path) -> None:
    """An LSTM of H units takes 2 x 4 words x (20 H + 4 H^2 + 7 H) FLOPs: 1376 for 4, 560 for 2.

    Of 40 words two rows of 20 are 4 batches of two samples of 4 words. Fine-tuning is a quarter.
    """
    expect = [("group penalty", True, 12, 3 * 1376 * 8 * 12), ("fine-tuning", True, 3, 3 * 560 * 8 * 3)]
    assert spent(system("iss"), text_task(Budget(flops=560), 12), tmp_path) == expect


def test_darts_costs_two_dense_passes_a_step_and_its_last_training_is_not_counted(tmp_path: Path) -> None:
    """Two steps of 8 of the 20 images that weights have, and as many for alpha."""
    assert spent(system("darts"), two(), tmp_path) == [
        ("search", True, 12, 2 * 3 * 768 * 16 * 12),
        ("from scratch", False, 12, 3 * 384 * 40 * 12),
    ]


def test_proxyless_costs_the_paths_that_are_taken_and_its_last_training_is_not_counted(tmp_path: Path) -> None:
    """A narrow path of 384 FLOPs is as good as certain, and stays so. 160 of 300 epochs, which are 6 of 12.

    4 batches of 8 of 36 images. Every fifth step after a quarter of the epochs, 1.5, which are 2: the 10th, 15th and
    20th of 24, alpha has the 4 images that are held out: a step on the narrow path, and a pass on the wide one.
    """

    def narrow(phase: Phase) -> None:
        if phase.name == "search":
            with torch.no_grad():
                phase.model.get_parameter("alpha").copy_(torch.tensor([[20.0, -20.0]]))

    assert spent(ProxylessNAS(shares=(0.5, 1.0), lr=0.0), two(), tmp_path, narrow) == [
        ("search", True, 6, 3 * 384 * 32 * 6 + (3 * 384 + 768) * 4 * 3),
        ("from scratch", False, 12, 3 * 384 * 40 * 12),
    ]


@pytest.mark.parametrize("norm", [False, True])
def test_statistics_cost_nothing_where_there_are_none(norm: bool) -> None:
    """And nothing is said then, though `torchgrow.recalibrate` warns: the lab asks for it of all networks."""
    task = task_of(partial(Two, norm=norm), Budget(params="50%"))
    spent = estimate_anew(task.network(), task.data, task.recipe, 2)
    assert (spent.flops > 0, spent.seconds > 0) == (norm, norm)
