"""Rows of evidence: what run folders and results files say, in the one form of `torchgrow compare`."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from torchgrow import Budget, Cost, TorchgrowError
from torchgrow.lab import recipes
from torchgrow.lab.compare import Rows, decisive
from torchgrow.lab.metrics import Metric, metric_of
from torchgrow.lab.names import FIXED, RECIPES
from torchgrow.lab.pages import Row, by_setting
from torchgrow.lab.results import by_budget

LITERAL = ("paper", "global", "nas")
"""Presets whose pressure is the lambda of the paper's Eq 4."""


@dataclass(frozen=True)
class Task:
    """Rows of one setting: they differ in method, seed and budget alone.

    Attributes:
        rows: all of them, those that failed too.
        metric: what they are judged by.
        beside: methods of all budgets of the setting, in whose order colours are given out.
    """

    rows: list[Row]
    metric: Metric
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the recipe."""
        return str(self.rows[0]["recipe"])

    @property
    def fine(self) -> list[Row]:
        """Rows that came to something: a finite score after at least one epoch."""
        return [row for row in self.rows if "error" not in row and isfinite(row[self.metric.name])]

    @property
    def judged_on(self) -> str:
        """What scores are of, in a word: "test", "validation" or "held-out"."""
        return "held-out" if self.config.get("validate") else self.metric.on

    @property
    def config(self) -> dict[str, Any]:
        """What all rows share."""
        return dict(self.rows[0]["config"])

    def methods(self) -> dict[str, list[Row]]:
        """Rows that came to something, by method; the dense network first, then the fixed ones, then the others."""
        names = dict.fromkeys(row["method"] for row in self.fine)
        order = sorted(names, key=lambda name: [*FIXED].index(name) if name in FIXED else len(FIXED))
        return {name: [row for row in self.fine if row["method"] == name] for name in order}

    def budgets(self) -> dict[str, "Task"]:
        """A task for every budget, that with most methods first; the dense network belongs to each."""
        all_of = tuple(self.methods())
        parts = {budget: Task(rows, self.metric, all_of) for budget, rows in by_budget(self.rows).items() if rows}
        return dict(sorted(parts.items(), key=lambda item: -len({row["method"] for row in item[1].fine})))

    def setting(self) -> str:
        """Network, data and length in one line."""
        config, samples = self.config, (self.config.get("samples") or [None])[0]
        seen = f"{samples:,} training samples" if samples else "training data"
        judged = "training images held out" if config.get("validate") else f"{self.metric.on} data"
        length = f"{config['epochs']} epochs" + (f" and {config['then']} more" if config.get("then") else "")
        lr = f"{config['schedule']} schedule from {config['lr']:g}"
        more = f", up to {config['largest_batch']:,} samples a step" if config.get("largest_batch") else ""
        more += f", {config['precision']}" if config.get("precision", "float32") != "float32" else ""
        more += ", channels last" if config.get("channels_last") else ""
        kind = config["model_arguments"].get("shortcut")
        model = f"{config['model']} (shortcuts {kind})" if kind else config["model"]
        return f"{model} on {config['dataset']}: {seen}, {length}, {lr}{more}, judged by {judged}"


def grows(row: Row) -> bool:
    """Whether the structure of a row's network was grown by a policy."""
    return any(epoch["widths"] for epoch in row["epochs"])


def literal(row: Row) -> bool:
    """Whether it was grown by indicators under a penalty, as the paper's."""
    controller = row["config"].get("growing", {}).get("controller", "pressure")
    return grows(row) and row["method"].startswith(LITERAL) and controller == "pressure"


def limits(row: Row) -> dict[str, int]:
    """What a row's budget allows, by "params" and "flops"; empty for the dense network."""
    if row["budget"] is None:
        return {}
    budget = Budget.read(row["budget"].replace(" <= ", "=").replace(" and ", ","))
    found = budget.limits(Cost(row["dense_params"], row["dense_flops"]))
    return {part: limit for part in ("params", "flops") if (limit := getattr(found, part)) is not None}


def read(sources: Sequence[Path]) -> list[Task]:
    """All rows that are in some places, by setting.

    Args:
        sources: run folders, results files of `torchgrow compare`, or folders of such files.

    Raises:
        TorchgrowError: there is nothing to read, or it is damaged.
    """
    rows = list({json.dumps(row, sort_keys=True): row for source in sources for row in _rows(source)}.values())
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"]].append(row)
    tasks = [found for some in groups.values() for found in by_setting(some)]
    return [Task(found, metric_of(next((row for row in found if "error" not in row), {}))) for found in tasks]


