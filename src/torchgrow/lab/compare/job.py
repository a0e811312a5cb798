"""One training of a comparison: its settings, and the hash that its row is found by."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchgrow import PRESETS, Method, policies
from torchgrow.lab.names import FIXED, SYSTEMS, UNBUDGETED
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems import BEGIN_TRAINED, system

AFTER = {"uniform-flops": "default", "direct": "default", "l1": "dense", **dict.fromkeys(BEGIN_TRAINED, "dense")}
"""Methods that start from the network of another one."""


_IF_GIVEN = ("channels_last", "source", "mean", "std", "weights", "distil", "crop", "void", "largest_batch")


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe as JSON without fields that decide nothing: rows from before there were such things stay good."""
    idle = {"preset", *(() if config.get("schedule") == "wsd" else ("decay",))}
    idle |= {field for field in _IF_GIVEN if not config.get(field)}
    return {key: value for key, value in config.items() if key not in idle}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to train: a method and everything that decides what comes out.

    Attributes:
        method: a name in `FIXED` or `SYSTEMS`, or what `torchgrow.Method.named` reads.
        recipe: with seed and budget.
        data: what tells one data set from another.
        validate: whether it is judged by training images that were held out.
    """

    method: str
    recipe: Recipe
    data: tuple[int, ...]
    validate: bool = False

    def config(self) -> dict[str, Any]:
        """All that decides what comes out, as JSON holds it.

        A dense or a published network has no budget, and one of fixed structure no way of growing, so its row serves
        them all.
        """
        config = {**self.recipe.as_json(), "method": self.method, "samples": list(self.data), "validate": self.validate}
        if self.method in UNBUDGETED:
            del config["budget"]
        base = replace(self, method=AFTER.get(self.method, self.method))
        if self.method in SYSTEMS:
            config["system"] = asdict(system(self.method))
        if base.method not in {*FIXED, *SYSTEMS}:
            config |= self._growing(base.preset())
        else:
            config |= {"depth": False, "meta": False}
        return json.loads(json.dumps(decisive(config)))

    def _growing(self, preset: str) -> dict[str, Any]:
        """How it grows, and how often, as `config` has it."""
        often = {"updates_per_epoch": replace(self.recipe, preset=preset).updates_an_epoch()}
        if preset.partition(":")[0] not in PRESETS:
            policy = policies.named(preset)
            return {"growing": {"policy": type(policy).__name__, **policy.settings()}, **often}
        growing = asdict(Method.named(preset, layers=bool(self.recipe.depth)))
        if not self.recipe.depth:
            del growing["layer_lag"]  # decides nothing; rows from before there was such a thing stay good
        method = Method.named(preset)
        if not method.literal:
            del growing["penalised"], growing["start"], growing["paced"]
        return {"growing": growing, **(often if growing["draws"] == "ranked" or method.updates else {})}

    def preset(self) -> str:
        """How it grows: "default" is the recipe's own way, and "default:..." what differs from that."""
        name, _, edits = self.method.partition(":")
        if name != "default":
            return self.method
        own = self.recipe.preset
        return own + (":" if ":" not in own else ",") * bool(edits) + edits

    def key(self) -> str:
        """The same for the same settings only."""
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()[:16]
