"""Label replay: run the frame once, carry labels beside every tensor, read off the space.

The model runs as it is, on real tensors, under a `TorchDispatchMode`: data-dependent Python, helper functions and
raw parameters need no special care. What cannot be understood is frozen with its operation, module and line.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from . import contractions, reductions, sequences  # noqa: F401 (importing them registers their rules)
from .adapters import adapted
from .errors import TraceError
from .labels import FIXED, Labels, Layer
from .rules import CONSTANT, COUNTED, FILLED, MODULE_RULES, RULES, copy, pointwise, unknown
from .space import Attribute, FlopTerm, Frozen, Place, Space


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run the model on example inputs: a tensor, a tuple or list of positional ones, or a dict of keywords."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def check_model(model: nn.Module, example_inputs: Any) -> None:
    """Refuse early what cannot be traced.

    Raises:
        TraceError: the model is not a plain module on one device, or there are no example inputs.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TraceError(f"the model is wrapped in {type(model).__name__}; pass model.module and wrap it afterwards")
    if hasattr(model, "_orig_mod"):
        raise TraceError("the model is compiled; pass the plain module (model._orig_mod) to torchgrow")
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise TraceError(f"layer {path!r} is compiled; call torchgrow first and compile what it leaves you with")
    if not any(isinstance(x, Tensor) for x in tree_leaves(example_inputs)):
        raise TraceError(
            "example_inputs holds no tensor; pass a small batch the model accepts, e.g. example_inputs=images[:2], "
            "a tuple for several arguments, or a dict for keywords"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise TraceError(f"the model is spread over {', '.join(devices)}; move it to one device with model.to(...)")
    for name, tensor in tensors:
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise TraceError(f"{name} is not materialised yet; run one forward pass before attaching torchgrow")
        if isinstance(tensor, nn.Parameter) and tensor.is_complex():
            raise TraceError(f"{name} is complex; keep real and imaginary part in two real parameters")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TraceError(
                f"{name} is {tensor.layout}, quantized={tensor.is_quantized}; only dense tensors can be cut"
            )


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and random state are as before afterwards."""
    modes = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for buffer in model.buffers()]
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for module, training, held in modes:
            module.training = training
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, before, version in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


@dataclass
class _Read:
    """A contraction reading produced values through the columns of a weight."""

    produced: Layer
    weight: Layer


@dataclass
class _Freezing:
    """A call of `freeze`, with the symbols it froze."""

    frozen: Frozen
    symbols: Tensor


class Replay(TorchDispatchMode):
    """The tracer: implements `rules.Context` while the frame runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.labels = Labels()
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> its layers
        self.from_input: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensors computed from the inputs
        self.filled_tensors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.names: dict[int, str] = {}
        self.symbols: dict[Place, Tensor] = {}
        self.used: set[str] = set()
        self.reads: list[_Read] = []
        self.freezings: list[_Freezing] = []
        self.split_layers: list[Layer] = []
        self.flop_terms: list[tuple[int, list[Tensor], str]] = []
        self.counted: dict[tuple[str, str], Tensor] = {}
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.whole: nn.Module | None = None  # the module under way that has a rule of its own
        self.deferred: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> what its use would freeze
        self.op = ""
        self.shadows: WeakTensorKeyDictionary | None = None  # meta frames: the values of what no weight has touched
        self.parameters = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {**self.parameters, **dict(model.named_buffers())}
        for name, tensor in self.tensors.items():
            self._label(name, tensor)

    def _label(self, name: str, tensor: Tensor) -> None:
        """Fresh symbols for every axis of a parameter or buffer."""
        layers = []
        for axis, size in enumerate(tensor.shape):
            if size < 2:
                continue
            symbols = self.labels.new(size)
            self.symbols[name, axis] = symbols
            silent, sources = torch.ones(size, dtype=torch.int64), frozenset([(name, axis)])
            if name not in self.parameters:
                sources = frozenset()
                if tensor.is_meta:
                    silent.zero_()
                else:
                    silent *= (tensor.detach() == 0).cpu().movedim(axis, 0).reshape(size, -1).all(1)
            shape = [1] * tensor.dim()
            shape[axis] = size
            layers.append(Layer((symbols << 1 | silent).reshape(shape), sources))
        self.known[tensor] = layers
        self.names[id(tensor)] = name

    # --- rules.Context ---

    def layers(self, tensor: Tensor | None) -> list[Layer]:
        """Canonical layers of a tensor."""
        if tensor is None:
            return []
        name = self.names.get(id(tensor))
        if name is not None:
            self.used.add(name)
        found = self.known.get(tensor, [])
        return [layer for layer in map(self.labels.canonical, found) if layer is not None]

    def set_layers(self, tensor: Tensor, layers: Sequence[Layer | None]) -> None:
        """Give an output its layers."""
        self.known[tensor] = [layer for layer in layers if layer is not None]

    def unify(self, a: Layer, b: Layer) -> None:
        """Tie two layers; one-axis layers are matched along their axes."""
        first, second = a.symbols, b.symbols
        if len(a.axes) == 1 and len(b.axes) == 1:
            first, second = first.flatten(), second.flatten()
        self.tie(first, second)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two tensors of symbols entry by entry; what meets FIXED is frozen, on the record."""
        a, b = torch.broadcast_tensors(self.labels.find(a), self.labels.find(b))
        if not bool((a * b).all()):  # FIXED is 0
            self._freeze(torch.cat([a[b == FIXED], b[a == FIXED]]), "meets values that cannot be removed")
        self.labels.unify(a, b)

    def freeze(self, layer: Layer, reason: str) -> None:
        """Never remove anything of this layer; an empty reason goes unrecorded."""
        self._freeze(layer.symbols, reason)

    def freeze_if_used(self, out: Tensor, layer: Layer, reason: str) -> None:
        """Freeze as soon as anything reads `out`."""
        self.deferred.setdefault(out, []).append((layer, self._reason(reason)))

    def _used(self, tensors: Sequence[Tensor]) -> None:
        """Make the freezes that waited for a use of these tensors."""
        for tensor in tensors:
            for layer, frozen in self.deferred.pop(tensor, ()):
                self._freeze(layer.symbols, frozen)

    def _reason(self, reason: str) -> Frozen:
        module, line = (self.stack[-1], _user_line()) if self.stack else ("", "")
        return Frozen(self.op, module, line, reason, ())

    def _freeze(self, symbols: Tensor, reason: str | Frozen) -> None:
        roots = self.labels.freeze(symbols)
        if roots.numel() and reason:
            frozen = self._reason(reason) if isinstance(reason, str) else reason
            self.freezings.append(_Freezing(frozen, roots))

    def without_axis(self, layer: Layer, axis: int, reason: str) -> Layer | None:
        """Merge the axis away if the layer varies elsewhere too, else freeze it."""
        if len(layer.axes) > 1:
            return self.labels.merge_along(layer, axis)
        self.freeze(layer, reason)
        return None

    def read(self, produced: Layer, weight: Layer) -> None:
        """Note a contraction."""
        self.reads.append(_Read(produced, weight))

    def flop(self, constant: int, *counted: Layer | int) -> None:
        """Count FLOPs."""
        vectors: list[Tensor] = []
        for item in counted:
            if isinstance(item, int):
                constant *= item
            else:
                vectors.append(item.symbols.flatten())
        self.flop_terms.append((constant, vectors, self.stack[-1] if self.stack else ""))

    def count(self, owner: Tensor, attribute: str, symbols: Tensor) -> None:
        """Note an attribute of the module that owns a parameter."""
        name = self.names.get(id(owner))
        if name is not None:
            self.counted[name.rpartition(".")[0], attribute] = symbols

    def constant_along(self, tensor: Tensor, axis: int) -> bool:
        """Constant by construction (stride 0), or by value where no input has a say."""
        if tensor.stride(axis) == 0:
            return True
        if tensor in self.from_input or tensor in self.known:
            return False
        if tensor.is_meta:
            shadow = self.shadows.get(tensor) if self.shadows is not None else None
            return shadow is not None and bool((shadow == shadow.narrow(axis, 0, 1)).all())
        return bool((tensor == tensor.narrow(axis, 0, 1)).all())

    def filled(self, tensor: Tensor) -> bool:
        """Made with one value everywhere."""
        return tensor in self.filled_tensors

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the inputs."""
        return tensor in self.from_input

    def split_view(self, layer: Layer) -> None:
        """Note a layer whose live positions must form a box."""
        self.split_layers.append(layer)

    # --- running ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and pass the labels through it."""
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        handler = RULES.get(name) or RULES.get(name.rstrip("_"))
        if handler is None and torch.Tag.pointwise in func.tags:
            handler = pointwise
        if handler is None and self.whole is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if self.whole is not None:
            return self._unlabelled(func, args, kwargs, tensors)
        self._used(tensors)
        mutated = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
        before = self.layers(mutated) if mutated is not None and mutated._is_view() else None
        out = self._unlabelled(func, args, kwargs, tensors)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if handler in COUNTED or any(self.known.get(x) for x in tensors):
            self.op = f"aten.{name}"
            named = _bind(func, args, kwargs)
            if results:
                (handler or unknown)(self, func, named, out)
            else:
                unknown(self, func, named, out)
            if mutated is not None and before is not None and handler is not copy:
                self._check_view_write(mutated, before)
        return out

    def _unlabelled(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """Run an operation and note only whether its results depend on the inputs."""
        if self.shadows is not None:
            known = self._shadow(func, args, kwargs, tensors)
            if known is not None and func is torch.ops.aten._local_scalar_dense.default:
                return known
            out = func(*args, **kwargs)
            for mine, real in zip(tree_leaves(out), tree_leaves(known), strict=False):
                if isinstance(mine, Tensor) and isinstance(real, Tensor):
                    self.shadows[mine] = real
        else:
            out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name in FILLED and isinstance(out, Tensor):
            self.filled_tensors[out] = True
        elif func._schema.is_mutable and name != "copy_":
            for x in tensors[:1]:
                self.filled_tensors.pop(x if x._base is None else x._base, None)
        if name not in CONSTANT and any(x in self.from_input for x in tensors):
            for result in tree_leaves(out):
                if isinstance(result, Tensor):
                    self.from_input[result] = True
                    if func._schema.is_mutable and result._base is not None:
                        self.from_input[result._base] = True
        return out

    def _shadow(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """On the meta device, what the operation gives in fact: positions and masks decide which way a forward goes.

        None where a weight or a floating-point input has a say, whose values nobody knows.
        """
        assert self.shadows is not None
        if any(x not in self.shadows for x in tensors):
            return None
        shadows = self.shadows

        def real(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return shadows[x] if isinstance(x, Tensor) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs))

    def _check_view_write(self, mutated: Tensor, before: list[Layer]) -> None:
        """An in-place write into a view changes its base behind our back: only unchanged labels are safe."""
        after = self.layers(mutated)
        same = len(before) == len(after) and all(
            torch.equal(a.symbols, b.symbols) and torch.equal(a.silent, b.silent)
            for a, b in zip(map(self.labels.canonical, before), after, strict=True)
            if a is not None
        )
        if not same:
            base = mutated._base
            for layer in [*before, *after, *(self.layers(base) if base is not None else [])]:
                self.freeze(layer, "writes in place into a view")

    def run(self, example_inputs: Any) -> None:
        """Run the frame once; afterwards freeze its outputs and what the run left open."""
        if any(parameter.is_meta for parameter in self.parameters.values()):
            given, self.shadows = example_inputs, WeakTensorKeyDictionary()
            example_inputs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given)
            for x, real in zip(tree_leaves(example_inputs), tree_leaves(given), strict=True):
                if isinstance(x, Tensor) and not real.is_floating_point():
                    self.shadows[x] = real
        for x in tree_leaves(example_inputs):
            if isinstance(x, Tensor):
                self.from_input[x] = True
        pre = nn.modules.module.register_module_forward_pre_hook(self._enter)
        post = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        handles = [pre, post]
        for module in self.model.modules():
            if type(module) in MODULE_RULES:
                handles.append(module.register_forward_pre_hook(self._enter_whole))
                handles.append(module.register_forward_hook(self._leave_whole, with_kwargs=True))
        try:
            with adapted(self.model), quiet_eval(self.model), self:
                outputs = call(self.model, example_inputs)
        except Exception as error:
            shapes = [tuple(x.shape) for x in tree_leaves(example_inputs) if isinstance(x, Tensor)]
            raise TraceError(
                f"the model's forward failed on example_inputs of shapes {shapes}: {type(error).__name__}: {error}; "
                "pass inputs that model(...) accepts (a tuple for several arguments, a dict for keywords)"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        self.stack, self.op = [], "output"
        for x in tree_leaves(_opened(outputs)):
            if isinstance(x, Tensor):
                self._used([x])
                for layer in self.layers(x):
                    self.freeze(layer, "is an output of the model")
        for name, tensor in self.tensors.items():
            if name not in self.used:
                self.op = "unused"
                for layer in self.layers(tensor):
                    self.freeze(layer, "is not used by the forward")
        for layer in self.split_layers:
            self._make_box(layer)

    def _make_box(self, layer: Layer) -> None:
        """Live positions of a view over several axes must form a box: keep freedom along one axis only."""
        current = self.labels.canonical(layer)
        if current is None or len(current.axes) < 2:
            return

        symbols = current.symbols

        def distinct(axis: int) -> int:
            return int(symbols.movedim(axis, 0).flatten(1).unique(dim=0).shape[0])

        free = max(current.axes, key=lambda axis: (distinct(axis), symbols.shape[axis]))
        for axis in current.axes:
            if axis != free and current is not None:
                current = self.labels.merge_along(current, axis)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(self.module_names.get(id(module), type(module).__name__))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def _enter_whole(self, module: nn.Module, inputs: Any) -> None:
        """Look away until `_leave_whole`: the module has a rule of its own."""
        if self.whole is None:
            self.whole = module

    def _leave_whole(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self.whole:
            return
        self.whole = None
        self.stack.append(self.module_names.get(id(module), type(module).__name__))
        self.op = type(module).__name__
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self._used([x for x in tree_leaves(named) if isinstance(x, Tensor)])
        with torch.utils._python_dispatch._disable_current_modes():
            MODULE_RULES[type(module)](self, module, named, output)
        self.stack.pop()

    # --- reading off the space ---

    def space(self, batch: int) -> Space:
        """The space, before the proof."""
        roots = {place: self.labels.find(symbols) for place, symbols in self.symbols.items()}
        owned = [roots[place] for place in roots if place[0] in self.parameters]
        real = torch.cat(owned).unique() if owned else torch.zeros(0, dtype=torch.int64)
        real = real[real != FIXED]
        unit_of_root = torch.full_like(self.labels.parent, -1)
        unit_of_root[real] = torch.arange(real.numel())
        unit_of = {}
        for name, tensor in self.tensors.items():
            for axis, size in enumerate(tensor.shape):
                known = roots.get((name, axis))
                unit_of[name, axis] = (
                    torch.full((size,), -1, dtype=torch.int64) if known is None else unit_of_root[known]
                )

        def units(symbols: Tensor) -> Tensor:
            return unit_of_root[self.labels.find(symbols)]

        terms = tuple(
            FlopTerm(constant, tuple(units(v) for v in vectors), module)
            for constant, vectors, module in self.flop_terms
        )
        group_of, names = _groups(unit_of, [v for term in terms for v in term.vectors], real.numel())
        space = Space(
            unit_of=unit_of,
            removable=torch.ones(real.numel(), dtype=torch.bool),
            group_of=group_of,
            group_names=names,
            shapes={name: tuple(tensor.shape) for name, tensor in self.tensors.items()},
            parameters=tuple(self.parameters),
            flops=terms,
            batch=batch,
            fold=self._fold_places(unit_of, units, real.numel()),
            attributes=self._attributes(unit_of, units),
        )
        return replace(space, frozen=self._frozen())

    def _fold_places(self, unit_of: dict[Place, Tensor], units: Any, n: int) -> dict[Place, Tensor]:
        """Where each unit's gate sits.

        On the last affine map that produces the unit, if every reader sees zero when that is zero; else on
        the columns of everything that reads it.
        """
        by_producer = torch.ones(n, dtype=torch.bool)
        reads = []
        for read in self.reads:
            read_units, silent = units(read.produced.symbols).flatten(), read.produced.silent.flatten()
            loud = read_units[~silent & (read_units >= 0)]
            by_producer[loud] = False
            reads.append((read_units[read_units >= 0].unique(), read.produced.sources, read.weight.sources))
        fold: dict[Place, Tensor] = {}
        for read_units, produced, weights in reads:
            for places, chosen in ((produced, by_producer), (weights, ~by_producer)):
                here = torch.zeros(n + 1, dtype=torch.bool)  # the last entry stands for -1, "no unit"
                here[read_units[chosen[read_units]]] = True
                for place in sorted(places):
                    vector = unit_of[place]
                    if place[0] not in self.parameters or not bool(here[vector].any()):
                        continue
                    gated = torch.where(here[vector], vector, -1)
                    old = fold.get(place)
                    fold[place] = gated if old is None else torch.where(old >= 0, old, gated)
        return fold

    def _attributes(self, unit_of: dict[Place, Tensor], units: Any) -> tuple[Attribute, ...]:
        """Attributes of torch.nn modules that count an axis."""
        found: dict[tuple[str, str], Tensor] = {key: units(symbols) for key, symbols in self.counted.items()}
        for path, module in self.model.named_modules():
            for attribute, (tensor, axis) in _counted_axes(module).items():
                place = (f"{path}.{tensor}" if path else tensor, axis)
                vector = unit_of.get(place)
                groups = int(getattr(module, "groups", 1))
                if vector is not None and attribute in ("in_channels", "out_channels") and axis == 1 and groups > 1:
                    whole = found.get((path, "groups"))
                    vector = whole.repeat_interleave(vector.numel()) if whole is not None else vector.repeat(groups)
                if vector is not None and getattr(module, attribute, None) == vector.numel():
                    found[path, attribute] = vector
            if isinstance(module, nn.MultiheadAttention):
                tensor = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
                rows = unit_of[f"{path}.{tensor}" if path else tensor, 0]
                heads = rows[: module.num_heads * module.head_dim].reshape(module.num_heads, -1)
                if bool((heads == heads[:, :1]).all()):
                    found[path, "num_heads"] = heads[:, 0]
        return tuple(
            Attribute(module, name, vector) for (module, name), vector in found.items() if bool((vector >= 0).any())
        )

    def _frozen(self) -> tuple[Frozen, ...]:
        """Freezings with the places of their symbols."""
        places = list(self.symbols)
        starts = torch.tensor([int(self.symbols[place][0]) for place in places] or [0])
        result = []
        for freezing in self.freezings:
            index = (torch.searchsorted(starts, freezing.symbols, right=True) - 1).unique().tolist()
            result.append(replace(freezing.frozen, places=tuple(places[i] for i in index)))
        return tuple(result)


def _opened(outputs: Any) -> Any:
    """Outputs with dataclasses and plain objects opened up, so that every tensor in them is found."""
    if hasattr(outputs, "__dict__") and not isinstance(outputs, (Tensor, dict, tuple, list)):
        return vars(outputs)
    return outputs


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by their schema names, defaults included."""
    named = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def _user_line() -> str:
    """`file:line` of the innermost frame outside torch and this package."""
    frame = sys._getframe(1)
    own = __name__.rpartition(".")[0]
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        inner = module.partition(".")[0] in (own, "torch", "contextlib")
        if not inner:
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _counted_axes(module: nn.Module) -> dict[str, Place]:
    """For modules of torch.nn: attribute -> (tensor, axis) it counts."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": ("weight", 0), "out_channels": ("weight", 1)}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": ("weight", 1), "out_channels": ("weight", 0)}
    if isinstance(module, nn.Linear):
        return {"in_features": ("weight", 1), "out_features": ("weight", 0)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": ("weight" if module.weight is not None else "running_mean", 0)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": ("weight", 0)}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": ("weight", 1)}
    return {}


def _groups(unit_of: dict[Place, Tensor], counted: list[Tensor], n: int) -> tuple[Tensor, tuple[str, ...]]:
    """Units that live on the same places (and are counted by the same FLOPs) equally often form a group.

    A group is named by the first place of its first unit.
    """
    if n == 0:
        return torch.zeros(0, dtype=torch.int64), ()
    places, vectors = list(unit_of), [*unit_of.values(), *counted]
    codes = torch.randint(-(2**62), 2**62, (len(vectors),), generator=torch.Generator().manual_seed(0))
    signature = torch.zeros(n, dtype=torch.int64)  # a hash of the multiset of places; sums wrap around
    first = torch.zeros(n, dtype=torch.int64)  # each unit's first place
    for i in range(len(vectors) - 1, -1, -1):
        owned = vectors[i][vectors[i] >= 0]
        if owned.numel():
            signature.index_add_(0, owned, codes[i].expand(owned.numel()))
            if i < len(places):
                first[owned] = i
    _, key = signature.unique(return_inverse=True)
    leader = torch.full((int(key.max()) + 1,), n).scatter_reduce_(0, key, torch.arange(n), "amin")
    order = torch.argsort(leader)  # groups in the order of their first units
    names: list[str] = []
    for place in first[leader[order]].tolist():
        names.append(_place_name(places[place], names))
    return torch.argsort(order)[key], tuple(names)


def _place_name(place: Place, taken: list[str]) -> str:
    """`layer1.0.conv1` for rows of a weight, `name[axis]` otherwise; made unique with a number."""
    tensor, axis = place
    base = tensor.removesuffix(".weight") if axis == 0 and tensor.endswith(".weight") else f"{tensor}[{axis}]"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    return name


Couples = Sequence[tuple[Place, Place]]


def _frozen_by_name(symbols: dict[Place, Tensor], names: Sequence[str | Place]) -> list[Place]:
    """Places of the tensors, modules, patterns and single axes named."""
    found: list[Place] = []
    for name in names:
        if isinstance(name, str):
            matching = [p for p in symbols if p[0] == name or p[0].startswith(f"{name}.") or fnmatchcase(p[0], name)]
        else:
            matching = [name] if name in symbols else []
        if not matching:
            raise TraceError(f"freeze names {name!r}, which no parameter or buffer {_close(name, symbols)}")
        found += matching
    return found


def _coupled(symbols: dict[Place, Tensor], couple: Couples) -> Couples:
    """The pairs, once both sides are known and as long as each other."""
    for pair in couple:
        for place in pair:
            if place not in symbols:
                raise TraceError(f"couple names {place!r}, which no parameter or buffer {_close(place, symbols)}")
        sizes = [symbols[place].numel() for place in pair]
        if sizes[0] != sizes[1]:
            raise TraceError(
                f"couple names {pair[0]} of {sizes[0]} positions and {pair[1]} of {sizes[1]}; only axes "
                "of the same length can be cut alike"
            )
    return couple


def _close(name: str | Place, symbols: dict[Place, Tensor]) -> str:
    """The end of an error about a name: what there is instead."""
    near = get_close_matches(name if isinstance(name, str) else str(name[0]), {place[0] for place in symbols}, 3, 0.3)
    axes = [f"{tensor} (axes {[a for t, a in symbols if t == tensor]})" for tensor in near]
    return f"of two or more positions has; close are {', '.join(axes) or 'none: see model.named_parameters()'}"


def replay(model: nn.Module, example_inputs: Any, *, freeze: Sequence[str | Place] = (), couple: Couples = ()) -> Space:
    """Trace the frame by label replay, without proof.

    Args:
        model: the frame, on one device, not wrapped and not compiled.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; the first axis of
            the first tensor is taken for the batch.
        freeze: parameters or modules that keep their shape, by qualified name or pattern ("head.*"); or single
            axes, such as ("head.weight", 1).
        couple: pairs of axes that are cut alike, position by position, such as (("a.weight", 0), ("b.weight", 0)).

    Raises:
        TraceError: the model or the inputs cannot be traced; the message says what would work.
    """
    check_model(model, example_inputs)
    tracer = Replay(model)
    wanted = _frozen_by_name(tracer.symbols, freeze), _coupled(tracer.symbols, couple)
    tracer.run(example_inputs)
    tracer.op = "the user"
    for a, b in wanted[1]:
        tracer.tie(tracer.symbols[a], tracer.symbols[b])
    for place in wanted[0]:
        tracer._freeze(tracer.symbols[place], "was named to stay as it is")
    first = next(x for x in tree_leaves(example_inputs) if isinstance(x, Tensor))
    return tracer.space(batch=max(1, first.shape[0]) if first.dim() else 1)
