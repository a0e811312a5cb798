"""Tables of docs/results.md on the paper's own numbers: its networks, which reading gives the rest, fewer steps."""

import math
from collections import defaultdict
from pathlib import Path

from torchgrow.lab.evidence.tables import PAPER, beside
from torchgrow.lab.pages import Row, grid, machine

SCHEDULED = ("paced", "constants as they are")
"""Rows of ResNet-20 in fewer steps and updates."""


def distance(found: list[Row]) -> float:
    """How far rows of one reading are from the paper: the mean over them of three logarithms.

    Of the FLOPs kept and of the saving over the paper's, and of the cost where the last draw landed over the budget
    (below a hundredth of it counts as that).
    """
    apart = [
        abs(math.log(max(a, 0.01) / b))
        for row in found
        for a, b in ((row["flops"], row["paper"]["flops"]), (row["saving"], row["paper"]["saving"]), (row["landed"], 1))
    ]
    return sum(apart) / len(apart)


def percent(share: float) -> str:
    """With three digits that count."""
    return f"{100 * share:.3g}"


def latest(found: list[Row]) -> list[Row]:
    """Of every run the last row."""
    keys = ("network", "reading", "updates", "steps", "seed")
    return list({tuple(row[key] for key in keys): row for row in found}.values())


def dynamics(rows: list[Row]) -> str:
    """Every reading beside the paper, the nearest first."""
    found = [row for row in latest(rows) if row["reading"] not in SCHEDULED]
    if not found:
        return "Not measured yet."
    readings: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        readings[row["reading"]].append(row)
    networks = list(dict.fromkeys(row["network"] for row in found))
    common = set.intersection(*({row["network"] for row in group} for group in readings.values()))
    by_distance = sorted(readings, key=lambda name: distance([r for r in readings[name] if r["network"] in common]))
    short, every = [], []
    for name in ["the paper", *by_distance]:
        cells = [name]
        for network in networks:
            here = [row for row in readings.get(name, found) if row["network"] == network]
            if not here:
                cells.append("")
            elif name == "the paper":
                paper = here[0]["paper"]
                kept = "" if paper["params"] is None else percent(paper["params"])
                cells.append(f"{kept} / {percent(paper['flops'])} / {paper['saving']:.2f}")
            else:
                row = here[0]
                landed = f", at {row['landed']:.2f}" if abs(row["landed"] - 1) > 0.2 else ""
                cells.append(f"{percent(row['params'])} / {percent(row['flops'])} / {row['saving']:.2f}{landed}")
        group = [row for row in readings.get(name, []) if row["network"] in common]
        short.append([*cells, f"{distance(group):.2f}" if group else ""])
    for name in by_distance:
        for row in readings[name]:
            after = " ".join(f"{100 * share:.3g}" for share in row["after"].values())
            every.append([f"{name}: {row['network']}", after, f"{row['swing']:.2f}", f"{row['landed']:.2f}"])
    epochs = ", ".join(found[0]["after"])
    return (
        "Budget dynamics of the policy `Paper` without any training, on the networks' real spaces and costs, with the "
        "paper's budgets, epochs and learning rates. In every cell: parameters kept in % / FLOPs kept in % (of MACs, "
        "which the paper calls FLOPs, the same share) / saving, dense over mean FLOPs in training. *at*: the cost of "
        "the last draw over the budget, before it is brought to it exactly, where it is a fifth off. Distance: the "
        "mean |ln| of FLOPs, saving and that cost beside the paper's, over "
        f"{', '.join(network for network in networks if network in common)}. *present*, *all*: whose gates the norm "
        "sums. *size^-1/2* and the like: the share of each group expected at the first draw; *s = -2*: all units "
        "alike. What is not said is as in the paper's equations. ImageNet's epochs have 390 steps here.\n\n"
        f"Command: `python benchmarks/paper_dynamics.py`. Measured on {machine(found)}.\n\n"
        + grid(["reading", *networks, "distance"], short)
        + f"\n\nShare of the parameters in % after epochs {epochs}; the largest swing of a group's width from one "
        "epoch to the next after epoch 30, as a share of the group; and where the last draw landed.\n\n"
        + grid(["reading and network", "parameters, %", "swing", "landed"], every)
    )


def schedules(rows: list[Row]) -> str:
    """ResNet-20 in fewer steps and updates, at the paper's pace and with its constants as they are."""
    found = [row for row in latest(rows) if row["reading"] in SCHEDULED]
    if not found:
        return "Not measured yet."
    body = [
        [
            f"{row['updates']} x {row['steps']}, {row['reading']}",
            percent(row["flops"]),
            f"{row['saving']:.2f}",
            f"{row['landed']:.2f}",
            f"{row['swing']:.2f}",
            " ".join(f"{100 * share:.3g}" for share in row["after"].values()),
        ]
        for row in found
    ]
    epochs = ", ".join(found[0]["after"])
    head = ["updates x steps in each", "FLOPs, %", "saving", "landed", "swing", "parameters, %"]
    return (
        "The same for ResNet-20 in fewer steps and in fewer updates: at the paper's pace (`paced`, the default), and "
        f"with its constants as they are. Parameters after as much progress as epochs {epochs} of 160.\n\nCommand: "
        f"`python benchmarks/paper_dynamics.py --schedules`. Measured on {machine(found)}.\n\n" + grid(head, body)
    )


def beside_ours(folder: Path) -> str:
    """All tables of the paper with what comparisons have found; `folder` is that of their results files."""
    tables = [f"### Table {number}\n\n{beside(int(number), folder).markdown()}" for number in PAPER["tables"]]
    return "Command: `torchgrow table 1` and so on. What was not measured is empty.\n\n" + "\n\n".join(tables)


def frames(rows: list[Row]) -> str:
    """The recipes' frames beside the paper's dense networks."""
    if not rows:
        return "Not measured yet."
    body = []
    for row in rows:
        paper = float(row["paper_millions"])
        ways = [
            f"{words}: {count / 1e6:.2f} ({100 * (count / 1e6 / paper - 1):+.1f} %)"
            for words, count in row["counts"].items()
        ]
        body.append(
            [
                row["network"],
                f"`{row['recipe']}`",
                f"{row['paper_millions']} ({row['where']})",
                "; ".join(ways),
                "; ".join(row["equal"]) or "none of these",
                f"{row['macs'] / 1e6:,.0f}",
                row.get("macs_published", ""),
                row["of"],
            ]
        )
    head = ["network", "recipe, as published", "the paper, millions", "our frame, millions", "equal as printed"]
    return (
        "Parameters of the frames that recipes build, on the meta device, beside those that the paper prints; where "
        "they differ, other ways to count, and which of them gives the printed number. For ResNet-50 none does: the "
        "paper prints 23.0, and does not say what it counts. It prints no FLOPs of dense networks; those of others "
        "stand beside ours.\n\n"
        f"Command: `python benchmarks/frames.py`. Made on {machine(rows)}.\n\n"
        + grid([*head, "MACs of one sample, millions", "as published", "sample"], body)
    )
