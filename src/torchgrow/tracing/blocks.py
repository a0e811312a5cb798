"""Depth: blocks that may be left out (paper Eq 2), found in the stages of a model or named by the user.

A *block* is a module that returns a tensor like the one it is given: without it x_out = x_in. Its gate sits on
parameters that make the block return its input (x + m f(x)) or zero (m f(x)) when they are zero. They are found by
trial on the randomised copy of the proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError
from ..structure.record import skip_of
from ..structure.space import WHOLE, Block, FlopTerm, Frozen, PassThrough, Space
from ..structure.store import is_meta
from .model_call import call, examples_of, fresh
from .nested import mapped
from .passes import Pass, running, twin

Named = str | Sequence[str]
"""A module by its qualified name, or several that run one after the other and are left out together."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Call:
    """One call of a module: what came in, under which keyword, and what went out."""

    entering: Tensor | None
    keyword: str
    leaving: Any

    @property
    def skip(self) -> PassThrough:
        return PassThrough(self.keyword, len(self.leaving) if isinstance(self.leaving, tuple) else 0)

    @property
    def result(self) -> Any:
        return self.leaving[0] if isinstance(self.leaving, tuple) and self.leaving else self.leaving

    @property
    def preserves(self) -> bool:
        """Whether the result is a tensor like the input."""
        x, y = self.entering, self.result
        return x is not None and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def find(model: nn.Module, example_inputs: Any, wanted: bool | Sequence[Named]) -> tuple[Block, ...]:
    """The blocks of a model that may be left out; unit ids are those of a space without other units.

    `wanted`: as `depth` of `trace`. Of those found, every stage keeps a block: a strided one, else its first.

    Raises:
        TraceError: no block qualifies, or a named one does not; the message says why.
    """
    if wanted is False:
        return ()
    model = twin(model)
    seen = _calls(model, examples_of(example_inputs)[0])
    found = _in_containers(model, seen) if wanted is True else [_named(model, seen, name) for name in wanted]
    if not found and all(skip_of(module) is None for module in model.modules()):  # else just those that stay are left
        raise TraceError(
            "depth=True, but no container of the model holds blocks of one class that follow each other and return a "
            "tensor like the one they are given; name the layers that may be left out (depth=['blocks.1', ...]), or "
            "leave depth out"
        )
    return tuple(replace(block, unit=unit) for unit, block in enumerate(found))


def _calls(model: nn.Module, example: Any) -> dict[str, list[_Call]]:
    """All calls of all modules in one forward."""
    seen: dict[str, list[_Call]] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():

            def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                inputs = {"": args[0]} if args else kwargs
                keyword, x = next(((k, v) for k, v in inputs.items() if isinstance(v, Tensor)), ("", None))
                seen.setdefault(path, []).append(_Call(x, keyword, output))

            hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        if is_meta(model):
            example = mapped(example, lambda x: x.to("meta"))
        try:
            with running(model, Pass()):
                call(model, fresh(example))
        except Exception as error:
            raise TraceError(f"the model's forward failed: {type(error).__name__}: {error}") from error
    return seen


def _fault(model: nn.Module, seen: dict[str, list[_Call]], path: str) -> str:
    """Why a module cannot be left out; "" if it can."""
    calls = seen.get(path, [])
    if len(calls) != 1:
        return f"is called {len(calls)} times in a forward; only layers called once can be left out"
    if not calls[0].preserves:
        x, y = calls[0].entering, calls[0].result
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (x, y)]
        return f"turns {shapes[0]} into {shapes[1]}; only a layer that returns a tensor like its input can be left out"
    module = model.get_submodule(path)
    inside = {id(p) for p in module.parameters()}
    others = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(f"{path}.")}
    if inside & others:
        return "shares parameters with other layers"
    if "forward" in vars(module):
        return "has a forward of its own, set on the instance"
    return ""


