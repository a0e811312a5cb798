"""Hooks on the modules of a traced model: which module is running, and which tensors it can see."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..default_device import on_host
from ..structure.space import Block
from .context import TraceContext
from .model_call import call
from .nested import tensors
from .notes import tensors_among
from .pending import Pending
from .rules.pointwise import either
from .rules.registry import MODULE_RULES


class ModuleHooks:
    """The tracer's hooks."""

    def __init__(self, model: nn.Module, context: TraceContext, pending: Pending, blocks: Sequence[Block] = ()) -> None:
        self.model, self.context, self.pending, self.blocks = model, context, pending, blocks
        self.module_names = {id(module): name for name, module in context.modules.items()}
        self.clear()

    def clear(self) -> None:
        """Forget all running modules."""
        self.stack: list[str] = []  # paths of the running modules
        self.whole: nn.Module | None = None  # the running module that has a rule of its own
        self.entering: dict[int, Tensor] = {}  # inputs of the running blocks

    @contextmanager
    def on(self) -> Iterator[None]:
        """A context with the tracer's hooks on the model."""
        everywhere = nn.modules.module
        with ExitStack() as hooks:
            hooks.enter_context(everywhere.register_module_forward_pre_hook(self._enter))
            hooks.enter_context(everywhere.register_module_forward_hook(self._leave, always_call=True))
            for module in self.model.modules():
                if type(module) in MODULE_RULES:
                    hooks.enter_context(module.register_forward_pre_hook(self._enter_whole))
                    hooks.enter_context(module.register_forward_hook(self._leave_whole, with_kwargs=True))
            for block in self.blocks:
                first, last = (self.model.get_submodule(block.modules[k]) for k in (0, -1))
                enter, leave = partial(self._enter_block, block), partial(self._leave_block, block)
                hooks.enter_context(first.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(last.register_forward_hook(leave))
            yield

    @on_host()
    def _enter(self, module: nn.Module, inputs: Any) -> None:
        path = self.module_names.get(id(module), type(module).__name__)
        self.stack.append(path)
        self._at_hand(path, inputs)

    @on_host()
    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()
        if output is not None and self.whole is None:
            self._at_hand(self.stack[-1] if self.stack else "", output)

    def _at_hand(self, path: str, value: Any) -> None:
        """Note tensors passed to or returned by a module; they may have no labels yet."""
        found = [value] if isinstance(value, Tensor) else tensors(value)
        self.context.visible.setdefault(path, []).extend(self.context.note(x) for x in found)

    @on_host()
    def _enter_block(self, block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = block.skip(*args, **kwargs)
        self.entering[block.unit] = x[0] if block.skip.outputs else x

    @on_host()
    def _leave_block(self, block: Block, module: nn.Module, args: Any, output: Any) -> None:
        """Tie the output of a block to its input, since readers get the one or the other."""
        self.pending.catch_up()
        self.context.module = self.module_names.get(id(module), type(module).__name__)
        self.context.op, self.context.line = "left out", user_line()
        ends = self.entering.pop(block.unit), output[0] if block.skip.outputs else output
        self.pending.obey(partial(either, self.context, *ends), ends, ends)

    @on_host()
    def _enter_whole(self, module: nn.Module, inputs: Any) -> None:
        """Stop tracing until `_leave_whole`: the module has a rule of its own."""
        if self.whole is None:
            self.whole = module

    @on_host()
    def _leave_whole(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self.whole:
            return
        self.whole = None
        self.pending.catch_up()
        self.context.module = self.module_names.get(id(module), type(module).__name__)
        self.context.op, self.context.line = type(module).__name__, user_line()
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given = tensors_among(tree_leaves(named))
        self.context.used(self.context.notes.get(id(x)) for x in given)
        rule = partial(MODULE_RULES[type(module)], self.context, module, named, output)
        with torch.utils._python_dispatch._disable_current_modes():
            self.pending.obey(
                rule, [*given, *module.parameters(), *module.buffers()], tensors_among(tree_leaves(output))
            )


# --- the line of the user's model that runs, for reasons and errors ---


def user_line() -> tuple[str, int] | None:
    """File and line of the innermost frame of the model itself; None where all its modules are torch's or ours.

    Frames outside the call of the model, such as a command line or a test runner, do not count.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != call.__module__:
        if not _inner(frame.f_globals.get("__name__", "")):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def line_of(error: BaseException) -> str:
    """`file:line` of the innermost frame of the model itself in which an error was raised; empty, if it was in none."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not _inner(frame.f_globals.get("__name__", ""))
    ]
    return f"{frames[-1][0].rpartition('/')[2]}:{frames[-1][1]}" if frames else ""


TOOLS = (__name__.partition(".")[0], "torch", "contextlib", "functools", "einops", "opt_einsum")
"""Packages that run operations on behalf of a model."""


@cache
def _inner(module: str) -> bool:
    """Whether a module is torch's or ours or a tool; the lab's models are models like others."""
    return module.partition(".")[0] in TOOLS and not module.startswith(f"{TOOLS[0]}.lab.")
