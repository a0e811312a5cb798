"""The page of `torchgrow report`: read from runs and results files alone, whole, escaped, and honest about gaps."""

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student
from typer.testing import CliRunner

from measured import DENSE, SAMPLES, TRAINED, results_file, row, run_folder
from torchgrow import TorchgrowError
from torchgrow.cli import app
from torchgrow.lab.compare import Job
from torchgrow.lab.evidence import drawing, page, pictures, rows, verdict
from torchgrow.lab.metrics import ACCURACY, PERPLEXITY
from torchgrow.lab.recipes import get

EVIL = 'paper:"><script>alert(1)</script>$x_{'


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def several(method: str, scores: list[float], **other: Any) -> list[Any]:
    return [row(method, seed, score, **other) for seed, score in enumerate(scores)]


def task(*found: Any) -> rows.Task:
    return rows.Task([one for some in found for one in some], ACCURACY)


class Read(HTMLParser):
    """Tags that must be closed, ids, what is asked for elsewhere, and the text."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect", "image", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open, self.wrong, self.ids, self.asks = list[str](), list[str](), Counter[str](), list[str]()
        self.labels, self.words = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update([given["id"] or ""] if "id" in given else [])
        self.asks += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        self.asks += re.findall(r"url\((?!#)[^)]*\)", given.get("style") or "")
        self.labels += (given.get("aria-labelledby") or "").split()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A page of a results file with two budgets and a method with an evil name, and of a run folder."""
    place = tmp_path_factory.mktemp("evidence")
    found = [*several("dense", [92.0, 93.0, 92.5]), *several("uniform", [88.0, 88.1, 87.9])]
    found += [
        *several("default", [90.0, 90.2, 89.9]),
        *several("direct", [90.1, 90.0, 90.0]),
        *several("paper", [89.0]),
    ]
    found += [*several(EVIL, [88.5]), *several("uniform", [91.0], budget="params <= 80%")]
    found += several("default", [91.5], budget="params <= 80%")
    failed = {**row("random", 0, 0.0), "error": "out of <memory>"}
    sources = [results_file(place / "mine.jsonl", [*found, failed]), run_folder(place / "a run")]
    done = invoke("report", *sources, "--out", place / "out" / "it.html")
    assert done.exit_code == 0, done.output
    return place / "out" / "it.html", done.output


def test_the_page_is_whole_and_asks_for_nothing(made: Any) -> None:
    text = made[0].read_text()
    seen = Read()
    seen.feed(text)
    assert (seen.open, seen.wrong) == ([], [])
    assert [name for name, count in seen.ids.items() if count > 1] == []
    assert set(seen.labels) <= set(seen.ids)
    assert len(seen.labels) == 2 * text.count("<svg ") > 20
    files = {path.name for path in (made[0].parent / "it-pictures").iterdir()}
    asked = {name for name in seen.asks if not name.startswith("data:")}
    assert {name.partition("/")[2] for name in asked} == files, "nothing but its own pictures"
    assert all((made[0].parent / name).stat().st_size > 1000 for name in asked)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert '<html lang="en">' in text
    assert "<title>torchgrow report: mine</title>" in text


def test_names_of_users_are_text(made: Any) -> None:
    text = made[0].read_text()
    assert "<script" not in text
    assert "paper:&#34;&gt;&lt;script&gt;" in text
    assert "out of &lt;memory&gt;" in text


def test_the_answer_comes_first_and_every_number_is_there(made: Any) -> None:
    seen = Read()
    seen.feed(made[0].read_text())
    words = " ".join(" ".join(seen.words).split())
    assert words.index("Did it work?") < words.index("better than uniform") < words.index("The numbers")
    assert "default 90.03 ± 0.15 % (n = 3); uniform 88.00 ± 0.10 % (n = 3)" in words
    assert "It has 400 parameters, 40.0 % of the dense network's; all within the budget." in words
    assert "Its whole training took 40 % of the FLOPs of one dense training." in words
    assert "too few seeds to tell" in words, "of the other budget"
    assert "torch 2, torchgrow 0" in words


