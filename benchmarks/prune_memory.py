"""How much memory does cutting a large language model take? `prune_` to 70 % without a proof.

    python benchmarks/prune_memory.py [--layers 2 4 8] [--hidden 4096]

A Llama of transformers with the widths of its 7-billion-parameter size, random weights in bfloat16 and fewer layers.
Each size runs in a process of its own. Resident memory is read every 10 ms while `prune_` runs; what Python and its
libraries take, measured before the model is built, is left out. `peak` is the most there was, as a multiple of the
model. Needs `pip install '.[zoo]'`. A line of results/prune-memory.jsonl for each size; what is there is not run again.
"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import torchgrow
from torchgrow import Budget
from torchgrow.lab.environment import environment

RESULTS = Path(__file__).parent.parent / "results" / "prune-memory.jsonl"
SHARE = "70%"


class Watch(threading.Thread):
    """Reads resident memory (bytes) until it is stopped; `most` is the largest seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._ended = 0, threading.Event()

    def run(self) -> None:
        """Read on."""
        while not self._ended.is_set():
            self.most = max(self.most, resident())
            time.sleep(0.01)

    def stop(self) -> int:
        """The largest seen."""
        self._ended.set()
        self.join()
        return max(self.most, resident())


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cut(layers: int, hidden: int) -> dict[str, Any]:
    """One size: built, cut, run once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(config(LlamaConfig, 1, 64))  # so that libraries are loaded before memory is read
    torchgrow.prune_(
        small, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, budget=Budget(params="90%"), proof=False
    )
    del small
    before = resident()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config(LlamaConfig, layers, hidden))
    torch.set_default_dtype(torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = {"input_ids": torch.randint(1000, (1, 8))}
    watch, start = Watch(), time.perf_counter()
    watch.start()
    cost = torchgrow.prune_(model, tokens, budget=Budget(params=SHARE), proof=False)
    seconds, most = time.perf_counter() - start, watch.stop()
    with torch.no_grad():
        finite = bool(model(**tokens).logits.isfinite().all())
    return {
        "model": f"Llama, hidden {hidden}, {layers} layers, bfloat16",
        "layers": layers,
        "hidden": hidden,
        "params": parameters,
        "bytes": size,
        "left": cost.params / parameters,
        "peak": (most - before) / size,
        "seconds": seconds,
        "runs": finite,
        "environment": environment(torch.device("cpu")),
    }


def config(kind: Any, layers: int, hidden: int) -> Any:
    """Widths of the 7-billion-parameter model for hidden 4096, else in proportion."""
    return kind(
        hidden_size=hidden,
        intermediate_size=11008 * hidden // 4096,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 128),
        num_key_value_heads=max(2, hidden // 128),
        vocab_size=32000 if hidden >= 4096 else 1000,
        use_cache=False,
    )


def main() -> None:
    """Run what has no row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked, console = parser.parse_args(), Console(stderr=True)
    lines = asked.results.read_text().splitlines() if asked.results.exists() else []
    done = {(row["layers"], row["hidden"]) for row in map(json.loads, lines)}
    for layers in asked.layers:
        if (layers, asked.hidden) in done:
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(cut, (layers, asked.hidden))
        with asked.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        console.print(f"{row['model']}: peak {row['peak']:.2f} x the model, {row['seconds']:.0f} s, {row['left']:.1%}")


if __name__ == "__main__":
    main()
