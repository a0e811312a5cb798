"""Pictures of structures: a cell for every layer and epoch, and the stages they add up to."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from torchgrow.lab.evidence.drawing import SETTINGS, Panel, axes, legend
from torchgrow.lab.evidence.rows import Task, grows
from torchgrow.lab.pages import Row
from torchgrow.lab.results import VARIANTS

MOST = 4
"""Methods that are shown; the pictures are large."""
TALLEST = 60
"""Layers that are named; of more every second, third and so on."""


def widths(task: Task) -> list[Panel]:
    """Two panels for every grown method, of its first seed."""
    layers, by_stage = [], []
    for method, row in _first_of_each(task).items():
        steps, full = _course(row)
        live = {group: [step.get(group, 0) for _, step in steps] for group in full}
        known = "full_widths" in row
        shares = {g: [100 * count / full[g] for count in counts] for g, counts in live.items()}
        edges = [0.0, *(at for at, _ in steps)]
        unit = "% of full width" if known else "% of the widest it was"
        ends = [f"{counts[-1]} of {full[g]}" if known else f"{counts[-1]}" for g, counts in live.items()]
        layers.append(
            _cells(f"{method}, seed {row['seed']}: width of every layer", edges, shares, unit, ends, Normalize(0))
        )
        stages: dict[str, list[str]] = {}
        for group in full:
            stages.setdefault(group.partition(".")[0], []).append(group)
        if 1 < len(stages) <= 12:
            by_stage.append(_stages(f"{method}, seed {row['seed']}", edges, live, full, stages, unit))
    return layers + by_stage


def temperatures(task: Task) -> list[Panel]:
    """One panel for every method that has temperatures, of its first seed."""
    panels = []
    for method, row in _first_of_each(task).items():
        epochs = [epoch for epoch in row["epochs"] if epoch.get("temperature")]
        values = {
            g: [epoch["temperature"][g] for epoch in epochs] for g in (epochs[0]["temperature"] if epochs else ())
        }
        if not values or max(map(max, values.values())) <= 1:
            continue  # none rises
        edges = [epochs[0]["epoch"] - 1.0, *(float(epoch["epoch"]) for epoch in epochs)]
        ends = [f"{some[-1]:.3g}" for some in values.values()]
        title = f"{method}, seed {row['seed']}: mean temperature of every layer"
        panels.append(_cells(title, edges, values, "beta (log scale)", ends, LogNorm()))
    return panels


def _first_of_each(task: Task) -> dict[str, Row]:
    found = {method: next((row for row in rows if grows(row)), None) for method, rows in task.methods().items()}
    return dict([(method, row) for method, row in found.items() if row][:MOST])


def _course(row: Row) -> tuple[list[tuple[float, dict[str, int]]], dict[str, int]]:
    """Widths after every update (at an epoch, by group), where they are known, else after every epoch; full widths."""
    updates = [update for epoch in row["epochs"] for update in epoch.get("updates", ())]
    course = [(update["epochs"], update["widths"]) for update in updates]
    course = course or [(float(epoch["epoch"]), epoch["widths"]) for epoch in row["epochs"] if epoch["widths"]]
    names = dict.fromkeys(name for _, step in course for name in step if not name.endswith(" (layer)"))
    widest = {name: max(1, *(step.get(name, 0) for _, step in course)) for name in names}
    return course, {name: row.get("full_widths", widest).get(name, widest[name]) for name in names}


def _cells(
    title: str, edges: list[float], values: Mapping[str, list[float]], unit: str, ends: list[str], norm: Any
) -> Panel:
    """A row for every layer, a column for every step; what each came to stands on the right."""
    names = list(values)
    panel, ax = axes(title, "epoch", "", height=1.2 + 0.2 * min(len(names), TALLEST), wide=True)
    image = ax.pcolormesh(
        edges, range(len(names) + 1), list(values.values()), cmap="viridis", norm=norm, rasterized=True
    )
    ax.invert_yaxis()
    ax.grid(visible=False)
    every = -(-len(names) // TALLEST)
    places = [place + 0.5 for place in range(0, len(names), every)]
    ax.set_yticks(places, [_short(name) for name in names[::every]])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    with mpl.rc_context(SETTINGS):
        final = ax.secondary_yaxis("right")
        final.set_yticks(places, ends[::every])
        final.tick_params(length=0)
        final.spines["right"].set_visible(False)
        plain = FuncFormatter(lambda value, _: f"{value:g}")  # a logarithmic scale would write formulas
        bar = panel.figure.colorbar(image, label=unit, pad=0.02, aspect=30, format=plain)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    return panel


def _stages(
    method: str,
    edges: list[float],
    live: Mapping[str, list[int]],
    full: Mapping[str, int],
    stages: Mapping[str, list[str]],
    unit: str,
) -> Panel:
    panel, ax = axes(f"{method}: units of every stage", "epoch", unit)
    for number, (stage, groups) in enumerate(stages.items()):
        whole = sum(full[group] for group in groups)
        shares = [100 * sum(live[g][at] for g in groups) / whole for at in range(len(edges) - 1)]
        shade = VARIANTS[number % len(VARIANTS)]
        ax.stairs(shares, edges, baseline=None, label=stage, color=shade, linewidth=1.8)
    ax.set_ylim(0, None)
    ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(panel, ax)
    return panel


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