def test_what_has_no_data_is_named_with_its_command(tmp_path: Path, made: Any) -> None:
    """Every picture is on the page, or in the list of those that are not."""
    text, missing = made[0].read_text(), made[0].read_text().partition('id="absent"')[2]
    for one in pictures.PICTURES:
        assert (f">{one.title} <small>" in text) != (f"<strong>{one.title}</strong>" in missing), one.name
    assert "Other courses of the temperature" in missing
    lone = results_file(tmp_path / "lone.jsonl", [row("dense", 0, 92.0)])
    done = invoke("report", lone, "--out", tmp_path / "lone.html")
    assert done.exit_code == 0, done.output
    alone = (tmp_path / "lone.html").read_text()
    for one in pictures.PICTURES:
        assert one.name == "scores" or one.command in done.output.replace("\n", "")
    assert "nothing was grown" in alone
    assert "&lt;" not in alone.partition('<section id="absent"')[2].partition("</section>")[0]


def test_commands_that_make_data_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("run.run", "compare.compare"):
        monkeypatch.setattr(f"torchgrow.lab.{name}", lambda *_, **__: calls.append("trained"))
    import shlex

    for one in pictures.PICTURES:
        words = shlex.split(one.command)
        assert words[0] == "torchgrow"
        assert invoke(*words[1:]).exit_code == 0, one.command
    assert len(calls) == len(pictures.PICTURES)


def test_a_run_folder_gives_the_rows_of_a_comparison(tmp_path: Path) -> None:
    """Samples follow from what the last epoch cost, update by update."""
    (found,) = rows.read([run_folder(tmp_path / "run")])
    dense, grown = found.rows
    assert (dense["method"], grown["method"]) == ("dense", "default")
    assert (dense["budget"], grown["budget"]) == (None, "params <= 40%")
    assert found.config["samples"] == [SAMPLES]
    assert {one["dense_train_flops"] for one in found.rows} == {TRAINED}
    assert (grown["params"], grown["dense_params"], grown["seed"]) == (400, DENSE["params"], 3)
    assert rows.limits(grown) == {"params": 400}
    assert rows.limits(dense) == {}
    assert [epoch["network"] for epoch in grown["epochs"]] == ["grown"] * 4


def test_runs_and_seeds_of_one_setting_stand_together(tmp_path: Path) -> None:
    """A run that grew another way beside it; another length of training apart."""
    one, two, three = (run_folder(tmp_path / name) for name in ("one", "two", "three"))
    for folder, change in ((two, {"preset": "paper", "seed": 4}), (three, {"lr": 0.2})):
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
    assert [[r["method"] for r in t.rows] for t in rows.read([one, two, three])] == [
        ["dense", "default", "dense", "paper"],
        ["dense", "default"],
    ]


def test_a_run_stands_with_the_comparison_of_its_recipe(tmp_path: Path) -> None:
    """What `torchgrow run` records of a recipe differs from a comparison's in nothing that decides."""
    recipe, folder = get("digits"), run_folder(tmp_path / "run", "digits")
    config = {**recipe.as_json(), "seed": 3, "run": {"data": None, "samples": [SAMPLES, 50]}}
    (folder / "config.json").write_text(json.dumps(config))
    job = Job(method="default", recipe=recipe, data=(SAMPLES, 50))
    beside = row("default", 0, 90.0, str(recipe.budget), recipe="digits", config=job.config())
    found = rows.read([folder, results_file(tmp_path / "digits.jsonl", [beside])])
    assert [[one["method"] for one in each.rows] for each in found] == [["dense", "default", "default"]]
    held_out = row("default", 0, 90.0, recipe="digits", config=replace(job, validate=True).config())
    assert len(rows.read([folder, results_file(tmp_path / "digits.jsonl", [held_out])])) == 2


