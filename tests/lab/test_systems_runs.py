"""Compared systems in the comparison: within the budget, all counted, resumable, on images and on a text."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import torchgrow
from small_tasks import DIGITS, THREE_BLOCKS
from tiny_cifar import write_batches
from torchgrow import Budget, TorchgrowError
from torchgrow.lab import frames, models, recipes, systems, train
from torchgrow.lab.compare import Job, compare
from torchgrow.lab.data import load_images
from torchgrow.lab.names import SYSTEMS
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.results import tables
from torchgrow.lab.systems import LEAVE_LAYERS_OUT
from torchgrow.lab.systems.morphnet import MorphNet
from torchgrow.lab.systems.netadapt import NetAdapt
from torchgrow.lab.systems.proxyless import ProxylessNAS

TEXT = replace(
    recipes.get("lstm-ptb"),
    build=partial(LSTM, embedding=8, hidden=(8, 8)),
    epochs=2,
    subset=1000,
    lr_milestones=(0.5,),
    threads=1,
)
TWO_STAGES = replace(DIGITS, build=partial(models.Staged, unit="basic", units=(1, 2), widths=(4, 8), in_channels=1))
"""As many blocks, one of which can."""

IMAGES = [name for name in SYSTEMS if name != "iss"]
BEGIN = {"l1-norm", "thinet", "pfp", "bar", "netadapt", "shrink"}
Row = dict[str, Any]


def run(out: Path, methods: str, recipe: Any = DIGITS) -> list[Row]:
    return compare(recipe, methods=methods.split(), seeds=[0], console=Console(quiet=True), out=out)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that search, in a few seconds, or in a few steps."""
    monkeypatch.setitem(systems.CLASSES, "proxyless", partial(ProxylessNAS, warm=0, every=1))
    monkeypatch.setitem(systems.CLASSES, "netadapt", partial(NetAdapt, most=2, short=1))
    monkeypatch.setitem(systems.CLASSES, "morphnet", partial(MorphNet, strengths=(1.0,)))


@pytest.mark.parametrize("deep", [False, True])
def test_all_image_systems_end_within_the_budget_and_all_is_counted(deep: bool, tmp_path: Path) -> None:
    names = [name for name in [*IMAGES, "iss"] if (name in LEAVE_LAYERS_OUT) == deep]
    made = run(tmp_path, " ".join(["dense", *names]), DIGITS if deep else THREE_BLOCKS)
    rows = {row["method"]: row for row in made}
    assert rows.keys() == {*names, "dense"}
    dense = rows.pop("dense")
    if not deep:
        assert "recurrent units" in rows.pop("iss")["error"]
    for name, row in rows.items():
        # The budget is used: a unit of three blocks has 3 % of all parameters, a channel of a stream, which is all that
        # NetAdapt has left here, more; and where a search leaves blocks out, what remains may lie below.
        least = 0.42 if name in ("netadapt", "darts", "proxyless") else 0.49 if deep else 0.46
        assert least * dense["params"] < row["params"] <= 0.5 * dense["params"], name
        assert 0 <= row["accuracy"] <= 100
        phases = row["phases"]
        assert row["train_flops"] == sum(phase["flops"] for phase in phases)
        assert row["train_flops_paper_rule"] == sum(phase["flops"] for phase in phases if phase["counted"])
        assert [phase["name"] for phase in phases if phase["name"] == "dense"] == ["dense"] * (name in BEGIN)
        if name in BEGIN:
            assert phases[0]["flops"] == dense["train_flops"] == 3 * dense["flops"] * 2 * 64
            assert not phases[0]["counted"]
        assert len(row["epochs"]) == sum(phase["epochs"] for phase in phases if phase["name"] != "dense")
        assert [epoch["epoch"] for epoch in row["epochs"]] == list(range(1, len(row["epochs"]) + 1))
        assert max(row["widths"].values()) <= 8, name  # units of every group that is left
        assert row["config"]["system"] == json.loads(json.dumps(vars(systems.system(name)))), name
    if deep:
        # Two epochs of half the images, and for each of their steps a batch of 32 of the other half.
        assert rows["darts"]["train_flops_paper_rule"] == 3 * dense["flops"] * (2 * 32 + 2 * 32)
        assert set(rows["autogrow"]["epochs"][-1]["depths"]) == {"layer1", "layer2", "layer3"}
        assert [phase["name"] for phase in rows["proxyless"]["phases"]] == ["search", "from scratch"]
    else:
        assert [phase["name"] for phase in rows["pfp"]["phases"] if phase["epochs"]] == ["dense", "round 1", "round 2"]
        assert rows["morphnet"]["train_flops_paper_rule"] == 3 * dense["flops"] * 2 * 64
    (table,) = tables([dense, *rows.values()])
    assert "by the\npaper's rule" in [str(column.header) for column in table.columns]


