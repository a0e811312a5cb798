"""Results files and run folders written by hand, as if something had been trained."""

import json
from pathlib import Path
from typing import Any

DENSE = {"params": 1000, "flops": 9000}
EPOCHS, SAMPLES = 4, 100
TRAINED = 3 * DENSE["flops"] * SAMPLES * EPOCHS


def epochs(score: float, flops: int, *, grown: bool = False, literal: bool = False) -> list[dict[str, Any]]:
    """Four epochs that end with a score; what grows gains units from epoch to epoch."""
    found = []
    for number in range(1, EPOCHS + 1):
        share = number / EPOCHS if grown else 1.0
        widths = {"stem": round(8 * share), "stage1.0.conv": round(16 * share), "stage1.1.conv": round(16 * share)}
        epoch = {
            "epoch": number,
            "loss": 2.0 / number,
            "test_loss": 2.1 / number,
            "accuracy": score - 5 * (EPOCHS - number),
            "perplexity": None,
            "params": round(400 * share) if grown else 400,
            "flops": round(flops * share),
            "training_flops": 3 * flops * SAMPLES * number,
            "seconds": 1.5 * number,
            "lr": 0.1,
            "widths": widths if grown else {},
            "depths": {"stage1": min(number, 2)} if grown else {},
            "pressure": 0.01 * (number - 3) if literal else 0.0 if grown else None,
            "temperature": dict.fromkeys(widths, 2.0**number) if literal else {},
            "born": 0,
            "regrown": 0,
            "detached": 0,
        }
        found.append(epoch)
    return found


def row(method: str, seed: int, score: float, budget: str | None = "params <= 40%", **other: Any) -> dict[str, Any]:
    """A line of a results file: a network of 400 parameters, the dense one of 1000."""
    grown = method.partition(":")[0] in ("default", "paper", "global", "random")
    literal = method.startswith("paper")
    cost = DENSE if method == "dense" else {"params": 400, "flops": 3600}
    config: dict[str, Any] = {"name": "mine", "dataset": "digits", "depth": False, "epochs": EPOCHS, "then": 0}
    config |= {"schedule": "linear", "lr": 0.1, "model": "Net", "model_arguments": {}, "samples": [SAMPLES, 50]}
    config |= {"validate": False, "batch_size": 10, "method": method, "seed": seed}
    if grown:
        config["growing"] = {"controller": "pressure" if literal else "plan"}
    return {
        "recipe": "mine",
        "method": method,
        "seed": seed,
        "budget": None if method == "dense" else budget,
        "config": config,
        "versions": {"torch": "2", "torchgrow": "0", "python": "3", "cpu": "a CPU", "cores": 2, "threads": 1},
        "accuracy": score,
        **cost,
        "dense_params": DENSE["params"],
        "dense_flops": DENSE["flops"],
        "train_flops": 3 * cost["flops"] * SAMPLES * EPOCHS,
        "train_flops_paper_rule": 3 * cost["flops"] * SAMPLES * EPOCHS,
        "dense_train_flops": TRAINED,
        "seconds": 6.0,
        "dense_seconds": 12.0,
        "epochs": epochs(score, cost["flops"], grown=grown, literal=literal),
        **other,
    }


def results_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A results file of `torchgrow compare`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def run_folder(path: Path, name: str = "mine") -> Path:
    """The folder of a finished run: a grown network, which changes in the middle of epochs, beside a dense one."""
    path.mkdir(parents=True)
    config = row("default", 0, 0.0)["config"] | {"name": name, "preset": "default", "budget": "params <= 40%"}
    config |= {"run": {"data": None}, "seed": 3}
    dense = [{"network": "dense", "updates": [], **one} for one in epochs(90.0, DENSE["flops"])]
    for one in dense:
        one["flops"], one["params"] = DENSE["flops"], DENSE["params"]
    grown: list[dict[str, Any]] = []
    live, spent = 1000, 0.0
    for one in epochs(91.0, 3600, grown=True, literal=True):
        updates = list[dict[str, Any]]()
        for at, flops in ((0.25, live + 100), (1.0, live + 400)):
            before = updates[-1]["epochs"] if updates else one["epoch"] - 1
            spent += 3 * live * SAMPLES * (one["epoch"] - 1 + at - before)
            live = flops
            updates.append({"epochs": one["epoch"] - 1 + at, "params": 400, "flops": flops, **_structure(one)})
        grown.append({"network": "grown", **one, "training_flops": round(spent), "updates": updates})
    results = {
        "dense": {"accuracy": 90.0, "perplexity": None, **DENSE, "training_flops": TRAINED, "seconds": 12.0},
        "grown": {"accuracy": 91.0, "perplexity": None, "params": 400, "flops": live, "training_flops": round(spent)},
    }
    results["grown"]["seconds"] = 6.0
    frame = {**DENSE, "limits": {"params": 400, "flops": None}, "blocks": {"stage1": 2}}
    frame["widths"] = {"stem": 8, "stage1.0.conv": 16, "stage1.1.conv": 32}
    files = {"config": config, "results": results, "frame": frame, "environment": row("dense", 0, 0.0)["versions"]}
    for file, value in files.items():
        (path / f"{file}.json").write_text(json.dumps(value))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*dense, *grown]))
    return path


def _structure(epoch: dict[str, Any]) -> dict[str, Any]:
    return {"widths": epoch["widths"], "depths": epoch["depths"]}
