"""The paper's figures, drawn from rows: what each shows, and the command that makes its data."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from torchgrow.lab.evidence.drawing import INK, NOT_SHOWN, Panel, axes, close, counts, curve, legend, styles
from torchgrow.lab.evidence.rows import Task, grows, limits, literal
from torchgrow.lab.evidence.units import temperatures, widths
from torchgrow.lab.pages import Row
from torchgrow.lab.report import span
from torchgrow.lab.results import by_budget, shown_range, sweeps


@dataclass(frozen=True)
class Picture:
    """Panels that belong together.

    Attributes:
        name: of its files.
        title: its heading.
        of_paper: the figures of the paper that show the same.
        caption: one sentence.
        draw: makes the panels from rows of one setting; none if these have no data for it.
        command: what makes such data.
        all_budgets: whether it shows all budgets of a setting at once.
    """

    name: str
    title: str
    of_paper: str
    caption: str
    draw: Callable[[Task], list[Panel]]
    command: str
    all_budgets: bool = False


def looks_of(task: Task) -> dict[str, dict[str, Any]]:
    """Of every method the same on all pictures of a setting."""
    return styles(task.beside or task.methods())


def _unit(task: Task) -> str:
    return f"{task.judged_on} {task.metric.name}{task.metric.unit}"


def _costs(task: Task) -> list[Panel]:
    """Score against what the final network costs."""
    panels = []
    looks, groups = looks_of(task), task.methods()
    if sum(len(by_budget(rows)) for rows in groups.values()) < 2:
        return []
    low, high = shown_range(task.fine, task.metric)
    for part, name in (("params", "parameters"), ("flops", "FLOPs of one sample")):
        costs = [row[part] for row in task.fine]
        apart = max(costs) > 4 * min(costs)  # else a log scale has no round numbers to write
        panel, ax = axes(f"Score against {name}", name + " (log scale)" * apart, _unit(task))
        for method, rows in groups.items():
            score = mean(row[task.metric.name] for row in rows)
            if low <= score <= high:
                _points(ax, task, list(by_budget(rows).values()), part, method, looks[method])
            else:  # it would squeeze the others into a few pixels
                told = f"{method} ({score:.1f}, {NOT_SHOWN})"
                ax.plot([], [], color=looks[method]["color"], marker="x", linestyle="none", label=told)
        if apart:
            ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if apart else MaxNLocator(5))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_minor_formatter(NullFormatter())
        legend(panel, ax)
        panels.append(panel)
    return panels


def _points(ax: Axes, task: Task, groups: Sequence[list[Row]], part: str, label: str, style: dict[str, Any]) -> None:
    """A point for every budget with its standard deviation, joined by a thin line."""
    name = task.metric.name
    found = sorted(
        (
            mean(row[part] for row in rows),
            mean(row[name] for row in rows),
            stdev(row[name] for row in rows) if len(rows) > 1 else 0.0,
        )
        for rows in groups
        if rows
    )
    x, y, spread = zip(*found, strict=True)
    size, above = (14, 2) if label == "default" else (6, 3)  # what lies on the same place stays seen
    ax.errorbar(x, y, yerr=spread, label=label, capsize=3, linewidth=1, markersize=size, zorder=above, **style)


def _sizes(task: Task) -> list[Panel]:
    """What the network costs in every epoch."""
    panels, groups = [], task.methods()
    looks = looks_of(task)
    for part, name in (("params", "parameters"), ("flops", "FLOPs of one sample")):
        panel, ax = axes(f"{name[0].upper()}{name[1:]} over epochs", "epoch", name)
        series = {method: _by_epoch(rows, part) for method, rows in groups.items()}
        allowed = sorted({limits(row)[part] for row in task.fine if part in limits(row)})
        means = {method: [mean(values) for values in some.values()] for method, some in series.items()}
        others = [value for method, some in means.items() if method != "dense" for value in some]
        above = close(ax, max(means.get("dense") or [0]), [*others, *allowed])
        for method, some in series.items():
            curve(ax, some, method + above * (method == "dense"), looks[method])
        for limit in allowed:
            ax.axhline(limit, color="#c0392b", linestyle=":", linewidth=1.2, label="budget")
        _epochs(ax)
        counts(ax, y=True)
        legend(panel, ax)
        panels.append(panel)
    return panels if any(grows(row) for row in task.fine) else []


def _by_epoch(rows: list[Row], field: str) -> dict[float, list[float]]:
    series: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        for epoch in row["epochs"]:
            if epoch.get(field) is not None:
                series[epoch["epoch"]].append(epoch[field])
    return series


def _epochs(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def phase_starts(row: Row) -> dict[int, int]:
    """Training FLOPs that were spent before the first epoch of each phase of a system, by the number of that epoch.

    What was done before the first one, or between two, is no part of an epoch.
    """
    phases, starts, at, spent = row.get("phases", []), dict[int, int](), 1, 0
    elsewhere = sum(phase["epochs"] for phase in phases) - len(row["epochs"])  # of the network that it begins with
    for phase in phases:
        if elsewhere > 0:
            elsewhere -= phase["epochs"]
        elif phase["epochs"]:
            starts[at] = spent
            at += phase["epochs"]
        spent += phase["flops"]
    return starts


def _spending(task: Task) -> list[Panel]:
    """Training FLOPs of every epoch, and of all of them together, as shares of the dense network's."""
    groups = {m: rows for m, rows in task.methods().items() if all(r["train_flops"] is not None for r in rows)}
    looks = looks_of(task)
    if len(groups) < 2:
        return []
    panel, ax = axes("Training FLOPs of every epoch", "epoch", "share of a dense epoch (log scale)")
    for method, rows in groups.items():
        series: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            config, whole = row["config"], row["dense_train_flops"]
            dense, starts = whole / (config["epochs"] + config.get("then", 0)), phase_starts(row)
            before = 0
            for epoch in row["epochs"]:
                before = starts.get(epoch["epoch"], before)
                series[epoch["epoch"]].append((epoch["training_flops"] - before) / dense)
                before = epoch["training_flops"]
        curve(ax, series, method, looks[method])
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    _epochs(ax)
    legend(panel, ax)
    return [panel, _totals(groups, looks)]