def test_on_a_text_systems_end_within_the_budget_beside_the_dense_network(tmp_path: Path) -> None:
    methods = "dense iss sfp morphnet shrink shrink:importance=bn_scale darts mnasnet"
    rows = {row["method"]: row for row in run(tmp_path, methods, TEXT)}
    assert "reads the scales of batch norms" in rows["shrink:importance=bn_scale"]["error"]
    assert "DARTS is written for images" in rows["darts"]["error"]
    assert "mnasnet reads images of three colours, and recipe 'lstm-ptb' trains on a text" in rows["mnasnet"]["error"]
    for name in ("iss", "sfp", "morphnet", "shrink"):
        assert rows[name]["flops"] <= 0.5 * rows["dense"]["flops"]
        assert rows[name]["perplexity"] > 1
    assert [phase["name"] for phase in rows["iss"]["phases"]] == ["group penalty", "fine-tuning"]


def test_published_networks_are_trained_as_they_are_and_serve_all_budgets(tmp_path: Path) -> None:
    """On images of three colours; their cost is that of torchvision's network, and no budget is in their rows."""
    write_batches(tmp_path / "images")
    recipe = replace(
        recipes.get("resnet20-cifar10"),
        build=partial(models.ResNet, depth=8, widths=(2, 4, 4)),
        epochs=2,
        batch_size=10,
        subset=20,
        threads=1,
    )
    found = compare(
        recipe,
        methods=["uniform", "mnasnet"],
        seeds=[0],
        budgets=[Budget(params="50%"), Budget(params="60%")],
        console=Console(quiet=True),
        folder=tmp_path / "images",
        out=tmp_path,
    )
    assert [row["method"] for row in found].count("mnasnet") == 1
    (row,) = [row for row in found if row["method"] == "mnasnet"]
    network = torchvision.models.mnasnet1_0(num_classes=10)
    assert row["budget"] is None
    assert row["params"] == sum(parameter.numel() for parameter in network.parameters())
    # Two epochs, and the forward passes by which the statistics of its slow batch norms are estimated in the end.
    samples = row["config"]["samples"][0]
    assert row["train_flops"] == row["train_flops_paper_rule"] == (3 * 2 + 1) * row["flops"] * samples
    assert "mnasnet" in [str(cell) for table in tables(found) for cell in table.columns[0].cells]


def test_published_networks_give_classes_and_no_masks(tmp_path: Path) -> None:
    rows = run(tmp_path, "mnasnet efficientnet-b0", recipes.with_scale(recipes.get("deeplabv3-voc"), "smoke"))
    assert [row["error"] for row in rows] == [
        f"{name} gives classes of images, and recipe 'deeplabv3-voc' trains on masks"
        for name in ("mnasnet", "efficientnet-b0")
    ]


def test_without_torchvision_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(TorchgrowError, match=r"this needs the package torchvision, .* pip install torchvision"):
        frames.from_torchvision("mnasnet1_0")


class Stop(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize(
    ("name", "after"), [("autogrow", 3), ("bar", 1), ("pfp", 3), ("proxyless", 2), ("shrink:until=0.8", 1)]
)
def test_a_system_that_was_stopped_ends_as_the_unbroken_one(
    name: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a phase and between two, with the state of hooks and of random numbers."""
    recipe = TWO_STAGES if name in LEAVE_LAYERS_OUT else THREE_BLOCKS
    (whole,) = [row for row in run(tmp_path / "whole", name, recipe) if row["method"] == name]
    left = after

    def fit(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        nonlocal left
        for epoch in train.fit(*arguments, **keywords):
            yield epoch
            left -= 1
            if not left:
                raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("torchgrow.lab.systems.running.fit", fit)
        with pytest.raises(Stop):
            run(tmp_path / "broken", name, recipe)
    (resumed,) = [row for row in run(tmp_path / "broken", name, recipe) if row["method"] == name]
    as_if_unbroken(resumed, whole)


def as_if_unbroken(resumed: Row, whole: Row) -> None:
    for key in ("accuracy", "params", "flops", "train_flops", "train_flops_paper_rule"):
        assert resumed[key] == whole[key], key
    assert [epoch["loss"] for epoch in resumed["epochs"]] == [epoch["loss"] for epoch in whole["epochs"]]


class Dropped(models.ResNet):
    """Draws random numbers in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2, self.training))


