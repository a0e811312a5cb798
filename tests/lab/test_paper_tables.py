"""`torchgrow table`: the paper's numbers as printed, ours only where something was measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from measured import results_file, row
from torchgrow import TorchgrowError, measure
from torchgrow.cli import app
from torchgrow.lab import recipes
from torchgrow.lab.compare import RESULTS
from torchgrow.lab.evidence.tables import PAPER, beside, found_structure
from torchgrow.lab.models import MobileNetV1

RESNET = {"name": "resnet20-cifar10", "model": "ResNet", "dataset": "cifar10", "samples": [50000, 10000]}


def cifar(method: str, seed: int, score: float, *, epochs: int = 160, **other: Any) -> Any:
    """A row of ResNet-20; of its 1000 parameters, 360 are kept."""
    one = row(method, seed, score, **{"budget": "params <= 36%", **other})
    one["recipe"], one["config"] = "resnet20-cifar10", {**one["config"], **RESNET, "epochs": epochs}
    one["config"].pop("growing", None)
    return one if method == "dense" else {**one, "params": 360, **other}


def line(table: Any, network: str, method: str) -> list[str]:
    lines = table.lines[network]
    at = next(n for n, cells in enumerate(lines) if cells[0] == method)
    found: list[str] = lines[at + 1] if lines[at][1] == "paper" else lines[at]
    return found


def printed(number: Any) -> tuple[float, float]:
    """The least and the most that a number may be before it was rounded."""
    half = 0.5 * 10.0 ** -len(str(number).partition(".")[2])
    return float(number) - half, float(number) + half


def test_the_papers_numbers_add_up() -> None:
    """What is kept is parameters over the original's, to the digits printed: a slip of the pen would show."""
    checked, apart = 0, []
    for table in PAPER["tables"].values():
        for group in table["groups"]:
            whole = next((r for r in group["rows"] if r["name"].startswith("Original") and "params" in r), None)
            for one in group["rows"]:
                if whole and "kept" in one and "params" in one:
                    (low, high), (least, most) = printed(one["params"]), printed(whole["params"])
                    (under, over) = printed(one["kept"])
                    apart += [(group["name"], one["name"])] * (100 * low / most > over or 100 * high / least < under)
                    checked += 1
            ours = next(r for r in group["rows"] if r.get("method") in ("paper", "nas"))
            for part, wanted in group.get("near", {}).items():
                assert part not in ours or float(ours[part]) == wanted
    assert checked >= 14
    assert apart == [("WRN-28-10", "the paper's method")], "3.443 of 36.5 M are 9.4 %; the paper prints 9.3"


def test_one_method_has_one_accuracy_in_all_tables() -> None:
    """Table 5 repeats Table 1's."""
    first, fifth = (
        {g["name"]: next(r for r in g["rows"] if r.get("method") == "paper") for g in PAPER["tables"][n]["groups"]}
        for n in "15"
    )
    assert {n: (r["score"], r["spread"]) for n, r in first.items()} == {
        n: (r["score"], r["spread"]) for n, r in fifth.items()
    }


def test_every_table_prints_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(1, 9):
        done = CliRunner().invoke(app, ["table", str(number)])
        assert done.exit_code == 0, done.output
        assert f"Table {number} of the paper" in done.output
        found = beside(number, RESULTS)
        assert {cell for lines in found.lines.values() for one in lines if one[1] == "here" for cell in one[2:]} == {""}
        columns = {len(cells) for cells in found.lines[next(iter(found.lines))]} | {len(found.head)}
        assert len(columns) == 1


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "nowhere"):
        done = CliRunner().invoke(app, ["table", "1", "--results", str(wrong)])
        assert done.exit_code == 1
        assert (
            "holds no results files (NAME.jsonl); name the folder that torchgrow compare wrote them into"
            in " ".join(done.output.split())
        )


