"""The paper's tables beside what was measured here; what was not measured stays empty."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from torchgrow import TorchgrowError, measure
from torchgrow.lab import recipes
from torchgrow.lab.compare import RESULTS
from torchgrow.lab.evidence.rows import Task, in_words, read
from torchgrow.lab.fitted import Fitted
from torchgrow.lab.pages import Row, grid, own_schedule, spread

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
"""The paper's numbers, with their source. A cell that the paper leaves empty is not there."""
ALSO = {"default": "torchgrow's default", "uniform": "narrowed by one factor", "direct": "grown structure from scratch"}
"""Methods that stand beside the paper's, whose tables do not have them."""
_HERE: dict[str, Callable[[list[Row]], str]] = {
    "params": lambda rows: f"{mean(row['params'] for row in rows) / 1e6:.3g}",
    "kept": lambda rows: f"{100 * mean(row['params'] / row['dense_params'] for row in rows):.1f}",
    "flops": lambda rows: f"{100 * mean(row['flops'] / row['dense_flops'] for row in rows):.1f}",
    "saving": lambda rows: _saving(rows),
    "test": lambda rows: spread([row["test_perplexity"] for row in rows]) if "test_perplexity" in rows[0] else "",
    "found": lambda rows: found_structure(rows[0]),
    "depth": lambda rows: _depth(rows[0]),
}


@dataclass(frozen=True)
class Beside:
    """A table of the paper with our rows in it.

    Attributes:
        title: of the table.
        head: of its columns.
        lines: of every network; the cells of a row are text.
        notes: what was measured here, and how it differs.
    """

    title: str
    head: list[str]
    lines: dict[str, list[list[str]]]
    notes: list[str]

    def markdown(self) -> str:
        """As one Markdown table, in which every line names its method."""
        body = list[list[str]]()
        for network, lines in self.lines.items():
            for method, *cells in lines:
                body.append([network, method or body[-1][1], *cells])
        notes = "\n".join(f"* {note}" for note in self.notes)
        return f"**{self.title}**\n\n{grid(['network', *self.head], body)}\n\n{notes}"

    def rich(self) -> list[Table | Text]:
        """For a terminal."""
        shown = Fitted(title=self.title, title_justify="left")
        for number, name in enumerate(self.head):
            shown.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
        for name, lines in self.lines.items():
            shown.add_row(Text(name, style="bold"))
            for line in lines:
                shown.add_row(*map(Text, line), style="bold" if line[1].startswith("here") else "")
            shown.add_section()
        return [shown, *(Text(f"{note}") for note in self.notes)]


def beside(number: int, results: Path) -> Beside:
    """Table ``number`` of the paper, with what results files hold for it.

    What counts as measured here: rows of the recipe that the table's network has here, on its data and judged by test
    data, in the setting with most training (epochs x samples) and, of those alike, most of the table's methods, then
    the recipe's own schedule, then most rows. Where a shorter setting has more of these methods, it has lines of its
    own, "here, short". Of the budgets of a setting, the one whose networks keep a share nearest to the paper's; all
    methods stand at that one budget.

    Args:
        number: 1 to 8.
        results: folder of results files of `torchgrow compare`; where it is not said and not there, it holds nothing.

    Raises:
        TorchgrowError: there is no such table or folder, or a results file is damaged.
    """
    if str(number) not in PAPER["tables"]:
        raise TorchgrowError(f"the paper has tables 1 to 8, not {number}")
    if results != RESULTS and not any(results.glob("*.jsonl")):
        raise TorchgrowError(
            f"{results} holds no results files (NAME.jsonl); name the folder that torchgrow compare wrote them into "
            f"(its --out; {RESULTS} where that is not given), or leave --results out to see the paper's numbers alone"
        )
    table, units = PAPER["tables"][str(number)], PAPER["units"]
    lines, notes = {}, []
    for group in table["groups"]:
        tasks, said = _measured(group, results)
        lines[group["name"]] = _lines(group, table["columns"], tasks)
        notes += [f"{group['name']}: {note}" for note in said]
    names = [table["score"] if column == "score" else units[column] for column in table["columns"]]
    whose = "narrow original" if any("flops_of" in group for group in table["groups"]) else "dense network"
    saving = f"Saving: the {whose}'s training FLOPs over those of growing or pruning phases, the paper's rule."
    notes += [saving] * ("saving" in table["columns"]) + [f"paper: {PAPER['source'].partition(':')[0]}."]
    title = f"Table {number} of the paper: {table['title']}"
    return Beside(title, ["method", "by", *names, "n"], lines, notes)


