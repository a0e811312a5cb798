"""How a model is called: example inputs, their checks, and states carried to the next call."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from ..default_device import on_default
from ..errors import TraceError
from .nested import Leaf, leaves, mapped, put_out

Carries = Mapping[int | str, int | str]
"""Which argument of a model's next call each of its outputs becomes: {argument: output}, by position or name."""


def examples_of(example_inputs: Any) -> list[Any]:
    """The examples that were given: those in a list, else the one value."""
    return list(example_inputs) if type(example_inputs) is list else [example_inputs]


def call(model: nn.Module, example: Any) -> Any:
    """Run the model on one example: a tensor, a tuple of positional inputs, or a mapping of keywords."""
    with on_default():
        if isinstance(example, Mapping):
            return model(**example)
        if isinstance(example, (tuple, list)) and not isinstance(example, PackedSequence):
            return model(*example)
        return model(example)


def feed(model: nn.Module, given: Any) -> None:
    """Call the model on a batch of a loader: inputs, or a tuple or list that begins with them; on its device."""
    inputs = given[0] if isinstance(given, (list, tuple)) else given
    device = next((tensor.device for tensor in model.parameters()), None)
    call(model, tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs))


def fresh(example: Any) -> Any:
    """A copy of an example for one call: what a forward writes into its inputs reaches no other call."""
    return mapped(example, lambda x: x.detach().clone().requires_grad_(x.requires_grad))


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
    _check_examples(examples_of(example_inputs))
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
    if devices and devices[0].partition(":")[0] == "mps":
        raise TraceError(
            "the model is on MPS, which has no float64, in which it is proven and its gates are kept; grow it on the "
            'CPU (model.to("cpu"), and an optimizer of these parameters) and move it to "mps" when it is grown'
        )
    for name, tensor in tensors:
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise TraceError(f"{name} is not materialised yet; run one forward pass before attaching torchgrow")
        if tensor.is_inference():
            raise TraceError(
                f"{name} was made under torch.inference_mode(), so that nothing can train it or write into it; "
                "build the model outside of it"
            )
        sparse = tensor.layout != torch.strided and isinstance(tensor, nn.Parameter)  # sparse buffers stay whole
        if sparse or tensor.is_quantized:
            raise TraceError(
                f"{name} is {tensor.layout}, quantized={tensor.is_quantized}; only dense tensors can be cut"
            )
    _check_apart(tensors)


def _check_apart(tensors: list[tuple[str, Tensor]]) -> None:
    """Refuse weights that share memory with another tensor, but not the object: each would get memory of its own."""
    first: dict[int, str] = {}
    for name, tensor in tensors:  # parameters first
        plain = type(tensor.data) is Tensor and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel()
        other = first.get(tensor.data_ptr(), name) if plain else name
        if plain and isinstance(tensor, nn.Parameter):
            first[tensor.data_ptr()] = name
        if other != name:
            raise TraceError(
                f"{name} and {other} are two tensors in one memory, which growing would part; make them one "
                f"parameter (model.{name} = model.{other}), or give one of them memory of its own, by clone()"
            )


def _check_examples(examples: list[Any]) -> None:
    """Refuse what a model cannot be run on several times, or not at all."""
    for i, example in enumerate(examples or [None]):
        name = f"example_inputs[{i}]" if len(examples) > 1 else "example_inputs"
        found = leaves(example, name)
        if not any(isinstance(leaf.value, Tensor) for leaf in found):
            raise TraceError(
                f"{name} holds no tensor; pass a small batch the model accepts, e.g. example_inputs=images[:2], "
                "a tuple for several arguments, a dict for keywords, or a list of several such examples"
            )
        for leaf in found:
            if isinstance(leaf.value, Iterator):
                raise TraceError(
                    f"{leaf.path} is a {type(leaf.value).__name__}, which can be read only once, but the model is run "
                    "several times; give a list or a tuple"
                )


def carried_inputs(example: Any, carries: Carries) -> dict[tuple[int | str, int | str], list[int]]:
    """For every (argument, output) the indices of the argument's tensors among those of the example."""
    found = [leaf for leaf in leaves(example, "example_inputs") if isinstance(leaf.value, Tensor)]
    entering = {}
    for argument, output in carries.items():
        indices = _floating(found, argument)
        if not indices:
            entries = list(dict.fromkeys(entry for leaf in found for entry in leaf.entries[:1]))
            raise TraceError(
                f"carried names argument {argument!r}, in which example_inputs holds no floating-point tensor (it "
                f"holds tensors in {entries}); give an initial state of zeros there, as in example_inputs=(tokens, "
                "state), carried={1: 1}"
            )
        entering[argument, output] = indices
    return entering


def _floating(found: list[Leaf], entry: Hashable) -> list[int]:
    """Indices of the floating-point tensors in an entry."""
    return [i for i, leaf in enumerate(found) if entry in leaf.entries and leaf.value.is_floating_point()]


def carried_outputs(
    outputs: Any, given: list[Tensor], entering: dict[tuple[int | str, int | str], list[int]]
) -> dict[int, int]:
    """Index of every carried tensor among the outputs' tensors, and among the inputs'."""
    found = put_out(outputs)
    leaving: dict[int, int] = {}
    for (argument, output), indices in entering.items():
        ends = _floating(found, output)
        into = [tuple(given[i].shape) for i in indices]
        out_of = [tuple(found[i].value.shape) for i in ends]
        if into != out_of:
            raise TraceError(
                f"carried says that output {output!r} becomes argument {argument!r} of the next call, but their "
                f"tensors are of shapes {out_of} and {into}; name the output (by position, key or attribute) that "
                "returns the new state, and give an initial state of its shapes in example_inputs"
            )
        leaving.update(zip(ends, indices, strict=True))
    return leaving
