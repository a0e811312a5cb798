"""Pictures of a run, drawn from the files in its folder alone."""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from torchgrow.lab.metrics import Metric, metric_of

COLOURS = {
    "dense": "#7f7f7f",
    "uniform": "#e07b00",
    "grown": "#1f6fd0",
    "before": "#7f7f7f",
    "shrunk": "#1f6fd0",
    "direct": "#2a9d5c",
    "trial": "#b0bec5",
    "searched": "#1f6fd0",
    "paper": "#8e44ad",
    "l1": "#c0392b",
}
"""One colour a method, in every picture."""

_LINES = ("-", "--", ":", "-.")
_LEGEND = {
    "uniform": "uniform: every width narrowed by one factor",
    "direct": "direct: the grown structure, from scratch",
}


def label(network: str) -> str:
    """What a network of a run is called in tables and pictures."""
    return network.replace("=", " ")


def colour(network: str) -> str:
    """The colour of a network or method; ways to grow have that of "grown"."""
    kind = network.partition("=")[0].partition(":")[0].partition(" ")[0].removesuffix("-flops")
    return COLOURS.get(kind, COLOURS["grown"])


def draw(folder: Path) -> list[str]:
    """Draw the pictures of a run into its folder.

    ``size.png`` has what every network came to against its parameters, ``cost.png`` the cost by epoch,
    ``accuracy.png`` (or ``perplexity.png``) the score by epoch and by training cost, ``widths.png`` the width of every
    group, and the blocks of every stage, after every update of a network that grows.

    Args:
        folder: holds ``metrics.jsonl``, ``results.json`` and ``frame.json`` as `torchgrow.lab.run.run` writes them.

    Returns:
        the names of the files.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    frame = json.loads((folder / "frame.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    metric = metric_of(records[0])
    if config.get("search", {}).get("validate"):
        metric = replace(metric, on="held-out")
    figures = {
        **({"size.png": _sizes(results, metric)} if len(results) > 1 else {}),
        "cost.png": _cost(records, frame),
        f"{metric.name}.png": _scores(records, metric, results.get("before", {}).get(metric.name)),
        **({"widths.png": _widths(records, frame)} if any(record["updates"] for record in records) else {}),
    }
    for name, figure in figures.items():
        if config:
            say_of(figure, config["name"], [config["budget"]], [config["seed"]])
        FigureCanvasAgg(figure).print_png(folder / name)
    return list(figures)


def say_of(figure: Figure, recipe: str, budgets: Iterable[str | None], seeds: Iterable[int]) -> None:
    """Write below a picture what it is of: it may be seen without the page, or the folder, that it stands in."""
    known, numbers = [budget for budget in dict.fromkeys(budgets) if budget], sorted(set(seeds))
    row = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    listed = f"{numbers[0]} to {numbers[-1]}" if row else ", ".join(map(str, numbers))
    text = [recipe, *([", ".join(known)] if known else []), f"seed{'s' * (len(numbers) > 1)} {listed}"]
    figure.supxlabel(textwrap.fill("; ".join(text), int(11 * figure.get_figwidth())), fontsize=7)


def _curves(records: list[dict[str, Any]]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(record["network"] for record in records)
    for network in sorted(names, key=lambda name: (list(COLOURS).index(name.partition("=")[0]), name)):
        yield network, [record for record in records if record["network"] == network]


def _style(network: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Colour, line and label of a network's curve; several uniform ones differ by their lines."""
    kind = network.partition("=")[0]
    alike = [name for name in dict.fromkeys(r["network"] for r in records) if name.partition("=")[0] == kind]
    line = _LINES[alike.index(network) % len(_LINES)]
    return {"color": colour(network), "linestyle": line, "label": label(network)}


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
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)


def _sizes(results: dict[str, dict[str, Any]], metric: Metric) -> Figure:
    """What every network came to against its parameters: up and to the left is better."""
    figure = Figure(figsize=(6.7, 4.4), dpi=120, layout="constrained")
    ax = figure.add_subplot()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    narrowed = sorted((r["params"], r[metric.name]) for n, r in results.items() if n.partition("=")[0] == "uniform")
    dense = [(r["params"], r[metric.name]) for n, r in results.items() if n == "dense"]
    begun = [(results[n]["params"], results[n][metric.name]) for n in ("before", "shrunk") if n in results]
    if len(narrowed) + len(dense) > 1:
        ax.plot(*zip(*narrowed, *dense, strict=True), color=COLOURS["uniform"], linewidth=1.2, zorder=1)
    if begun:
        ax.plot(*zip(*begun, strict=True), color=COLOURS["shrunk"], linewidth=1.2, linestyle=":", zorder=1)
    markers = {"dense": ("s", 60), "uniform": ("o", 50), "direct": ("D", 60), "grown": ("*", 260)}
    markers |= {"before": ("s", 60), "shrunk": ("*", 260), "searched": ("*", 260)}
    seen = set[str]()
    for network, result in results.items():
        kind = network.partition("=")[0]
        marker, area = markers[kind]
        name = _LEGEND.get(kind, kind)
        points = ax.scatter(result["params"], result[metric.name], s=area, marker=marker, color=colour(kind), zorder=3)
        if kind not in seen:
            points.set_label(name)
        seen.add(kind)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    unit = metric.unit.strip()
    ax.set(xlabel="parameters (log scale)", ylabel=f"{metric.name}{f', {unit}' if unit else ''}")
    ax.set_title(f"{metric.on.capitalize()} {metric.name} against size, one seed", loc="left")
    ax.legend(loc="best", frameon=False)
    return figure


