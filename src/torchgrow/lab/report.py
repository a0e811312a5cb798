"""Pictures of a run, drawn from the files in its folder alone."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from torchgrow.lab.metrics import Metric, metric_of

COLOURS = {"dense": "0.55", "uniform": "tab:orange", "grown": "tab:blue"}
LABELS = {"dense": "dense twin", "uniform": "uniform twin", "grown": "grown"}


def draw(folder: Path) -> list[str]:
    """Draw ``cost.png``, ``accuracy.png`` (or ``perplexity.png``) and ``widths.png`` into a run folder.

    Args:
        folder: holds ``metrics.jsonl`` and ``frame.json`` as `torchgrow.lab.run.run` writes them.

    Returns:
        the names of the files.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    frame = json.loads((folder / "frame.json").read_text())
    metric = metric_of(records[0])
    figures = {
        "cost.png": _cost(records, frame),
        f"{metric.name}.png": _scores(records, metric),
        "widths.png": _widths(records, frame),
    }
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_png(folder / name)
    return list(figures)


def _curves(records: list[dict[str, Any]]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    for network in COLOURS:
        rows = [record for record in records if record["network"] == network]
        if rows:
            yield network, rows


def _axes(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * columns, 4), dpi=120, layout="constrained")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, ax: Axes) -> None:
    """One legend under all axes, with the entries of ``ax``."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _cost(records: list[dict[str, Any]], frame: dict[str, Any]) -> Figure:
    figure, axes = _axes(2)
    titles = {"flops": "FLOPs of one sample (2 x MACs)", "params": "Parameters"}
    for ax, (field, title) in zip(axes, titles.items(), strict=True):
        for network, rows in _curves(records):
            ax.step(
                [row["epoch"] for row in rows],
                [row[field] for row in rows],
                where="mid",
                color=COLOURS[network],
                label=LABELS[network],
            )
        if frame["limits"][field]:
            ax.axhline(frame["limits"][field], color="tab:red", linestyle=":", label="budget")
        ax.set(title=title, xlabel="epoch")
        ax.set_ylim(0, 1.05 * max(frame[field], *(record[field] for record in records)))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter(EngFormatter())
    _legend(figure, axes[0] if frame["limits"]["flops"] else axes[1])  # one that shows the budget
    return figure


def _scores(records: list[dict[str, Any]], metric: Metric) -> Figure:
    figure, (by_epoch, by_flops) = _axes(2)
    for network, rows in _curves(records):
        scores = [row[metric.name] for row in rows]
        for ax, field in ((by_epoch, "epoch"), (by_flops, "training_flops")):
            ax.plot([row[field] for row in rows], scores, color=COLOURS[network], label=LABELS[network])
    title = f"{metric.on.capitalize()} {metric.name}"
    label = ", ".join(filter(None, (metric.name, metric.unit.strip())))
    by_epoch.set(title=f"{title} by epoch", xlabel="epoch", ylabel=label)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_flops.set(title=f"{title} by training cost", xlabel="training FLOPs so far", ylabel=label)
    for ax in (by_epoch, by_flops):
        # The first epochs would squeeze the rest, in which networks differ, into a few pixels.
        scores = [record[metric.name] for record in records]
        ax.set_ylim(*(_span_of_perplexity(scores) if metric.lower_is_better else _span(scores)))
    by_flops.xaxis.set_major_formatter(EngFormatter())
    _legend(figure, by_epoch)
    return figure


def _span(accuracy: list[float]) -> tuple[float, float]:
    best = max(accuracy)
    low = max(min(accuracy), best - 4 * (best - sorted(accuracy)[len(accuracy) // 2]) - 10)
    return low - 1, min(100.5, best + 1)


def _span_of_perplexity(perplexity: list[float]) -> tuple[float, float]:
    best, middle = min(perplexity), sorted(perplexity)[len(perplexity) // 2]
    return 0.95 * best, min(1.05 * max(perplexity), best + 4 * (middle - best) + 0.1 * best)


def _widths(records: list[dict[str, Any]], frame: dict[str, Any]) -> Figure:
    rows = [record for record in records if record["network"] == "grown"]
    groups = list(frame["widths"])
    full = frame["widths"]
    shares = [[100 * row["widths"].get(group, 0) / full[group] for row in rows] for group in groups]
    figure = Figure(figsize=(9, 1.6 + 0.26 * len(groups)), dpi=120, layout="constrained")
    ax = figure.add_subplot()
    span = (rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5, len(groups) - 0.5, -0.5)
    image = ax.imshow(shares, aspect="auto", extent=span, vmin=0, vmax=100, cmap="viridis", interpolation="none")
    ax.set_yticks(range(len(groups)), groups)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title="Live units of every layer over time (right: in the end, of full width)", xlabel="epoch")
    final = ax.secondary_yaxis("right")
    final.set_yticks(range(len(groups)), [f"{rows[-1]['widths'].get(g, 0)} of {full[g]}" for g in groups])
    final.tick_params(length=0)
    figure.colorbar(image, label="% of full width", pad=0.02)
    return figure
