"""Write docs/results.md and its pictures from the results files: python benchmarks/tables.py

Nothing in that page is typed by hand; `--check` fails if it is not what the results files give.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

from torchgrow.lab.pages import Row, alike, appendix, comparisons, grid, machine, section, spread, summary
from torchgrow.lab.results import draw, draw_sizes

sys.path.insert(0, str(Path(__file__).parent))
from tables_models import conformance, exactness, random_networks, training_networks
from tables_paper import beside_ours, dynamics, frames, schedules
from tables_published import published
from tables_shrinking import compensation, shrinking

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "pictures"
README = ROOT / "README.md"
COMPARISONS = ROOT / "results" / "compare"
SHOWN, OVERVIEW = "digits", "digits-sizes.png"  # the comparison on README, and its picture
BEGIN, END = "<!-- made by benchmarks/tables.py -->", "<!-- end -->"


def rows(name: str) -> list[Row]:
    """Lines of a results file; none if it is not there yet."""
    path = ROOT / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timings(name: str, command: str, what: str) -> str:
    """Ratios measured side by side; every row holds `case`, `ratio` (median), `low`, `high` and `repeats`."""
    found = rows(name)
    if not found:
        return "Not measured yet."
    body = [
        [row["case"], f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", str(row["repeats"])]
        for row in found
    ]
    return f"{what}\n\nCommand: `{command}`. Measured on {machine(found)}.\n\n" + grid(
        ["case", "median ratio", "interval", "repeats"], body
    )


def tracing() -> str:
    """Tracing beside Torch-Pruning, by the number of operations, and on the meta device."""
    found = rows("tracing-speed.jsonl")
    if not found:
        return "Not measured yet."
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in {(row["kind"], row["model"]): row for row in found}.values():  # the last measurement of each
        kinds[row["kind"]].append(row)
    beside = [
        [
            row["case"],
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            *(f"{row[f'seconds_{key}']:.3f}" for key in ("ours", "theirs", "forward")),
            str(row["repeats"]),
        ]
        for row in kinds["side"]
    ]
    by_operations = [
        [
            row["case"],
            str(row["operations"]),
            f"{row['seconds']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['microseconds_per_operation']:.0f}",
        ]
        for row in kinds["ops"]
    ]
    by_size = [
        [
            row["case"],
            f"{row['parameters'] / 1e9:.2f}",
            f"{row['seconds']:.1f}",
            str(row["most_seconds"]),
            f"{row['megabytes']:.0f}",
            f"{row['megabytes_before']:.0f}",
        ]
        for row in kinds["size"]
    ]
    return (
        "Label tracing without the proof. Beside Torch-Pruning 1.6.1, in turns: ratio of medians, and the interval of "
        "single ratios; what both must do, one forward, is among the seconds. Then seconds by the number of ATen "
        "operations; then frames on the meta device, whose weights are never made, each in a process of its own.\n\n"
        f"Command: `python benchmarks/tracing_speed.py`. Measured on {machine(found)}.\n\n"
        + grid(["case", "ratio", "interval", "seconds", "Torch-Pruning", "forward alone", "repeats"], beside)
        + "\n\n"
        + grid(["model", "operations", "median seconds", "least to most", "µs per operation"], by_operations)
        + "\n\n"
        + grid(["frame", "parameters, billions", "seconds", "allowed", "peak MB", "MB before tracing"], by_size)
    )


def ranks() -> str:
    """Several processes: do they hold the same, and what one process would hold."""
    found = rows("ranks.jsonl")
    if not found:
        return "Not measured yet."
    body = [
        [
            f"{row['network']}, {row['processes']} processes",
            str(row["updates"]),
            str(row["structures"]),
            f"{row['tensors']:,}",
            str(row["differing"]),
            f"{row['difference_to_one_process']:.1e}" if "difference_to_one_process" in row else "",
        ]
        for row in found
    ]
    head = ["case", "updates", "structures", "tensors compared", "differing on any rank", "difference to one process"]
    return (
        f"Data-parallel growing (DDP, gloo, float64, Adam) on scikit-learn's digits, {found[0]['epochs']} epochs of "
        f"batches of {found[0]['batch']}, shared out. All tensors of a rank after every update are compared bit for "
        "bit: weights, statistics, the bank, optimizer slots, indicators, draws. Without batch norm the run is also "
        "compared with one process on whole batches; the difference is relative to a tensor's largest entry (or 1).\n\n"
        f"Command: `python benchmarks/ranks.py`. Measured on {machine(found)}.\n\n" + grid(head, body)
    )


def killed() -> str:
    """Runs killed at random moments."""
    found = rows("killed.jsonl")
    if not found:
        return "Not measured yet."
    where = Counter(phase for row in found for phase in row["kills"])
    body = [
        ["runs", str(len(found))],
        ["ended bit for bit as the unbroken run", str(sum(row["same"] for row in found))],
        ["kills", str(where.total())],
        *([f"of them in {phase}", str(count)] for phase, count in sorted(where.items())),
    ]
    return (
        f"The digits recipe with a ResNet-8, {found[0]['epochs']} epochs, a checkpoint every "
        f"{found[0]['checkpoint_every']} steps, killed by SIGKILL again and again and resumed with `--resume`. "
        "Compared are the grower's whole state, the records and the saved network.\n\n"
        f"Command: `python benchmarks/killed.py`. Measured on {machine(found)}.\n\n" + grid(["", "count"], body)
    )


def depth() -> str:
    """Layers and channels that grow, beside a depth picked by hand and one grown by AutoGrow's rule."""
    found = rows("depth-growth.jsonl")
    if not found:
        return "Not measured yet."
    body = []
    for method in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == method]
        live = [[w for name, w in row["widths"].items() if w and "(layer)" not in name] for row in mine]
        widths = [", ".join(f"{w}" for w in dict.fromkeys(seen)) or "16, 32, 64" for seen in live]
        hand = {row["seed"]: row for row in found if row["method"] == "3-3-3"}
        pairs = [(row, hand[row["seed"]]) for row in mine if row["seed"] in hand]
        body.append(
            [
                method,
                str(len(mine)),
                spread([row["accuracy"] for row in mine]),
                "; ".join(dict.fromkeys("-".join(f"{d}" for d in row["depths"].values()) for row in mine)),
                "; ".join(dict.fromkeys(widths)),
                spread([row["params"] for row in mine], 0),
                *(spread([row[key] / base[key] for row, base in pairs]) for key in ("flops", "train_flops")),
            ]
        )
    first = found[0]
    command = f"python benchmarks/depth_growth.py --data FOLDER --precision {first['precision']}"
    head = [
        "method",
        "n",
        "test accuracy %",
        "blocks of each stage (row of like blocks), by seed",
        "widths in use, by seed",
        "parameters",
        "FLOPs / 3-3-3",
        "all training FLOPs / 3-3-3",
    ]
    return (
        f"CIFAR-10, {first['subset']:,} images, {first['epochs']} epochs, {first['precision']}, a Basic3ResNet frame "
        "of 9-9-9 blocks: layers and channels grown to the parameters of the hand-picked 3-3-3; our version of "
        "AutoGrow's periodic growth, which stops by itself and adds whole blocks.\n\n"
        f"Command: `{command}`. Measured on {machine(found)}.\n\n" + grid(head, body)
    )