def _in_containers(model: nn.Module, seen: dict[str, list[_Call]]) -> list[Block]:
    """Blocks of one class, linked in a container; where they nest, the innermost.

    A plain sequence of layers (conv, norm, activation) inside a block is not a block.
    """
    found: list[Block] = []
    every: list[Block] = []  # also those that must stay
    for stage, container in model.named_modules():
        if not isinstance(container, CONTAINERS):
            continue
        paths = [f"{stage}.{name}" if stage else name for name, _ in container.named_children()]
        linked: set[str] = set()
        for before, after in itertools.pairwise(paths):
            one, other = seen.get(before, []), seen.get(after, [])
            alike = type(model.get_submodule(before)) is type(model.get_submodule(after))
            if alike and len(one) == len(other) == 1 and one[0].result is other[0].entering is not None:
                linked |= {before, after}
        there = [path for path in paths if path in linked and skip_of(model.get_submodule(path)) is None]
        blocks = [path for path in there if _composite(model.get_submodule(path))]
        fine = [path for path in blocks if not _fault(model, seen, path)]
        every += [Block(0, (path,), stage, PassThrough()) for path in blocks]
        found += [Block(0, (path,), stage, seen[path][0].skip) for path in (fine if fine != blocks else fine[1:])]

    def inside(block: Block, others: Sequence[Block]) -> bool:
        return any(block.modules != other.modules and other.holds(block.modules[0]) for other in others)

    def sequence(block: Block) -> bool:
        return type(model.get_submodule(block.modules[0])).forward is nn.Sequential.forward

    found = [block for block in found if not sequence(block) or not inside(block, every)]
    return [block for block in found if not any(inside(other, [block]) for other in found)]


def _composite(module: nn.Module) -> bool:
    """A block of layers, not a container of blocks nor a single layer."""
    has_layers = any(True for _ in module.children()) and any(True for _ in module.parameters())
    plain = isinstance(module, nn.Sequential) and not any(isinstance(x, CONTAINERS) for x in module.children())
    return has_layers and (plain or not isinstance(module, CONTAINERS))


def _named(model: nn.Module, seen: dict[str, list[_Call]], name: Named) -> Block:
    """The block of modules named by the user."""
    paths = (name,) if isinstance(name, str) else tuple(name)
    for path in paths:
        if path not in dict(model.named_modules()):
            raise TraceError(f"depth names {path!r}, which no module has; see model.named_modules()")
        fault = _fault(model, seen, path)
        if fault:
            raise TraceError(f"depth names {path!r}, which {fault}")
    for before, after in itertools.pairwise(paths):
        if seen[before][0].result is not seen[after][0].entering:
            raise TraceError(
                f"depth names {before!r} and {after!r} as one layer, but the second does not read the first"
            )
    return Block(0, paths, "", seen[paths[0]][0].skip)


def with_layers(space: Space, blocks: Sequence[Block]) -> Space:
    """The space with one more unit and group per block; where its gate sits is left to `gated`."""
    if not blocks:
        return space
    n = space.n_units
    blocks = tuple(replace(block, unit=n + k) for k, block in enumerate(blocks))
    flops = [
        FlopTerm(t.constant, (*t.vectors, *(torch.tensor([s.unit]) for s in blocks if s.holds(t.module))), t.module)
        for t in space.flops
    ]
    return replace(
        space,
        removable=torch.cat([space.removable, torch.ones(len(blocks), dtype=torch.bool)]),
        group_of=torch.cat([space.group_of, space.n_groups + torch.arange(len(blocks))]),
        group_names=(*space.group_names, *(f"{' + '.join(block.modules)} (layer)" for block in blocks)),
        flops=tuple(flops),
        blocks=blocks,
    )


