"""What cannot be trained in a comparison: said with the fix, before anything is written, and never at others' cost."""

import itertools
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from small_tasks import DIGITS, THREE_BLOCKS
from torchgrow import Budget, TorchgrowError
from torchgrow.lab import models, train
from torchgrow.lab.baselines import twin_width
from torchgrow.lab.compare import Rows, compare, recorded, training
from torchgrow.lab.data import fingerprint, load_images
from torchgrow.lab.recipes import Recipe


class Flat(nn.Module):
    """Scores of all pixels; no layer that might be left out."""

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, max(1, round(8 * width)), 3), nn.LazyLinear(classes)
        self(torch.zeros(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x).relu().flatten(1))


class Pair(Flat):
    """Returns more than scores."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def run(out: Path, methods: str, recipe: Recipe = THREE_BLOCKS, **more: Any) -> Any:
    return compare(recipe, methods=methods.split(), seeds=[0], console=Console(quiet=True), out=out, **more)


def methods_in(out: Path) -> list[str]:
    return [row["method"] for file in out.glob("*.jsonl") for row in Rows(file).read()]


def test_one_that_cannot_be_trained_is_named_and_the_others_are_trained_all_the_same(tmp_path: Path) -> None:
    """And tried again by the same command, unlike those whose row says why they never can."""
    recipe = replace(DIGITS, name="mine", build=Flat, depth=True)
    for _ in range(2):
        with pytest.raises(TorchgrowError, match=r"^1 of 4 could not be trained: default, seed 0, .*: depth=True, but"):
            run(tmp_path, "default dense direct uniform", recipe)
        assert sorted(methods_in(tmp_path)) == ["dense", "uniform"]


def failing(error: BaseException, after: int = 0) -> Any:
    """A `fit` that fails with this error in "uniform", after some epochs."""

    def fit(name: str, *args: Any, **more: Any) -> Any:
        for done, epoch in enumerate(train.fit(name, *args, **more)):
            if name == "uniform" and done == after:
                raise error
            yield epoch

    return fit


def test_a_fault_in_one_method_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told in one line, with where the traceback is; the same command tries it again, from its last epoch."""
    fault = RuntimeError("mat1 and mat2 do not fit\nand so on, in many lines")
    monkeypatch.setattr(training, "fit", failing(fault, 1))
    told = (
        r"1 of 3 could not be trained: uniform, seed 0, [^\n]*: RuntimeError: mat1 and mat2 do not fit "
        r"\(the whole traceback is in (.*error\.txt)\)"
    )
    with pytest.raises(TorchgrowError) as raised:
        run(tmp_path, "uniform dense default")
    where = re.fullmatch(told, str(raised.value))
    assert where
    assert sorted(methods_in(tmp_path)) == ["default", "dense"]
    text = Path(where[1]).read_text(encoding="utf-8")
    assert text.startswith("Traceback")
    assert "in fit" in text
    assert "and so on, in many lines" in text
    monkeypatch.setattr(training, "fit", train.fit)
    assert len(run(tmp_path, "uniform dense default")) == 3
    assert not Path(where[1]).exists()


def test_a_fault_while_a_budget_is_looked_at_ends_that_method_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraced(*_: Any, **__: Any) -> Any:
        raise ValueError

    monkeypatch.setattr(training, "Structure", untraced)
    with pytest.raises(TorchgrowError, match=r"1 of 2 could not be trained: sfp, seed 0, .*: ValueError \(the whole"):
        run(tmp_path, "uniform sfp")
    assert methods_in(tmp_path) == ["uniform"]


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError("no space left on device"),
    ],
    ids=repr,
)
def test_what_is_short_for_all_of_them_ends_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(training, "fit", failing(error))
    with pytest.raises(type(error)):
        run(tmp_path, "uniform dense")
    assert methods_in(tmp_path) == []


def test_rows_of_other_data_of_the_same_size_are_not_taken(tmp_path: Path) -> None:
    """Neither as this data's rows nor as what a stopped command goes on from."""
    recipe = replace(DIGITS, name="pictures", dataset="imagefolder", build=PICTURES, side=16, subset=None, shift=0)
    first, other = (noise(tmp_path / name, seed) for seed, name in enumerate(("first", "other")))
    run(tmp_path / "out", "uniform", recipe, folder=first)
    with pytest.raises(TorchgrowError, match=r"pictures\.jsonl holds rows of other data with as many samples"):
        run(tmp_path / "out", "uniform", recipe, folder=other)
    run(tmp_path / "out", "uniform", recipe, folder=first)
    assert len(methods_in(tmp_path / "out")) == 1
    data = load_images("imagefolder", folder=other, side=16)
    assert recorded(recipe, data, ["uniform"], tmp_path / "out") == []
    streamed = [
        fingerprint(load_images("imagefolder", folder=one, side=16, crop=True)) for one in (first, first, other)
    ]
    assert streamed[0] == streamed[1] != streamed[2]


