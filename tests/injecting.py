"""Exceptions at any line of torchgrow, raised inside updates, endings, loads and constructions.

A run is built once for every case; each exception comes in a process of its own, forked from it.
"""

import copy
import gc
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import torchgrow
from growing import differences
from torchgrow import Budget, Grower
from torchgrow.structure.record import mark_of

ROOT = str(Path(torchgrow.__file__).parent)
EXAMPLE = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
ACTIONS = ("update", "finish", "load", "construct")
CASES = ("sgd", "paper", "two optimizers", "followers", "layers", "meta")


class Injected(BaseException):
    """What is raised; nothing but a bare `except` catches it."""


# --- runs ---


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(width, 12), nn.BatchNorm1d(12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.norm(self.a(x))))


@dataclass
class Run:
    """A model on its way, and what else there is."""

    case: str
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    grower: Grower | None = None
    saved: dict[str, Any] | None = None

    @property
    def grown(self) -> Grower:
        assert self.grower is not None
        return self.grower


def start(case: str) -> Run:
    """Model and optimizers; no grower yet."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Block(16) for _ in range(3 if case == "layers" else 1)])
    with torch.device("meta" if case == "meta" else "cpu"):
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), blocks, nn.Linear(16, 3))
        if case == "meta":
            model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Block(16), nn.Linear(16, 3))
    if case == "two optimizers":
        parts = [[*model[0].parameters()], [*model[2].parameters(), *model[3].parameters()]]
        return Run(case, model, [torch.optim.SGD(parts[0], 0.05, momentum=0.9), torch.optim.AdamW(parts[1], 0.01)])
    if case in ("layers", "meta"):
        return Run(case, model, [torch.optim.AdamW(model.parameters(), 0.01)])
    return Run(case, model, [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)])


def construct(run: Run) -> None:
    """Attach a grower."""
    run.grower = Grower(
        run.model,
        run.optimizers,
        example_inputs=EXAMPLE,
        budget=Budget(params="50%"),
        updates=8,
        preset="paper" if run.case in ("paper", "two optimizers") else "default",
        depth=run.case == "layers",
    )


def step(run: Run) -> None:
    """One step of every optimizer."""
    run.model(EXAMPLE).square().mean().backward()
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def prepared(case: str, action: str) -> Run:
    """A run just before an action."""
    run = start(case)
    if action == "construct":
        return run
    construct(run)
    if case == "followers":
        run.grown.follow(copy.deepcopy(run.model))
    for _ in range(3):
        step(run)
        run.grown.update()
    step(run)
    if action == "load":
        run.saved = run.grown.state_dict()
        step(run)
        run.grown.update()
        step(run)
    return run


def act(run: Run, action: str) -> None:
    """What an exception shall come into."""
    if action == "construct":
        construct(run)
    elif action == "load":
        assert run.saved is not None
        run.grown.load_state_dict(run.saved)
    else:
        run.grown.update() if action == "update" else run.grown.finish()


def seen(run: Run) -> dict[str, Any]:
    """All of a run that an action may change, as copies; without the seconds."""
    modules = dict(run.model.named_modules())
    parameters = {id(parameter): name for name, parameter in run.model.named_parameters()}
    mark = mark_of(run.model)
    found: dict[str, Any] = {
        "tensors": {name: _tensor(tensor) for name, tensor in run.model.state_dict().items()},
        "gradients": {name: _tensor(parameter.grad) for name, parameter in run.model.named_parameters()},
        "objects": [id(parameter) for parameter in run.model.parameters()],
        "modules": {path: _plain(module) for path, module in modules.items()},
        "record": copy.deepcopy(vars(mark.record)) if mark is not None else None,
        "slots": [
            {parameters[id(p)]: {key: _tensor(slot) for key, slot in slots.items()} for p, slots in o.state.items()}
            for o in run.optimizers
        ],
        "hooks": [len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in run.optimizers],
        "random": torch.get_rng_state(),
    }
    if run.grower is not None:
        state = run.grower.state_dict()
        found["books"] = {**state, "history": [{**event, "seconds": 0.0} for event in state["history"]]}
    return found


def _tensor(value: Any) -> Any:
    """A value to compare; of a tensor on the meta device its shape."""
    if isinstance(value, Tensor):
        return ("meta", tuple(value.shape)) if value.is_meta else value.detach().clone()
    return value


def _plain(module: nn.Module) -> dict[str, Any]:
    """Class, mode, numbers and hooks of a module, and whether its forward is its own."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    hooks = {name: len(value) for name, value in vars(module).items() if isinstance(value, dict)}
    return {"class": type(module).__name__, "forward": "forward" in vars(module), **numbers, **hooks}


