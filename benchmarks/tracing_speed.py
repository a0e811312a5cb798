"""How long label tracing takes: beside Torch-Pruning, by the number of operations, and of frames too large to run.

    OMP_NUM_THREADS=1 python benchmarks/tracing_speed.py [--repeats 9] [--cases side:resnet50 size:llama-7b ...]

Needs `pip install '.[zoo]'`. The proof is not part of it. Three kinds of cases, each in a process of its own:

- side: `replay` and `tp.DependencyGraph().build_dependency` in turns (A B, B A, ...) on the same model and example;
  a repeat gives one ratio of times.
- ops: seconds over the number of ATen operations of the forward, small and large members of a family.
- size: seconds and peak resident memory for frames on the meta device, whose weights are never made.

Every case is a line of results/tracing-speed.jsonl; cases that are there already from the same commit with the same
settings are not run again, unless `--again` is given.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from step_overhead import interval
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchgrow.lab.environment import environment
from torchgrow.tracing.tracer import replay

RESULTS = Path(__file__).parent.parent / "results" / "tracing-speed.jsonl"
CASES = (
    "side:resnet50", "side:densenet121", "side:vit_b_16",
    "ops:resnet18", "ops:resnet50", "ops:resnet152", "ops:densenet121", "ops:densenet201",
    "size:vit_h_14", "size:llama-7b",
)  # fmt: skip
LIMITS = {"vit_h_14": (20, None), "llama-7b": (60, 4000)}  # seconds, megabytes


class Count(TorchDispatchMode):
    """Counts ATen operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it."""
        self.operations += 1
        return func(*args, **(kwargs or {}))


def pictures(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A classifier of torchvision and two pictures."""
    side = 224  # the pictures that all these models were made for
    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, side, side)


def seconds(work: Any) -> float:
    """Seconds of wall-clock time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def side(name: str, repeats: int) -> dict[str, Any]:
    """Ratios to Torch-Pruning."""
    import torch_pruning

    model, x = pictures(name)

    def theirs() -> None:
        torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)

    def plain() -> None:
        with torch.no_grad():
            model(x)

    works = {"ours": lambda: replay(model, x), "theirs": theirs, "forward": plain}
    times: dict[str, list[float]] = {key: [] for key in works}
    for repeat in range(-2, repeats):
        for key in list(works)[:: 1 if repeat % 2 else -1]:
            took = seconds(works[key])
            if repeat >= 0:
                times[key].append(took)
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, high = interval(ratios)
    return {
        "case": f"{name}, 2 pictures of {x.shape[-1]}: tracing / Torch-Pruning's build_dependency",
        "ratio": statistics.median(times["ours"]) / statistics.median(times["theirs"]),
        "low": low,
        "high": high,
        **{f"seconds_{key}": statistics.median(values) for key, values in times.items()},
        "ratios": ratios,
        "target": 1.0,
    }


def operations(name: str, repeats: int) -> dict[str, Any]:
    """Seconds by the number of operations."""
    model, x = pictures(name)
    with torch.no_grad(), Count() as count:
        model(x)
    times = [seconds(lambda: replay(model, x)) for _ in range(repeats + 1)][1:]
    took = statistics.median(times)
    return {
        "case": name,
        "operations": count.operations,
        "seconds": took,
        "low": min(times),
        "high": max(times),
        "microseconds_per_operation": 1e6 * took / count.operations,
    }


def size(name: str) -> dict[str, Any]:
    """Seconds and memory of one trace on the meta device."""
    if name == "vit_h_14":
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        example: Any = torch.randn(1, 3, 224, 224)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(use_cache=False))
        example = {"input_ids": torch.randint(0, 100, (1, 16)), "use_cache": False}
    before = peak_megabytes()
    took = seconds(lambda: replay(model, example))
    limits = LIMITS[name]
    return {
        "case": f"{name} on the meta device",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": took,
        "most_seconds": limits[0],
        "megabytes": peak_megabytes(),
        "megabytes_before": before,
        "most_megabytes": limits[1],
    }


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    scale = 1e-6 if sys.platform == "darwin" else 1.024e-3  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def measure(case: str, repeats: int) -> dict[str, Any]:
    """One case, in this process."""
    warnings.filterwarnings("ignore")  # Torch-Pruning's about parameters outside of modules
    torch.manual_seed(0)
    kind, _, name = case.partition(":")
    row = side(name, repeats) if kind == "side" else operations(name, repeats) if kind == "ops" else size(name)
    return {"kind": kind, "model": name, "repeats": 1 if kind == "size" else repeats, **row}


def shown(row: dict[str, Any]) -> str:
    """A line about a case."""
    if row["kind"] == "side":
        verdict = "within" if row["ratio"] <= row["target"] else "ABOVE"
        return (
            f"{row['case']}: {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}], {verdict} {row['target']:g} "
            f"({row['seconds_ours']:.3f} s and {row['seconds_theirs']:.3f} s, the forward alone "
            f"{row['seconds_forward']:.3f} s)"
        )
    if row["kind"] == "ops":
        each = row["microseconds_per_operation"]
        return f"{row['case']}: {row['operations']} operations in {row['seconds']:.3f} s, {each:.0f} µs each"
    return (
        f"{row['case']}: {row['parameters'] / 1e9:.2f} billion parameters, "
        f"{row['seconds']:.1f} s, peak {row['megabytes']:.0f} MB ({row['megabytes_before']:.0f} MB before)"
    )


def main() -> None:
    """Measure what is missing and print everything of this commit and these settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--one", choices=CASES, help="measure one case in this process and print it as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(measure(arguments.one, arguments.repeats)) + "\n")
        return
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    console, here = Console(), environment()
    for case in track(arguments.cases, "tracing", console=Console(stderr=True)):
        kind, _, name = case.partition(":")
        settings = {"kind": kind, "model": name, "repeats": 1 if kind == "size" else arguments.repeats}
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        found = [
            row
            for row in rows
            if all(row[key] == value for key, value in settings.items())
            and all(row["environment"][key] == here[key] for key in ("commit", "threads", "cpu"))
        ]
        if found and not arguments.again:
            row = found[-1]
        else:
            command = [sys.executable, __file__, "--one", case, "--repeats", str(arguments.repeats)]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {**json.loads(ran.stdout.splitlines()[-1]), "environment": here}
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        console.print(shown(row), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
