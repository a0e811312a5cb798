"""How a model is called: example inputs, what it can be called with, what it carries on to its next call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from .errors import TraceError

Carries = Mapping[int | str, int | str]
"""Which argument of a model's next call each of its outputs becomes: {argument: output}, by position or name."""


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run the model on example inputs: a tensor, a tuple or list of positional ones, or a dict of keywords."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def check_model(model: nn.Module, example_inputs: Any) -> None:
    """Refuse early what cannot be traced.

    Raises:
        TraceError: the model is not a plain module on one device, or there are no example inputs.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TraceError(
            f"the model is wrapped in {type(model).__name__}; pass model.module, and train through what "
            "grower.wrap() returns"
        )
    if hasattr(model, "_orig_mod"):
        raise TraceError("the model is compiled; pass the plain module (model._orig_mod) to torchgrow")
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TraceError(f"{path or 'the model'} is sharded over processes (FSDP); use DDP, ddp = grower.wrap()")
        if hasattr(module, "_orig_mod"):
            raise TraceError(
                f"layer {path!r} is a torch.compile(...) of a module; compile it in place, model.{path}.compile(), or "
                "call torchgrow first"
            )
    if not any(isinstance(x, Tensor) for x in tree_leaves(example_inputs)):
        raise TraceError(
            "example_inputs holds no tensor; pass a small batch the model accepts, e.g. example_inputs=images[:2], "
            "a tuple for several arguments, or a dict for keywords"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if hasattr(tensor, "device_mesh"):
            raise TraceError(
                f"{name} is sharded over processes (FSDP2, fully_shard): a shard holds rows of some units only, and "
                "its contents cannot be exchanged for smaller ones; use DDP, that is ddp = grower.wrap()"
            )
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise TraceError(f"the model is spread over {', '.join(devices)}; move it to one device with model.to(...)")
    for name, tensor in tensors:
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise TraceError(f"{name} is not materialised yet; run one forward pass before attaching torchgrow")
        if tensor.is_inference():
            raise TraceError(
                f"{name} was made under torch.inference_mode(), so that nothing can train it or write into it; "
                "build the model outside of it"
            )
        if isinstance(tensor, nn.Parameter) and tensor.is_complex():
            raise TraceError(f"{name} is complex; keep real and imaginary part in two real parameters")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TraceError(
                f"{name} is {tensor.layout}, quantized={tensor.is_quantized}; only dense tensors can be cut"
            )


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, not compiled; modes, buffers and random state are as before afterwards."""
    modules = list(model.modules())
    compiled = [(module, module._compiled_call_impl) for module in modules if module._compiled_call_impl]
    modes = [(module, module.training, dict(module._buffers)) for module in modules]
    held = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for buffer in held]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        model.eval()
        devices: list[int] | None = None if torch.cuda.is_initialized() else []  # counting devices takes milliseconds
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, call_compiled in compiled:
            module._compiled_call_impl = call_compiled
        for module, training, own in modes:
            module.training = training
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, before, version in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


def opened(outputs: Any) -> Any:
    """Outputs with dataclasses and plain objects opened up, so that every tensor in them is found."""
    if hasattr(outputs, "__dict__") and not isinstance(outputs, (Tensor, dict, tuple, list)):
        return vars(outputs)
    return outputs


def _leaves_by_entry(tree: Any) -> list[tuple[Any, Tensor]]:
    """The tensors of arguments or outputs, each with the position or name of the entry it lies in."""

    def entry(path: Any) -> Any:
        return next(
            (getattr(path[0], field) for field in ("idx", "key", "name") if path and hasattr(path[0], field)), None
        )

    return [(entry(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, Tensor)]


def carried_inputs(example_inputs: Any, carries: Carries) -> dict[tuple[int | str, int | str], list[int]]:
    """For every (argument, output) the indices of the argument's tensors among those of the example inputs."""
    leaves = _leaves_by_entry(example_inputs)
    entering = {}
    for argument, output in carries.items():
        indices = [i for i, (entry, leaf) in enumerate(leaves) if entry == argument and leaf.is_floating_point()]
        if not indices:
            entries = list(dict.fromkeys(entry for entry, _ in leaves if entry is not None))
            raise TraceError(
                f"carried names argument {argument!r}, in which example_inputs holds no floating-point tensor (it "
                f"holds tensors in {entries}); give an initial state of zeros there, as in example_inputs=(tokens, "
                "state), carried={1: 1}"
            )
        entering[argument, output] = indices
    return entering


def carried_outputs(
    outputs: Any, given: list[Tensor], entering: dict[tuple[int | str, int | str], list[int]]
) -> dict[int, int]:
    """Index of every carried tensor among the outputs' tensors, and among the inputs'."""
    leaves = _leaves_by_entry(opened(outputs))
    leaving: dict[int, int] = {}
    for (argument, output), indices in entering.items():
        ends = [i for i, (entry, leaf) in enumerate(leaves) if entry == output and leaf.is_floating_point()]
        into = [tuple(given[i].shape) for i in indices]
        out_of = [tuple(leaves[i][1].shape) for i in ends]
        if into != out_of:
            raise TraceError(
                f"carried says that output {output!r} becomes argument {argument!r} of the next call, but their "
                f"tensors are of shapes {out_of} and {into}; name the output (by position, key or attribute) that "
                "returns the new state, and give an initial state of its shapes in example_inputs"
            )
        leaving.update(zip(ends, indices, strict=True))
    return leaving
