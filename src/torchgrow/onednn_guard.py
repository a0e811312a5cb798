"""A guard against a bug of oneDNN: the backward pass of thin, strided 1x1 convolutions corrupts memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

THIN = 16
"""Fewest input channels that are safe: oneDNN's channel block, 8 with AVX2 and 16 with AVX-512."""


def guard_(model: nn.Module) -> list[str]:
    """Make the strided 1x1 `nn.Conv2d` of a model safe to train on a CPU at any width, in place; names them.

    A growing network reaches widths where PyTorch writes outside its memory: the weight gradient of a convolution with
    kernel 1, a stride > 1, no padding, one group, input sizes that are multiples of the stride, channels_last layout
    and fewer than 8 (AVX2) or 16 (AVX-512) input channels. It shows as `double free or corruption`, a crash some steps
    later, an endless wait, or *wrong weight gradients alone*. Seen with torch 2.13.0 and 2.14.1 (oneDNN 3.12) on AMD,
    with AVX2 from 8x8 inputs on, with AVX-512 from 48x48. Conv1d, Conv3d, other kernels and float64 were safe.

    Channels_last may come from the input, from the *weight*, or from `torch.compile`, which chooses it by itself. So
    `x.contiguous()` is no cure, but this is: drop the last row, which such a convolution never reads. The size is then
    no multiple of the stride, and oneDNN takes another path. Outputs and gradients stay the same.

    The guard is a forward pre-hook. It hands on the very same tensor unless gradients are on, the tensor is on the CPU
    and thin, and the layout is (or, compiled, may become) channels_last. There it breaks a compiled graph in two, so
    `fullgraph=True` refuses. `torch.jit.script` compiles it along, for any layout. Copies and pickles keep it.

    Not covered: `F.conv2d` called directly, `conv(input=x)` by keyword, and a ConvTranspose2d with kernel 1, stride s,
    `output_padding` s - 1 and fewer than 16 output channels, which fails alike. To be removed once every supported
    torch has a fix of https://github.com/uxlfoundation/oneDNN/issues/6035: tests/test_onednn_guard.py says XPASS then.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and exposed(module):
            names.append(name)
            if crop_thin not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(crop_thin)
    return names


def exposed(conv: nn.Conv2d) -> bool:
    """Whether a convolution could meet the bug at some width."""
    unpadded = conv.padding == "valid" or not any(conv.padding)
    return set(conv.kernel_size) == {1} and max(conv.stride) > 1 and unpadded


def crop_thin(conv: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The forward pre-hook: leave out the last row (or column) where oneDNN would corrupt memory."""
    assert isinstance(conv, nn.Conv2d)
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.shape[-3] >= THIN or conv.groups > 1:
        return None
    # A parametrized weight is not among the parameters, and computing it here could have side effects.
    weight = conv._parameters.get("weight")
    nhwc = channels_last(x) or weight is None or channels_last(weight) or torch.compiler.is_compiling()
    axis = -2 if conv.stride[0] > 1 else -1
    size, stride = x.shape[axis], conv.stride[axis]
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not nhwc or size % stride or traced or not torch.is_grad_enabled():
        return None
    return (narrow(x, axis, 0, size - stride + 1), *args[1:])


def _scripted(self: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    x = args[0]
    axis = -2 if self.stride[0] > 1 else -1
    size, stride = x.shape[axis], self.stride[axis]
    thin = x.device.type == "cpu" and x.shape[-3] < 16 and self.groups == 1
    if thin and size % stride == 0 and torch.is_grad_enabled():
        return (x.narrow(axis, 0, size - stride + 1),)
    return (x,)


# TorchScript knows no *args; it reads the source of what a function wraps. What it compiles has any layout.
crop_thin.__wrapped__ = _scripted  # type: ignore[attr-defined]


def channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch may take a tensor for channels_last; `is_contiguous` cannot tell if C or H W is 1."""
    return tensor.stride(-1) >= tensor.stride(-3) * tensor.shape[-3]


@_disable_dynamo  # torch.compiler.disable, but importing the compiler (a second and more) only at the first call
def narrow(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """`torch.narrow` outside the graph: inductor's gradient of it reads past its end if channels are few."""
    return x.narrow(axis, start, length)