@contextmanager
def _left_out(
    frame: nn.Module, blocks: Sequence[Block], judge: Callable[[Block, Tensor, Tensor], None]
) -> Iterator[None]:
    """While the frame runs, every block returns its input, after `judge` has seen its real output."""
    entering: dict[int, Any] = {}

    def enter(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = block.skip(*args, **kwargs)
        entering[block.unit] = (given[0] if block.skip.outputs else given).clone()  # the layer may write into it

    def leave(block: Block, module: nn.Module, args: Any, output: Any) -> Any:
        x = entering.pop(block.unit)
        judge(block, x, output[0] if block.skip.outputs else output)
        return (x, *output[1:]) if block.skip.outputs else x

    with ExitStack() as hooks:
        for block in blocks:
            first, last = (frame.get_submodule(block.modules[k]) for k in (0, -1))
            hooks.enter_context(first.register_forward_pre_hook(partial(enter, block), with_kwargs=True))
            hooks.enter_context(last.register_forward_hook(partial(leave, block)))
        yield


def _running_order(frame: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """When each module is first called in a forward."""
    order, paths = dict[str, int](), {id(module): path for path, module in frame.named_modules()}

    def note(module: nn.Module, args: Any) -> None:
        if id(module) in paths:
            order.setdefault(paths[id(module)], len(order))

    with nn.modules.module.register_module_forward_pre_hook(note):
        run()
    return order


def gated(space: Space, frame: nn.Module, run: Callable[[], Any], tolerance: float) -> Space:
    """Find where the gate of each layer sits: as few of its parameters as will do, the last ones if there is a choice.

    With all its parameters at zero a layer must return its input (a residual layer) or zero (a plain one). Then one
    parameter after the other gets its value back, unless that changes this. All layers are tried at the same time,
    each on its input when all others are left out too. `frame` is a randomised copy at full size, left as it was.
    """
    tensors = dict(frame.named_parameters())
    names = {block.unit: [name for name in tensors if block.holds(name)] for block in space.blocks}
    order = _running_order(frame, run)
    for below in names.values():
        below.sort(key=lambda name: order.get(name.rpartition(".")[0], 0))
    values = {name: tensors[name].detach().clone() for below in names.values() for name in below}
    holds, moved = dict[int, tuple[bool, bool]](), dict[int, Tensor]()

    def judge(block: Block, x: Tensor, y: Tensor) -> None:
        moved[block.unit] = y - x
        bound = tolerance * max(float(x.abs().max()), 1e-12)
        holds[block.unit] = float((y - x).abs().max()) <= bound, float(y.abs().max()) <= bound

    with torch.no_grad(), _left_out(frame, space.blocks, judge):
        for name in values:
            tensors[name].zero_()
        run()
        kinds = dict(holds)
        gates: dict[int, list[str]] = {unit: [] for unit in names}
        for k in range(max(map(len, names.values()))):
            trying = {unit: below[k] for unit, below in names.items() if k < len(below)}
            for name in trying.values():
                tensors[name].copy_(values[name])
            run()
            for unit, name in trying.items():
                if not holds[unit][0 if kinds[unit][0] else 1]:
                    tensors[name].zero_()
                    gates[unit].append(name)
        sides = []
        for small in (1e-3, -1e-3):  # what a ReLU gives never changes sign with them, and has no gradient at 0
            for name in itertools.chain.from_iterable(gates.values()):
                tensors[name].copy_(small * values[name])
            run()
            sides.append(dict(moved))
        for name, value in values.items():
            tensors[name].copy_(value)
    whole = {(name, WHOLE): torch.tensor([block.unit]) for block in space.blocks for name in gates[block.unit]}
    turns = {unit for unit in gates if kinds[unit][0] and bool((sides[0][unit] * sides[1][unit] < 0).any())}
    silent = {place: unit for place, unit in whole.items() if int(unit) in turns}
    blocks = tuple(replace(block, residual=kinds[block.unit][0]) for block in space.blocks)
    space = replace(space, fold={**space.fold, **whole}, columns={**space.columns, **silent}, blocks=blocks)
    for block in blocks:
        if not any(kinds[block.unit]) or not gates[block.unit]:
            reason = "with its weights at zero the layer returns neither its input nor zero"
            space = space.freeze([block.unit], Frozen("depth", block.modules[0], "", reason, ()))
    return space
