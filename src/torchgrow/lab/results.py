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
from rich import box
from rich.table import Table
from scipy.stats import t as student

from torchgrow.lab.display import short
from torchgrow.lab.metrics import metric_of

SHARES = {"flops": "dense_flops", "train_flops": "dense_train_flops", "seconds": "dense_seconds"}
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
    return gaps, float(student.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))


def by_budget(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by budget; the dense network, which has none, belongs to each."""
    budgets = dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None) or {"none": None}
    return {budget: [row for row in rows if row["budget"] in (None, budget)] for budget in budgets}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One a budget: mean and standard deviation over seeds, and shares of the dense network."""
    metric = metric_of(next((row for row in rows if "error" not in row), {}))
    grids = []
    for budget, all_of in by_budget(rows).items():
        grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=budget, title_justify="left")
        heads = (metric.name, "minus uniform\n(95 % interval)", "parameters", "FLOPs", "training\nFLOPs", "seconds")
        grid.add_column("method")
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
            gap += f" ± {half:.2f}" if gap and half == half else ""
            shares = [short(mean(row["params"] for row in fine))]
            for part, whole in SHARES.items():
                known = [row[part] / row[whole] for row in fine if row[whole]]
                shares.append(f"{100 * mean(known):.0f} %" if known else "")
            grid.add_row(method, str(len(fine)), f"{mean(scores):.2f}{spread}", gap, *shares)
        grids.append(grid)
    return grids


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


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A picture: the plane of score against all training cost for every budget, and the score along the budgets.

    The plane is one panel a budget; where there are several budgets of a kind, one panel more has a line for every
    method, against what its networks cost. Means over seeds, with their standard deviations.
    """
    budgets, along = {budget: some for budget, some in by_budget(rows).items() if some}, sweeps(rows)
    metric = metric_of(next((row for row in rows if "error" not in row), {}))
    panels = len(budgets) + len(along)
    columns = min(3, panels)
    height = 4 + 0.2 * len(_by_method(rows))  # the legends are below
    figure = Figure(figsize=(5.5 * columns, height * math.ceil(panels / columns)), dpi=120, layout="constrained")
    axes = [figure.add_subplot(math.ceil(panels / columns), columns, number + 1) for number in range(panels)]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylabel(f"{metric.name}{metric.unit}")
    for ax, (budget, some) in zip(axes, budgets.items(), strict=False):
        ax.set(title=budget, xlabel="training FLOPs / dense (all of them)")
        for method, fine in _by_method(some).items():
            _point(ax, [fine], "train_flops", "dense_train_flops", metric.name, method)
    for ax, (kind, some) in zip(axes[len(budgets) :], along.items(), strict=True):
        ax.set(title=f"by {kind}", xlabel=f"{kind} / dense")
        for method, fine in _by_method(some).items():
            _point(ax, list(by_budget(fine).values()), kind, f"dense_{kind}", metric.name, method)
    for ax in axes:
        if ax.containers:
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.15), fontsize=7, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _by_method(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that came to something, by method."""
    fine = [row for row in rows if "error" not in row]
    return {name: [row for row in fine if row["method"] == name] for name in dict.fromkeys(r["method"] for r in fine)}


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
    ax.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=textwrap.fill(label, 90))
