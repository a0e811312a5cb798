"""One training of a comparison: its settings, and the hash that its row is found by."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchgrow import TorchgrowError, policies
from torchgrow.lab.names import FIXED, UNBUDGETED, is_system
from torchgrow.lab.own_networks import told_apart
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems import BEGIN_TRAINED, system

AFTER = {"uniform-flops": "default", "direct": "default", "l1": "dense", **dict.fromkeys(BEGIN_TRAINED, "dense")}
"""Methods that start from the network of another one."""


def after(method: str) -> str:
    """The method whose network one starts from, whatever settings it has; "" if from none."""
    return AFTER.get(method.partition(":")[0], "")


_IF_GIVEN = ("channels_last", "source", "mean", "std", "weights", "distil", "crop", "void", "largest_batch")


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe as JSON without fields that decide nothing: rows from before there were such things stay good."""
    idle = {"preset", *(() if config.get("schedule") == "wsd" else ("decay",))}
    idle |= {field for field in _IF_GIVEN if not config.get(field)}
    return {key: value for key, value in config.items() if key not in idle}


_OF_ALL = {
    "lambda_base": 0.5,
    "layer_lambda_base": 0.1,
    "layer_lag": 1.0,
    "ramp": 0.1,
    "peak": 1.0,
    "hold": 0.1,
    "prune": "alike",
    "align": 1,
    "settle": 0.0,
    "heat": 1.0,
    "temperature": "unit",
    "relaxation": "sigmoid",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-6,
}
_OF_KIND: dict[type[policies.Policy], dict[str, Any]] = {
    policies.Default: {"controller": "plan", "draws": "ranked", "gates": False},
    policies.Paper: {"controller": "pressure", "draws": "independent", "gates": True},
    policies.Random: {"controller": "plan", "draws": "independent", "gates": False, "ramp": 0.0},
}
_ROWS_SAY = {"final_inverse_temperature": "heat", "temperature_rises": "temperature"}


def growing(preset: str, layers: bool = False) -> dict[str, Any]:
    """Settings of a way to grow, all in the one list that rows have had from the beginning.

    Args:
        preset: as `torchgrow.policies.named` reads it.
        layers: whether layers grow too.

    Raises:
        TorchgrowError: it is unknown, or not among the ways to grow that are compared.
    """
    policy = policies.named(preset, layers=layers)
    if type(policy) not in _OF_KIND:
        raise TorchgrowError(f"preset {preset!r} grows in another way than those that are compared")
    own = {_ROWS_SAY.get(name, name): value for name, value in policy.settings().items()}
    return {**_OF_ALL, **_OF_KIND[type(policy)], **own}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to train: a method and everything that decides what comes out.

    Attributes:
        method: a name in `FIXED` or `SYSTEMS` (of shrink with settings), or what `torchgrow.policies.named` reads.
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
        config |= told_apart(self.recipe)  # rows of recipes of ours from before there was this stay good
        if self.method in UNBUDGETED:
            del config["budget"]
        base = replace(self, method=after(self.method) or self.method)
        if is_system(self.method):
            config["system"] = asdict(system(self.method))
        if base.method not in FIXED and not is_system(base.method):
            config["growing"] = growing(base.preset(), layers=bool(self.recipe.depth))
            if not self.recipe.depth:
                del config["growing"]["layer_lag"]  # decides nothing; rows from before it was there stay good
            if config["growing"]["draws"] == "ranked" or config["growing"].get("paced"):
                config["updates_per_epoch"] = replace(self.recipe, preset=base.preset()).updates_an_epoch()
        else:
            config |= {"depth": False, "meta": False}
        return json.loads(json.dumps(decisive(config)))

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