def damaged() -> str:
    """Mutated files and what became of them."""
    found = rows("fuzz-files.jsonl")
    if not found:
        return "Not measured yet."
    verdicts: Counter[str] = Counter()
    for row in found:
        for name, count in row.get("verdicts", {}).items():
            verdicts[name.rpartition(": ")[2]] += count
    crashed = sum(row["exit"] != 0 for row in found)
    body = [
        ["damaged folders", f"{sum(row['folders'] for row in found):,}"],
        ["refused with a TorchgrowError", f"{verdicts['refused']:,}"],
        ["loaded, and ran", f"{verdicts['loaded']:,}"],
        ["any other exception, or more than 10 s", str(sum(len(row.get("wrong", [])) for row in found))],
        ["processes that crashed, hung or ran out of memory", str(crashed)],
        ["code compiled, run or imported, files written", str(sum(len(row.get("code", [])) for row in found))],
        ["most memory, MB", f"{max(row.get('most_megabytes', 0) for row in found):,.0f}"],
    ]
    return (
        "Saved models (formats 1 and 4) and checkpoints with one of their files mutated, most with checksums that fit "
        "again; 2 GB of address space beyond what the process needed before.\n\nCommand: "
        f"`python benchmarks/fuzz_files.py`. Measured on {machine(found)}.\n\n" + grid(["", "count"], body)
    )


