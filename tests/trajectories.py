"""Runs that a refactor must leave as they are: every structure and all final weights, in float64 on one thread.

benchmarks/trajectories.py records them, and compares two commits bit for bit.

Bits depend on the processor and the version of torch, so the file holds sums to compare up to rounding. Only public
names are used here, so that one copy of this file runs on both commits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planned import Planned
from torchgrow import Budget, Grower

GOLDEN = Path(__file__).parent / "golden" / "trajectories.json"
UPDATES, STEPS = 8, 2
SHORT, LONG = 4, 12
"""Classes of the images, and hidden units of the sequences."""


# --- models: float64, small, one of each kind ---


class Convolutions(nn.Module):
    """Two convolutions with a norm between, on images of 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, SHORT)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        scores: Tensor = self.head(hidden.mean((2, 3)))
        return scores


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.second(F.relu(self.norm(self.first(x))))
        return x + changed


class Layers(nn.Module):
    """Two stages of residual blocks that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.early = nn.Sequential(*[Block(8) for _ in range(4)])
        self.widen = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.late = nn.Sequential(*[Block(12) for _ in range(3)])
        self.head = nn.Linear(12, SHORT)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.late(self.widen(self.early(self.stem(x)))).mean((2, 3)))
        return scores


class Recurrent(nn.Module):
    """An LSTM whose state goes from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(5, LONG, batch_first=True), nn.Linear(LONG, SHORT)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, state = self.inner(x, state)
        return self.head(hidden[:, -1]), state


class Linear(nn.Linear):
    """Initialised by a rule that does not look at the width, so that a meta frame begins as a real one."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -0.3, 0.3)
        nn.init.uniform_(self.bias, -0.3, 0.3)


# --- runs ---


def images(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch of images."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    return (x,), torch.randint(0, SHORT, (8,), generator=generator)


def vectors(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same, flat."""
    (x,), target = images(step)
    return (x.flatten(1),), target


def sequences(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch of sequences."""
    (x,), target = images(step)
    return (x.flatten(1)[:, :35].reshape(8, 7, 5),), target


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer."""
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One of another kind."""
    return [torch.optim.AdamW(model.parameters(), 0.01)]


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One for matrices and kernels, one for the rest."""
    wide = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return [torch.optim.SGD(wide, 0.05, momentum=0.9), torch.optim.AdamW(rest, 0.01)]


PERSISTENT = Planned(ramp=0.03, peak=1.0, hold=0.45, settle=0.4, layer_lag=3.0)
ALIGNED = replace(PERSISTENT, peak=1.35, align=2, prune="worth", ranked=True, final_inverse_temperature=1.0)
Case = tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]
"""Model, data, optimizers, settings of the grower."""

CASES: dict[str, Case] = {
    "default": (Convolutions, images, sgd, {}),
    "default, gates and aligned": (Convolutions, images, sgd, {"policy": ALIGNED}),
    "persistent": (Convolutions, images, sgd, {"policy": PERSISTENT}),
    "paper": (Convolutions, images, sgd, {"preset": "paper"}),
    "gumbel": (
        Convolutions,
        images,
        sgd,
        {"preset": "paper:relaxation=gumbel,temperature=learning_rate"},
    ),
    "global": (Convolutions, images, sgd, {"preset": "global"}),
    "random": (Convolutions, images, sgd, {"preset": "random"}),
    "nas": (Layers, images, sgd, {"preset": "nas", "depth": True, "budget": Budget(params=1500)}),
    "layers": (
        Layers,
        images,
        sgd,
        {"preset": "default:ramp=0.5,hold=0.6", "depth": True, "budget": Budget(params="40%", flops="60%")},
    ),
    "layers, paper": (Layers, images, sgd, {"depth": True, "preset": "paper"}),
    "lstm, carried": (Recurrent, sequences, sgd, {"preset": "paper", "carried": {1: 1}}),
    "adamw": (Convolutions, images, adamw, {"preset": "paper"}),
    "two optimizers": (Convolutions, images, two, {"preset": "paper"}),
    "meta": (
        lambda: nn.Sequential(Linear(108, 20), nn.ReLU(), Linear(20, 16), nn.ReLU(), Linear(16, SHORT)),
        vectors,
        adamw,
        {},
    ),
}

