"""Write docs/results.md and its pictures from the results files: python benchmarks/tables.py

Nothing in that page is typed by hand; `--check` fails if it is not what the results files give.
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from torchgrow import Method
from torchgrow.lab import recipes
from torchgrow.lab.compare import AFTER, Job
from torchgrow.lab.metrics import PERPLEXITY, Metric, metric_of
from torchgrow.lab.results import by_budget, difference, draw

sys.path.insert(0, str(Path(__file__).parent))
from tables_layout import Row, grid, machine, spread
from tables_models import conformance, exactness, random_networks, training_networks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "pictures"


def rows(name: str) -> list[Row]:
    """Lines of a results file; none if it is not there yet."""
    path = ROOT / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alike() -> dict[str, list[Row]]:
    """Rows of `torchgrow compare` that differ in method, seed and budget only, by the name of their picture."""
    pictures: dict[str, list[Row]] = {}
    for path in sorted((ROOT / "results" / "compare").glob("*.jsonl")):
        settings: dict[str, list[Row]] = defaultdict(list)
        for row in rows(f"compare/{path.name}"):
            varying = ("seed", "budget", "method", "growing", "preset", "epochs", "depth", "meta", "updates_per_epoch")
            same = {key: value for key, value in row["config"].items() if key not in varying}
            row["method"] = label(row)
            settings[json.dumps([same, row["config"]["epochs"]], sort_keys=True)].append(row)
        pictures |= {f"{path.stem}-{number}.png": found for number, found in enumerate(settings.values(), start=1)}
    return pictures


def label(row: Row) -> str:
    """The method; with the option that lets layers grow, or not, if the recipe differs; and what a preset was then."""
    method, then = row["method"], row["config"].get("growing")
    if then is None:
        return method
    recipe, depth = recipes.get(row["recipe"]), row["config"]["depth"]
    suffix = "" if depth == recipe.depth else " --depth" if depth else " --no-depth"
    job = Job(method=AFTER.get(method, method), recipe=recipe, data=())
    now = asdict(Method.named(job.preset(), layers=depth))
    if depth:
        then = {"layer_lag": 1.0, **then}  # before there was such a thing, layers came as channels did
    now["updates_per_epoch"] = replace(recipe, preset=job.preset()).updates_an_epoch()
    often = row["config"]["updates_per_epoch"] or (4 if then["draws"] == "ranked" else 1)  # as it was once
    then = {**then, "updates_per_epoch": often}
    changed = ", ".join(f"{key}={then[key]}" for key in then if then[key] != now.get(key))
    return f"{method}{suffix}, then with {changed}" if changed else method + suffix


SECTIONS = {
    "Methods side by side": "What `torchgrow compare` has found. A method is named with the option it needs where its "
    "recipe says otherwise (`default --no-depth`: no layers grow).",
    "What was chosen by": "Judged by training images that were held out, never by the test images. `default:...` is "
    'the default with what follows changed, so "default minus it" is what that ingredient is worth.',
    "Earlier ways to grow": 'Rows from before a way to grow was changed, named with what was different ("then with").',
}
"""Where the rows of `torchgrow compare` stand, in this order, and what is said of them."""


def section(found: list[Row]) -> str:
    """Which of the sections rows of one setting belong to."""
    now, held_out, then = SECTIONS
    grown = [row["method"] for row in found if "growing" in row["config"]]
    if grown and all("then with" in method for method in grown):
        return then
    return held_out if found[0]["config"]["validate"] else now


def comparisons() -> str:
    """What `torchgrow compare` has found so far: a table for each recipe, its settings and budget, and a picture."""
    parts: dict[str, list[str]] = {title: [f"## {title}\n\n{text}"] for title, text in SECTIONS.items()}
    for name, found in alike().items():
        budgets = by_budget(found)
        tables = [along(budgets)] * (len(budgets) > 1)
        tables += [compared(found, budget, some) for budget, some in budgets.items()]
        title = f"{found[0]['recipe']}: score against training cost, and along the budgets if there are several"
        parts[section(found)] += [*tables, f"![{title}]({PICTURES.name}/{name})"]
    return "\n\n".join(part for some in parts.values() if len(some) > 1 for part in some) or "Not measured yet."


def options(config: Row) -> str:
    """The options of `torchgrow compare` that give this configuration, but for methods, seeds and budgets."""
    recipe, shortcut = recipes.get(config["name"]).as_json(), config["model_arguments"].get("shortcut")
    fields = ("subset", "epochs", "precision", "threads", "then")
    given = [f" --{field} {config[field]}" for field in fields if config[field] != recipe[field]]
    given += [" --channels-last"] * config.get("channels_last", False)
    if shortcut != recipe["model_arguments"].get("shortcut"):
        given.append(f" --shortcut {shortcut}")
    return "".join(given) + (" --validate" if config["validate"] else "")


def gap(some: list[Row], a: str, b: str) -> str:
    """Mean difference of two methods over the seeds that both have, with its 95 % interval."""
    gaps, half = difference(some, a, b)
    if a == b or not gaps:
        return ""
    return f"{statistics.mean(gaps):+.2f}" + (f" ± {half:.2f}" if len(gaps) > 1 else "")


def of_common_seeds(some: list[Row], *methods: str) -> list[Row]:
    """The rows of those seeds that all of some methods have."""
    seeds = [{row["seed"] for row in some if row["method"] == name} for name in methods]
    return [row for row in some if row["seed"] in set.intersection(*seeds)]


def compared(found: list[Row], budget: str, some: list[Row]) -> str:
    """One table: the methods at one budget."""
    config, metric = found[0]["config"], metric_of(next(row for row in found if "error" not in row))
    body, text = [], metric is PERPLEXITY
    for method in dict.fromkeys(row["method"] for row in some):
        fine = [row for row in some if row["method"] == method and "error" not in row]
        if not fine:
            failed = next(row["error"] for row in some if row["method"] == method)
            body.append([method, "0", f"failed: {failed}", *[""] * (7 + text)])
            continue
        timed = [row["seconds"] / row["dense_seconds"] for row in fine if row["dense_seconds"]]
        body.append(
            [
                method,
                str(len(fine)),
                spread([row[metric.name] for row in fine]),
                *([spread([row["test_perplexity"] for row in fine])] if text else []),
                gap(some, method, "uniform"),
                gap(some, "default", method),
                spread([row["params"] / row["dense_params"] for row in fine], 3),
                spread([row["flops"] / row["dense_flops"] for row in fine], 3),
                spread([row["train_flops"] / row["dense_train_flops"] for row in fine], 3),
                spread([row["train_flops_paper_rule"] / row["dense_train_flops"] for row in fine], 3),
                spread(timed) if timed else "",
            ]
        )
    unit = f"{metric.name}{metric.unit.rstrip()}"
    head = ["method", "n", unit, *([f"test {unit}"] if text else []), "minus uniform (95 % interval)"]
    head += ["default minus it (95 % interval)"]
    head += ["parameters / dense", "FLOPs / dense"]
    head += ["all training FLOPs / dense", "of growing or pruning only (the paper's rule)", "seconds / dense"]
    judged = "images held out of the training set" if config.get("validate") else f"{metric.on} data"
    if config.get("validate") and config["samples"][0] < (config["subset"] or 0):
        judged += " (a fifth of the subset: rows of before `--validate` took those outside it)"
    return (
        f"### {config['name']}, {budget}\n\n{config['model']} {config['model_arguments']}, {config['samples'][0]:,} "
        f"training samples, {config['epochs']} epochs, {config['precision']}; judged by {judged}; mean ± standard "
        "deviation over seeds, differences paired by seed.\n\nCommand: `torchgrow compare "
        f"{config['name']}{options(config)}`. Measured on {machine(found, 'versions')}.\n\n"
        + grid(head, body)
        + f"\n\n{won_back(some, metric)}"
    ).rstrip()


def won_back(some: list[Row], metric: Metric) -> str:
    """How much of what the uniform twin loses to the dense network growing wins back, on the seeds of all three."""
    whole = of_common_seeds(some, "dense", "uniform", "default")
    if not whole:
        return ""
    dense, grown = (sum(difference(whole, name, "uniform")[0]) for name in ("dense", "default"))
    counted = f"(counted on seed {', '.join(str(seed) for seed in sorted({row['seed'] for row in whole}))})."
    if (-dense if metric.lower_is_better else dense) <= 0:
        return f"The dense network is no better than the uniform twin here, so there is no gap to win back {counted}"
    return f"Of the way from uniform to dense, default goes {100 * grown / dense:.0f} % {counted}"


def along(budgets: dict[str, list[Row]]) -> str:
    """One table: growing beside the uniform twin at every budget, on the seeds that both have."""
    body, first = [], next(iter(budgets.values()))
    metric = metric_of(next(row for row in first if "error" not in row))
    for budget, some in sorted(budgets.items(), key=lambda item: item[0].rpartition(" ")):
        both = of_common_seeds(some, "uniform", "default")
        if not both:
            continue
        twin, grown = ([row for row in both if row["method"] == name] for name in ("uniform", "default"))
        costs = [(part, mine) for part in ("params", "flops", "train_flops") for mine in (twin, grown)]
        body.append(
            [
                budget,
                str(len(grown)),
                *(spread([row[metric.name] for row in mine]) for mine in (twin, grown)),
                gap(both, "default", "uniform"),
                *(f"{statistics.mean(row[part] / row[f'dense_{part}'] for row in mine):.3f}" for part, mine in costs),
            ]
        )
    unit = f"{metric.name}{metric.unit.rstrip()}"
    head = ["budget", "n", f"uniform, {unit}", f"default, {unit}", "default minus uniform (95 % interval)"]
    for cost in ("parameters", "FLOPs", "all training FLOPs"):
        head += [f"uniform, {cost} / dense", f"default, {cost} / dense"]
    return f"### {first[0]['recipe']}: growing beside the uniform twin along the budgets\n\n" + grid(head, body)


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
        f"{found[0]['checkpoint_every']} steps, killed by SIGKILL again and again and gone on with by `--resume`. "
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
        "blocks of the stages, by seed",
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
        "Saved models (formats 1 and 2) and checkpoints with one of their files mutated, most with checksums that fit "
        "again; 2 GB of address space beyond what the process needed before.\n\nCommand: "
        f"`python benchmarks/fuzz_files.py`. Measured on {machine(found)}.\n\n" + grid(["", "count"], body)
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


def page() -> str:
    """The whole page."""
    parts = [
        "# Results\n\nMade from the files in `results/` by `python benchmarks/tables.py`, all of it.",
        comparisons(),
        "## Layers and channels\n\n" + depth(),
        "## Exactness\n\n" + exactness(rows("exactness.jsonl")),
        "## Models people use\n\n" + conformance(rows("conformance.jsonl")),
        "## Random networks\n\n" + random_networks(rows("random-networks.jsonl")),
        "## Random networks in training mode\n\n" + training_networks(rows("training-networks.jsonl")),
        "## Seconds to trace\n\n" + tracing(),
        "## Several processes\n\n" + ranks(),
        "## Killed and gone on with\n\n" + killed(),
        "## Damaged files\n\n" + damaged(),
        "## Memory over updates\n\n" + memory(),
        "## Cost of a training step\n\n"
        + timings(
            "step-overhead.jsonl",
            "python benchmarks/step_overhead.py",
            "One training step of a live network, hooks included, over one of the same architecture written by hand.",
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
            "held at multiples of 8 (`Method.align`).",
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the page and its pictures, or check that it is up to date and they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    text, drawn = page(), alike()
    if parser.parse_args().check:
        there = {path.name for path in PICTURES.glob("*")} == set(drawn)
        return 0 if PAGE.exists() and PAGE.read_text() == text and there else 1
    PAGE.write_text(text)
    PICTURES.mkdir(exist_ok=True)
    for path in PICTURES.glob("*"):
        if path.name not in drawn:
            path.unlink()  # of rows that are gone
    for name, found in drawn.items():
        draw(found, PICTURES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
