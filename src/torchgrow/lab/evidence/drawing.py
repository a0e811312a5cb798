"""What every picture of the page shares: one panel an axis, its colours, its legend, and its SVG for light and dark."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import StringIO
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from torchgrow.lab.display import short
from torchgrow.lab.report import COLOURS, colour
from torchgrow.lab.results import VARIANTS

INK, RULE = "#24292f", "#d7dde3"
"""Of text and of grid lines; on the page they follow its theme."""
PALETTE = tuple(dict.fromkeys([*COLOURS.values(), *VARIANTS]))
NOT_SHOWN = "not shown"
"""In labels of what lies far outside."""
WIDTH = 4.4  # inches; on a narrow screen a panel is about as wide as drawn, so its text can be read there
_LINES, _MARKERS = ("-", "--", "-.", ":"), "^vPXph8<>d"
_KNOWN_MARKERS = {"dense": "s", "uniform": "o", "direct": "D", "default": "*"}
SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: small, sharp, and read out aloud
    "svg.hashsalt": "torchgrow",  # the same picture is the same file
    "text.color": INK,
    "text.parse_math": False,  # a name may have any letters
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: what it shows, in a few words.
        figure: of one axis.
        wide: whether it needs the whole width of the page.
    """

    title: str
    figure: Figure
    wide: bool = False

    def svg(self, name: str, caption: str) -> str:
        """To stand within a page: its colours follow the page's theme, its ids are its own.

        Args:
            name: of letters, digits and hyphens, as no other picture of the page has it.
            caption: what a screen reader says beside the title.
        """
        text = self._drawn
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(
            r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-labelledby="{name}-title {name}-desc"', text, count=1
        )
        text = re.sub(r'\bid="', f'id="{name}-', text)
        text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
        text = text.replace(INK, "currentColor").replace(RULE, "var(--rule)")
        for one in PALETTE:
            text = text.replace(one, f"var(--c{one[1:]})")
        told = f'<title id="{name}-title">{escape(self.title)}</title><desc id="{name}-desc">{escape(caption)}</desc>'
        return text.replace(">", f">{told}", 1)

    def write(self, path: Path) -> None:
        """As files of its own, ``path.svg`` and ``path.png``, on white."""
        path.with_suffix(".svg").write_text(self._drawn, encoding="utf-8")
        with mpl.rc_context(SETTINGS):
            self.figure.set_facecolor("white")
            self.figure.set_dpi(150)
            FigureCanvasAgg(self.figure).print_png(path.with_suffix(".png"))

    @cached_property
    def _drawn(self) -> str:
        text = StringIO()
        with mpl.rc_context(SETTINGS):
            self.figure.set_facecolor("none")
            FigureCanvasSVG(self.figure).print_svg(text, metadata={"Date": None})
        self.figure.set_layout_engine("none")  # it has been laid out, which takes most of the time
        return text.getvalue()


def themes() -> tuple[str, str]:
    """Style rules that give the palette its colours on a light page, and on a dark one."""
    light = "".join(f"--c{one[1:]}:{one};" for one in PALETTE)
    dark = "".join(f"--c{one[1:]}:{_lighter(one)};" for one in PALETTE)
    return light, dark


def _lighter(shade: str) -> str:
    red, green, blue = (0.62 * part + 0.38 for part in to_rgb(shade))
    return to_hex((red, green, blue))


def styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of every method; those that a colour is known for have it on all pages."""
    found: dict[str, dict[str, Any]] = {}
    free = [one for one in VARIANTS if one not in COLOURS.values()]
    others = 0
    for method in methods:
        known = method == "default" or method in COLOURS
        shade = colour(method) if known else free[others % len(free)]
        line = "-" if known else _LINES[others // len(free) % len(_LINES)]
        marker = _KNOWN_MARKERS.get(method, _MARKERS[others % len(_MARKERS)])
        others += not known
        found[method] = {"color": shade, "linestyle": line, "marker": marker}
    return found


def axes(title: str, x: str, y: str, *, height: float = 2.9, wide: bool = False) -> tuple[Panel, Axes]:
    """A panel and its axis; height in inches, to which `legend` adds what it needs."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(2 * WIDTH + 0.3 if wide else WIDTH, height), layout="constrained")
        ax = figure.add_subplot()
        ax.set(title=textwrap.fill(title, 100 if wide else 42), xlabel=x, ylabel=y)
    return Panel(title, figure, wide), ax


def legend(panel: Panel, ax: Axes) -> None:
    """Under the axis, which keeps its height."""
    given = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda item: NOT_SHOWN in item[1])
    if not given:
        return
    handles, labels = [handle for handle, _ in given], [label for _, label in given]
    brief = max(map(len, labels)) < 27
    labels = [textwrap.fill(label, 54) for label in labels]
    columns = 2 if brief and len(labels) > 1 else 1
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    width, height = panel.figure.get_size_inches()
    panel.figure.set_size_inches(width, height + 0.17 * ceil(lines) + 0.15)
    with mpl.rc_context(SETTINGS):
        panel.figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def curve(ax: Axes, series: Mapping[float, Sequence[float]], label: str, style: Mapping[str, Any]) -> None:
    """A line through means over seeds, in a band of one standard deviation."""
    if not series:
        return  # of a network that nobody trained here
    x = sorted(series)
    y = [mean(series[at]) for at in x]
    spread = [stdev(series[at]) if len(series[at]) > 1 else 0.0 for at in x]
    ax.plot(x, y, color=style["color"], linestyle=style["linestyle"], label=label)
    if any(spread):
        low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def close(ax: Axes, dense: float, others: Sequence[float]) -> str:
    """Fit the axis to the networks that are small, where the dense one would press them flat.

    Returns:
        what to add to the dense network's label.
    """
    top = max(others, default=dense)
    ax.set_ylim(0, 1.12 * (top if dense > 3 * top else max(dense, top)))
    return f" ({short(dense)}, above)" if dense > 3 * top else ""


def counts(ax: Axes, *, x: bool = False, y: bool = False) -> None:
    """Write large numbers short: 38k, 1.5M."""
    if x:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if y:
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