def test_what_failed_is_not_counted_and_alone_is_no_evidence(tmp_path: Path) -> None:
    failed = {**row("random", 0, 0.0), "error": "out of memory"}
    page.write([results_file(tmp_path / "some.jsonl", [failed, row("dense", 0, 92.0)])], tmp_path / "some.html")
    assert "1 trained network in 1 setting" in (tmp_path / "some.html").read_text()
    with pytest.raises(TorchgrowError, match=r"all\.jsonl: no network came to a result.* take these rows out"):
        page.write([results_file(tmp_path / "all.jsonl", [failed])], tmp_path / "all.html")
    assert not (tmp_path / "all.html").exists()


def test_a_score_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    lost = [row("uniform", seed, float("nan")) for seed in range(2)]
    page.write([results_file(tmp_path / "a.jsonl", [*lost, *several("default", [90.0, 91.0])])], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "uniform, seed 1: its score is not finite" in text
    assert "2 trained networks in 1 setting" in text


def test_an_empty_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match=r"empty\.jsonl: no rows in it yet; torchgrow compare adds one"):
        page.write([results_file(tmp_path / "empty.jsonl", [])], tmp_path / "a.html")


def test_held_out_scores_are_called_so(tmp_path: Path) -> None:
    found = several("default", [90.0, 91.0])
    for one in found:
        one["config"]["validate"] = True
    page.write([results_file(tmp_path / "a.jsonl", found)], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "came to a held-out accuracy of" in text
    assert "test accuracy" not in text
    assert "Test accuracy" not in text


def test_a_run_with_layers_is_another_method_than_one_without(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, "digits") for name in ("one", "two")]
    recipe = get("digits")
    for folder, depth in zip(folders, (recipe.depth, not recipe.depth), strict=True):
        config = {**recipe.as_json(), "seed": 3, "depth": depth, "run": {"data": None, "samples": [SAMPLES, 50]}}
        (folder / "config.json").write_text(json.dumps(config))
    methods = {one["method"] for found in rows.read(folders) for one in found.rows}
    assert methods == {"dense", "default", "default --no-depth" if recipe.depth else "default --depth"}


def test_a_method_has_one_colour_on_a_page() -> None:
    """Whatever budgets and pictures it is on."""
    odd = [several(name, [80.0], budget="params <= 80%") for name in ("paper:b", "paper:c")]
    found = task(several("paper:a", [80.0]), *odd)
    whole = drawing.styles(found.methods())
    for part in found.budgets().values():
        assert pictures.looks_of(part) == whole


def test_no_formula_is_left_in_a_picture() -> None:
    found = task(several("paper", [80.0]))
    for picture in pictures.PICTURES:
        for panel in picture.draw(found):
            assert "mathdefault" not in panel.svg("a", "b"), picture.name


def test_a_picture_of_the_page_says_what_it_is_of(tmp_path: Path) -> None:
    found = task(several("uniform", [90.0, 91.0]), several("default", [91.0]))
    (first, *_) = (picture for picture in pictures.PICTURES if picture.draw(found))
    for svg, _, name in page.panels_of(first, found, "a", tmp_path).panels:
        files = tmp_path / f"{Path(name).name}.svg"
        told = f"{found.name}; {found.rows[0]['budget']}; seeds 0, 1".replace("<", "&lt;")
        assert told in files.read_text()
        assert told in svg