def test_a_search_that_was_stopped_trains_only_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NetAdapt, in its third step: the first two are not searched again, and all ends as the unbroken one."""
    recipe = replace(DIGITS, build=partial(Dropped, depth=8, widths=(4, 8, 8), in_channels=1))
    monkeypatch.setitem(systems.CLASSES, "netadapt", partial(NetAdapt, most=4, short=1))
    trained, most = list[nn.Module](), 10000
    original = NetAdapt.trained

    def counted(*arguments: Any) -> tuple[nn.Module, int]:
        if len(trained) == most:
            raise Stop
        trained.append(arguments[1].model)
        return original(*arguments)

    monkeypatch.setattr(NetAdapt, "trained", counted)
    (whole,) = [row for row in run(tmp_path / "whole", "netadapt", recipe) if row["method"] == "netadapt"]
    searched = [len(list(same)) for _, same in itertools.groupby(map(id, trained))]
    assert len(searched) >= 3  # candidates of each step
    most = searched[0] + searched[1] + 1
    trained.clear()
    with pytest.raises(Stop):
        run(tmp_path / "broken", "netadapt", recipe)
    trained.clear()
    most = 10000
    (resumed,) = [row for row in run(tmp_path / "broken", "netadapt", recipe) if row["method"] == "netadapt"]
    assert [len(list(same)) for _, same in itertools.groupby(map(id, trained))] == [1, 1, *searched[2:]]
    as_if_unbroken(resumed, whole)
    assert [epoch["widths"] for epoch in resumed["epochs"]] == [epoch["widths"] for epoch in whole["epochs"]]


def test_phases_that_are_done_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "sfp", THREE_BLOCKS)
    (folder,) = [path.parent for path in (tmp_path / ".digits").glob("*/phases.json")]
    (tmp_path / "digits.jsonl").write_text("")
    steps = []
    monkeypatch.setattr("torchgrow.lab.train.train_step", lambda *_: steps.append(1))
    (row,) = run(tmp_path, "sfp", THREE_BLOCKS)
    assert not steps
    assert len(row["epochs"]) == 2
    assert torch.tensor(row["accuracy"]) >= 0
    assert folder.exists()


def test_the_constants_of_a_system_are_part_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(method="netadapt", recipe=DIGITS, data=(1,))
    before = job.key()
    monkeypatch.setitem(systems.CLASSES, "netadapt", partial(NetAdapt, short=2))
    assert job.key() != before
    assert "growing" not in job.config()


def test_an_unknown_system_is_refused_with_the_names_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match=r"or compare with dense, .*l1-norm, sfp, thinet, pfp, bar, morphnet"):
        run(tmp_path, "sft")


# --- shrink


def test_shrink_is_the_dense_network_a_grower_and_a_plain_loop(tmp_path: Path) -> None:
    """Fine-tuned by hand: half the epochs, a tenth of the rate, the recipe's schedule; an update every step of two."""
    recipe = replace(THREE_BLOCKS, epochs=8, threads=1)
    row = next(r for r in run(tmp_path, "shrink:until=0.5,importance=l1", recipe) if r["method"] != "dense")
    assert [(one["name"], one["epochs"]) for one in row["phases"]] == [("dense", 8), ("fine-tuning", 4)]
    (saved,) = (tmp_path / ".digits").glob("*/network")
    model, images = torchgrow.load(saved, recipe.build), load_images("digits", subset=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr / 10, momentum=0.9, weight_decay=recipe.weight_decay)
    grower = torchgrow.Grower(
        model,
        optimizer,
        example_inputs=images.example(),
        budget=recipe.budget,
        updates=4 * 2,
        start="frame",
        policy=torchgrow.policies.Shrink(until=0.5, importance="l1"),
        seed=0,
    )
    torchgrow.guard_(model)
    generator, losses, flops = torch.Generator().manual_seed(0), [], 0
    for epoch in range(4):
        total = 0.0
        for x, labels in images.train_batches(
            batch_size=32, shift=recipe.shift, mirror=recipe.mirror, generator=generator
        ):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr / 10 * (1.0, 1.0, 0.1, 0.01)[epoch]
            flops += 3 * 32 * grower.cost().flops
            loss = F.cross_entropy(model.train()(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            grower.update()
        losses.append(total / 2)
    assert [epoch["loss"] for epoch in row["epochs"]] == losses
    assert row["train_flops_paper_rule"] == flops
    assert row["train_flops"] == flops + 3 * row["dense_flops"] * 8 * 64
    assert (row["params"], row["flops"]) == (grower.cost().params, grower.cost().flops)
    assert grower.finished


def test_settings_of_shrink_are_part_of_a_row_and_are_refused_where_there_are_none(tmp_path: Path) -> None:
    def config(method: str) -> Any:
        return Job(method=method, recipe=DIGITS, data=(1,)).config()

    assert config("shrink")["system"]["settings"]["until"] == 0.2
    assert config("shrink:until=0.3,importance=l1")["system"]["settings"]["importance"] == "l1"
    with pytest.raises(TorchgrowError, match=r"'unti=0\.3' in preset 'shrink:unti=0\.3' is not a setting of"):
        run(tmp_path, "shrink:unti=0.3")
    with pytest.raises(TorchgrowError, match="l1-norm takes no settings, so not 'l1-norm:lr=1'; only shrink does"):
        run(tmp_path, "l1-norm:lr=1")
    assert not list(tmp_path.iterdir())