def _measured(group: dict[str, Any], results: Path) -> tuple[dict[str, Task], list[str]]:
    """The rows that stand for a network of the paper, by what they are called, and how they were measured."""
    path, own = results / f"{group['recipe']}.jsonl", recipes.get(group["recipe"]).dataset
    found = [_nearest(group, task) for task in read([path]) if _counts(task, own)] if path.is_file() else []
    if not found:
        return {}, [f"not measured here yet: torchgrow compare {group['recipe']} --data FOLDER."]

    def methods(task: Task) -> int:
        return len({row["method"] for row in task.fine} & {row.get("method") for row in group["rows"]})

    def training(task: Task) -> int:
        return _epochs(task.config) * int(task.config["samples"][0])

    def rest(task: Task) -> tuple[bool, int]:
        return own_schedule(task.config), len(task.fine)

    longest = max(found, key=lambda one: (training(one[0]), methods(one[0]), *rest(one[0])))
    fullest = max(found, key=lambda one: (methods(one[0]), training(one[0]), *rest(one[0])))
    chosen = {"here": longest}
    if methods(fullest[0]) > methods(longest[0]):
        chosen["here, short"] = fullest
    wanted = {row.get("method") for row in group["rows"]}
    for one in found:  # what only another setting has
        here = {row["method"] for task, _ in chosen.values() for row in task.fine}
        if wanted & {row["method"] for row in one[0].fine} - here:
            chosen[f"here, {len(chosen) + 1}"] = one
    return {name: task for name, (task, _) in chosen.items()}, [f"{name} {note}" for name, (_, note) in chosen.items()]


def _counts(task: Task, dataset: str) -> bool:
    """Whether it is a result on the recipe's data; what was drawn in its place for ``--scale smoke`` is none."""
    return bool(task.fine) and not task.config["validate"] and task.config["dataset"] == dataset


def _epochs(config: dict[str, Any]) -> int:
    """All of a training, those after growth too."""
    return int(config["epochs"] + (config.get("then") or 0))


def _published(name: str) -> int:
    """Epochs of a recipe as it was published, for a paper that does not name them."""
    recipe = recipes.get(name)
    full = recipes.with_size(recipe, "large") if name == "lstm-ptb" else recipes.with_scale(recipe, "full")
    return _epochs(vars(full))


def _nearest(group: dict[str, Any], chosen: Task) -> tuple[Task, str]:
    """The rows of one setting at the budget that is nearest to the paper's, and how they were measured."""
    budgets = chosen.budgets()
    budget = min(budgets, key=lambda name: _apart(group.get("near"), budgets[name]))
    config, full = chosen.config, group["full"]
    samples = config["samples"][0]
    few = [f"{samples:,} of {full['samples']:,} samples"] if samples < full["samples"] else []
    few += _smaller(group, config)
    whole = full.get("epochs") or (0 if few else _published(group["recipe"]))
    if _epochs(config) < whole:
        few.append(f"{_epochs(config)} of {whole} epochs")
    how = f"a short run ({', '.join(few)})" if few else "as long as the paper's"
    size = f"{chosen.fine[0]['dense_params'] / 1e6:.3g} M parameters dense"
    kept = f", {in_words(budget)}" if budget != "none" else ""
    return budgets[budget], f"{group['recipe']}, {how}. {chosen.setting()}; {size}{kept}."


_SHAPE = ("widen", "widths", "depth", "units", "unit")


