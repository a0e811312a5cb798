"""Everything that wants a GPU, in the order of its worth, each part with a time limit and rows as it goes.

    python benchmarks/gpu.py --data FOLDER [--out FOLDER] [--minutes 14] [--parts tests steps resnet20 vgg16]

Parts:

- `tests`: the laws on the device (tests/devices), with what only CUDA has.
- `steps`: what a policy costs in a training step, and what an update costs.
- `resnet20`: the paper's ResNet-20 at its full schedule (160 epochs, 50,000 images), a process for every method and
  seed: paper, dense, uniform at equal parameters and at equal FLOPs, the default, and L1 pruning.
- `vgg16`: VGG-16 to 5 % of its parameters, full schedule: paper, dense, uniform.

What is left of the minutes is shared out by the weights below. Stopped by its limit, a comparison goes on where it was
if it is called again with the same folder. `--device cpu` tries the script out: with `--epochs 1 --subset 256`.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parent.parent
WEIGHTS = {"tests": 2.0, "steps": 1.5, "resnet20": 8.5, "vgg16": 2.0}
METHODS = {
    "resnet20": ("paper", "dense", "uniform", "uniform-flops", "default", "l1"),
    "vgg16": ("paper", "dense", "uniform"),
}
RECIPES = {"resnet20": "resnet20-cifar10", "vgg16": "vgg16-cifar10"}

Command = tuple[str, list[str]]
"""What it is called, and what is run."""


def commands(part: str, arguments: argparse.Namespace) -> list[Command]:
    """What a part runs, side by side."""
    out, device = arguments.out, arguments.device
    python, measured = sys.executable, ["--device", device, "--results"]
    if part == "tests":
        return [("tests", [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "devices")])]
    if part == "steps":
        policies = [
            python,
            str(ROOT / "benchmarks" / "step_by_policy.py"),
            *measured,
            str(out / "step-by-policy.jsonl"),
        ]
        updates = [python, str(ROOT / "benchmarks" / "update_cost.py"), *measured, str(out / "update-cost.jsonl")]
        return [("steps", ["sh", "-c", f"{' '.join(policies)}; {' '.join(updates)}"])]  # one after the other
    found = []
    for seed in range(arguments.seeds):
        for method in METHODS[part]:
            asked = [python, "-m", "torchgrow", "compare", RECIPES[part], "--scale", "full", "--methods", method]
            asked += ["--first-seed", str(seed), "--seeds", "1", "--device", device, "--precision", "bfloat16"]
            asked += ["--data", str(arguments.data), "--out", str(out / f"{part}-{method}-{seed}"), "--channels-last"]
            for option in ("epochs", "subset"):
                value = getattr(arguments, option)
                asked += [f"--{option}", str(value)] if value is not None else []
            found.append((f"{part}-{method}-{seed}", asked))
    return found


def run(several: Sequence[Command], seconds: float, out: Path) -> dict[str, int | None]:
    """Run commands side by side; those that are not through by then are stopped, as Ctrl-C would.

    Returns:
        Exit codes by name; None for those that were stopped.
    """
    paths = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    end = time.monotonic() + seconds
    started = {}
    for name, command in several:
        with (out / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
        started[name] = process
    codes: dict[str, int | None] = {}
    for name, process in started.items():
        try:
            codes[name] = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            codes[name] = None
    for name, process in started.items():
        if codes[name] is None:
            os.killpg(process.pid, 2)
    for process in started.values():
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    return codes


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="rows and logs")
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--subset", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out, arguments.data = arguments.out.absolute(), arguments.data.absolute()
    if arguments.device == "cpu":
        os.environ["TORCHGROW_DEVICE"] = "emulated"
    console, end, bad = Console(), time.monotonic() + 60 * arguments.minutes, 0
    for number, part in enumerate(arguments.parts):
        left = end - time.monotonic()
        share = WEIGHTS[part] / sum(WEIGHTS[later] for later in arguments.parts[number:])
        for name, code in run(commands(part, arguments), left * share - 20, arguments.out).items():
            said = "through" if code == 0 else "stopped by its time limit" if code is None else f"FAILED ({code})"
            console.print(f"{name}: {said}; {arguments.out / name}.log", highlight=False, soft_wrap=True)
            bad += code not in (0, None)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