def test_a_headline_is_of_one_budget(tmp_path: Path) -> None:
    """Where nothing was grown, too: the budget that most methods stand at, and it says which."""
    found = [*several("uniform", [70.0], budget="params <= 10%"), *several("uniform", [90.0, 91.0])]
    page.write([results_file(tmp_path / "a.jsonl", [*found, row("l1", 0, 80.0)])], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "uniform 90.50 ± 0.71 % (n = 2); l1 80.00 % (n = 1) (at most 40 % of the parameters)" in text


@pytest.mark.parametrize("what", ["nothing", "empty", "partial", "damaged"])
def test_what_is_no_evidence_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    text = f"{folder} holds nothing to report: name the folder of a finished run (with results.json), a results file"
    if what == "empty":
        folder.mkdir()
    elif what != "nothing":
        run_folder(folder)
        (folder / "results.json").unlink() if what == "partial" else (folder / "frame.json").write_text("[")
        text = text if what == "partial" else f"{folder} is damaged: "
    with pytest.raises(TorchgrowError, match=re.escape(text)):
        rows.read([folder])
    done = invoke("report", folder, "--out", tmp_path / "x.html")
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert not (tmp_path / "x.html").exists()


def test_results_of_other_measurements_are_refused_and_rows_count_once(tmp_path: Path) -> None:
    for line in ('{"case": "MLP"}', "[]"):
        (tmp_path / "other.jsonl").write_text(f"{line}\n")
        with pytest.raises(TorchgrowError, match=r"other\.jsonl holds no rows of torchgrow compare"):
            rows.read([tmp_path])
    run = run_folder(tmp_path / "run")
    assert [len(one.rows) for one in rows.read([run, run])] == [len(one.rows) for one in rows.read([run])]
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(TorchgrowError, match="is damaged"):
        rows.read([run])


def test_pictures_stay_out_of_a_run_that_is_called_like_the_page(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    before = sorted(run.rglob("*"))
    done = invoke("report", run, "--out", tmp_path / "run.html")
    assert done.exit_code == 0, done.output
    assert sorted(run.rglob("*")) == before
    assert len(list((tmp_path / "run-pictures").glob("*.svg"))) > 3
    assert "run-pictures" in done.output


def test_the_page_has_a_name_of_its_own(tmp_path: Path) -> None:
    done = invoke("report", run_folder(tmp_path / "run"), "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "--out names the page, such as report.html, not" in " ".join(done.output.split())
    (tmp_path / "file").touch()
    done = invoke("report", tmp_path / "run", "--out", tmp_path / "file" / "it.html")
    assert done.exit_code == 1
    assert "it.html cannot be written there (Not a directory: " in " ".join(done.output.split())


# --- did it work


def test_verdicts_by_hand() -> None:
    """Gaps 1, 2, 3: their mean is 2 and half the interval t(0.975, 2) / sqrt(3) = 2.48, so nothing is clear."""
    uniform = several("uniform", [80.0, 80.0, 80.0])
    half = student.ppf(0.975, 2) / 3**0.5
    (open_one,) = verdict.verdicts(task(uniform, several("default", [81.0, 82.0, 83.0])))
    assert (open_one.badge, open_one.kind) == ("no clear difference to uniform", "open")
    assert f"(95 % interval {2 - half:+.2f} to {2 + half:+.2f}, paired by seed)" in " ".join(open_one.sentences)
    (better,) = verdict.verdicts(task(uniform, several("default", [82.0, 82.1, 81.9])))
    (worse,) = verdict.verdicts(task(uniform, several("default", [78.0, 78.1, 77.9])))
    assert [(v.badge, v.kind) for v in (better, worse)] == [
        ("better than uniform", "good"),
        ("worse than uniform", "bad"),
    ]
    few = verdict.verdicts(task(several("uniform", [80.0, 80.0]), several("default", [90.0, 90.0])))[0]
    assert (few.badge, few.kind) == ("too few seeds to tell", "open")
    assert verdict.verdicts(task(uniform)) == []
    alone = verdict.verdicts(task(several("paper", [80.0])))[0]
    assert (alone.badge, alone.method) == ("nothing to compare with", "paper")


def test_less_perplexity_is_better() -> None:
    found = [
        {**row(method, seed, 0.0), "accuracy": None, "perplexity": value + seed}
        for method, value in (("uniform", 120.0), ("default", 110.0))
        for seed in range(3)
    ]
    assert verdict.verdicts(rows.Task(found, PERPLEXITY))[0].badge == "better than uniform"


def test_a_broken_budget_is_told() -> None:
    over = [{**one, "params": 401} for one in several("default", [80.0, 81.0, 82.0])]
    assert "3 of 3 above the budget!" in " ".join(verdict.verdicts(task(over))[0].sentences)


def test_budgets_in_words() -> None:
    assert rows.in_words("params <= 8%") == "at most 8 % of the parameters"
    assert rows.in_words("params <= 272474 and flops <= 50%") == "at most 272,474 parameters and 50 % of the FLOPs"


# --- pictures


def test_every_method_has_a_look_of_its_own() -> None:
    """Fourteen methods: colour and line together tell each apart, and known ones have their own colours."""
    looks = drawing.styles(["dense", "uniform", "direct", "default", "paper", *(f"m{n}" for n in range(12))])
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == len(looks)
    assert looks["default"]["color"] == "#1f6fd0"


def test_svg_follows_the_theme_and_its_ids_are_its_own() -> None:
    panel, ax = drawing.axes("a < b", "x", "y")
    ax.plot([1, 2], [1, 2], color="#e07b00", label="$ is no formula")
    drawing.legend(panel, ax)
    text = panel.svg("one", "what & why")
    assert text.startswith("<svg ")
    assert '<title id="one-title">a &lt; b</title><desc id="one-desc">what &amp; why</desc>' in text
    assert "var(--ce07b00)" in text
    assert "#e07b00" not in text
    assert "currentColor" in text
    assert "$ is no formula" in text
    assert all(name.startswith("one-") for name in re.findall(r'\bid="([^"]*)"', text))
    assert all(name.startswith("one-") for name in re.findall(r'(?:url\(|href=")#([^")]*)', text))


def test_dense_does_not_press_the_others_flat() -> None:
    _, ax = drawing.axes("t", "x", "y")
    assert drawing.close(ax, 1000, [100, 90]) == " (1k, above)"
    assert ax.get_ylim()[1] == pytest.approx(112)
    assert drawing.close(ax, 200, [100, 90]) == ""
    assert ax.get_ylim() == pytest.approx((0, 224))


def test_the_table_has_all_methods_at_all_budgets() -> None:
    found = task(
        several("dense", [92.0]), several("uniform", [88.0]), several("default", [90.0], budget="flops <= 50%")
    )
    assert [(budget, [line[:3] for line in lines]) for budget, lines in page.table_lines(found)] == [
        ("at most 40 % of the parameters", [["dense", "1", "92.00"], ["uniform", "1", "88.00"]]),
        ("at most 50 % of the FLOPs", [["dense", "1", "92.00"], ["default", "1", "90.00"]]),
    ]


def test_settings_say_what_a_step_may_hold(tmp_path: Path) -> None:
    """Rows of larger batches are a setting of their own, and the page does not call both the same."""
    large = row("default", 0, 90.0)
    large["config"] = {**large["config"], "largest_batch": 1024}
    results_file(tmp_path / "mine.jsonl", [row("default", 0, 91.0), large])
    usual, other = (task.setting() for task in rows.read([tmp_path]))
    assert other == usual.replace(", judged", ", up to 1,024 samples a step, judged")


def test_what_is_spent_before_a_phase_is_no_part_of_its_epochs() -> None:
    """A dense training elsewhere, two epochs of gates, samples, two of fine-tuning."""
    phases = [("dense", 4, 1000), ("gates", 2, 60), ("sampling", 0, 7), ("fine-tuning", 2, 20)]
    one = {**row("bar", 0, 90.0), "phases": [{"name": n, "epochs": e, "flops": f} for n, e, f in phases]}
    assert pictures.phase_starts(one) == {1: 1000, 3: 1067}
    assert pictures.phase_starts(row("default", 0, 90.0)) == {}
