"""Networks whose structure travels inside `state_dict()`: frames, runs of them, and what came through a file."""

import copy
import functools
import io
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchgrow import Budget, Cost, Grower
from torchgrow.persistence.folder import SEAL, digest
from torchgrow.persistence.portable import KEY

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Images(nn.Module):
    """With layers that can go, a grouped convolution, and tied weights."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(3)])
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.head, self.same = nn.Linear(width, width), nn.Linear(width, width)
        self.same.weight = self.head.weight
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.blocks(self.first(x))).mean((2, 3))
        return self.last(self.same(self.head(x).relu()).relu())


class Words(nn.Module):
    """With heads and recurrent units."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.TransformerEncoderLayer(6, 3, 16, batch_first=True, dropout=0.0)
        self.memory = nn.LSTM(6, 9, batch_first=True)
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(self.mixer(x))[0])


class Scaled(nn.Module):
    """With a buffer that is cut and not part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.scale).relu())


FRAMES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "images": (Images, IMAGES),
    "words": (Words, WORDS),
    "scaled": (Scaled, WORDS),
}


def build(name: str = "images") -> nn.Module:
    torch.manual_seed(3)
    return FRAMES[name][0]()


def begun(name: str = "images", updates: int = 6, **settings: Any) -> Grower:
    model, inputs = build(name), FRAMES[name][1]
    settings.setdefault("depth", name == "images")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Grower(model, optimizer, example_inputs=inputs, budget=Budget(params="50%"), updates=updates, **settings)


def step(grower: Grower, inputs: Tensor) -> None:
    for optimizer in grower.optimizers:
        optimizer.zero_grad()
    grower.model(inputs).square().mean().backward()
    for optimizer in grower.optimizers:
        optimizer.step()


def grown(name: str = "images", updates: int = 1, **settings: Any) -> Grower:
    grower = begun(name, **settings)
    for _ in range(updates):
        step(grower, FRAMES[name][1])
        grower.update()
    step(grower, FRAMES[name][1])
    return grower


@functools.cache
def run(name: str) -> list[tuple[nn.Module, Cost, dict[str, int], dict[str, int]]]:
    """The network after every update of one run, as a copy, and what it costs."""
    grower, found = begun(name), []
    for number in range(6):
        if number:
            grower.update()
        step(grower, FRAMES[name][1])
        found.append((copy.deepcopy(grower.model), grower.cost(), grower.widths(), grower.depths()))
    return found


def network(name: str = "images", updates: int = 2) -> nn.Module:
    """A copy of what a run has grown."""
    return copy.deepcopy(run(name)[updates][0])


def saved(model: nn.Module) -> dict[str, Any]:
    """A state dict that went through a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model: nn.Module, other: nn.Module, inputs: Tensor = IMAGES) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    models = [copy.deepcopy(each).eval() for each in (model, other)]
    assert torch.equal(models[0](inputs), models[1](inputs))


def reads(state: dict[str, Any], change: Callable[[Any], None]) -> dict[str, Any]:
    """The record in a state dict, changed, with a seal that fits."""
    record = json.loads(bytes(state[KEY].tolist()))
    record.pop(SEAL)
    change(record)
    record[SEAL] = digest(record)
    return {**state, KEY: torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)}
