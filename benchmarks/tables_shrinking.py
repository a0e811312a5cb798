"""Tables of docs/results.md on trained networks that are brought to a budget."""

from collections import defaultdict

from torchgrow.lab.pages import Row, grid, machine, spread

TAKEN_OVER = ["network", "units by", "parameters left", "n", "whole %", "cut %", "compensated %", "gained, points"]
NAMES = {"resnet20": "ResNet-20, CIFAR-10", "digits": "digits"}
SETTING = ("network", "budget", "epochs", "base_epochs", "images", "batch")
HEAD = [
    "method",
    "learning rate",
    "n",
    "accuracy %",
    "when cut",
    "parameters %",
    "FLOPs %",
    "TFLOPs spent",
    "with base",
]


def chosen(found: list[Row], judged: str) -> list[Row]:
    """Rows of a method at the learning rate that was best on held-out images at seed 0, the latest of every seed."""
    lr = max((row for row in found if row["seed"] == 0), key=lambda row: row["held_out"])["lr"]
    return list({row["seed"]: row for row in found if row["lr"] == lr and row[judged] is not None}.values())


def first_training(row: Row) -> float:
    """Training FLOPs of the network that a method began with; none for a network from scratch."""
    return 0.0 if row["method"] == "uniform" else 3.0 * row["base_flops"] * row["images"] * row["base_epochs"]


def table(found: list[Row], bases: list[Row], judged: str) -> str:
    """The methods of one network and budget, the best first."""
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        by_method[row["method"]].append(row)
    groups = [rows for rows in (chosen(rows, judged) for rows in by_method.values()) if rows]
    groups.sort(key=lambda rows: -sum(row[judged] for row in rows) / len(rows))
    body = [
        [
            rows[0]["method"],
            f"{rows[0]['lr']:g}",
            str(len(rows)),
            spread([row[judged] for row in rows]),
            spread([row["accuracy_cut"] for row in rows]),
            *(spread([100 * row[kind] / row[f"base_{kind}"] for row in rows], 1) for kind in ("params", "flops")),
            spread([row["spent_flops"] / 1e12 for row in rows], 2),
            spread([(row["spent_flops"] + first_training(row)) / 1e12 for row in rows], 2),
        ]
        for rows in groups
    ]
    known = list({row["seed"]: row for row in bases if row[judged] is not None}.values())
    if known:
        body.append(["base", f"{known[0]['lr']:g}", str(len(known)), spread([row[judged] for row in known]), *[""] * 5])
    return grid(HEAD, body)


def shrinking(rows: list[Row]) -> str:
    """Every network and budget: by test images where they were looked at, else by held-out ones."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != "base":
            groups[tuple(row[name] for name in SETTING)].append(row)
    if not groups:
        return "Not measured yet."
    parts = [
        "A trained network (base), brought to a budget with equal training FLOPs of fine-tuning, which count what a "
        "method spends at full size, and its teacher (`+distil`). Learning rates were chosen on held-out training "
        "images at seed 0. TFLOPs are 10^12 training FLOPs, of the fine-tuning alone and with the base's training; 3 x "
        "forward. When cut: held-out accuracy when the network first was within the budget. `tp-` is "
        "Torch-Pruning 1.6.1; `uniform` trains from scratch for as many epochs as base and fine-tuning together.\n\n"
        f"Command: `python benchmarks/shrinking.py`. Measured on {machine(rows)}."
    ]
    for found in groups.values():
        first = found[0]
        same = ("network", "base_epochs", "images", "batch")
        bases = [row for row in rows if row["method"] == "base" and all(row[name] == first[name] for name in same)]
        tested = any(row["test"] is not None for row in found)
        parts.append(
            f"{NAMES[first['network']]}, {first['budget']}; {first['images']:,} images, {first['base_epochs']} epochs, "
            f"then {first['epochs']}; accuracy on {'test' if tested else 'held-out'} images:\n\n"
            + table(found, bases, "test" if tested else "held_out")
        )
    return "\n\n".join(parts)


def compensation(found: list[Row]) -> str:
    """Networks right after a cut, as they are and with biases that take over what the gone units gave on average."""
    if not found:
        return "Not measured yet."
    cases: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in found:
        cases[row["network"], row["importance"], row["share"]].append(row)
    body = []
    for (network, importance, share), rows in cases.items():
        accuracies = [[row[way]["accuracy"] for row in rows] for way in ("whole", "cut", "compensated")]
        gained = [with_means - without for _, without, with_means in zip(*accuracies, strict=True)]
        scores = [spread([row[way]["distance"] for row in rows]) for way in ("cut", "compensated")]
        cells = [network, importance, share, str(len(rows)), *(spread(one, 1) for one in accuracies)]
        body.append([*cells, spread(gained, 1), *scores])
    first = found[0]
    return (
        f"`torchgrow.prune_(..., batches=...)` on networks without norms, trained on digits for {first['epochs']} to "
        f"{found[-1]['epochs']} epochs: accuracy on held-out images right after the cut, before any fine-tuning. "
        f"Compensated: biases take over what the gone units gave on average, over {first['measured']} batches of "
        f"{first['batch']} training images. Both cuts remove the same units. Distance: of the scores to those of the "
        "whole network, over their norm.\n\nCommand: `python benchmarks/compensation.py`. Measured on "
        f"{machine(found, 'versions')}, busy with other runs.\n\n"
        + grid([*TAKEN_OVER, "distance, cut", "distance, compensated"], body)
    )