def _smaller(group: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What of a network and its images is smaller than in the paper's, in words."""
    full, own, found = group["full"], config["model_arguments"], list[str]()
    hidden = own.get("hidden", [full.get("hidden")])[0]
    if hidden != full.get("hidden"):
        found.append(f"{hidden} of {full['hidden']} hidden units")
    if config["dataset"] == "text":
        return found
    paper = recipes.with_scale(recipes.get(group["recipe"]), "full")
    if config["dataset"] == "imagefolder" and own.get("classes", 1000) < 1000:
        found.append(f"{own['classes']} of 1,000 classes")
    if config.get("void"):
        found.append(f"{21 - len(config['void'])} of 21 classes")
    if config.get("side") and config["side"] < paper.side:
        found.append(f"images of {config['side']} pixels for {paper.side}")
    keywords = getattr(paper.build, "keywords", {})
    whole = json.loads(json.dumps({name: keywords[name] for name in _SHAPE if name in keywords}))
    if any(own[name] != value for name, value in whole.items() if name in own):
        found.append("a smaller network")
    return found


def _apart(near: dict[str, float] | None, task: Task) -> float:
    """How far the networks of a budget are from what the paper keeps."""
    if near is None:
        return 0.0
    part, wanted = next(iter(near.items()))
    field = {"kept": "params", "flops": "flops"}[part]
    shares = [100 * row[field] / row[f"dense_{field}"] for row in task.fine if row["budget"] is not None]
    return abs(mean(shares) - wanted) if shares else 100.0


def _lines(group: dict[str, Any], columns: list[str], tasks: dict[str, Task]) -> list[list[str]]:
    """Lines for every method of the paper, its own and ours, and one for each of ours beside them."""
    methods, lines = {name: task.methods() for name, task in tasks.items()}, []
    told = {row.get("method") for row in group["rows"]}
    for row in group["rows"]:
        cells = ["" if column not in row else _cell(row, column) for column in columns]
        lines.append([row["name"], "paper", *cells, ""])
        here = [[by, *_ours(tasks[by], methods[by].get(row.get("method"), []), columns, group)] for by in tasks]
        measured = [line for line in here if line[-1]] or [["here", *[""] * (len(columns) + 1)]]
        lines += [["", *line] for line in measured]
    for method, name in ALSO.items():
        names = [by for by in tasks if method in methods[by] and method not in told]
        for number, by in enumerate(names):
            cells = _ours(tasks[by], methods[by][method], columns, group)
            lines.append(["" if number else name, by, *cells])
    return lines


def _cell(row: dict[str, Any], column: str) -> str:
    value = row[column]
    return f"{value:.2f} ± {row['spread']:.2f}" if column == "score" and "spread" in row else str(value)


def _ours(task: Task, rows: list[Row], columns: list[str], group: dict[str, Any]) -> list[str]:
    """Cells of our line, empty where there is nothing; FLOPs as the table counts them."""
    if not rows:
        return [""] * (len(columns) + 1)
    cells = []
    for column in columns:
        if column == "score":
            cells.append(spread([row[task.metric.name] for row in rows]))
        elif column == "flops" and "flops_of" in group:
            whole = _flops_of(group, task.config)
            cells.append(f"{100 * mean(row['flops'] for row in rows) / whole:.1f}")
        elif column == "saving" and "flops_of" in group:
            cells.append(_saving(rows, _flops_of(group, task.config) / rows[0]["dense_flops"]))
        else:
            cells.append(_HERE[column](rows) if column in _HERE else "")
    return [*cells, str(len(rows))]


def _flops_of(group: dict[str, Any], config: dict[str, Any]) -> int:
    """FLOPs of the frame with the group's share of every width, which the paper counts MobileNetV1's in."""
    network = recipes.get(group["recipe"]).build(group["flops_of"], **config["model_arguments"])
    return measure(network, torch.zeros(1, 3, config["side"], config["side"])).flops


def _saving(rows: list[Row], share: float = 1.0) -> str:
    """By the paper's rule, beside a training of the dense network, or of one with this share of its FLOPs."""
    spent = [(row["train_flops_paper_rule"], share * row["dense_train_flops"]) for row in rows]
    return f"{mean(dense / own for own, dense in spent):.2f}" if all(own for own, _ in spent) else ""


def _depth(row: Row) -> str:
    """Blocks of all stages together, of the first seed."""
    blocks = (row["epochs"][-1] if row["epochs"] else {}).get("depths", {})
    return str(sum(blocks.values())) if blocks else ""


def found_structure(row: Row) -> str:
    """Blocks of the stages, or hidden units of an LSTM's layers, of the first seed."""
    last, config = row["epochs"][-1] if row["epochs"] else {}, row["config"]
    if config["model"] == "LSTM":
        widths = row.get("widths") or last.get("widths", {})  # of a system; of what was grown
        hidden = config["model_arguments"]["hidden"] if row["method"] == "dense" else widths.values()
        return ", ".join(map(str, hidden))
    return "-".join(map(str, last.get("depths", {}).values()))
