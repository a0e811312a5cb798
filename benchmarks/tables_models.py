"""Tables of docs/results.md on models and random networks: what was found in them, and whether it is exact."""

from collections import Counter, defaultdict

from torchgrow.lab.pages import Row, grid, machine


def exactness(found: list[Row]) -> str:
    """The proof over random subsets, per model."""
    if not found:
        return "Not measured yet."
    body = [
        [
            row["model"],
            str(row["subsets"]),
            f"{row['max_error']:.1e}",
            f"{row['units']:,}",
            str(row["groups"]),
            f"{100 * row['removable_params']:.1f}",
        ]
        for row in found
    ]
    head = ["model", "random subsets", "largest relative error", "removable units", "groups", "removable parameters, %"]
    return (
        "Compact network against the frame with the absent units zeroed, float64, all weights and statistics "
        f"randomised.\n\nCommand: `python benchmarks/exactness.py`. Measured on {machine(found)}.\n\n"
        + grid(head, body)
    )


PEERS = {"torch_pruning": "Torch-Pruning", "kirigami": "torch-kirigami"}


def of_peer(group: list[Row], peer: str) -> list[str]:
    """On how many models a peer ran, and on how many it was exact; rows of before say nothing of the second."""
    asked = [row[peer] for row in group if peer in row]
    judged = [answer for answer in asked if "exact" in answer]
    runs, exact = (sum(bool(answer.get(key)) for answer in some) for key, some in (("runs", asked), ("exact", judged)))
    return [f"{runs} of {len(asked)}" if asked else "", f"{exact} of {len(judged)}" if judged else ""]


def conformance(found: list[Row]) -> str:
    """What was found in the models people use: a summary by set, then every model."""
    if not found:
        return "Not measured yet."
    by_set: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        by_set[row["set"]].append(row)
    body, every = [], []
    for name, group in [*by_set.items(), ("all", found)]:
        verdicts = [row["verdict"] for row in group]
        most = sum(row.get("removable", 0) >= 0.6 for row in group)
        rest = len(group) - sum(verdicts.count(v) for v in ("exact", "frozen", "refused", "wrong"))
        counts = [str(verdicts.count(v)) for v in ("exact", "frozen", "refused", "wrong")]
        trained = sum(isinstance(row.get("training"), float) for row in group)
        peers = [cell for peer in PEERS for cell in of_peer(group, peer)]
        body.append([name, str(len(group)), *counts, str(rest), str(trained), str(most), *peers])
    for row in found:
        quiet = "seconds_to_trace" in row and not row["environment"].get("machine busy")
        every.append(
            [
                row["model"],
                row["verdict"],
                f"{100 * row['removable']:.1f}" if "removable" in row else "",
                "yes" if isinstance(row.get("training"), float) else "the frame fails" if row.get("training") else "",
                f"{row['seconds_to_trace']:.2f}" if quiet else "",
                *(of_one(row.get(peer, {})) for peer in PEERS),
            ]
        )
    head = [
        "set",
        "models",
        "exact",
        "frozen",
        "refused",
        "wrong",
        "other",
        "in training mode too",
        "60 % or more can go",
    ]
    head += [f"{name} {what}" for name in PEERS.values() for what in ("runs", "is exact")]
    details = [
        "model",
        "verdict",
        "parameters that can go, %",
        "training mode too",
        "seconds to trace",
        *PEERS.values(),
    ]
    return (
        "Exact: after tracing and proof, two more random subsets (30 and 60 % of every group) compute what the frame "
        "computes with them zeroed, float64, relative error at most 1e-9; in training mode (where rows say so) at most "
        "1e-6, with nothing dropped. Other: left out for its size, or stopped at the time limit. Torch-Pruning 1.6.1 "
        "and torch-kirigami 0.2.1 on the same models: a step asking for 30 % of every layer runs, removes something, "
        "and the forward works afterwards; exact is asked by the same oracle in evaluation mode. Torch-Pruning also "
        "takes features out of norms, which changes what is normalised and so cannot be exact.\n\n"
        f"Command: `python benchmarks/conformance.py`. Measured on {machine(found)}.\n\n"
        + grid(head, body)
        + "\n\n"
        + grid(details, every)
    )


