"""Networks by name: of torchvision, timm or transformers, or what a function in a Python file returns."""

import difflib
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchgrow import TorchgrowError
from torchgrow.lab.user_files import explained, made_in

_BYTES = 20  # a parameter, while it is proven: in float32, and in float64 as what is cut and as its backup


def library_network(width: float = 1.0, *, model: str, classes: int | None = None) -> nn.Module:
    """An image classifier of a library, as `Recipe.build` makes it; its weights are drawn, not downloaded.

    Args:
        width: 1.0; these networks have one width.
        model: ``torchvision:NAME``, ``timm:NAME``, or ``hf:FOLDER`` with what `save_pretrained` left there.
        classes: number of outputs. Default: the library's, or what the folder says.

    Raises:
        TorchgrowError: there is no such model, or it cannot be built.
    """
    assert width == 1.0
    kind, _, name = model.partition(":")
    return LIBRARIES[kind](name, classes)


def file_network(width: float = 1.0, *, model: str) -> nn.Module:
    """What the function of ``path/to/file.py:function`` returns, as `Recipe.build` makes it; width: 1.0.

    Raises:
        TorchgrowError: there is no such function, it fails, or it returns no model.
    """
    assert width == 1.0
    return from_file(model)[0]


def package(name: str) -> Any:
    """A package that the lab does not need itself.

    Raises:
        TorchgrowError: it cannot be imported; the message has the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise TorchgrowError(
            f"this needs the package {name}, which cannot be imported ({error}); install it with: pip install {name}"
        ) from error


def known(source: str, name: str, names: Iterable[str]) -> None:
    """Raise, with what is near, if the name is not among the names."""
    names = list(names)
    if name not in names:
        near = [f"{source}:{close}" for close in difflib.get_close_matches(name, names, 3)]
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"it knows {len(names)}, such as {', '.join(names[:3])}"
        )
        raise TorchgrowError(f"{source} has no model {name!r}; {hint}")


def built(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a library's model, unless it is too large for memory: a killed process explains nothing."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in build().parameters())
    except Exception:
        count = 0  # some compute with values while they are built; those few are taken at their word
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if memory and count * _BYTES > memory:
        raise TorchgrowError(
            f"{name} has {count:,} parameters, and proving what can go needs about {count * _BYTES / 1e9:.0f} GB of "
            f"memory ({memory / 1e9:.0f} GB here); inspect a smaller one of the same kind, with fewer layers or "
            "narrower, by path/to/file.py:function"
        )
    with explained(f"{name} could not be built", "try another model, or another version of its library"):
        return build()


def from_torchvision(name: str, classes: int | None = None) -> nn.Module:
    """A model of torchvision.

    Raises:
        TorchgrowError: there is none of this name, it cannot be built, or torchvision is not installed.
    """
    zoo = package("torchvision").models
    known("torchvision", name, zoo.list_models())
    builder = zoo.get_model_builder(name)
    options: dict[str, Any] = {"weights": None} | ({} if classes is None else {"num_classes": classes})
    if "weights_backbone" in signature(builder).parameters:
        options["weights_backbone"] = None  # else it would be downloaded
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # else they warn that they have not been told
    return built(f"torchvision:{name}", lambda: builder(**options))


def from_timm(name: str, classes: int | None = None) -> nn.Module:
    """A model of timm; what follows a dot in its name names weights, and is left out.

    Raises:
        TorchgrowError: there is none of this name, or it cannot be built.
    """
    timm = package("timm")
    architecture = name.partition(".")[0]
    known("timm", architecture, timm.list_models())
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    return built(f"timm:{name}", lambda: timm.create_model(architecture, pretrained=False, **options))


def from_folder(folder: str, classes: int | None = None) -> nn.Module:
    """The image classifier that the ``config.json`` of a folder of transformers describes, in float32.

    Raises:
        TorchgrowError: the folder has none, or it is of no image classifier.
    """
    transformers = package("transformers")
    if not (Path(folder) / "config.json").is_file():
        raise TorchgrowError(
            f"{folder} has no config.json; hf: names a folder on this machine, as model.save_pretrained({folder!r}) "
            "leaves it"
        )
    with explained(f"hf:{folder} could not be built", "name the folder of an image classifier of transformers"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if classes is not None:
            config.num_labels = classes
    return built(f"hf:{folder}", lambda: transformers.AutoModelForImageClassification.from_config(config).float())


def pretrained(folder: Path) -> nn.Module:
    """The image classifier in a folder of transformers, with its weights, in float32.

    Raises:
        TorchgrowError: it cannot be read, or weights are missing.
    """
    kind = package("transformers").AutoModelForImageClassification
    with explained(f"hf:{folder} could not be built", "name the folder of an image classifier of transformers"):
        model, found = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    if found["missing_keys"]:
        raise TorchgrowError(
            f"{folder} is no trained image classifier: it has no {', '.join(sorted(found['missing_keys'])[:3])}; save "
            "the one that was trained with save_pretrained"
        )
    network: nn.Module = model.float()
    return network


def from_file(name: str) -> tuple[nn.Module, Any]:
    """The model of ``path/to/file.py:function``, and the example inputs it came with, or None.

    Raises:
        TorchgrowError: there is no such function, it fails, or it returns something else.
    """
    return as_model(name, called(name))


def called(name: str) -> Any:
    """What the function of ``path/to/file.py:function`` returns; a model that stands there ready made as it is.

    Raises:
        TorchgrowError: there is no such function, or it fails.
    """
    made = made_in(name, "the model")
    path, _, function = name.rpartition(":")
    if not callable(made):
        raise TorchgrowError(f"{path} has no callable {function!r}; name a function that returns the model")
    if not isinstance(made, nn.Module):  # a model that stands in the file ready made is as good
        file = str(Path(path).resolve())
        with explained(f"{name} failed", "it is called without arguments and must return the model", file):
            made = made()
    return made


def as_model(name: str, made: Any) -> tuple[nn.Module, Any]:
    """The model that a function returned, and the example inputs it came with, or None.

    Raises:
        TorchgrowError: it returned something else.
    """
    inputs = None
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise TorchgrowError(
            f"{name} returned {type(made).__name__}; return a torch.nn.Module, or (module, example_inputs)"
        )
    return made, inputs


LIBRARIES: dict[str, Callable[[str, int | None], nn.Module]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "hf": from_folder,
}
"""How networks of `library_network` are built: from what follows the colon, and a number of classes."""
