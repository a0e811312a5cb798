"""The page: one HTML file from rows, which asks nothing of the network, and its pictures as files beside it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from torchgrow import TorchgrowError
from torchgrow.lab.checkpoints import write_whole
from torchgrow.lab.display import short, span
from torchgrow.lab.evidence.drawing import themes
from torchgrow.lab.evidence.pictures import PICTURES, Picture
from torchgrow.lab.evidence.rows import Task, grows, in_words, read
from torchgrow.lab.evidence.verdict import scored, verdicts
from torchgrow.lab.names import FIXED, SYSTEMS
from torchgrow.lab.pages import Row, gap
from torchgrow.lab.report import say_of

HERE = Path(__file__).parent
_TOLD = ("name", "model", "model_arguments", "dataset", "samples", "method", "budget", "seed", "growing", "system")
"""Settings that stand elsewhere on the page."""


@dataclass(frozen=True)
class Shown:
    """Panels of one picture, as SVG.

    Attributes:
        picture: what they show.
        panels: (SVG, whether it is wide, name of its files).
    """

    picture: Picture
    panels: list[tuple[Markup, bool, str]]


def write(sources: Sequence[Path], out: Path) -> list[str]:
    """Write the page and, into the folder ``NAME-pictures`` beside it, every picture as SVG and PNG.

    Args:
        sources: as for `torchgrow.lab.evidence.rows.read`.
        out: the page, ``report.html``.

    Returns:
        titles of the pictures that these rows have no data for, with the commands that make them.

    Raises:
        TorchgrowError: there is nothing to read, it is damaged, or the page cannot be written there.
    """
    found = read(sources)
    if not found:
        raise TorchgrowError(
            f"{', '.join(map(str, sources))}: no rows in it yet; torchgrow compare adds one as each network ends"
        )
    tasks = sorted((task for task in found if task.fine), key=_rank)
    if not tasks:
        raise TorchgrowError(
            f"{', '.join(map(str, sources))}: no network came to a result, so there is nothing to show; the "
            'rows say why ("error"); mend that, take these rows out, and give torchgrow compare again'
        )
    folder = _folder_of(out)
    console = Console(stderr=True)
    each = track(tasks, "drawing", console=console, transient=True, disable=not console.is_terminal)
    parts = [_part(number, task, folder) for number, task in enumerate(each, start=1)]
    seen = {shown.picture.name for part in parts for shown in part["shown"] + part["folded"]}
    absent = [picture for picture in PICTURES if picture.name not in seen]
    light, dark = themes()
    loader = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = loader.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        light=Markup(light),
        dark=Markup(dark),
        parts=parts,
        absent=absent,
        sources=[str(source) for source in sources],
        networks=sum(len(task.fine) for task in tasks),
        version=version("torchgrow"),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        words={**FIXED, **SYSTEMS},
    )
    write_whole(out, text)
    return [f"{picture.title} ({picture.of_paper}): {picture.command}" for picture in absent]


def pictures_of(page: Path) -> Path:
    """The folder of its pictures: with a name of its own, since a page is often called as the run it shows."""
    return page.with_name(f"{page.stem}-pictures")


def _folder_of(page: Path) -> Path:
    """The folder of its pictures, made; nothing was drawn yet."""
    folder = pictures_of(page)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TorchgrowError(
            f"{page} cannot be written there ({error.strerror}: {error.filename}); name a file in a folder of yours: "
            "--out report.html"
        ) from None
    return folder


def _rank(task: Task) -> tuple[bool, bool, int]:
    """What was grown and judged by test data comes first, and of that what has most networks."""
    return not any(map(grows, task.fine)), bool(task.config.get("validate")), -len(task.fine)


def _part(number: int, task: Task, folder: Path) -> dict[str, Any]:
    """All that the page says of one setting."""
    budgets = task.budgets()
    grown = [budget for budget, part in budgets.items() if any(map(grows, part.fine))] or list(budgets)[:1]
    shown, folded = list[Shown](), list[Shown]()
    for picture in PICTURES:
        if picture.all_budgets:
            shown.append(panels_of(picture, task, f"t{number}", folder))
            continue
        for place, budget in enumerate(grown):
            one = panels_of(picture, budgets[budget], f"t{number}-b{place}", folder)
            (folded if place else shown).append(one)
    return {
        "number": number,
        "task": task,
        "metric": f"{task.metric.name}{task.metric.unit}",
        "verdicts": verdicts(task),
        "headline": _headline(budgets, grown[0]),
        "heads": _heads(task),
        "table": table_lines(task),
        "main_budget": "" if grown[0] == "none" else in_words(grown[0]),
        "shown": [one for one in shown if one.panels],
        "folded": [one for one in folded if one.panels],
        "other_budgets": ", ".join(map(in_words, grown[1:])),
        "settings": {key: value for key, value in task.config.items() if key not in _TOLD},
        "arguments": task.config["model_arguments"],
        "machines": _machines(task.rows),
        "growing": {r["method"]: r["config"]["growing"] for r in task.rows if "growing" in r["config"]},
        "failed": [
            f"{r['method']}, seed {r['seed']}: {r.get('error', 'its score is not finite')}"
            for r in task.rows
            if not any(r is one for one in task.fine)
        ],
        "sources": sorted({row["source"] for row in task.rows if "source" in row}),
    }


def _headline(budgets: dict[str, Task], budget: str) -> str:
    """What networks of one budget came to, and of which, where there are several."""
    part = budgets[budget]
    scores = "; ".join(f"{method} {scored(part, rows)}" for method, rows in list(part.methods().items())[:4])
    return f"{scores} ({in_words(budget)})" if len(budgets) > 1 else scores


def panels_of(picture: Picture, task: Task, prefix: str, folder: Path) -> Shown:
    """A picture of a task, its panels written to the folder."""
    panels = []
    for number, panel in enumerate(picture.draw(task), start=1):
        name = f"{prefix}-{picture.name}-{number}"
        say_of(panel.figure, task.name, [row["budget"] for row in task.fine], [row["seed"] for row in task.fine])
        panel.write(folder / name)
        panels.append((Markup(panel.svg(name, picture.caption)), panel.wide, f"{folder.name}/{name}"))
    return Shown(picture, panels)


def _heads(task: Task) -> list[str]:
    text = ["test perplexity"] if any("test_perplexity" in row for row in task.fine) else []
    unit = task.metric.unit.strip() or task.metric.name
    beside = f"minus uniform, {unit} (± 95 % interval; of two seeds: both)"
    costs = ["parameters", "of dense", "FLOPs of dense", "training FLOPs of dense", "seconds"]
    return ["method", "n", f"{task.metric.name}{task.metric.unit}", *text, beside, *costs]


def table_lines(task: Task) -> list[tuple[str, list[list[str]]]]:
    """Lines of the table by budget; the dense network stands in each."""
    text, found = any("test_perplexity" in row for row in task.fine), []
    for budget, part in task.budgets().items():
        lines = []
        for method, rows in part.methods().items():
            spent = [r["train_flops"] / r["dense_train_flops"] for r in rows if r["train_flops"] is not None]
            seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
            lines.append(
                [
                    method,
                    str(len(rows)),
                    _spread([row[task.metric.name] for row in rows]),
                    *([_spread([row["test_perplexity"] for row in rows if "test_perplexity" in row])] * text),
                    "" if method == "uniform" else gap(part.fine, method, "uniform"),
                    short(mean(row["params"] for row in rows)),
                    f"{100 * mean(row['params'] / row['dense_params'] for row in rows):.1f} %",
                    f"{100 * mean(row['flops'] / row['dense_flops'] for row in rows):.1f} %",
                    f"{100 * mean(spent):.0f} %" if spent else "",
                    span(mean(seconds)) if seconds else "",
                ]
            )
        found.append(("" if budget == "none" else in_words(budget), lines))
    return found


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _machines(rows: list[Row]) -> list[str]:
    seen = set()
    for row in rows:
        e = row.get("versions") or {}
        device = e.get("device") or e.get("cpu")
        commit = re.sub(r"^(\w{10})\w*", r"\1", e.get("commit") or "unknown")
        versions = (
            f"torch {e.get('torch')}, torchgrow {e.get('torchgrow')} at commit {commit}, Python {e.get('python')}"
        )
        seen.add(f"{device}, {e.get('cores')} cores, {e.get('threads')} thread(s); {versions}")
    return sorted(seen)
