"""What a very deep frame costs before it has grown: a 42-42-42 ResNet on the meta device beside its seed alone.

    OMP_NUM_THREADS=1 python benchmarks/deep_frame.py [--blocks 42]

Three processes: the frame attached, the same network as small as the seed written by hand (one block of one channel
in each stage), and one that imports and builds nothing. Each takes the same training step. Compared are the bytes of
all tensors (network, bank, gates, optimizer) and the resident memory of the processes; the most that attaching took
on the way is said too. A line of results/deep-frame.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from torchgrow import Budget, Grower
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet

RESULTS = Path(__file__).parent.parent / "results" / "deep-frame.jsonl"


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def nbytes(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def one(case: str, blocks: int) -> dict[str, Any]:
    """Build, take a step, and weigh."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(2, 3, 32, 32)
    tensors: dict[str, int] = {}
    model: nn.Module = nn.Conv2d(3, 1, 1)
    grower = None
    if case == "frame":
        with torch.device("meta"):
            model = ResNet(depth=6 * blocks + 2, shortcut="B")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="20%"), updates=40, depth=True, seed=0)
    else:
        if case == "seed":
            model = ResNet(depth=8, widths=(1, 1, 1), shortcut="B")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    tensors["network"] = nbytes([*model.parameters(), *model.buffers()])
    tensors["optimizer"] = nbytes(
        v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
    )
    row: dict[str, Any] = {"resident": resident(), "most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if grower is not None:
        bank = grower.run.live.bank
        tensors["bank"] = nbytes(store.held for store in [*bank.full.values(), *bank.slots.values()])
        tensors["gates"] = nbytes(grower.run.live.raw().values())
        row |= {"layers": len(grower.space.blocks), "frame_params": grower.frame_cost.params, **vars(grower.cost())}
    return {**row, "tensors": tensors, "bytes": sum(tensors.values())}


def main() -> None:
    """Three processes, one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=42, help="in each of the three stages")
    parser.add_argument("--one", choices=("frame", "seed", "nothing"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(one(arguments.one, arguments.blocks)))
        return
    found: dict[str, Any] = {}
    for case in ("nothing", "seed", "frame"):
        command = [sys.executable, __file__, "--one", case, "--blocks", str(arguments.blocks)]
        found[case] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    row = {
        "blocks": arguments.blocks,
        **found,
        "bytes_ratio": found["frame"]["bytes"] / found["seed"]["bytes"],
        "resident_ratio": found["frame"]["resident"] / found["seed"]["resident"],
        "target": 1.2,
        "environment": environment(),
    }
    arguments.results.parent.mkdir(exist_ok=True)
    with arguments.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    Console().print_json(json.dumps({k: v for k, v in row.items() if k != "environment"}))


if __name__ == "__main__":
    main()
