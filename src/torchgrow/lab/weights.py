"""Weights that a run begins with: a file of them, a folder that `torchgrow.save` wrote, or one of transformers."""

import argparse
import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import torchgrow
from torchgrow import TorchgrowError
from torchgrow.lab import frames

_INSIDE = ("state_dict", "model_state_dict", "model")  # where common checkpoints keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), _SCALAR]
_PLAIN += [(_SCALAR, "numpy.core.multiarray.scalar")]  # its name before numpy 2
"""Beside tensors, what training programs leave in checkpoints: their arguments, and scores. It runs no code."""


def network(path: Path, build: Callable[..., nn.Module]) -> nn.Module:
    """The network with those weights, on the CPU, in training mode.

    Args:
        path: a ``.pt``, ``.pth`` or ``.safetensors`` file, of the whole frame or of a network that was cut; a folder
            that `torchgrow.save` wrote, which gives the smaller network that is in it; or a folder of transformers.
        build: builds the frame, as in `Recipe`.

    Raises:
        TorchgrowError: the weights cannot be read, are of another network, or no numbers; names are in the message.
    """
    path = _folder(path)
    if _is_saved(path):
        model = torchgrow.load(path, partial(build, 1.0))
    else:
        model, given = build(1.0), _read(path)
        names = [name for name, _ in model.named_parameters()]
        if len(several := _fitting(given, names)) > 1:
            one = max(several)
            raise TorchgrowError(
                f"{path} holds {len(several)} networks of this kind, with {' and '.join(map(repr, several))} before "
                "their names; write the one to begin with into a file of its own: state = "
                f'torch.load("{path}", weights_only=True); torch.save({{name.removeprefix({one!r}): state[name] for '
                f'name in state if name.startswith({one!r})}}, "weights.pt")'
            )
        _give(model, _inner(given, names), path)
    odd = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    odd += [name for name, tensor in model.named_buffers() if bool(tensor.isnan().any())]  # masks may be infinite
    if odd:
        raise TorchgrowError(
            f"the weights in {path} are no numbers: {_some(odd)} hold NaN or infinity, as after a training that "
            "diverged; take an earlier checkpoint of it"
        )
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
    path = _folder(path)
    few, many = _shapes(build, 3), _shapes(build, 5)
    given = load_file(path / "model.safetensors") if _is_saved(path) else _inner(_read(path), few)
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


def _folder(path: Path) -> Path:
    """The folder that `torchgrow.save` wrote where one of its files is named; else the path itself."""
    own = path.name in ("model.safetensors", "structure.json") and path.is_file()
    return path.parent if own and _is_saved(path.parent) else path


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
        found = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # whatever a damaged or foreign file raises; what it advises is to run its code
        raise TorchgrowError(
            f"{path} cannot be read as weights: it is damaged, or holds more than tensors and plain data, such as a "
            "whole model, and files that would run code are not opened. In the program that trained the model: "
            f'torch.save(model.state_dict(), "weights.pt")'
        ) from error
    state = _state_in(found)
    if not _is_state(state):
        inside = [key for key, value in state.items() if _is_state(value)] if isinstance(state, dict) else []
        if inside:
            raise TorchgrowError(
                f"{path} holds {len(inside)} state dicts, {', '.join(map(str, inside))}; write the one to begin with "
                f'into a file of its own: torch.save(torch.load("{path}")[{inside[-1]!r}], "weights.pt")'
            )
        odd = (
            [name for name, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else []
        )
        what = _some([str(name) for name in odd]) or ("nothing" if isinstance(state, dict) else type(state).__name__)
        raise TorchgrowError(
            f"{path} holds no state dict, of names and tensors: there is {what}; in the program that trained the "
            'model: torch.save(model.state_dict(), "weights.pt")'
        )
    return state


def _unpickled(path: Path) -> Any:
    """What `torch.save` wrote, if reading it runs no code."""
    with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
        warnings.simplefilter("ignore", UserWarning)  # of TorchScript, which is refused anyway
        return torch.load(path, "cpu", weights_only=True)


def _is_state(found: Any) -> bool:
    """Whether this is a state dict: names and tensors."""
    return isinstance(found, dict) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _state_in(found: Any) -> Any:
    """The state dict in a checkpoint: under a usual name, or the only one there is; else what is there."""
    while isinstance(found, dict) and not _is_state(found):
        usual = [found[key] for key in _INSIDE if isinstance(found.get(key), dict)]
        alone = [value for value in found.values() if _is_state(value)]
        if not usual and len(alone) != 1:
            break
        found = (usual or alone)[0]
    return found


def _inner(given: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a network that was saved within a wrapper, by the names of its parameters alone.

    DataParallel, torch.compile, an average and modules of Lightning put their own name before, and may have more
    tensors beside the network. If parameters are missing nothing is taken out.
    """
    fits = _fitting(given, names)
    whole = len(fits) == 1 and fits[0].endswith(".")
    inside = {name: tensor for name, tensor in given.items() if not whole or name.startswith(fits[0])}
    state: OrderedDict[str, Tensor] = OrderedDict(inside)
    vars(state).update(vars(given) if isinstance(given, OrderedDict) else {})  # versions of its modules
    for prefix in fits if whole else _PREFIXES:  # of what does not fit, the message has plain names
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _fitting(given: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """What stands before the names of a network's parameters, for every network that is there whole."""
    own = [*names]
    found = [name.removesuffix(own[0]) for name in given if own and name.endswith(own[0])]
    return [prefix for prefix in found if all(prefix + name in given for name in own)]


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
    if any("torchgrow_structure" in name for name in state):  # of a network that was cut: the record travels along
        torchgrow.portable_(model).load_state_dict(versioned(state, model))
        return
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    here = {id(own[name]) for name in state if name in own}  # of tied ones a safetensors file has one name
    counters = {name for name in own if name.endswith(".num_batches_tracked")}  # which old files lack
    odd = [
        f"{name} has {list(state[name].shape)} and must have {list(tensor.shape)}"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and name in state and state[name].shape != tensor.shape
    ]
    missing = [name for name in own if id(own[name]) not in here and name not in counters]
    foreign = [name for name in state if name not in own]
    wrong = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("foreign", foreign)) if names]
    if odd:
        wrong.append(_some(odd))
    if wrong:
        raise TorchgrowError(
            f"the weights in {path} are not those of this {type(model).__name__}: {'; '.join(wrong)}. Name the model "
            f"they were saved from: torchgrow shrink MODEL --from {quote(str(path))}"
        )
    model.load_state_dict(versioned(state, model), strict=False)


def _some(names: list[str]) -> str:
    """Three of them, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