def of_one(answer: Row) -> str:
    """What came of a peer on one model."""
    if not answer:
        return ""
    if not answer.get("runs"):
        return "time-out" if answer.get("error", "").startswith("time-out") else "no"
    return {True: "exact", False: "runs, not exact", None: "runs"}[answer.get("exact")]


def random_networks(found: list[Row]) -> str:
    """Networks nobody chose: exact or not, and units found against units expected."""
    if not found:
        return "Not measured yet."
    total = {
        key: sum(row[key] for row in found) for key in ("networks", "exact", "as_many_units", "units", "units_expected")
    }
    verdicts = [row["verdict"] for chunk in found for row in chunk["not_exact"]]
    fewer = sum(row["units"] < row["expected"] for chunk in found for row in chunk["other_counts"])
    more = sum(row["units"] > row["expected"] for chunk in found for row in chunk["other_counts"])
    body = [
        ["networks", f"{total['networks']:,}"],
        ["exact", f"{total['exact']:,}"],
        ["refused", str(verdicts.count("refused"))],
        ["wrong", str(verdicts.count("wrong"))],
        ["largest relative error", f"{max(row['worst_error'] for row in found):.1e}"],
        ["as many units as expected", f"{total['as_many_units']:,}"],
        ["fewer (something stayed that could go)", str(fewer)],
        ["more", str(more)],
        ["units found, of those expected", f"{total['units']:,} of {total['units_expected']:,}"],
    ]
    return (
        "Convolutions, groups, depthwise, concatenation, chunks, shuffles, residuals, pooling, recurrent layers, "
        "attention and shared layers in random order, against a literal oracle in float64; the number of units is "
        f"worked out beside.\n\nCommand: `python benchmarks/random_networks.py`. Measured on {machine(found)}.\n\n"
        + grid(["", "count"], body)
    )


def training_networks(found: list[Row]) -> str:
    """Random networks in training mode, and those that a Grower took from seed to budget."""
    if not found:
        return "Not measured yet."
    grown: Counter[str] = Counter()
    for row in found:
        grown.update(row["grown"])
    verdicts = Counter(row["verdict"] for chunk in found for row in chunk["not_exact"])
    body = [
        ["networks", f"{sum(row['networks'] for row in found):,}"],
        ["exact", f"{sum(row['exact'] for row in found):,}"],
        ["refused", str(verdicts["refused"])],
        ["wrong", str(verdicts["wrong"])],
        ["largest relative error", f"{max(row['worst_error'] for row in found):.1e}"],
        [
            "units found, of those expected",
            f"{sum(row['units'] for row in found):,} of {sum(row['units_expected'] for row in found):,}",
        ],
        ["grown from seed to budget", str(grown.total())],
        ["of them right", str(grown["right"])],
        ["with nothing that can grow, or refused", str(grown["nothing to grow"] + grown["refused"])],
        ["wrong", str(grown["wrong"])],
        ["FLOPs compared with torch's counter", str(sum(row["flops_compared"] for row in found))],
    ]
    return (
        "Heads and branches of training alone, learned noise, writes in place, buffers that training moves, graphs "
        "with sparse adjacency or by scatter, outputs in dataclasses, namespaces and generators, among the blocks "
        "above. A literal oracle in float64, in training and in evaluation mode: outputs, the gradient of the input, "
        "moved buffers. Right, of a grown network: parameters and FLOPs are those counted and within the budget, and "
        "the saved network computes what it did, and what the frame computes with its weights and zeros.\n\n"
        f"Command: `python benchmarks/training_networks.py`. Measured on {machine(found)}.\n\n"
        + grid(["", "count"], body)
    )