def _totals(groups: dict[str, list[Row]], looks: dict[str, dict[str, Any]]) -> Panel:
    """All training FLOPs as bars, and what the paper's rule counts of them as marks."""
    total, bars = axes("All training FLOPs", "share of one dense training", "", height=1.1 + 0.26 * len(groups))
    names = list(groups)[::-1]
    for place, method in enumerate(names):
        rows = groups[method]
        share = mean(row["train_flops"] / row["dense_train_flops"] for row in rows)
        bars.barh(place, share, color=looks[method]["color"], height=0.62)
        ruled = [row["train_flops_paper_rule"] for row in rows]
        if None not in ruled:
            rule = mean(r / row["dense_train_flops"] for r, row in zip(ruled, rows, strict=True))
            bars.plot([rule, rule], [place - 0.36, place + 0.36], color=INK, linewidth=2)
        beyond: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "color": INK}
        bars.annotate(f"{share:.2f}", (share, place), fontsize=8.5, **beyond)
    bars.set_yticks(range(len(names)), [name if len(name) < 30 else f"{name[:12]}…{name[-16:]}" for name in names])
    bars.margins(x=0.14)
    bars.grid(visible=False, axis="y")
    return total


def _scores(task: Task) -> list[Panel]:
    """Score by epoch, and by training FLOPs spent."""
    panels, name, groups = [], task.metric.name, task.methods()
    looks = looks_of(task)
    seen = [epoch[name] for row in task.fine for epoch in row["epochs"] if epoch.get(name) is not None]
    if not seen:
        return []
    by_epoch, ax = axes(f"{task.judged_on.capitalize()} {name} by epoch", "epoch", _unit(task))
    by_cost, other = axes("The same by training FLOPs", "training FLOPs so far (log scale)", _unit(task))
    for method, rows in groups.items():
        scores, spent = _by_epoch(rows, name), _by_epoch(rows, "training_flops")
        curve(ax, scores, method, looks[method])
        curve(other, {mean(spent[at]): values for at, values in scores.items()}, method, looks[method])
    _epochs(ax)
    other.set_xscale("log")
    longest = max(epoch["training_flops"] for row in task.fine for epoch in row["epochs"])
    other.set_xlim(left=longest / 500, right=1.5 * longest)
    other.xaxis.set_minor_formatter(NullFormatter())
    counts(other, x=True)
    for panel, one in ((by_epoch, ax), (by_cost, other)):
        one.set_ylim(*span(seen, task.metric))
        legend(panel, one)
        panels.append(panel)
    return panels


def _depths(task: Task) -> list[Panel]:
    """Blocks of all stages over epochs."""
    deep = {m: rows for m, rows in task.methods().items() if any(e.get("depths") for r in rows for e in r["epochs"])}
    if not deep:
        return []
    panel, ax = axes("Blocks over epochs", "epoch", "blocks, all stages")
    looks = looks_of(task)
    for method, rows in deep.items():
        series: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            for epoch in row["epochs"]:
                if epoch.get("depths"):  # of compared systems only while they grow
                    series[epoch["epoch"]].append(sum(epoch["depths"].values()))
        curve(ax, series, method, looks[method])
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _epochs(ax)
    legend(panel, ax)
    return [panel]