PAPERS = ("paper", "gumbel", "global", "nas", "layers, paper", "lstm, carried", "adamw", "two optimizers")
FIRST = "penalised=all,start=1,paced=False"
"""How the paper was read first: the L1 norm over all units, one unit expected per group, constants as they are."""

for _name in PAPERS:
    *_parts, _settings = CASES[_name]
    _preset = _settings["preset"]
    CASES[f"{_name}, first reading"] = (
        *_parts,
        {**_settings, "preset": f"{_preset}{',' if ':' in _preset else ':'}{FIRST}"},
    )

EARLY = {"adamw": 4, "adamw, first reading": 4}
"""Runs that end before their time, by `finish`."""


def run(name: str, spoil: bool = False) -> dict[str, Any]:
    """One trajectory, on one thread, since others may add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(name, spoil)
    finally:
        torch.set_num_threads(threads)


def _run(name: str, spoil: bool) -> dict[str, Any]:
    """One trajectory.

    Args:
        name: of the case.
        spoil: begin from another seed of draws, so that other units come: what a check must notice.

    Returns:
        "structures": the live units of the seed and after every update, as hexadecimal text; "costs": parameters and
        FLOPs; "weights": for every parameter in the end its sum and its product with fixed random numbers;
        "bits": a digest of all final bits.
    """
    make, data, optimizers_of, settings = CASES[name]
    torch.manual_seed(0)
    with torch.device("meta" if name == "meta" else "cpu"):
        model = make().double()
    optimizers = optimizers_of(model)
    inputs, _ = data(0)
    state: Any = None
    if "carried" in settings:
        state = (torch.zeros(1, 8, LONG, dtype=torch.float64), torch.zeros(1, 8, LONG, dtype=torch.float64))
        inputs = (*inputs, state)
    grower = Grower(
        model,
        optimizers,
        example_inputs=inputs,
        updates=UPDATES,
        **{"budget": Budget(params="50%"), "seed": 1 if spoil else 0, **settings},
    )
    state = grower.carry(state) if state is not None else None
    structures, costs = [], []

    def note() -> None:
        keep = grower.state_dict()["keep"]
        structures.append("".join("01"[int(one)] for one in keep))
        costs.append([grower.cost().params, grower.cost().flops])

    note()
    for update in range(EARLY.get(name, UPDATES)):
        for step in range(STEPS):
            x, target = data(STEPS * update + step)
            out = model(*x) if state is None else model(*x, state)
            if state is not None:
                out, state = out
                state = tuple(part.detach() for part in state)
            F.cross_entropy(out, target).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        grower.update()
        state = grower.carry(state) if state is not None else None
        note()
    if not grower.finished:
        grower.finish()
        note()
    structures = [f"{len(bits)}:{int(bits, 2):x}" for bits in structures]
    return {"structures": structures, "costs": costs, **_of_weights(model)}


def _of_weights(model: nn.Module) -> dict[str, Any]:
    """Each parameter's sum and product with fixed random numbers, and a digest of all bits."""
    weights, digest = {}, hashlib.sha256()
    for number, (key, parameter) in enumerate(model.named_parameters()):
        values = parameter.detach().flatten()
        against = torch.randn(values.numel(), generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        weights[key] = [float(values.sum()), float(values @ against)]
        digest.update(values.numpy().tobytes())
    return {"weights": weights, "bits": digest.hexdigest()}


def differences(golden: dict[str, Any], found: dict[str, Any], tolerance: float = 1e-9) -> list[str]:
    """What of a trajectory is not as recorded: structures and costs exactly, weights up to rounding."""
    wrong = [key for key in ("structures", "costs") if golden[key] != found[key]]
    if golden["weights"].keys() != found["weights"].keys():
        return [*wrong, "names of parameters"]
    for key, wanted in golden["weights"].items():
        scale = max(1.0, *map(abs, wanted))
        if any(abs(a - b) > tolerance * scale for a, b in zip(wanted, found["weights"][key], strict=True)):
            wrong.append(key)
    return wrong