def follow_on(run: Run) -> None:
    """Three more steps, with updates as long as there are any."""
    for _ in range(3):
        step(run)
        if not run.grown.finished:
            run.grown.update()
    step(run)


# --- exceptions ---


def at_line(function: Callable[[], object], line: int) -> list[str]:
    """Call `function` and raise `Injected` before that line (from 0) of torchgrow's; returns all that were reached.

    Raises:
        Injected: if so many lines are reached and nothing swallows it.
    """
    lines: list[str] = []

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}")
            if len(lines) == line + 1:
                raise Injected(lines[-1])
        return local

    def every(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOT) else None

    gc.disable()  # callbacks on the garbage of other tests are no part of the action, and their exceptions go nowhere
    sys.settrace(every)
    try:
        function()
    finally:
        sys.settrace(None)
        gc.enable()
    return lines


@dataclass
class Expected:
    """What a run of a case looks like before and after an action, and some steps later."""

    case: str
    action: str
    run: Run
    lines: list[str]
    before: dict[str, Any]
    after: dict[str, Any]
    later: dict[str, Any]


def expected(case: str, action: str) -> Expected:
    """Make the runs that a broken one is compared with."""
    traced = prepared(case, action)
    lines = at_line(lambda: act(traced, action), -1)
    whole = prepared(case, action)
    before = seen(whole)
    act(whole, action)
    after = seen(whole)
    follow_on(whole)
    return Expected(case, action, prepared(case, action), lines, before, after, seen(whole))


def draw(expected: Expected, count: int, seed: int) -> list[int]:
    """Lines to raise at: half of them anywhere, half in the exchange or after it began."""
    random_ = random.Random(seed)
    every = range(len(expected.lines))
    first = next(i for i in every if expected.lines[i].startswith("exchange."))
    late = [i for i in every if expected.lines[i].startswith("exchange.") or i > every[-1] - 60]
    late = late or list(every[first:])
    anywhere = random_.sample(every, min(count - count // 2, len(every)))
    return anywhere + random_.sample(late, min(count // 2, len(late)))


def verdict(expected: Expected, line: int) -> dict[str, Any]:
    """Raise at a line in a process of its own.

    Returns:
        Where it came, and "before" or "after" for what it left, "unreached" if this run has fewer lines, or "bad: " and
        what is.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            found = _broken(expected, line)
        except BaseException:
            found = {"where": expected.lines[line], "verdict": "bad: " + traceback.format_exc()[-600:]}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"where": expected.lines[line], "verdict": "bad: the process died"}


def _broken(expected: Expected, line: int) -> dict[str, Any]:
    run, action = expected.run, expected.action
    wanted = {"before": _comparable(expected.before), "after": _comparable(expected.after)}
    where, came = expected.lines[line], False
    try:
        reached = at_line(lambda: act(run, action), line)
    except Injected as error:
        where, came = str(error), True
    else:
        if len(reached) > line:
            return {"where": reached[line], "verdict": "bad: the exception was swallowed"}
    now = _comparable(seen(run))
    state = next((name for name in ("after", "before") if not differences(wanted[name], now)), None)
    if state is None:
        wrong = {name: differences(wanted[name], now)[:4] for name in wanted}
        return {"where": where, "verdict": f"bad: neither before {wrong['before']} nor after {wrong['after']}"}
    if state == "before":
        act(run, action)
    follow_on(run)
    apart = differences(_comparable(expected.later), _comparable(seen(run)))
    if apart:
        return {"where": where, "verdict": f"bad: {state}, and then another run {apart[:4]}"}
    return {"where": where, "verdict": state if came else "unreached"}


def _comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Without what is another object in every run, and lists by number."""
    return _numbered({key: value for key, value in found.items() if key != "objects"})


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return {number: _numbered(item) for number, item in enumerate(value)}
    return value
