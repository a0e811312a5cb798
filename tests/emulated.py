"""A device that is not the CPU, on a machine without one: memory of the host that keeps to the rules of a GPU.

Importing this builds it with the C++ compiler (once; PyTorch keeps what was built) and registers it as "emulated".
"""

import sys
import types
from pathlib import Path

import torch
from torch.utils.backend_registration import rename_privateuse1_backend
from torch.utils.cpp_extension import load

NAME = "emulated"


def _module() -> types.ModuleType:
    """What `torch.cuda` is for CUDA, as far as it is asked for."""
    module = types.ModuleType(f"torch.{NAME}")
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True}
    for name, answer in {**answers, "_is_in_bad_fork": False}.items():
        setattr(module, name, lambda answer=answer: answer)
    vars(module).update(
        _initialized=True,
        manual_seed_all=lambda seed: None,  # random numbers are the CPU's
        get_rng_state=lambda *device: torch.zeros(1, dtype=torch.uint8),
        set_rng_state=lambda *state: None,
    )
    return module


load(
    "torchgrow_other_device",
    [str(Path(__file__).parent / "devices" / "other_device.cpp")],
    extra_cflags=["-O0", "-DAT_PER_OPERATOR_HEADERS"],  # only the headers that it names: a third of the time
    is_python_module=False,
)
rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, sys.modules.setdefault(f"torch.{NAME}", _module()))


def held() -> int:
    """Bytes of all tensors on the device."""
    return int(torch.ops.emulated.held())