def noise(folder: Path, seed: int) -> Path:
    """Two classes of pictures of noise, as many in every folder."""
    for number, place in enumerate(itertools.product(("train", "val"), ("a", "b"), range(8))):
        path = folder.joinpath(*map(str, place[:2]), f"{place[2]}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(100 * seed + number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


PICTURES = partial(models.ResNet, depth=8, widths=(4, 8, 8), classes=2)


def test_no_network_stands_at_a_budget_that_it_breaks(tmp_path: Path) -> None:
    rows = {row["method"]: row for row in run(tmp_path, "uniform sfp", budgets=[Budget(params=20)])}
    assert "narrowest network that one factor gives has" in rows["uniform"]["error"]
    assert "more than params <= 20 allows; give a larger --budget" in rows["uniform"]["error"]
    assert "give a larger --budget" in rows["sfp"]["error"]


def test_a_budget_out_of_reach_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all systems in the same words; those that may leave layers out come to a smaller network than the others.

    Blocks of one channel inside: 22 parameters in a stream of 1, and 62, or 44 at its beginning, in a stream of 3 (what
    shortcuts pad has a channel each). Twice 22, 44 and 62, twice 62, a stem of 11 and a classifier of 40 are 325;
    without the second block of every stage 179.
    """
    trained: list[str] = []

    def fit(name: str, *_: Any, **__: Any) -> Any:
        trained.append(name)
        raise TorchgrowError("a network began to train")

    monkeypatch.setattr("torchgrow.lab.systems.running.fit", fit)
    monkeypatch.setattr("torchgrow.lab.compare.training.fit", fit)
    monkeypatch.setattr("torchgrow.lab.systems.netadapt.NetAdapt.search", fit)
    methods = "l1-norm sfp thinet pfp bar morphnet netadapt autogrow darts proxyless shrink shrink:until=0.3"
    rows = run(tmp_path, methods, DIGITS, budgets=[Budget(params=20)])
    assert trained == []
    assert [row["method"] for row in rows] == methods.split()
    text = "the budget is below the smallest network here, of {} parameters and .* FLOPs; give a larger --budget"
    for row in rows:
        least = 179 if row["method"] in ("autogrow", "darts", "proxyless") else 325
        assert re.fullmatch(text.format(least), row["error"]), row["error"]
    with pytest.raises(TorchgrowError, match=r"dense, seed 0, .*: a network began to train"):
        run(tmp_path, "dense sfp", DIGITS, budgets=[Budget(params=20)])
    assert trained == ["dense"]
    with pytest.raises(TorchgrowError, match="1 of 2 could not be trained: autogrow"):
        run(tmp_path, "autogrow sfp", DIGITS, budgets=[Budget(params=300)])


def test_the_uniform_twin_is_within_all_that_is_budgeted() -> None:
    data = load_images("digits", subset=64)
    params, flops = (
        twin_width(replace(DIGITS, budget=budget), data, params=2000, flops=100_000)
        for budget in (Budget(params=2000), Budget(flops=100_000))
    )
    both = replace(DIGITS, budget=Budget(params=2000, flops=100_000))
    assert params != flops
    assert twin_width(both, data, params=2000, flops=100_000) == min(params, flops)


def no_width() -> nn.Module:
    return Flat()


def broken(width: float) -> nn.Module:
    raise RuntimeError("no weights here")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (no_width, r"recipe 'mine': build\(1\.0\), or its network on images .* failed: TypeError: .* 0 positional"),
        (broken, r"failed: RuntimeError: no weights here; build takes a width factor"),
        (Pair, r"the network returns a tuple; let it return scores, \[N, classes\]"),
        (partial(Flat, classes=4), r"returns \[2, 4\] for 2 images of 10 classes; let it return \[2, 10\]"),
    ],
)
def test_a_network_of_ones_own_is_tried_before_anything_is_written(tmp_path: Path, build: Any, text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        run(tmp_path, "dense default", replace(DIGITS, name="mine", build=build, source="mine.py:mine"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ([], r'no method is named; name some with spaces between: --methods "dense uniform default"'),
        (["dense,uniform"], r"""'dense,uniform': put spaces between methods: --methods "dense uniform\""""),
        (["sfp:rate=0.3"], r"sfp takes no settings, so not 'sfp:rate=0\.3'; only shrink does"),
    ],
)
def test_methods_that_are_misspelt_are_named_with_what_works(tmp_path: Path, methods: list[str], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        compare(DIGITS, methods=methods, seeds=[0], console=Console(quiet=True), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_by_the_papers_rule_a_training_after_growth_is_of_a_structure_that_is_final(tmp_path: Path) -> None:
    """As it is for a system that searches; of what does not grow, everything counts."""
    rows = {row["method"]: row for row in run(tmp_path, "uniform default", replace(DIGITS, then=1))}
    _, growth, whole = (epoch["training_flops"] for epoch in rows["default"]["epochs"])
    assert (rows["default"]["train_flops_paper_rule"], rows["default"]["train_flops"]) == (growth, whole)
    assert growth < whole
    assert rows["uniform"]["train_flops_paper_rule"] == rows["uniform"]["train_flops"]
