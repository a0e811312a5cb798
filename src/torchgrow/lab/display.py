"""What a run shows while it trains: a live panel in a terminal, one line per epoch anywhere else."""

from collections.abc import Mapping
from types import TracebackType

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchgrow import Cost
from torchgrow.lab.metrics import metric_of
from torchgrow.lab.train import Epoch

_BAR = 36  # characters
_MOST_GROUPS = 24  # rows of the widths chart; a taller panel than the terminal would flicker


def short(number: float) -> str:
    """A count in three digits at most: 987, 37.9k, 1.5M, 2.31G; 999,987 is 1M."""
    number = float(f"{number:.3g}")  # first, for it may come to the next unit
    for factor, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def span(seconds: float) -> str:
    """A time in one or two units: 40 s, 3 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def epoch_line(record: Epoch, epochs: int, left: float) -> str:
    """What an epoch came to, for where there is no terminal.

    Args:
        record: of the epoch.
        epochs: how many there will be.
        left: seconds until all is done, as far as one can tell.
    """
    return (
        f"epoch {record.epoch:>3}/{epochs}  loss {record.loss:.3f}  {_score(record)}  {short(record.params)} parameters"
        f"  {short(record.flops)} FLOPs  {record.seconds:.1f} s" + (f"  about {span(left)} left" if left else "")
    )


def _score(record: Epoch) -> str:
    """What the network is judged by, with its name."""
    metric = metric_of(vars(record))
    return f"{metric.name} {metric.show(getattr(record, metric.name))}"


class Display:
    """Shows one network after another. Use as a context manager around the whole run.

    Args:
        console: where to; a live panel is drawn only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._network = ""
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def start(
        self, network: str, *, epochs: int, frame: Cost, limits: Mapping[str, int | None], full: dict[str, int]
    ) -> None:
        """Begin a network.

        Args:
            network: its name.
            epochs: how many it will train.
            frame: cost of the dense network.
            limits: the budget in absolute numbers, by ``params`` and ``flops``; none where there is no limit.
            full: units of every group at full width; empty for a network that does not grow.
        """
        self._network, self._epochs, self._frame, self._limits, self._full = network, epochs, frame, limits, full
        self._under_way, self._steps = 1, (0, 1)
        self._last: Epoch | None = None

    def step(self, epoch: int, done: int, total: int) -> None:
        """Note the progress within an epoch (counted from 1), in steps."""
        self._under_way, self._steps = epoch, (done, total)

    def epoch(self, record: Epoch) -> None:
        """Note a finished epoch."""
        self._last, self._under_way, self._steps = record, record.epoch + 1, (0, self._steps[1])
        if not self.console.is_terminal:
            left = record.seconds / record.epoch * (self._epochs - record.epoch)
            self.console.print(f"{record.network:<12}{epoch_line(record, self._epochs, left)}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line that stays, above the panel."""
        self.console.print(text, soft_wrap=True)

    def render(self) -> RenderableType:
        """What the panel shows now."""
        if not self._network:
            return ""
        head = Table.grid(padding=(0, 2))
        status = f"{_score(self._last)}  loss {self._last.loss:.3f}" if self._last else ""
        head.add_row(
            Text(self._network, style="bold"),
            f"epoch {min(self._under_way, self._epochs)}/{self._epochs}",
            ProgressBar(total=self._steps[1], completed=self._steps[0], width=_BAR),
            status,
        )
        if self._last is None:
            return head
        return Group(head, self._sizes(self._last), *([self._widths(self._last)] if self._full else []))

    def _sizes(self, record: Epoch) -> Table:
        """Parameters and FLOPs, as bars against the budget where there is one, else against the frame."""
        table = Table.grid(padding=(0, 2))
        for field, label in (("params", "parameters"), ("flops", "FLOPs")):
            now, frame, limit = getattr(record, field), getattr(self._frame, field), self._limits.get(field)
            against = limit or frame
            style = "yellow" if now > against else "green" if limit else "bright_black"
            table.add_row(
                label,
                Bar(against, 0, min(now, against), width=_BAR, color=style, bgcolor="grey23"),
                f"{short(now)} of {short(against)} {'budget' if limit else 'dense'}",
                f"{100 * now / frame:.1f} % of dense",
            )
        return table

    def _widths(self, record: Epoch) -> Table:
        """Live units of every group against its full width."""
        table = Table.grid(padding=(0, 2))
        most = max(self._full.values())
        for group, full in list(self._full.items())[:_MOST_GROUPS]:
            now = record.widths.get(group, 0)
            # A group's track is as long as its share of the widest group, so that shapes can be compared.
            track = max(1, round(_BAR * full / most))
            table.add_row(
                Text(group, style="bright_black"),
                Bar(full, 0, now, width=track, color="cyan", bgcolor="grey23"),
                f"{now}/{full}",
            )
        if len(self._full) > _MOST_GROUPS:
            table.add_row(Text(f"and {len(self._full) - _MOST_GROUPS} more groups", style="bright_black"))
        return table
