"""Weights that a run begins with: a file of them, a folder that `torchgrow.save` wrote, or one of transformers."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import torchgrow
from torchgrow import TorchgrowError
from torchgrow.lab import frames

_INSIDE = ("state_dict", "model_state_dict", "model")  # where common checkpoints keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def network(path: Path, build: Callable[..., nn.Module]) -> nn.Module:
    """The network with those weights, on the CPU, in training mode.

    Args:
        path: a ``.pt``, ``.pth`` or ``.safetensors`` file of the whole frame; a folder that `torchgrow.save` wrote,
            which gives the smaller network that is in it; or a folder of transformers.
        build: builds the frame, as in `Recipe`.

    Raises:
        TorchgrowError: the weights cannot be read, or are of another network; names are in the message.
    """
    if _is_saved(path):
        return torchgrow.load(path, partial(build, 1.0)).train()
    model = build(1.0)
    _give(model, _read(path), path)
    return model.train()


def classes_in(path: Path, build: Callable[..., nn.Module]) -> int | None:
    """The number of classes that weights were trained for; None where the network has no choice of it.

    Two builds with different numbers of classes tell what the classifier's tensors are called; the weights tell how
    many rows those have.

    Args:
        path: as for `network`.
        build: as for `network`; a choice of classes is its argument ``classes``.

    Raises:
        TorchgrowError: the weights cannot be read.
    """
    few, many = _shapes(build, 3), _shapes(build, 5)
    given = load_file(path / "model.safetensors") if _is_saved(path) else _read(path)
    heads = [name for name in few if few[name] != many.get(name, ()) and few[name][0] == 3 and name in given]
    return int(given[heads[0]].shape[0]) if heads and given[heads[0]].dim() else None


def digest(model: nn.Module) -> str:
    """Of all that a network's state dict holds, in hexadecimal: the same weights have the same."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        if isinstance(tensor, Tensor):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _is_saved(path: Path) -> bool:
    """Whether `torchgrow.save` wrote this."""
    return (path / "structure.json").is_file()


def _shapes(build: Callable[..., nn.Module], classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a network of so many classes; none where it has no choice of them."""
    try:
        try:
            with torch.device("meta"):
                model = build(1.0, classes=classes)
        except (RuntimeError, NotImplementedError, TorchgrowError):  # some compute with values while they are built
            model = build(1.0, classes=classes)
    except TypeError:
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder of transformers, by their names in the model.

    Raises:
        TorchgrowError: there are none, or they cannot be read without running code.
    """
    if (path / "config.json").is_file() and not (path / "network").is_dir():
        return dict(frames.pretrained(path).state_dict())
    if path.is_dir():
        hint = f"did you mean {path / 'network'}?" if _is_saved(path / "network") else "name one of them"
        raise TorchgrowError(
            f"{path} is a folder without weights: --from takes a .pt, .pth or .safetensors file, a folder that "
            f"torchgrow.save wrote (it has a structure.json), or one of save_pretrained; {hint}"
        )
    if not path.exists():
        raise TorchgrowError(
            f'there are no weights in {path}; write them with torch.save(model.state_dict(), "{path}")'
        )
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file raises
        raise TorchgrowError(
            f"{path} cannot be read as weights: {str(error).partition(chr(10))[0]}; files that would run code are not "
            f'opened. In the program that trained the model: torch.save(model.state_dict(), "{path}")'
        ) from error
    for key in _INSIDE:
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        what = ", ".join(map(str, [*found][:5])) if isinstance(found, dict) else type(found).__name__
        raise TorchgrowError(
            f"{path} holds no state dict, of names and tensors, but {what or 'nothing'}; write one with "
            f'torch.save(model.state_dict(), "{path}")'
        )
    state: OrderedDict[str, Tensor] = OrderedDict(found)
    vars(state).update(vars(found) if isinstance(found, OrderedDict) else {})  # versions of its modules
    for prefix in _PREFIXES:
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def versioned(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict with the versions of the modules here, where it has none; some modules load nothing without."""
    found = OrderedDict(state)
    vars(found)["_metadata"] = getattr(state, "_metadata", vars(model.state_dict())["_metadata"])
    return found


def _give(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load weights into the frame they are of.

    Raises:
        TorchgrowError: they are of another one.
    """
    own: dict[str, Any] = model.state_dict()
    counters = {name for name in own if name.endswith(".num_batches_tracked")}  # which old files lack
    odd = [
        f"{name} has {list(state[name].shape)} and must have {list(tensor.shape)}"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and name in state and state[name].shape != tensor.shape
    ]
    missing = [name for name in own if name not in state and name not in counters]
    foreign = [name for name in state if name not in own]
    wrong = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("foreign", foreign)) if names]
    if odd:
        wrong.append(_some(odd))
    if wrong:
        raise TorchgrowError(
            f"the weights in {path} are not those of this {type(model).__name__}: {'; '.join(wrong)}. Name the model "
            f"they were saved from: torchgrow shrink MODEL --from {path}"
        )
    model.load_state_dict(versioned(state, model), strict=False)


def _some(names: list[str]) -> str:
    """Three of them, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