def _rows(source: Path) -> list[Row]:
    if source.suffix == ".jsonl" and source.is_file():
        return _compared(source)
    if (source / "results.json").is_file():
        return _of_run(source)
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else []
    if not files or (source / "config.json").exists():
        raise TorchgrowError(
            f"{source} holds nothing to report: name the folder of a finished run (with results.json), a results file "
            "of torchgrow compare (.jsonl), or a folder of those"
        )
    return [row for file in files for row in _compared(file)]


def _compared(file: Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        TorchgrowError: it is one of other measurements.
    """
    rows = Rows(file).read()
    if not all(isinstance(row, dict) and {"recipe", "method", "config"} <= row.keys() for row in rows):
        raise TorchgrowError(
            f"{file} holds no rows of torchgrow compare, but of another measurement; leave it out: name the folder "
            "results/compare, or files in it"
        )
    return rows


def _of_run(folder: Path) -> list[Row]:
    """The networks of a run folder as rows; what only `torchgrow compare` counts is left out or None."""
    try:
        config, frame, results, here = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("config", "frame", "results", "environment")
        )
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        told = config["run"].get("samples")
        single = told and records[-1]["epoch"] == 1  # no epoch before it to count from
        seen = told[0] if single else _samples(records, frame, taught=config.get("distil", 0) > 0)
        same = {key: value for key, value in decisive(config).items() if key not in ("run", "text", "search")}
        same |= {
            "samples": told or [seen],
            "validate": bool(config.get("search", {}).get("validate")),
        }
        length = 3 * frame["flops"] * seen * (config["epochs"] + config["then"])
        return [
            {
                "recipe": config["name"],
                "method": _method(network, config),
                "seed": config["seed"],
                "budget": _budget(network, config["budget"]),
                "config": same,
                "versions": here,
                metric_of(found).name: found[metric_of(found).name],
                **({"test_perplexity": found["test_perplexity"]} if found.get("test_perplexity") else {}),
                **{part: found[part] for part in ("params", "flops", "seconds")},
                "train_flops": found["training_flops"],
                "train_flops_paper_rule": None,
                "dense_params": frame["params"],
                "dense_flops": frame["flops"],
                "dense_train_flops": length,
                "dense_seconds": results.get("dense", {}).get("seconds"),
                "full_widths": frame["widths"],
                "epochs": [record for record in records if record["network"] == network],
                "source": str(folder),
            }
            for network, found in results.items()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise TorchgrowError(f"{folder} is damaged: {error!r}; leave it out") from error


def _samples(records: list[dict[str, Any]], frame: dict[str, Any], *, taught: bool) -> int:
    """Training samples of an epoch, from the FLOPs it took: 3 x forward x samples, between one update and the next.

    Args:
        records: lines of ``metrics.jsonl``.
        frame: what ``frame.json`` holds.
        taught: whether the network before is run for every sample, as a teacher.
    """
    last = records[-1]
    before = next(r for r in records if r["network"] == last["network"] and r["epoch"] == last["epoch"] - 1)
    flops, at, each = (before["updates"] or [before])[-1]["flops"], float(before["epoch"]), 0.0
    for update in last["updates"] or [{**last, "epochs": last["epoch"]}]:
        each += 3 * flops * (update["epochs"] - at)
        flops, at = update["flops"], update["epochs"]
    return round((last["training_flops"] - before["training_flops"]) / (each + taught * frame["flops"]))


def in_words(budget: str) -> str:
    """A budget as people say it: "params <= 8%" is "at most 8 % of the parameters"."""
    limits = []
    for limit in budget.split(" and "):
        part, _, amount = limit.partition(" <= ")
        name = {"params": "parameters", "flops": "FLOPs"}.get(part, part)
        limits.append(f"{amount[:-1]} % of the {name}" if amount.endswith("%") else f"{int(amount):,} {name}")
    return f"at most {' and '.join(limits)}"


def _method(network: str, config: dict[str, Any]) -> str:
    """What `torchgrow compare` calls a network of a run."""
    if network in ("grown", "shrunk"):
        preset, own = str(config["preset"]), recipes.get(config["name"]) if config["name"] in RECIPES else None
        depth = "" if own is None or config["depth"] == own.depth else " --depth" if config["depth"] else " --no-depth"
        return ("default" if own and preset == own.preset else preset) + depth
    return network.partition("=")[0] if network.startswith("uniform") else network


def _budget(network: str, budget: str) -> str | None:
    share = network.partition("=")[2] if network.startswith("uniform=") else ""
    return f"params <= {share}" if share else None if network in ("dense", "before") else budget