def _cost(records: list[dict[str, Any]], frame: dict[str, Any]) -> Figure:
    figure, axes = _axes(2)
    titles = {"flops": "FLOPs of one sample (2 x MACs)", "params": "Parameters"}
    for ax, (field, title) in zip(axes, titles.items(), strict=True):
        for network, rows in _curves(records):
            # What grows is known after every update, what does not grow by its first epoch.
            points = [update for row in rows for update in row["updates"]] or [
                {"epochs": rows[-1]["epoch"], **rows[-1]}
            ]
            edges = [0.0, *(point["epochs"] for point in points)]
            ax.stairs([point[field] for point in points], edges, baseline=None, **_style(network, records))
        if frame["limits"][field]:
            ax.axhline(frame["limits"][field], color="tab:red", linestyle=":", label="budget")
        ax.set(title=title, xlabel="epochs trained")
        ax.set_ylim(0, 1.05 * max(frame[field], *(record[field] for record in records)))
        ax.yaxis.set_major_formatter(EngFormatter())
    _legend(figure, axes[0] if frame["limits"]["flops"] else axes[1])  # one that shows the budget
    return figure


def _scores(records: list[dict[str, Any]], metric: Metric, before: float | None) -> Figure:
    figure, (by_epoch, by_flops) = _axes(2)
    for network, rows in _curves(records):
        scores = [row[metric.name] for row in rows]
        for ax, field in ((by_epoch, "epoch"), (by_flops, "training_flops")):
            ax.plot([row[field] for row in rows], scores, **_style(network, records))
    if before is not None:
        for ax in (by_epoch, by_flops):
            ax.axhline(before, color=COLOURS["before"], linestyle="--", label="before")
    title = f"{metric.on.capitalize()} {metric.name}"
    label = ", ".join(filter(None, (metric.name, metric.unit.strip())))
    by_epoch.set(title=f"{title} by epoch", xlabel="epoch", ylabel=label)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_flops.set(title=f"{title} by training cost", xlabel="training FLOPs so far", ylabel=label)
    for ax in (by_epoch, by_flops):
        # The first epochs would squeeze the rest, in which networks differ, into a few pixels.
        scores = [*(record[metric.name] for record in records), *([] if before is None else [before])]
        ax.set_ylim(*span(scores, metric))
    by_flops.xaxis.set_major_formatter(EngFormatter())
    _legend(figure, by_epoch)
    return figure


def span(scores: list[float], metric: Metric) -> tuple[float, float]:
    """From where to where an axis of scores goes, so that the last ones can be told apart."""
    middle = sorted(scores)[len(scores) // 2]
    if metric.lower_is_better:
        best = min(scores)
        return 0.95 * best, min(1.05 * max(scores), best + 4 * (middle - best) + 0.1 * best)
    best = max(scores)
    low = max(min(scores), best - 4 * (best - middle) - 10)
    return low - 1, min(100.5, best + 1)


def _widths(records: list[dict[str, Any]], frame: dict[str, Any]) -> Figure:
    """Live units of every group, and live blocks of every stage, after every update, on a scale fitted to them."""
    grown = ("grown", "shrunk")
    rows = [update for record in records if record["network"] in grown for update in record["updates"]]
    full = _live({"widths": frame["widths"], "depths": frame["blocks"]})
    live = [_live(row) for row in rows]
    shares = [[100 * row.get(group, 0) / count for row in live] for group, count in full.items()]
    figure = Figure(figsize=(9, 1.8 + 0.26 * len(full)), dpi=120, layout="constrained")
    ax = figure.add_subplot()
    edges = [0.0, *(row["epochs"] for row in rows)]
    image = ax.pcolormesh(edges, range(len(full) + 1), shares, vmin=0, vmax=max(map(max, shares)), cmap="viridis")
    ax.invert_yaxis()
    places = [place + 0.5 for place in range(len(full))]
    ax.set_yticks(places, list(full))
    ax.set_title("Width of every group after each update (right: in the end, of full width)", loc="left")
    ax.set(xlabel="epochs trained")
    final = ax.secondary_yaxis("right")
    final.set_yticks(places, [f"{live[-1].get(group, 0)} of {count}" for group, count in full.items()])
    final.tick_params(length=0)
    figure.colorbar(image, label="% of full width", pad=0.02)
    return figure


def _live(structure: dict[str, Any]) -> dict[str, int]:
    """Units by group and blocks by stage; a group of a single layer is counted among its stage's blocks."""
    groups = {name: count for name, count in structure["widths"].items() if not name.endswith(" (layer)")}
    return {**groups, **{f"{stage or 'layers'} (blocks)": count for stage, count in structure["depths"].items()}}
