"""What a comparison came to: paired differences, tables and pictures of its rows."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from rich.table import Table
from scipy.special import stdtrit

from torchgrow import Budget, Cost
from torchgrow.lab.display import short
from torchgrow.lab.fitted import Fitted
from torchgrow.lab.metrics import Metric, metric_of
from torchgrow.lab.names import PUBLISHED
from torchgrow.lab.report import COLOURS, colour, say_of

SHARES = {
    "flops": "dense_flops",
    "train_flops": "dense_train_flops",
    "train_flops_paper_rule": "dense_train_flops",
    "seconds": "dense_seconds",
}
"""What is shown as a share of the dense network's."""


def difference(rows: Sequence[Mapping[str, Any]], method: str, other: str) -> tuple[list[float], float]:
    """Scores of one method minus those of another, seed by seed, and half the 95 % interval of their mean.

    Half the interval is that of Student's t, NaN for fewer than two seeds.
    """
    scores = {(row["method"], row["seed"]): row[metric_of(row).name] for row in rows if "error" not in row}
    seeds = sorted(seed for name, seed in scores if name == method and (other, seed) in scores)
    gaps = [scores[method, seed] - scores[other, seed] for seed in seeds]
    if len(gaps) < 2:
        return gaps, math.nan
    return gaps, interval(gaps) if len(gaps) > 2 else float(stdtrit(1, 0.975)) * stdev(gaps) / math.sqrt(2)