def test_ours_stand_beside_at_the_nearest_budget(tmp_path: Path) -> None:
    rows = [cifar("dense", seed, 91.0 + seed) for seed in range(2)]
    rows += [cifar("paper", seed, 90.0 + seed) for seed in range(3)]
    rows += [cifar("paper", 0, 50.0, budget="params <= 90%", params=900), cifar("default", 0, 90.5)]
    results_file(tmp_path / "resnet20-cifar10.jsonl", rows)
    found = beside(1, tmp_path)
    assert found.head[:3] == ["method", "by", "accuracy, %"]
    assert found.head[3:] == ["parameters, M", "parameters kept, %", "FLOPs kept, %", "training cost saved, x", "n"]
    assert found.lines["ResNet-20"][-3][:3] == ["the paper's method", "paper", "90.91 ± 0.07"]
    assert line(found, "ResNet-20", "the paper's method") == [
        "", "here", "91.00 ± 1.00", "0.00036", "36.0", "40.0", "2.50", "3"
    ]  # fmt: skip
    assert line(found, "ResNet-20", "Original")[2] == "91.50 ± 0.71"
    assert line(found, "ResNet-20", "torchgrow's default")[2] == "90.50"
    assert line(found, "ResNet-20", "SoftNet") == ["", "here", *[""] * 6]
    assert "as long as the paper's" in found.notes[1]
    assert "at most 36 % of the parameters" in found.notes[1]
    assert found.notes[0] == "VGG-16: not measured here yet: torchgrow compare vgg16-cifar10 --data FOLDER."


def test_a_short_run_says_so_and_gives_way_to_a_long_one(tmp_path: Path) -> None:
    path = tmp_path / "resnet20-cifar10.jsonl"
    short = [cifar("paper", seed, 70.0, epochs=20) for seed in range(5)]
    results_file(path, short)
    assert "a short run (20 of 160 epochs)" in beside(1, tmp_path).notes[1]
    assert line(beside(1, tmp_path), "ResNet-20", "the paper's method")[2] == "70.00 ± 0.00"
    results_file(path, [*short, cifar("paper", 0, 90.0)])
    assert line(beside(1, tmp_path), "ResNet-20", "the paper's method")[2] == "90.00"


def test_what_is_smaller_than_the_papers_is_named(tmp_path: Path) -> None:
    one = row("uniform", 0, 50.0, recipe="mobilenetv1-imagenet", budget="flops <= 40%")
    one["config"] |= {"name": "mobilenetv1-imagenet", "dataset": "imagefolder", "side": 64, "samples": [9469, 3925]}
    one["config"] |= {"model": "MobileNetV1", "model_arguments": {"widen": 0.5, "classes": 10}, "epochs": 90}
    results_file(tmp_path / "mobilenetv1-imagenet.jsonl", [one])
    found = beside(6, tmp_path)
    note = next(note for note in found.notes if note.startswith("224 px"))
    assert "9,469 of 1,281,167 samples, 10 of 1,000 classes, images of 64 pixels for 224, a smaller network" in note
    assert line(found, "224 px, grown out of 1.0x", "Original 0.75x")[2] == "", "a network narrowed to a budget is none"