def _sweep(task: Task) -> list[Panel]:
    """Score along several budgets of one kind."""
    panels, looks = [], looks_of(task)
    for kind, rows in sweeps(task.fine).items():
        name = {"params": "parameters", "flops": "FLOPs"}[kind]
        panel, ax = axes(f"Along the budgets of {name}", f"{name} left, share of the dense network", _unit(task))
        shown = [{**row, "share": row[kind] / row[f"dense_{kind}"]} for row in rows]
        part = Task(shown, task.metric)
        for method, some in part.methods().items():
            groups = list(by_budget(some).values())
            if method != "dense" and len(groups) > 1:
                _points(ax, task, groups, "share", method, looks[method])
            elif method == "dense":
                level = mean(row[task.metric.name] for row in some)
                ax.axhline(level, color=looks[method]["color"], linewidth=1.2, label="dense")
        if len(ax.lines) > 1:
            legend(panel, ax)
            panels.append(panel)
    return panels


def _pressure(task: Task) -> list[Panel]:
    """Lambda of Eq 4 over epochs."""
    groups = {m: rows for m, rows in task.methods().items() if any(map(literal, rows))}
    if not groups:
        return []
    panel, ax = axes("Lambda over epochs", "epoch", "lambda (below 0: growth is rewarded)")
    looks = looks_of(task)
    for method, rows in groups.items():
        curve(ax, _by_epoch(rows, "pressure"), method, looks[method])
    ax.axhline(0, color=INK, linewidth=0.8)
    _epochs(ax)
    legend(panel, ax)
    return [panel]


def _decay(task: Task) -> list[Panel]:
    """Ways for temperatures to rise, side by side: Eq 7 beside others."""
    ways = {m: rows for m, rows in task.methods().items() if any(map(literal, rows)) and "temperature=" in m}
    if not ways:
        return []
    plain = {m: rows for m, rows in task.methods().items() if m in ("paper", "global")}
    beside = task.beside or tuple(task.methods())
    only = Task([row for rows in {**plain, **ways}.values() for row in rows], task.metric, beside)
    return [_scores(only)[0], _sizes(only)[0]]


_COMPARE = "torchgrow compare digits --methods"
PICTURES = (
    Picture(
        "score-cost", "Score against size", "Figure 3",
        "Left is smaller. A higher accuracy is better, a lower perplexity; bars are one standard deviation.",
        _costs, f'{_COMPARE} "dense uniform default direct"', all_budgets=True,
    ),
    Picture(
        "size", "How the network grows", "Figures 1b, 4 and 5",
        "What the network that is trained costs in every epoch.",
        _sizes, f'{_COMPARE} "dense uniform default"',
    ),
    Picture(
        "spending", "What training costs", "Figures 1c and 4",
        "FLOPs of training beside one training of the dense network; what came before an epoch on record is counted in "
        "the first; an upright mark is the sum by the paper's rule, of growing and pruning phases only.",
        _spending, f'{_COMPARE} "dense uniform default l1-norm sfp"',
    ),
    Picture(
        "scores", "How the score rises", "Figure 5",
        "The score after every epoch, and by the training FLOPs spent until then.",
        _scores, f'{_COMPARE} "dense uniform default autogrow"',
    ),
    Picture(
        "sweep", "Along the budgets", "Figures 6 (parameters) and 11 (FLOPs)",
        "The score of each method at several budgets; direct is the grown structure, trained from scratch.",
        _sweep, f'{_COMPARE} "dense uniform default direct" --budget 8% --budget 25% --budget 50% '
        "--budget flops=25% --budget flops=50%", all_budgets=True,
    ),
    Picture(
        "widths", "Which layers get units", "Figures 7 to 10",
        "The width of every layer (one seed) and of every stage in each epoch.",
        widths, f'{_COMPARE} "default paper"',
    ),
    Picture(
        "depth", "How deep it gets", "Figure 5",
        "Blocks that are present, all stages together.",
        _depths, f'{_COMPARE} "default autogrow" --depth',
    ),
    Picture(
        "lambda", "What calls units in", "Equation 4",
        "Lambda follows the gap between the network and its budget: below 0 it rewards units, above 0 it removes them.",
        _pressure, f'{_COMPARE} "paper"',
    ),
    Picture(
        "temperature", "Temperatures", "Figure 12",
        "The mean temperature beta of every layer (one seed): it rises only in updates in which a unit is present.",
        temperatures, "torchgrow run digits --preset paper",
    ),
    Picture(
        "decay", "Other courses of the temperature", "Figures 13 and 14",
        "gamma that decays with the learning rate, or one temperature for all units, beside the paper's rule (Eq 7).",
        _decay, f'{_COMPARE} "paper paper:temperature=learning_rate paper:temperature=global"',
    ),
)  # fmt: skip
"""In the order of the page."""
