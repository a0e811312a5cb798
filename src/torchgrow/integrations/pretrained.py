"""Loading grown models that transformers' `save_pretrained` saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoConfig

from ..errors import SavedModelError
from ..persistence.portable import portable_


def from_pretrained(kind: Any, folder: str | Path) -> Any:
    """A grown model that a Trainer or `save_pretrained` saved; transformers' own from_pretrained refuses its shapes.

    Args:
        kind: the model's class, or an Auto class such as `AutoModelForSequenceClassification`.
        folder: the checkpoint, on this machine: `config.json` and `model.safetensors`, in one file or several.

    Returns:
        The model, in evaluation mode.

    Raises:
        SavedModelError: weights are missing or of another model; the message names some.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise SavedModelError(
            f"{folder} has no model.safetensors; save with trainer.save_model or model.save_pretrained"
        )
    config = AutoConfig.from_pretrained(folder)
    model = portable_(kind.from_config(config) if hasattr(kind, "from_config") else kind(config))
    found = model.load_state_dict({k: v for file in files for k, v in load_file(file).items()}, strict=False)
    model.tie_weights()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    missing = sorted({*found.missing_keys} - tied)
    if missing or found.unexpected_keys:
        raise SavedModelError(
            f"{folder} does not fit {type(model).__name__}: missing {missing[:3]}, foreign "
            f"{found.unexpected_keys[:3]}; give the class that was saved"
        )
    return model.eval()
