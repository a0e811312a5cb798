"""What the tables of docs/results.md are laid out with."""

import statistics
from typing import Any

Row = dict[str, Any]


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and, with more than one value, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def grid(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine(found: list[Row], field: str = "environment") -> str:
    """Where rows were measured; `field` is where they say it."""
    seen = {
        f"{e['cpu']}, {e['cores']} cores, {e['threads']} thread(s), torch {e['torch']}"
        for e in (row[field] for row in found)
    }
    return "; ".join(sorted(seen))