def large() -> str:
    """Memory that cutting a large language model takes."""
    found = rows("prune-memory.jsonl")
    if not found:
        return "Not measured yet."
    body = [
        [
            row["model"],
            f"{row['params'] / 1e9:.2f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['left']:.1%}",
            f"{row['peak']:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in found
    ]
    return (
        "`torchgrow.prune_(model, tokens, budget=..., proof=False)`, importance by group norm: the most resident "
        "memory while it ran, as a multiple of the model's.\n\nCommand: `python benchmarks/prune_memory.py`. Measured "
        f"on {machine(found)}, busy with other runs.\n\n"
        + grid(["model", "parameters, 10^9", "GB", "parameters left", "peak, x the model", "s"], body)
    )


def memory() -> str:
    """Growth of memory over updates."""
    found = rows("memory.jsonl")
    if not found:
        return "Not measured yet."
    body = [
        [
            row["case"],
            str(row["updates"]),
            f"{row['units_that_came_or_went']:,}",
            *("{slope:+.3f} ({low:+.3f} to {high:+.3f})".format(**row[kind]) for kind in ("in_use", "resident")),
            f"{row['tensor_megabytes'][1] - row['tensor_megabytes'][0]:+.1f}",
            str(len(row["orphans"])),
        ]
        for row in found
    ]
    head = [
        "optimizer",
        "updates",
        "units that came or went",
        "MB an update in use (95 % interval)",
        "MB an update resident",
        "MB of tensors, last minus first count",
        "orphaned or misshapen state",
    ]
    return (
        "ResNet-50 with units drawn anew at every update, a training step before each.\n\nCommand: "
        f"`python benchmarks/memory.py`. Measured on {machine(found)}.\n\n" + grid(head, body)
    )


def by_arm(found: list[Row], arms: list[str]) -> list[list[str]]:
    """A line for every task: on what it was judged, seeds, epochs, and the accuracy of each arm."""
    body = []
    for task, judged in dict.fromkeys((row["task"], row["judged"]) for row in found):
        own = [[r for r in found if (r["task"], r["judged"], r["arm"]) == (task, judged, arm)] for arm in arms]
        cells = [spread([row["accuracy"] for row in rows], 1) if rows else "" for rows in own]
        body.append([task, judged, str(len(own[0])), str(own[0][0]["epochs"]), *cells])
    return body


def birth() -> str:
    """Accuracy by the scale that initial weights have, and by ways to grow from there."""
    found = rows("birth.jsonl")
    if not found:
        return "Not measured yet."
    scales, head = ["frame", "planned", "direct"], ["network", "images", "seeds", "epochs"]
    presets = [arm for arm in dict.fromkeys(row["arm"] for row in found) if arm not in scales]
    some = {row["seed"] for row in found if row["arm"] in presets}
    tables = [grid([*head, "frame's scale %", "planned scale %", "direct %"], by_arm(found, scales))]
    if presets:
        both = ["planned", *presets]
        tables += [
            "Ways to grow from the planned scale, of the same seeds: `default`, and others in its place.",
            grid(
                [*head, "default %", *(f"{p} %" for p in presets)],
                by_arm([r for r in found if r["seed"] in some], both),
            ),
        ]
    return (
        f"Grown to {found[0]['share']} of the parameters on digits by the default policy, with initial weights at the "
        "scale of the frame (`rescale=False`) and of the widths planned; direct: the network of the second, from fresh "
        f"weights.\n\nCommand: `python benchmarks/birth.py`. Measured on {machine(found, 'versions')}.\n\n"
        + "\n\n".join(tables)
    )


def newborns() -> str:
    """Accuracy by how units enter that come in the middle of a run."""
    found = rows("newborns.jsonl")
    if not found:
        return "Not measured yet."
    arms = ["fresh", "silent", "paired", "warm", "direct"]
    head = ["network", "images", "seeds", "epochs", *(f"{arm} %" for arm in arms)]
    flops = {(row["task"], row["seed"], row["arm"]): row["train_flops"] for row in found}
    more = [cost / flops[task, seed, "fresh"] for (task, seed, arm), cost in flops.items() if arm == "direct"]
    return (
        "Policy `Late`: half of every group, or one layer of every stage, until the middle of the run, then all that "
        "the budget holds (10 % of the parameters on digits, 36 % on 10,000 images of CIFAR-10). Units that come have "
        "initial weights (fresh); weights of 0 where they are read, so that outputs stay (silent); weights in pairs "
        "that cancel (paired); or initial weights and steps that grow to full length over 100 (warm). Direct: the "
        f"final structure from scratch, for {min(more):.2f} to {max(more):.2f} times the training FLOPs.\n\n"
        "Command: `python benchmarks/newborns.py --cifar10 FOLDER`. Measured on "
        f"{machine(found, 'versions')}, shared with other runs.\n\n" + grid(head, by_arm(found, arms))
    )


def startup() -> str:
    """CPU seconds of commands that train nothing, and of the import."""
    found = rows("startup.jsonl")
    if not found:
        return "Not measured yet."
    body = [
        [
            row["case"],
            f"{row['cpu_seconds']:.2f}",
            "" if row["most"] is None else f"{row['most']:.2f}",
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
        ]
        for row in found
    ]
    head = ["process", "CPU seconds, median", "at most allowed", "over `import torch` (interval)"]
    return (
        f"Fresh processes in turns, {found[0]['repeats']} of each.\n\nCommand: `python benchmarks/startup.py`. "
        f"Measured on {machine(found)}.\n\n" + grid(head, body)
    )


def page() -> str:
    """The whole page."""
    parts = [
        "# Results\n\nMade from the files in `results/` by `python benchmarks/tables.py`, all of it.",
        "## In short\n\n" + summary(COMPARISONS),
        "## Methods side by side\n\n" + comparisons(COMPARISONS, PICTURES.name),
        "## Layers and channels\n\n" + depth(),
        "## Initial weights at the scale of the widths planned\n\n" + birth(),
        "## Units that come in the middle of a run\n\n" + newborns(),
        "## Trained networks made smaller\n\n" + shrinking(rows("shrinking.jsonl")),
        "## Biases that take over from units that leave\n\n" + compensation(rows("compensation.jsonl")),
        "## Published networks made smaller\n\n" + published(rows("published.jsonl")),
        "## The paper's networks\n\n" + frames(rows("frames.jsonl")),
        "## The paper's tables beside ours\n\n" + beside_ours(COMPARISONS),
        "## The paper's tables, without training\n\n" + dynamics(rows("paper-dynamics.jsonl")),
        "## The paper's course in fewer steps\n\n" + schedules(rows("paper-dynamics.jsonl")),
        "## Exactness\n\n" + exactness(rows("exactness.jsonl")),
        "## Models people use\n\n" + conformance(rows("conformance.jsonl")),
        "## Random networks\n\n" + random_networks(rows("random-networks.jsonl")),
        "## Random networks in training mode\n\n" + training_networks(rows("training-networks.jsonl")),
        "## Seconds to trace\n\n" + tracing(),
        "## Several processes\n\n" + ranks(),
        "## Resumed after SIGKILL\n\n" + killed(),
        "## Damaged files\n\n" + damaged(),
        "## Memory over updates\n\n" + memory(),
        "## Memory to cut a large model\n\n" + large(),
        "## Cost of a start\n\n" + startup(),
        "## Cost of a training step\n\n"
        + timings(
            "step-overhead.jsonl",
            "python benchmarks/step_overhead.py",
            "One training step of a live network, hooks included, over one of the same architecture written by hand.",
        ),
        "## Cost of a step by policy\n\n"
        + timings(
            "step-by-policy.jsonl",
            "python benchmarks/step_by_policy.py",
            "One training step of a live network under each policy, over one of a copy that no grower knows.",
        ),
        "## Cost of an update\n\n"
        + timings(
            "update-cost.jsonl",
            "python benchmarks/update_cost.py",
            "One update of the structure, over what is named in the case.",
        ),
        "## Seconds by width\n\n"
        + timings(
            "step-by-width.jsonl",
            "python benchmarks/step_by_width.py",
            "One training step of a ResNet-20 over one at full width (16-32-64), batch 128: why widths can be "
            "held at multiples of 8 (`Default.align`).",
        ),
        "# Appendix\n\n" + appendix(COMPARISONS, PICTURES.name),
    ]
    return "\n\n".join(parts) + "\n"


def readme(text: str) -> str:
    """README's text with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary(COMPARISONS, briefly=True)}\n{END}{after}"


def drawn() -> dict[str, list[Row]]:
    """Rows by the picture that shows them: where there is more than one method to compare."""
    return {name: found for name, found in alike(COMPARISONS).items() if len({row["method"] for row in found}) > 1}


def overview() -> list[Row]:
    """The rows of README's picture: of one setting, and by data that nothing was chosen by."""
    now = [found for found in alike(COMPARISONS).values() if found[0]["recipe"] == SHOWN and section(found) == "now"]
    return max(now, key=len, default=[])


def main() -> int:
    """Write the page, its pictures and README's table, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page or README's table is out of date")
    text, first = page(), readme(README.read_text())
    if parser.parse_args().check:
        there = {path.name for path in PICTURES.glob("*")} - {OVERVIEW} == set(drawn())
        return 0 if PAGE.exists() and PAGE.read_text() == text and README.read_text() == first and there else 1
    PAGE.write_text(text)
    README.write_text(first)
    PICTURES.mkdir(exist_ok=True)
    for path in PICTURES.glob("*"):
        if path.name not in (*drawn(), OVERVIEW):
            path.unlink()  # of rows that are gone
    for name, found in drawn().items():
        draw(found, PICTURES / name)
    if overview():
        draw_sizes(overview(), PICTURES / OVERVIEW)
    return 0


if __name__ == "__main__":
    sys.exit(main())
