"""Seconds of a training step by stage widths, over the full width, side by side: python benchmarks/step_by_width.py

Why `Default.align` exists: CPUs (and tensor cores) compute channels in blocks, so a width between two multiples of
the block costs what the next multiple costs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from torchgrow import measure
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet

RESULTS = Path(__file__).parent.parent / "results" / "step-by-width.jsonl"
FULL = (16, 32, 64)
WIDTHS = ((10, 19, 38), (8, 16, 40), (12, 20, 38), (8, 16, 32))


def main() -> None:
    """Interleave the widths step by step; one line per width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(arguments.batch, 3, 32, 32), torch.randint(10, (arguments.batch,))
    networks = {}
    for widths in (FULL, *WIDTHS):
        model = ResNet(depth=20, widths=widths)
        networks[widths] = model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), list[float]()
    for _ in range(arguments.repeats + 1):
        for model, optimizer, seconds in networks.values():
            start = time.perf_counter()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    full = measure(networks[FULL][0], images[:2])
    with RESULTS.open("a") as file:
        for widths in WIDTHS:
            model, _, seconds = networks[widths]
            ratios = sorted(
                a / b for a, b in zip(seconds[1:], networks[FULL][2][1:], strict=True)
            )  # the first warms up
            cost = measure(model, images[:2])
            share = (
                f"{100 * cost.params / full.params:.0f} % of parameters, {100 * cost.flops / full.flops:.0f} % of FLOPs"
            )
            row = {
                "case": f"{'-'.join(map(str, widths))} ({share})",
                "ratio": statistics.median(ratios),
                "low": ratios[0],
                "high": ratios[-1],
                "repeats": len(ratios),
                "environment": environment(),
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
