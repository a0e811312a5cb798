"""Did it work? What rows say about growing, in plain words for somebody who sees them for the first time."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

from torchgrow.lab.evidence.rows import Task, grows, in_words, limits
from torchgrow.lab.pages import Row
from torchgrow.lab.results import difference

ENOUGH = 3
"""Seeds from which on a difference has an interval worth its name."""


@dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        badge: the answer in a few words.
        kind: "good", "bad" or "open", for its colour.
        method: the way to grow that it is about.
        budget: at which.
        numbers: the scores of the networks that everybody asks for.
        sentences: what it rests on.
    """

    badge: str
    kind: str
    method: str
    budget: str
    numbers: str
    sentences: list[str]


def verdicts(task: Task) -> list[Verdict]:
    """One for every budget at which something was grown: of `default`, or the first way to grow that is there."""
    found = []
    for budget, part in task.budgets().items():
        ways = [method for method, rows in part.methods().items() if any(map(grows, rows))]
        if ways:
            found.append(_verdict(part, "default" if "default" in ways else ways[0], budget))
    return found


def scored(task: Task, rows: Iterable[Row]) -> str:
    """Mean, standard deviation where there are several, and how many."""
    values = [row[task.metric.name] for row in rows]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}{task.metric.unit} (n = {len(values)})"


def _verdict(task: Task, method: str, budget: str) -> Verdict:
    rows, others = task.methods()[method], task.methods()
    sentences = [f"{method} came to a {task.judged_on} {task.metric.name} of {scored(task, rows)}."]
    over = [row for row in rows if any(row[part] > limit for part, limit in limits(row).items())]
    size = f"{mean(row['params'] for row in rows):,.0f} parameters"
    share = f"{100 * mean(row['params'] / row['dense_params'] for row in rows):.1f} % of the dense network's"
    kept = f"{len(over)} of {len(rows)} above the budget!" if over else "all within the budget"
    sentences.append(f"It has {size}, {share}; {kept}.")
    spent = [r["train_flops"] / r["dense_train_flops"] for r in rows if r["train_flops"] is not None]
    if spent:
        sentences.append(f"Its whole training took {100 * mean(spent):.0f} % of the FLOPs of one dense training.")
    badge, kind = "nothing to compare with", "open"
    if "uniform" in others:
        badge, kind, words = _beside(task, method, "uniform", "the network narrowed by one factor to the same budget")
        sentences.append(words)
    if "direct" in others:
        sentences.append(_beside(task, method, "direct", "its own structure trained from scratch")[2])
    for other, what in (("dense", "The dense network"), ("before", "The network before it was shrunk")):
        if other in others:
            sentences.append(f"{what}: {scored(task, others[other])}.")
    names = [name for name in dict.fromkeys((method, "uniform", "direct", "dense", "before")) if name in others]
    numbers = "; ".join(f"{name} {scored(task, others[name])}" for name in names)
    return Verdict(badge, kind, method, in_words(budget), numbers, sentences)


def _beside(task: Task, method: str, other: str, what: str) -> tuple[str, str, str]:
    """Badge, its kind and a sentence about the difference, seed by seed."""
    gaps, half = difference(task.rows, method, other)
    theirs = scored(task, task.methods()[other])
    if not gaps:
        return "no seed in common", "open", f"{other}, {what}, came to {theirs}, on other seeds."
    gap = mean(gaps)
    words = f"{other}, {what}, came to {theirs}: a difference of {gap:+.2f}"
    if len(gaps) < ENOUGH or math.isnan(half):
        seeds = "one seed" if len(gaps) == 1 else f"{len(gaps)} seeds"
        return "too few seeds to tell", "open", f"{words}, on {seeds}, which says little."
    words += f" (95 % interval {gap - half:+.2f} to {gap + half:+.2f}, paired by seed)."
    better = -gap if task.metric.lower_is_better else gap
    if abs(gap) <= half:
        return f"no clear difference to {other}", "open", words
    return (f"better than {other}", "good", words) if better > 0 else (f"worse than {other}", "bad", words)
