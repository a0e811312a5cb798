"""Checks of optimizer state: values that are not data, tensors inside containers, and shapes that cannot be cut."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import OptimizerError

WORKS = "use SGD, Adam, AdamW or RMSprop, or another optimizer whose state has the shape of its parameters"


def form_of(optimizer: torch.optim.Optimizer, key: Any, value: Any, parameter: Tensor) -> str:
    """Whether a slot is a "number" for the whole parameter, or "shaped" as it, or has its elements in a "flat" vector.

    Raises:
        OptimizerError: it is none of these.
    """

    def refuse(found: str) -> NoReturn:
        raise refusal(
            optimizer,
            f"it keeps {key!r} {found} for a parameter of shape {tuple(parameter.shape)}, which cannot be re-cut",
        )

    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            refuse(f"as a {type(value).__name__} of layout {value.layout} and shape {tuple(value.shape)}")
        if value.numel() > 1 and not (value.is_floating_point() or value.is_complex()):
            refuse(f"as {value.dtype} of shape {tuple(value.shape)}")
        if value.shape == parameter.shape and parameter.dim():
            return "shaped"
        if value.numel() <= 1:
            return "number"
        if value.dim() == 1 and value.numel() == parameter.numel():
            return "flat"
        refuse(f"of shape {tuple(value.shape)}")
    if not is_plain(value):
        large = next((leaf for _, leaf in reach(value) if isinstance(leaf, Tensor)), None)
        refuse(f"as a {type(value).__name__}" + ("" if large is None else f" with tensors ({tuple(large.shape)})"))
    return "number"


def is_plain(value: Any, most: float = 1) -> bool:
    """Whether a value is data, its tensors of at most so many elements."""
    if isinstance(value, Tensor):
        return value.numel() <= most
    if isinstance(value, (list, tuple, dict)):
        return all(is_plain(one, most) for one in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_attributes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse (`OptimizerError`) tensors of a parameter's shape, or of all together, kept outside of the state."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    shapes, total = {tuple(p.shape) for p in held}, sum(p.numel() for p in held)
    own = {id(p) for p in held}
    for path, leaf in reach(attributes_of(optimizer)):
        stray = isinstance(leaf, Tensor) and id(leaf) not in own and leaf.numel() > 1
        if stray and (tuple(leaf.shape) in shapes or leaf.numel() == total):
            _refuse_beside(optimizer, path, leaf)


def check_what_is_new(optimizer: torch.optim.Optimizer, probe: torch.optim.Optimizer) -> None:
    """Refuse (`OptimizerError`) optimizers whose steps store tensors outside the state of their parameters."""
    before = {path for path, _ in reach(attributes_of(optimizer))}
    stands = {id(p) for group in probe.param_groups for p in group["params"]}
    for path, leaf in reach(attributes_of(probe)):
        if isinstance(leaf, Tensor) and id(leaf) not in stands and leaf.numel() > 1 and path not in before:
            _refuse_beside(optimizer, path, leaf)
    for group in probe.param_groups:
        for name, value in group.items():
            for path, leaf in reach(value, name) if name != "params" else ():
                if isinstance(leaf, Tensor) and leaf.numel() > 1:
                    _refuse_beside(optimizer, f"setting {path}", leaf)
    for key in probe.state:
        if not isinstance(key, Tensor):
            raise refusal(optimizer, f"it keeps state[{key!r}], which belongs to no parameter")


def _refuse_beside(optimizer: torch.optim.Optimizer, path: str, tensor: Tensor) -> NoReturn:
    raise refusal(
        optimizer,
        f"it keeps {path} of shape {tuple(tensor.shape)} beside its state, where it is not re-cut with the parameters; "
        "keep it in optimizer.state[parameter]",
    )


def refusal(optimizer: torch.optim.Optimizer, reason: str) -> OptimizerError:
    """The error for an optimizer that cannot be served."""
    return OptimizerError(f"{type(optimizer).__name__} cannot be served: {reason}; {WORKS}")


def reach(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and optimizers that an object holds, with their places; modules and functions are not looked into."""
    todo, seen = [(path, value)], set()
    while todo:
        path, value = todo.pop()
        if id(value) in seen or isinstance(value, (type, nn.Module, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) or is_optimizer(value):
            yield path, value
        elif isinstance(value, types.MethodType):
            todo.append((path, value.__self__))
        elif isinstance(value, dict):
            names = (str(key) if isinstance(key, (str, int)) else "..." for key in value)
            todo += [(f"{path}[{n!r}]" if path else n, item) for n, item in zip(names, value.values(), strict=True)]
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        else:
            todo += [(f"{path}.{name}", item) for name, item in (getattr(value, "__dict__", None) or {}).items()]


def is_optimizer(value: Any) -> bool:
    """Whether an object is an optimizer: of PyTorch's class, or with the same interface."""
    if isinstance(value, torch.optim.Optimizer):
        return True
    return not isinstance(value, (dict, list, tuple)) and all(
        hasattr(type(value), name) or name in getattr(value, "__dict__", {}) for name in ("param_groups", "step")
    )


def inner_optimizers(optimizer: Any) -> list[tuple[str, Any]]:
    """Other optimizers that an optimizer holds, by attribute."""
    found = reach({k: v for k, v in vars(optimizer).items() if "hook" not in k and k != "step"})
    return [(path, leaf) for path, leaf in found if is_optimizer(leaf) and leaf is not optimizer]


def attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's own attributes, without hooks and without a `step` that a scheduler has wrapped."""
    left_out = ("step", "state", "param_groups", "defaults")
    return {key: value for key, value in vars(optimizer).items() if "hook" not in key and key not in left_out}
