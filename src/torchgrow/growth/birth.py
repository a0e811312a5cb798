"""Initial weights at the scale of the planned network rather than of the frame.

Initial weights have a variance c/n, where n is a fan of their tensor (He et al., 2015, arXiv 1502.01852, Eq 10; Glorot
and Bengio, 2010, Eq 12). Cut out of a wide frame, the weights of a small network are too small by the root of
the ratio of the two fans, in every layer. Normalisation hides this; without it signals and gradients vanish. So
untrained weights are multiplied by that root, for the widths planned for the end of the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..exchange import Exchange
from ..structure.optimizer_slots import Layout
from ..structure.space import Space, live_positions
from ..structure.store import Births, is_meta
from ..structure.surgery import scale_
from .advice import OUTLIER, outlier

Shape = tuple[int, ...]

Rule = tuple[str, float]
"""A fan by name, and what the variance is times that."""

UNIFORM = 1 / 3
CONSTANTS = (UNIFORM, 1.0, 2 / 1.04, 2 / 1.01, 2.0, 25 / 9)
"""Variances times fan: PyTorch's rule; LeCun's, Glorot's, orthogonal; He's with leaks of 0.2, 0.1, 0; tanh's gain."""

STANDARD_ERRORS = 4.0
"""By how many standard errors a variance may differ from a rule."""

VAGUE = 0.2
"""Largest standard error of a single weight of its kind for a rule to be identified; otherwise it is not rescaled."""

MOST = 2**20
"""Values of a tensor that are looked at, about."""


def _of_shape(shape: Shape) -> dict[str, float]:
    """Fans of a weight."""
    inputs, outputs = float(math.prod(shape[1:])), float(shape[0] * math.prod(shape[2:]))
    return {"in": inputs, "out": outputs, "mean": (inputs + outputs) / 2}


@dataclass(frozen=True)
class _Tensor:
    """A parameter whose initial values are random: the fans that its variance could come from, by name."""

    kind: str  # parameters of one kind are taken to follow one rule
    name: str
    fans: Mapping[str, tuple[float, float]]  # in the frame, and in the network planned
    variance: float
    count: int
    mean: float  # its size, in standard errors
    top: float  # the largest of its values, less what rounding may add
    trained: bool  # whether they are none that any rule draws: their mean is not 0, or they are far from independent

    @property
    def miss(self) -> float:
        """Tolerance of the logarithm of its variance."""
        return STANDARD_ERRORS * math.sqrt(2 / self.count) + 0.01

    def rules(self) -> Iterator[Rule]:
        """Fans and constants that give its variance, within the tolerance."""
        for fan, (frame, _) in self.fans.items():
            for constant in CONSTANTS:
                if abs(math.log(self.variance * frame / constant)) < self.miss:
                    yield fan, constant

    def alike(self, other: _Tensor) -> bool:
        """Whether both may have the same variance."""
        return abs(math.log(self.variance / other.variance)) < max(self.miss, other.miss)

    def beyond(self, rule: Rule) -> bool:
        """Whether a value lies outside the bounds of PyTorch's uniform rule, if that is the rule."""
        fan, constant = rule
        return constant == UNIFORM and self.top > 1 / math.sqrt(self.fans[fan][0])


@torch.no_grad()
def birth_scales(
    model: nn.Module, space: Space, planned: Tensor, seed: int = 0, held: Container[str] | None = None
) -> dict[str, float]:
    """What to multiply fresh parameters of a frame by, by name; those that stay as they are are left out.

    The rule that initialised a parameter is identified from its variance, together with the others of its kind. Not
    rescaled are weights to which no rule with a fan fits, or to which one fixed variance fits as well, as in
    transformers. If any tensor has values that its rule cannot draw, the model was trained and nothing is rescaled.

    `planned` (bool [n]) is a structure of the widths that the run is to end with, and `held` are the names of the
    parameters that will be trained: others are not rescaled. `seed`: of all values of a frame on the meta device.
    """
    kinds: dict[str, list[_Tensor]] = {}
    full = Births(model, seed).full if is_meta(model) else model.get_parameter
    for found in _random(model, space, planned, full):
        if found.trained:
            return {}
        if found.mean < STANDARD_ERRORS:
            kinds.setdefault(found.kind, []).append(found)
    scales = {}
    for tensors in kinds.values():
        votes = Counter(rule for tensor in tensors for rule in tensor.rules())
        for tensor in tensors:
            best = max(tensor.rules(), key=lambda rule: votes[rule], default=None)  # of several the first
            if best is None or votes[best] < sum(tensor.alike(other) for other in tensors):
                continue
            if tensor.beyond(best):
                return {}
            frame, live = tensor.fans[best[0]]
            alone = best[1] != UNIFORM and votes[best] == 1 and tensor.miss > VAGUE  # whose bounds tell
            if frame != live and not alone and (held is None or tensor.name in held):
                scales[tensor.name] = math.sqrt(frame / live)
    return scales