def by_budget(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by budget; the dense network, which has none, belongs to each."""
    budgets = dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None) or {"none": None}
    return {budget: [row for row in rows if row["budget"] in (None, budget)] for budget in budgets}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One a budget: mean and standard deviation over seeds, and shares of the dense network."""
    metric = metric_of(next((row for row in rows if "error" not in row), {}))
    grids: list[Table] = []
    for budget, all_of in by_budget(rows).items():
        grid = Fitted(title=budget, title_justify="left")
        heads = (
            metric.name,
            "minus uniform\n(95 % interval;\nof two: both)",
            "parameters",
            "FLOPs",
            "training\nFLOPs",
            "by the\npaper's rule",
            "seconds",
        )
        grid.add_column("method", no_wrap=True)
        for head in ("n", *heads):
            grid.add_column(head, justify="right", no_wrap=True)
        for method in dict.fromkeys(row["method"] for row in all_of):
            mine = [row for row in all_of if row["method"] == method]
            fine = [row for row in mine if "error" not in row]
            if not fine:
                grid.add_row(method, "0", "failed")
                continue
            scores = [row[metric.name] for row in fine]
            spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
            gaps, half = difference(all_of, method, "uniform")
            gap = "" if method == "uniform" or not gaps else f"{mean(gaps):+.2f}"
            if gap and len(gaps) > 2:
                gap += f" ± {half:.2f}"
            elif gap and len(gaps) == 2:
                gap += f" ({min(gaps):+.2f}, {max(gaps):+.2f})"
            shares = [short(mean(row["params"] for row in fine))]
            for part, whole in SHARES.items():
                known = [row[part] / row[whole] for row in fine if row[whole]]
                shares.append(f"{100 * mean(known):.0f} %" if known else "")
            grid.add_row(method, str(len(fine)), f"{mean(scores):.2f}{spread}", gap, *shares)
        beyond = _beyond(all_of, budget)
        if beyond:
            grid.caption = f"{', '.join(beyond)}: as published, not within the budget"
            grid.caption_justify, grid.caption_style = "left", ""
        grids.append(grid)
    return grids


def _beyond(rows: Sequence[dict[str, Any]], budget: str) -> list[str]:
    """Published networks, which stand in the tables of all budgets, that break the one of this table."""
    if budget == "none":
        return []
    allowed = Budget(**dict(limit.split(" <= ") for limit in budget.split(" and ")))
    found = []
    for row in rows:
        if row["method"] in PUBLISHED and "error" not in row:
            limits = allowed.limits(Cost(row["dense_params"], row["dense_flops"]))
            allowances = {"params": limits.params, "flops": limits.flops}
            if any(limit is not None and row[name] > limit for name, limit in allowances.items()):
                found.append(row["method"])
    return list(dict.fromkeys(found))


def verdict(rows: Sequence[dict[str, Any]], metric: Metric, source: str) -> list[str]:
    """What several seeds say of the default way to grow beside the uniform network, in plain sentences.

    Args:
        rows: of one setting, methods "default", "uniform" and, where they are known, "dense" and "direct".
        metric: what they are judged by.
        source: the file they are in.
    """
    gaps, half = difference(rows, "default", "uniform")
    if len(gaps) < 3:
        return ["One seed; torchgrow compare trains several and says what the differences are worth."]
    words = []
    for method in ("default", "uniform", "direct", "dense"):
        scores = [row[metric.name] for row in rows if row["method"] == method]
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        words += [f"{'grown' if method == 'default' else method} {mean(scores):.2f}{spread}"] if scores else []
    lines = [f"Over {len(gaps)} seeds ({source}): {', '.join(words)}; mean and standard deviation."]
    sign = -1 if metric.lower_is_better else 1
    gap = sign * mean(gaps)
    interval = f"{gap:+.2f}, 95 % interval {gap - half:+.2f} to {gap + half:+.2f}"
    if gap - half <= 0:
        worse = "worse" if gap + half < 0 else "no better"
        return [*lines, f"So growing is {worse} than narrowing every width by one factor here ({interval})."]
    closing = f"So growing is better than narrowing every width by one factor here ({interval})"
    again, around = difference(rows, "default", "direct")
    if len(again) < 3:
        return [*lines, f"{closing}."]
    beyond = sign * mean(again)
    apart = f"{beyond:+.2f}, 95 % interval {beyond - around:+.2f} to {beyond + around:+.2f}"
    if abs(beyond) <= around:
        return [*lines, f"{closing}; its structure trained from scratch is as good ({apart}): the structure wins."]
    which = "training by growing adds to that" if beyond > 0 else "its structure trained from scratch is better still"
    return [*lines, f"{closing}; {which} ({apart})."]


def sweeps(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what the budget limits, "params" or "flops", where there are several such budgets."""
    kinds: dict[str, dict[str, None]] = {}
    for budget in dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None):
        limits = [limit.split(" <= ")[0] for limit in budget.split(" and ")]
        if len(limits) == 1:
            kinds.setdefault(limits[0], {})[budget] = None
    return {
        kind: [row for row in rows if row["budget"] is None or row["budget"] in budgets]
        for kind, budgets in kinds.items()
        if len(budgets) > 1
    }


VARIANTS = ("#00a5b5", "#c9a400", "#d6508c", "#6d4c41", "#7cb342", "#3f51b5", "#ff8a80", "#263238")
"""Colours of variants, none of them that of a method."""


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A picture: the plane of score against all training cost for every budget, and the score along the budgets.

    The plane is one panel a budget; where there are several budgets of a kind, one panel more has a line for every
    method, against what its networks cost. Means over seeds, with their standard deviations. Axes fit the dense,
    uniform, direct and default networks; a method far from those is named with its score instead.
    """
    budgets, along = {budget: some for budget, some in by_budget(rows).items() if some}, sweeps(rows)
    metric = metric_of(next((row for row in rows if "error" not in row), {}))
    panels = len(budgets) + len(along)
    columns = min(2, panels)  # three would be too small to read on a page
    height = 4 + 0.2 * len(_by_method(rows))  # the legends are below
    figure = Figure(figsize=(5.5 * columns, height * math.ceil(panels / columns)), dpi=120, layout="constrained")
    axes = [figure.add_subplot(math.ceil(panels / columns), columns, number + 1) for number in range(panels)]
    for ax in axes:
        ax.set_prop_cycle(color=VARIANTS)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylabel(f"{metric.name}{metric.unit}")
    for ax, (budget, some) in zip(axes, budgets.items(), strict=False):
        ax.set(title=budget, xlabel="training FLOPs / dense (all of them)")
        low, high = shown_range(some, metric)
        for method, fine in _by_method(some).items():
            score = mean(row[metric.name] for row in fine)
            if low <= score <= high:
                _point(ax, [fine], "train_flops", "dense_train_flops", metric.name, method)
            else:  # it would squeeze the others into a few pixels
                ax.plot([], [], "x", color=colour(method), label=f"{textwrap.fill(method, 70)}: {score:.1f}, not shown")
    for ax, (kind, some) in zip(axes[len(budgets) :], along.items(), strict=True):
        ax.set(title=f"by {kind}", xlabel=f"{kind} / dense")
        for method, fine in _by_method(some).items():
            several = list(by_budget(fine).values())
            if len(several) > 1 or method == "dense":
                _point(ax, several, kind, f"dense_{kind}", metric.name, method)
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.15), fontsize=7, frameon=False)
    _of(figure, rows)
    FigureCanvasAgg(figure).print_png(path)