def test_flops_and_saving_of_mobilenets_are_of_the_narrow_original(tmp_path: Path) -> None:
    """0.75 of every width of the frame; of its FLOPs and of a training with them."""
    narrow = measure(MobileNetV1(0.75, classes=10), torch.zeros(1, 3, 64, 64)).flops
    whole = measure(MobileNetV1(classes=10), torch.zeros(1, 3, 64, 64)).flops
    one = row("uniform", 0, 50.0, recipe="mobilenetv1-imagenet", flops=narrow // 2, dense_flops=whole)
    one["config"] |= {"name": "mobilenetv1-imagenet", "dataset": "imagefolder", "side": 64}
    one["config"] |= {"model": "MobileNetV1", "model_arguments": {"widen": 1.0, "classes": 10}}
    one |= {"dense_train_flops": 100 * whole, "train_flops_paper_rule": 50 * narrow}
    results_file(tmp_path / "mobilenetv1-imagenet.jsonl", [one])
    assert line(beside(6, tmp_path), "224 px, grown out of 1.0x", "narrowed by one factor")[3:5] == ["50.0", "2.00"]


def test_what_only_another_setting_has_has_a_line_of_its_own(tmp_path: Path) -> None:
    path, other = tmp_path / "resnet20-cifar10.jsonl", cifar("thinet", 0, 60.0, epochs=20)
    rows = [cifar(name, 0, 90.0) for name in ("dense", "paper", "sfp")]
    results_file(path, [*rows, other])
    found = beside(1, tmp_path)
    assert line(found, "ResNet-20", "ThiNet")[1:3] == ["here, 2", "60.00"]
    assert any("here, 2 resnet20-cifar10, a short run" in note for note in found.notes)


def test_a_short_setting_with_more_methods_has_lines_of_its_own(tmp_path: Path) -> None:
    """Never mixed: each line says which setting it is of, and the notes say how each was measured."""
    path, short = tmp_path / "resnet20-cifar10.jsonl", [cifar("paper", 0, 70.0, epochs=20)]
    results_file(path, [*short, cifar("paper", 0, 90.0)])
    assert all(one[1] != "here, short" for one in beside(1, tmp_path).lines["ResNet-20"]), "it has nothing more"
    short += [cifar(name, 0, 60.0, epochs=20) for name in ("sfp", "dense", "default")]
    results_file(path, [*short, cifar("paper", 0, 90.0)])
    found = beside(1, tmp_path)
    cells = [one[:3] for one in found.lines["ResNet-20"]]
    at = next(n for n, one in enumerate(cells) if one[0] == "the paper's method")
    assert [one[1:] for one in cells[at + 1 : at + 3]] == [["here", "90.00"], ["here, short", "70.00"]]
    assert line(found, "ResNet-20", "SoftNet")[:3] == ["", "here, short", "60.00"]
    assert line(found, "ResNet-20", "ThiNet")[:3] == ["", "here", ""]
    assert line(found, "ResNet-20", "torchgrow's default")[1:3] == ["here, short", "60.00"]
    assert found.notes[1].startswith("ResNet-20: here resnet20-cifar10, as long as the paper's")
    assert found.notes[2].startswith("ResNet-20: here, short resnet20-cifar10, a short run (20 of 160 epochs)")


def test_of_settings_alike_the_one_with_more_methods_stands_here(tmp_path: Path) -> None:
    """ "Short" is only what is shorter, and what counts is what stands at the budget that is shown."""
    path, other = tmp_path / "resnet20-cifar10.jsonl", [cifar(name, 0, 60.0) for name in ("paper", "sfp", "dense")]
    for one in other:
        one["config"]["lr"] = 0.05
    results_file(path, [*(cifar("paper", seed, 90.0) for seed in range(9)), *other])
    found = beside(1, tmp_path)
    assert all(one[1] != "here, short" for one in found.lines["ResNet-20"])
    assert line(found, "ResNet-20", "the paper's method")[2] == "60.00"
    short = [cifar("paper", 0, 70.0, epochs=20)]
    short += [cifar(name, 0, 70.0, epochs=20, budget="params <= 90%", params=900) for name in ("sfp", "pfp")]
    results_file(path, [cifar("paper", 0, 90.0), *short])
    assert all(one[1] != "here, short" for one in beside(1, tmp_path).lines["ResNet-20"])


def test_what_a_system_ended_with_stands_in_the_table(tmp_path: Path) -> None:
    """Hidden units from its row, blocks from its last epoch: systems have no widths from epoch to epoch."""
    found = cifar("iss", 0, 80.0, widths={"lstm.0": 7, "lstm.1": 9})
    found["config"]["model"] = "LSTM"
    assert found_structure(found) == "7, 9"
    found = cifar("autogrow", 0, 80.0)
    found["epochs"][-1]["depths"] = {"layer1": 2, "layer2": 3}
    assert found_structure(found) == "2-3"


def test_of_settings_that_have_the_same_the_recipes_own_schedule_stands_here(tmp_path: Path) -> None:
    """What was measured under another one first does not stand for the recipe for ever, however many rows it has."""
    path = tmp_path / "resnet20-cifar10.jsonl"
    own, other = cifar("paper", 0, 80.0, epochs=20), [cifar("paper", seed, 60.0, epochs=20) for seed in range(3)]
    own["config"]["schedule"] = recipes.get("resnet20-cifar10").schedule
    for one in other:
        one["config"]["schedule"] = "milestones"
    results_file(path, [*other, own])
    assert line(beside(1, tmp_path), "ResNet-20", "the paper's method")[2] == "80.00"


def test_a_train_phase_counts_and_data_drawn_for_a_trial_does_not(tmp_path: Path) -> None:
    path = tmp_path / "nas-imagenet.jsonl"

    def searched(score: float, *, then: int = 90, dataset: str = "imagefolder", **other: Any) -> Any:
        one = row("nas", 0, score, **{"budget": "params <= 7000000", **other})
        one["recipe"], one["config"] = "nas-imagenet", {**one["config"], **RESNET, "name": "nas-imagenet"}
        one["config"] |= {"dataset": dataset, "epochs": 30, "then": then, "samples": [1281167, 50000]}
        return one

    results_file(path, [searched(60.0, then=0), searched(70.0)])
    found = beside(4, tmp_path)
    assert line(found, "ImageNet", "the paper's method, 140 h")[3] == "70.00"
    assert "as long as the paper's" in found.notes[0]
    results_file(path, [searched(60.0, then=0)])
    assert "a short run (30 of 120 epochs)" in beside(4, tmp_path).notes[0]
    results_file(path, [searched(99.0, dataset="shapes")])
    assert beside(4, tmp_path).notes[0].startswith("ImageNet: not measured here yet")


def test_where_the_paper_names_no_epochs_the_recipe_does(tmp_path: Path) -> None:
    one = cifar("paper", 0, 90.0, epochs=3)
    one["recipe"], one["config"] = "basic3resnet-cifar10", {**one["config"], "name": "basic3resnet-cifar10"}
    results_file(tmp_path / "basic3resnet-cifar10.jsonl", [one])
    assert "a short run (3 of 200 epochs)" in beside(3, tmp_path).notes[0]


def test_what_was_chosen_by_is_not_a_result(tmp_path: Path) -> None:
    held = cifar("paper", 0, 99.0)
    held["config"]["validate"] = True
    results_file(tmp_path / "resnet20-cifar10.jsonl", [held])
    assert line(beside(1, tmp_path), "ResNet-20", "the paper's method")[2] == ""


def test_markdown_has_the_same_cells(tmp_path: Path) -> None:
    results_file(tmp_path / "resnet20-cifar10.jsonl", [cifar("paper", 0, 90.0)])
    done = CliRunner().invoke(app, ["table", "1", "--results", str(tmp_path), "--markdown"])
    lines = [line for line in done.output.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert sum(map(len, beside(1, tmp_path).lines.values())) == len(lines) - 2
    assert re.search(r"\| ResNet-20 \| the paper's method \| here \| 90.00 \|", done.output)


def test_there_are_eight_tables(tmp_path: Path) -> None:
    assert list(PAPER["tables"]) == [str(number) for number in range(1, 9)]
    assert "arXiv 2007.15353v2" in PAPER["source"]
    with pytest.raises(TorchgrowError, match="the paper has tables 1 to 8, not 9"):
        beside(9, tmp_path)
    assert CliRunner().invoke(app, ["table", "9"]).exit_code == 2


def test_the_data_file_is_plain() -> None:
    """Numbers as printed: a text where zeros at the end count."""
    for table in PAPER["tables"].values():
        for group in table["groups"]:
            for one in group["rows"]:
                assert set(one) <= {"name", "method", "spread", *table["columns"]}, one
    assert json.dumps(PAPER).isascii()