def rescale_(model: nn.Module, scales: Mapping[str, float], exchange: Exchange, layouts: Sequence[Layout] = ()) -> None:
    """Multiply parameters by name, and optimizers' copies, unless on the meta device; the exchange's `undo` undoes."""
    if not is_meta(model):
        tensors = dict(model.named_parameters())
        scale_(tensors, scales, exchange)
        for layout in layouts:
            for (i, _), slot in layout.copies([tensors[name] for name in scales]).items():
                scale_({"": slot}, {"": list(scales.values())[i]}, exchange)


def _random(model: nn.Module, space: Space, planned: Tensor, full: Callable[[str], Tensor]) -> Iterator[_Tensor]:
    """The parameters that are not all the same, with the fans of the first module of theirs that has any."""
    seen = set[int]()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        shapes = {key: _shapes(space, names[id(p)], tuple(p.shape), planned) for key, p in own.items()}
        for key, parameter in own.items():
            name, fans = names[id(parameter)], _fans(module, key, shapes)
            if fans and id(parameter) not in seen and parameter.numel() > 1:
                seen.add(id(parameter))
                whole = full(name).detach()
                values = whole.flatten()[:: 1 + whole.numel() // MOST].double()
                variance = float(values.var())
                if variance > 0:
                    mean = abs(float(values.mean())) * math.sqrt(values.numel() / variance)
                    plain = isinstance(module, (nn.Linear, _ConvNd))
                    kind = f"{'' if plain else type(module).__name__} {'bias' if parameter.dim() == 1 else 'weight'}"
                    top = float(whole.abs().max()) / (1 + 4 * torch.finfo(whole.dtype).eps)
                    trained = _trained(key, whole, mean)  # now: a frame on the meta device has one tensor at a time
                    yield _Tensor(kind, name, fans, variance, values.numel(), mean, top, trained)


def _trained(key: str, values: Tensor, mean: float) -> bool:
    """See `_Tensor`; `mean` in standard errors."""
    if values.dim() < 2:
        return False
    far = outlier(values.flatten(1)) if values.numel() <= 16 * MOST else None
    ordinary = key.startswith(("weight_ih", "weight_hh")) or key == "weight"
    return (ordinary and mean > 2 * STANDARD_ERRORS) or (far is not None and far > OUTLIER)


def _fans(module: nn.Module, key: str, shapes: Mapping[str, tuple[Shape, Shape]]) -> dict[str, tuple[float, float]]:
    """By name, what the variance of a parameter may be a share of: in the frame, and in the network planned."""
    frame, live = shapes[key]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {}
    own: dict[str, tuple[float, float]] = {}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        hidden = next(pair for name, pair in shapes.items() if name.startswith("weight_hh"))
        own["hidden"] = (float(hidden[0][0] // _gates(module)), float(hidden[1][0] // _gates(module)))
    if len(frame) == 2 or (len(frame) > 2 and isinstance(module, _ConvNd)):  # of others, an axis may be of experts
        fans = _of_shape(live)
        return own | {name: (fan, fans[name]) for name, fan in _of_shape(frame).items() if fan > 0 and fans[name] > 0}
    if own or len(frame) != 1:
        return own
    weight = shapes.get("weight")
    if key != "bias" or weight is None or len(weight[0]) < 2:
        return {}
    return {"in": (_of_shape(weight[0])["in"], _of_shape(weight[1])["in"])}


def _gates(module: nn.Module) -> int:
    """Rows of a recurrent weight per unit."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return 4
    return 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1


def _shapes(space: Space, name: str, shape: Shape, keep: Tensor) -> tuple[Shape, Shape]:
    """The shape of a tensor in the frame, and in a structure as if no layer were left out."""
    axes = space.cut_axes.get(name, ())
    live = {axis: int(live_positions(space.unit_of[name, axis], keep).sum()) for axis in axes}
    return shape, tuple(max(1, live.get(axis, size)) for axis, size in enumerate(shape))
