"""Loading grown models that transformers' `save_pretrained` saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from ..errors import SavedModelError
from ..persistence.portable import KEY, portable_


def from_pretrained(kind: Any, folder: str | Path) -> Any:
    """A grown model that a Trainer or `save_pretrained` saved; transformers' own from_pretrained refuses its shapes.

    The weights are loaded by transformers, whose names in files may differ from those in the model.

    Args:
        kind: the model's class, or an Auto class such as `AutoModelForSequenceClassification`.
        folder: the checkpoint, on this machine: `config.json` and `model.safetensors`, in one file or several.

    Returns:
        The model, in evaluation mode.

    Raises:
        SavedModelError: weights are missing or of another model; the message names some.
    """
    files, records = list(Path(folder).glob("model*.safetensors")), dict[str, torch.Tensor]()
    if not files:
        raise SavedModelError(
            f"{folder} has no model.safetensors; save with trainer.save_model or model.save_pretrained"
        )
    for file in files:
        with safe_open(file, "pt") as tensors:
            records |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.endswith(KEY)}  # noqa: SIM118
    if hasattr(kind, "from_config"):
        with torch.device("meta"):
            kind = type(kind.from_config(AutoConfig.from_pretrained(folder)))

    class Cut(kind):
        """Has the shapes in the folder as soon as it is built."""

        _keys_to_ignore_on_load_unexpected = (*(kind._keys_to_ignore_on_load_unexpected or ()), KEY)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            portable_(self).load_state_dict(dict(records), strict=False)
            portable_(self, on=False)  # transformers would look for a parameter of every name in its state dict

    Cut.__name__, Cut.__module__ = kind.__name__, kind.__module__  # by which transformers knows how names differ
    model, found = Cut.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = {name: sorted(map(str, found[f"{name}_keys"]))[:3] for name in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        raise SavedModelError(
            f"{folder} does not fit {kind.__name__}: missing {wrong['missing']}, foreign {wrong['unexpected']}, of "
            f"another size {wrong['mismatched']}; give the class that was saved"
        )
    model.__class__ = kind
    return portable_(model).eval()