def _of(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """Write below a picture which rows it is of."""
    names = ", ".join(dict.fromkeys(row["recipe"] for row in rows))
    say_of(figure, names, [row["budget"] for row in rows], [row["seed"] for row in rows])


def draw_sizes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A picture: score against parameters; dense and uniform networks as one line, grown ones and direct beside it.

    Means over seeds with 95 % intervals (Student's t), where there are at least three.

    Args:
        rows: of one setting; budgets, methods and seeds may differ.
        path: of the picture.

    Raises:
        ValueError: rows of several settings, whose means would say nothing.
    """
    settings = {(row["config"]["validate"], row["config"]["lr"], row["config"]["schedule"]) for row in rows}
    if len(settings) > 1:
        raise ValueError(f"a picture is of one setting, not of {len(settings)} (validate, lr, schedule): {settings}")
    metric = metric_of(next(row for row in rows if "error" not in row))
    points: dict[str, list[tuple[float, float, float]]] = {}
    for some in {
        (r["method"], r["budget"]): None for r in rows if r["method"] in ("dense", "uniform", "direct", "default")
    }:
        fine = [r for r in rows if (r["method"], r["budget"]) == some and "error" not in r]
        scores = [row[metric.name] for row in fine]
        points.setdefault(some[0], []).append((mean(r["params"] for r in fine), mean(scores), interval(scores)))
    figure = Figure(figsize=(6.7, 4.2), dpi=120, layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    curve = sorted(points.get("uniform", []) + points.get("dense", []))
    ax.plot([x for x, _, _ in curve], [y for _, y, _ in curve], color=colour("uniform"), linewidth=1.2, zorder=1)
    names = {"dense": "dense", "uniform": "narrowed by one factor", "direct": "the grown structure, from scratch"}
    markers = {"dense": "s", "uniform": "o", "direct": "D", "default": "*"}
    for method, found in sorted(points.items(), key=lambda item: list(markers).index(item[0])):
        x, y, half = zip(*sorted(found), strict=True)
        size = 15 if method == "default" else 7
        label = names.get(method, "grown")
        style: dict[str, Any] = {"marker": markers[method], "markersize": size, "linestyle": "none", "capsize": 3}
        ax.errorbar(x, y, yerr=half, color=colour(method), label=label, zorder=3, **style)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    seeds = len({row["seed"] for row in rows})
    ax.set(xlabel="parameters (log scale)", ylabel=f"{metric.on} {metric.name}{metric.unit}")
    ax.set_title(f"{rows[0]['recipe']}: means of {seeds} seeds, 95 % intervals", loc="left", fontsize=11)
    ax.legend(loc="lower right", frameon=False)
    _of(figure, rows)
    FigureCanvasAgg(figure).print_png(path)


def interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean (Student's t); 0 for fewer than three values."""
    if len(values) < 3:
        return 0.0
    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


def _by_method(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that came to something, by method."""
    fine = [row for row in rows if "error" not in row]
    return {name: [row for row in fine if row["method"] == name] for name in dict.fromkeys(r["method"] for r in fine)}


def shown_range(rows: Sequence[dict[str, Any]], metric: Metric) -> tuple[float, float]:
    """Scores that are shown: as far from the networks that always stand there as these are apart, twice."""
    usual = ("dense", "uniform", "direct", "default", "l1")
    scores = [r[metric.name] for r in rows if "error" not in r and r["method"].partition(" ")[0] in usual]
    if not scores:
        return -math.inf, math.inf
    room = 2 * (max(scores) - min(scores)) + 0.02 * max(scores)
    return min(scores) - room, max(scores) + room


def _point(ax: Axes, groups: Sequence[Sequence[dict[str, Any]]], part: str, whole: str, score: str, label: str) -> None:
    """One point for every group of rows, joined by a line."""
    points = sorted(
        (
            mean(row[part] / row[whole] for row in rows),
            mean(row[score] for row in rows),
            stdev(row[score] for row in rows) if len(rows) > 1 else 0.0,
        )
        for rows in groups
    )
    x, y, spread = zip(*points, strict=True)
    known = label in ("default", *COLOURS)  # variants of the default share its family, told apart by their own colours
    style: dict[str, Any] = {"color": colour(label)} if known else {}
    ax.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=textwrap.fill(label, 60), **style)
