"""Models by name: from torchvision, timm, transformers, a Python file, or a recipe, each with inputs to trace it on."""

import difflib
import re
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
import torchvision.models as zoo
from torch import nn

from torchgrow import TorchgrowError
from torchgrow.lab import frames, recipes
from torchgrow.lab.names import MODELS
from torchgrow.lab.user_files import explained, is_file

Shape = tuple[int, ...]

_SAMPLES = 2
_TOKENS = 16  # of a text, where nothing is said
# The others read text.
RECIPE_IMAGES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "imagefolder": (3, 64, 64), "voc": (3, 64, 64)}


def parse_shape(text: str) -> Shape:
    """Read a shape as typed: ``1x3x224x224``.

    Raises:
        TorchgrowError: it is not whole numbers of at least 1 with x between.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise TorchgrowError(f"cannot read the input shape {text!r}; write it with the batch first, like 1x3x224x224")
    return tuple(int(size) for size in text.split("x"))


def load(name: str, shapes: Iterable[Shape] = ()) -> tuple[nn.Module, Any]:
    """The model of that name, and example inputs for it.

    Args:
        name: in one of the `torchgrow.lab.names.MODELS`. A file is executed.
        shapes: of the inputs, in place of those known for the model: one float tensor each. For ``hf:`` a
            single one, of the model's main input.

    Raises:
        TorchgrowError: there is no such model, it cannot be built, or no inputs are known for it.
    """
    return load_with_depth(name, shapes)[:2]


def load_with_depth(name: str, shapes: Iterable[Shape] = ()) -> tuple[nn.Module, Any, bool]:
    """As `load`, and whether layers may be left out too, as a recipe says; False of what is no recipe."""
    with torch.random.fork_rng(devices=()):  # the same answer every time, and no trace of it in the caller's state
        torch.default_generator.manual_seed(0)
        return _load(name, tuple(shapes))


def _load(name: str, shapes: tuple[Shape, ...]) -> tuple[nn.Module, Any, bool]:
    kind, _, rest = name.partition(":")
    if kind in _LIBRARIES and rest:
        return *_LIBRARIES[kind](rest, shapes), False
    if is_file(name):
        made = frames.called(name)
        return _of_recipe(made, shapes) if isinstance(made, recipes.Recipe) else (*_in_file(name, made, shapes), False)
    if name in recipes.RECIPES:
        return _of_recipe(recipes.get(name), shapes)
    full = {known: known for known in recipes.RECIPES} | {known: f"torchvision:{known}" for known in zoo.list_models()}
    near = [full[known] for known in difflib.get_close_matches(rest or name, full, 3)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise TorchgrowError(f"there is no model {name!r}{hint}; what works: {MODELS}")


def _of_recipe(recipe: recipes.Recipe, shapes: tuple[Shape, ...]) -> tuple[nn.Module, Any, bool]:
    network = recipe.build()
    if recipe.dataset == "text":
        return network, _words(network, shapes, recipe), recipe.depth
    return network, _images(shapes, RECIPE_IMAGES.get(recipe.dataset, (3, recipe.side, recipe.side))), recipe.depth


def _images(shapes: tuple[Shape, ...], default: Shape) -> Any:
    """Random float tensors of these shapes; without any, a small batch of the default shape."""
    inputs = tuple(torch.randn(shape) for shape in shapes or ((_SAMPLES, *default),))
    return inputs if len(inputs) > 1 else inputs[0]


def _words(network: Any, shapes: tuple[Shape, ...], recipe: recipes.Recipe) -> Any:
    """Random words, and the state that a recurrent network begins with."""
    if len(shapes) > 1:
        raise TorchgrowError(f"{recipe.name} takes one --input, the shape of its words; got {len(shapes)}")
    words = torch.randint(network.embedding.num_embeddings, shapes[0] if shapes else (_SAMPLES, recipe.steps))
    return (words, network.start(len(words))) if hasattr(network, "carried") else words


def _no_inputs(name: str, why: str) -> TorchgrowError:
    return TorchgrowError(
        f"{name} {why}, or write a file with a function that returns (model, example_inputs) and name it as "
        "path/to/file.py:function"
    )


def _from_torchvision(name: str, shapes: tuple[Shape, ...]) -> tuple[nn.Module, Any]:
    model, full = frames.from_torchvision(name), f"torchvision:{name}"
    family = zoo.get_model_builder(name).__module__.split(".")[2]
    if shapes:
        return model, _images(shapes, ())
    if family == "detection":
        raise _no_inputs(
            full, "takes a list of images, so that FLOPs of one sample cannot be told; inspect its backbone"
        )
    weights = list(zoo.get_model_weights(name))
    keywords = getattr(weights[0].transforms, "keywords", {}) if weights else {}
    size = getattr(model, "image_size", keywords.get("crop_size", 224))
    size = (size, size) if isinstance(size, int) else tuple(size)
    if family == "optical_flow":
        return model, _images(((_SAMPLES, 3, 128, 128),) * 2, ())
    return model, _images((), (3, 16, *size) if family == "video" else (3, *size))


def _from_timm(name: str, shapes: tuple[Shape, ...]) -> tuple[nn.Module, Any]:
    model = frames.from_timm(name)
    size: Any = getattr(model, "default_cfg", {}).get("input_size")
    if not size and not shapes:
        raise _no_inputs(f"timm:{name}", "does not say its input size; give it with --input")
    return model, _images(shapes, size)


def _from_transformers(name: str, shapes: tuple[Shape, ...]) -> tuple[nn.Module, Any]:
    transformers = frames.package("transformers")
    full = f"hf:{name}"
    frames.known("hf", name, transformers.CONFIG_MAPPING.keys())
    with explained(f"{full} has no default configuration", "try another type"):
        config = transformers.AutoConfig.for_model(name)
    config.use_cache = False  # a cache among the outputs is not what is asked about
    model = frames.built(full, lambda: transformers.AutoModel.from_config(config))
    return model, _tokens_or_pixels(full, model, config, shapes)


def _tokens_or_pixels(full: str, model: Any, config: Any, shapes: tuple[Shape, ...]) -> dict[str, Any]:
    """Inputs by the names that a model of transformers takes, read off its configuration."""
    parts = [config, getattr(config, "text_config", None), getattr(config, "vision_config", None)]

    def setting(*fields: str) -> Any:
        found = (getattr(part, field, None) for part in parts for field in fields)
        return next((value for value in found if value is not None), None)

    main = model.main_input_name
    if len(shapes) > 1:
        raise TorchgrowError(f"{full} takes one --input, the shape of its {main}; got {len(shapes)}")
    shape = shapes[0] if shapes else None
    accepted = signature(model.forward).parameters
    words, size = setting("vocab_size"), setting("image_size")
    inputs: dict[str, Any] = {}
    if words and "input_ids" in accepted:
        ids = torch.randint(words, (shape if shape and main == "input_ids" else None) or (_SAMPLES, _TOKENS))
        inputs["input_ids"] = ids
        if "decoder_input_ids" in accepted and config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    if (size or shape) and "pixel_values" in accepted and (main == "pixel_values" or parts[2] is not None):
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        frames = (setting("num_frames"),) if setting("num_frames") else ()
        known = (_SAMPLES, *frames, setting("num_channels") or 3, *sides)
        inputs["pixel_values"] = torch.randn(shape if shape and main == "pixel_values" else known)
    if main not in inputs and shape:
        inputs[main] = torch.randn(shape)
    if main not in inputs:
        raise _no_inputs(full, f"takes {main}, of which no shape is known; give it with --input")
    return inputs


def _in_file(name: str, made: Any, shapes: tuple[Shape, ...]) -> tuple[nn.Module, Any]:
    made, inputs = frames.as_model(name, made)
    if shapes:
        inputs = _images(shapes, ())
        _check_reads(made, inputs, name)
    if inputs is None:
        raise TorchgrowError(
            f"no inputs are known for {name}; give their shape with --input 1x3x224x224, or return (model, "
            "example_inputs)"
        )
    return made, inputs


@torch.no_grad()
def _check_reads(model: nn.Module, inputs: Any, name: str) -> None:
    """Tell what --input cannot make where a model with an embedding does not take it.

    Raises:
        TorchgrowError: it does not.
    """
    if not any(isinstance(module, nn.Embedding) for module in model.modules()):
        return
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(*inputs if isinstance(inputs, tuple) else (inputs,))  # evaluation leaves statistics alone
    except (RuntimeError, TypeError, IndexError) as error:
        raise TorchgrowError(
            f"{name} cannot read what --input makes, numbers with fractions: {error}; for word numbers (integers) let "
            "the function return (model, example_inputs)"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


_LIBRARIES: dict[str, Callable[[str, tuple[Shape, ...]], tuple[nn.Module, Any]]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_transformers,
}
