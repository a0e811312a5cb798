"""Tables that can be read in a narrow terminal."""

import copy
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

READABLE = 2
"""Columns that always stay: what a line is of, and its first value."""
EDGES, BETWEEN = 1, 2
"""Blanks beside the table, and beside each column."""


class Fitted(Table):
    """A table whose cells fold at spaces where it is narrow; where words do not fit, columns go, the last one first.

    Args:
        settings: as for `rich.table.Table`; the look is that of all tables here.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **settings)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table within the width that there is; below it stands what is left out."""
        room, shown = options.max_width - EDGES, copy.copy(self)
        sizes = [self._size(console, options, column) for column in self.columns]
        if sum(most + BETWEEN for _, most in sizes) > room:
            count = len(sizes)
            while count > READABLE and sum(least + BETWEEN for least, _ in sizes[:count]) > room:
                count -= 1
            widths, free = (
                [least for least, _ in sizes[:count]],
                room - sum(least + BETWEEN for least, _ in sizes[:count]),
            )
            for at in range(count):  # the first ones are what a line is of
                more = max(0, min(free, sizes[at][1] - widths[at]))
                widths[at], free = widths[at] + more, free - more
            shown.columns = [copy.copy(column) for column in self.columns[:count]]
            for column, width in zip(shown.columns, widths, strict=True):
                column.width, column.no_wrap, column.overflow = width, False, "fold"
            gone = [" ".join(str(column.header).split()) for column in self.columns[count:]]
            if gone:
                said = f"not shown for want of room: {', '.join(gone)}"
                shown.caption = f"{self.caption}\n{said}" if self.caption else said
                shown.caption_justify, shown.caption_style = "left", ""
        yield from Table.__rich_console__(shown, console, options)

    def _size(self, console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
        """Characters of the longest word and of the longest line, the head with them."""
        wide = options.update(max_width=10_000)
        sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        return max(size.minimum for size in sizes), max(size.maximum for size in sizes)
