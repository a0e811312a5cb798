"""Comparisons as Markdown: which rows stand beside each other, what they are called, and what they come to."""

import json
import statistics
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchgrow import TorchgrowError
from torchgrow.lab import recipes
from torchgrow.lab.compare import Job, after, growing
from torchgrow.lab.metrics import PERPLEXITY, Metric, metric_of
from torchgrow.lab.names import RECIPES
from torchgrow.lab.results import by_budget, difference
from torchgrow.lab.systems import system

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


def alike(folder: Path) -> dict[str, list[Row]]:
    """Rows of `torchgrow compare` that differ in method, seed and budget only, by the name of their picture.

    Args:
        folder: of results files.
    """
    pictures: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        settings = by_setting([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        pictures |= {f"{path.stem}-{number}.png": found for number, found in enumerate(settings, start=1)}
    return pictures


LEAST_GAP = 0.005
"""Of the dense network's score, from which on one to the uniform network is one."""

VARYING = (
    "seed",
    "budget",
    "method",
    "growing",
    "preset",
    "epochs",
    "depth",
    "meta",
    "updates_per_epoch",
    "system",
)
"""Settings that may differ between rows that stand beside each other."""


def by_setting(rows: list[Row]) -> list[list[Row]]:
    """Rows of one recipe that differ in method, seed and budget only; `label` becomes their method.

    Threads are those that were used, asked for or not. The same network, measured twice, counts once: the first time.
    """
    settings: dict[str, dict[tuple[str, ...], Row]] = defaultdict(dict)
    for row in rows:
        same = {key: value for key, value in row["config"].items() if key not in VARYING}
        same["threads"] = row.get("versions", {}).get("threads") or same.get("threads")
        row["method"] = label(row)
        setting = json.dumps([same, row["config"]["epochs"]], sort_keys=True)
        settings[setting].setdefault((row["method"], str(row["budget"]), str(row["seed"])), row)
    return [list(found.values()) for found in settings.values()]


def _scaled(name: str, config: Row) -> tuple[recipes.Recipe, bool]:
    """The recipe as it is now, and whether at full scale: where settings have all its epochs and all samples."""
    recipe = recipes.get(name)
    with suppress(TorchgrowError):  # not all have scales
        full = recipes.with_scale(recipe, "full")
        if config["epochs"] == full.epochs != recipe.epochs and config.get("subset") is None:
            return full, True
    return recipe, False


def label(row: Row) -> str:
    """The method; with the option that lets layers grow, or not, if the recipe differs; and what a preset was then."""
    method: str = row["method"]
    if "system" in row["config"]:
        return method + _since(method, row["config"]["system"])
    then = row["config"].get("growing")
    if then is None or row["recipe"] not in RECIPES:  # of a recipe in a file nobody knows what it was then
        return method
    recipe, depth = _scaled(row["recipe"], row["config"])[0], row["config"]["depth"]
    recipe = replace(recipe, epochs=row["config"]["epochs"])
    suffix = "" if depth == recipe.depth else " --depth" if depth else " --no-depth"
    job = Job(method=after(method) or method, recipe=recipe, data=())
    try:
        now = growing(job.preset(), layers=depth)
    except TorchgrowError:  # of a way that is gone
        return method
    if depth:
        then = {"layer_lag": 1.0, **then}  # before there was such a thing, layers came as channels did
    if then["controller"] == "pressure":  # before there was a choice
        then = {"penalised": "all", "start": 1.0, "paced": False, **then}
    now["updates_per_epoch"] = replace(recipe, preset=job.preset()).updates_an_epoch()
    often = row["config"]["updates_per_epoch"] or (4 if then["draws"] == "ranked" else 1)  # as it was once
    then = {**then, "updates_per_epoch": often}
    changed = ", ".join(f"{key}={then[key]}" for key in then if then[key] != now.get(key))
    return f"{method}{suffix}, then with {changed}" if changed else method + suffix


def _since(method: str, then: Row) -> str:
    """What of a system's constants was not there yet, or was another, when a row was made."""
    now = json.loads(json.dumps(asdict(system(method))))
    changed = ", ".join(
        f"{key}={then[key]}" if key in then else f"no {key}" for key in now if then.get(key) != now[key]
    )
    return f", then with {changed}" if changed else ""


SECTIONS = {
    "now": "What `torchgrow compare` has found, on data that nothing was chosen by. A method is named with the option "
    "it needs where its recipe says otherwise (`default --no-depth`: no layers grow).",
    "What was chosen by": "Judged by training images that were held out, never by the test images. `default:...` is "
    'the default with what follows changed, so "default minus it" is what that ingredient is worth.',
    "Earlier ways to grow": 'Rows from before a way to grow was changed, named with what was different ("then with").',
}
"""Where rows of `torchgrow compare` stand, in this order, and what is said of them; all but the first at the end."""


def section(found: list[Row]) -> str:
    """Which of the sections rows of one setting belong to."""
    now, held_out, then = SECTIONS
    grown = [row["method"] for row in found if "growing" in row["config"]]
    if grown and all("then with" in method for method in grown):
        return then
    return held_out if found[0]["config"]["validate"] else now


def comparisons(folder: Path, pictures: str) -> str:
    """What holds now: a table for each recipe, its settings and budget, and a picture.

    Args:
        folder: of results files.
        pictures: where pictures are, as the page names it.
    """
    parts = _parts(folder, pictures)["now"]
    return "\n\n".join([SECTIONS["now"], *parts]) if parts else "Not measured yet."


def appendix(folder: Path, pictures: str) -> str:
    """What was chosen by, and earlier ways to grow; arguments as for `comparisons`."""
    parts = _parts(folder, pictures)
    shown = [[f"## {title}", SECTIONS[title], *some] for title, some in parts.items() if title != "now" and some]
    return "\n\n".join(part for some in shown for part in some) or "Nothing yet."


def _parts(folder: Path, pictures: str) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {title: [] for title in SECTIONS}
    for name, found in alike(folder).items():
        budgets = by_budget(found)
        tables = [along(budgets)] * (len(budgets) > 1)
        tables += [compared(found, budget, some) for budget, some in budgets.items()]
        title = f"{found[0]['recipe']}: score against training cost, and along the budgets if there are several"
        several = len({row["method"] for row in found}) > 1  # a single method is compared with nothing
        parts[section(found)] += [*tables, *([f"![{title}]({pictures}/{name})"] if several else [])]
    return parts


def length(config: Row) -> str:
    """How long and how rows were trained, in a few words: what tells settings of one recipe apart."""
    more = f" and {config['then']} more" if config.get("then") else ""
    words = f"{config['epochs']}{more} epochs of {config['samples'][0]:,}, {config['schedule']}"
    words += f", up to {config['largest_batch']:,} a step" if config.get("largest_batch") else ""
    words += f", {config['precision']}" if config["precision"] != "float32" else ""
    return words + ", held out" * config["validate"]


def _twins(found: list[Row]) -> list[Row]:
    """Rows of the seeds at which growing and the uniform network were both measured, at any budget."""
    return [row for some in by_budget(found).values() for row in of_common_seeds(some, "uniform", "default")]


def own_schedule(config: Row) -> bool:
    """Whether rows were trained under the learning-rate schedule that their recipe has now."""
    return bool(config["schedule"] == _scaled(config["name"], config)[0].schedule)


def summary(folder: Path, *, briefly: bool = False) -> str:
    """One table of what holds now: every recipe and budget at which grown and uniform networks were measured.

    Args:
        folder: of results files.
        briefly: leave out rows under another schedule than the recipe's, where there are some under its own.
    """
    body = []
    settings = [found for found in alike(folder).values() if section(found) == "now" and _twins(found)]
    own = {found[0]["recipe"] for found in settings if own_schedule(found[0]["config"])}
    for found in settings:
        if briefly and found[0]["recipe"] in own and not own_schedule(found[0]["config"]):
            continue
        for budget, some in by_budget(found).items():
            both = of_common_seeds(some, "uniform", "default")
            if not both:
                continue
            metric = metric_of(both[0])
            grown = [row for row in both if row["method"] == "default"]
            scores = {
                method: [row[metric.name] for row in some if row["method"] == method and "error" not in row]
                for method in ("default", "uniform", "direct", "dense")
            }
            task = f"{found[0]['config']['name']}, {budget.replace('<=', 'at most')}, {length(found[0]['config'])}"
            body.append(
                [
                    f"{task} ({metric.name}{metric.unit.rstrip()})",
                    *(f"{spread(values)} ({len(values)})" if values else "" for values in scores.values()),
                    gap(some, "default", "uniform"),
                    f"{statistics.mean(row['train_flops'] / row['dense_train_flops'] for row in grown):.2f}",
                ]
            )
    head = ["task", "grown", "uniform", "direct", "dense", "grown minus uniform", "training FLOPs / dense"]
    text = (
        "Grown: `default`. Uniform: the same network with every width narrowed by one factor, to the same budget. "
        "Direct: the structure that was grown, from scratch. Mean ± standard deviation (number of seeds); differences "
        "paired by seed, with a 95 % interval from three seeds on, and both of two. Of a perplexity, lower is better. "
        "Epochs are of so many images or words; the learning rate drops in steps (milestones), falls from the start "
        "(linear) or stays until it falls over the last 30 % (wsd)."
    )
    return f"{text}\n\n{grid(head, body)}" if body else "Not measured yet."


def options(config: Row) -> str:
    """The options of `torchgrow compare` that give this configuration, but for methods, seeds and budgets."""
    (scaled, full), shortcut = _scaled(config["name"], config), config["model_arguments"].get("shortcut")
    recipe = scaled.as_json()
    fields = ("subset", "epochs", "lr", "schedule", "precision", "threads", "then")
    given = [f" --{field} {config[field]}" for field in fields if config[field] != recipe[field]]
    large = config.get("largest_batch")
    given += [f" --largest-batch {large}"] if large else []
    given += [" --channels-last"] * config.get("channels_last", False)
    if shortcut != recipe["model_arguments"].get("shortcut"):
        given.append(f" --shortcut {shortcut}")
    return " --scale full" * full + "".join(given) + (" --validate" if config["validate"] else "")


def gap(some: list[Row], a: str, b: str) -> str:
    """Mean difference of two methods over the seeds that both have, with its 95 % interval; of two, their range."""
    gaps, half = difference(some, a, b)
    if a == b or not gaps:
        return ""
    if len(gaps) == 2:
        return f"{statistics.mean(gaps):+.2f} ({min(gaps):+.2f}, {max(gaps):+.2f})"
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
        f"### {config['name']}, {budget}, {length(config)}\n\n"
        f"{config['model']} {config['model_arguments']}; judged by {judged}; mean ± standard deviation over seeds, "
        "differences paired by seed.\n\nCommand: `torchgrow compare "
        f"{config['name']}{options(config)}`. Measured on {machine(found, 'versions')}.\n\n"
        + grid(head, body)
        + f"\n\n{won_back(some, metric)}"
    ).rstrip()


def won_back(some: list[Row], metric: Metric) -> str:
    """How much of what the uniform network loses to the dense network growing wins back, on the seeds of all three."""
    whole = of_common_seeds(some, "dense", "uniform", "default")
    if not whole:
        return ""
    dense, grown = (sum(difference(whole, name, "uniform")[0]) for name in ("dense", "default"))
    counted = f"(counted on seed {', '.join(str(seed) for seed in sorted({row['seed'] for row in whole}))})."
    score = sum(row[metric.name] for row in whole if row["method"] == "dense")
    if (-dense if metric.lower_is_better else dense) <= LEAST_GAP * score:
        return f"The dense network is hardly better than the uniform network here, or not: no gap to win back {counted}"
    return f"Of the way from uniform to dense, default goes {100 * grown / dense:.0f} % {counted}"


def along(budgets: dict[str, list[Row]]) -> str:
    """One table: growing beside the uniform network at every budget, on the seeds that both have."""
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
    how = length(first[0]["config"])
    return f"### {first[0]['recipe']}, {how}: growing beside the uniform network by budget\n\n" + grid(head, body)
