"""The proof on a randomised float64 copy of the frame: cut networks are compared with zeroed ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..default_device import gpus_in_use
from ..errors import TraceError
from ..structure.bank import Bank
from ..structure.record import skip_
from ..structure.space import WHOLE, Space, live_positions
from ..structure.store import Births, is_meta
from ..structure.surgery import recut
from .model_call import call, examples_of, fresh
from .module_hooks import line_of
from .nested import mapped, put_out, tensors
from .passes import BARE, HIGH, Chance, Pass, Steady, fingerprint, passes, running, storages, too_small, twin, unchanged
from .size_attributes import Guess, choices

TOLERANCE = 1e-9
"""Largest relative error in float64 that still counts as equal."""

BLOWN_UP, RETRIES = 1e-3, 3
"""Errors up to this may be rounding (seen: 2e-7 in EfficientNet-B4, 1e-13 on its other subsets); how often to ask."""

NOISE = 1_000_003
"""Length of the block of noise that large parameters repeat; prime, so that their rows differ."""

ZERO = 1e-100
"""What stands for zero where a parameter is zeroed: negligible in a sum, but it can be normalised.

A weight-normalised row of true zeros is 0 / 0, which is no answer to compare with.
"""


class _DrawnError(Exception):
    """A forward drew random numbers where its first run had drawn none."""


class Prover:
    """A randomised float64 copy of a frame, on which subsets of units are tried."""

    def __init__(self, model: nn.Module, space: Space, example_inputs: Any, seed: int) -> None:
        self.space = space
        self.followed: frozenset[str] = frozenset()  # names of attributes that had to follow
        self.generator = torch.Generator().manual_seed(seed)
        self.frame = twin(model)
        examples = examples_of(example_inputs)
        if is_meta(model):
            births = Births(model, seed)
            self.frame.to_empty(device=tensors(examples[0])[0].device)
            for name, tensor in [*self.frame.named_parameters(), *self.frame.named_buffers()]:
                tensor.detach().copy_(births.full(name))
        self.frame._apply(_doubled)
        for module in self.frame.modules():
            _double_inside({name: value for name, value in vars(module).items() if name not in BARE}, vars(module))
        self.examples = [mapped(example, lambda x: _doubled(x.detach().clone())) for example in examples]
        self._randomize()
        for state in space.carried:  # random, not the zeros that most examples begin with
            for example in self.examples:
                given = tensors(example)[state.input]
                given.copy_(torch.randn(given.shape, generator=self.generator, dtype=torch.float64))
        self.small: set[int] = set()  # examples too small for statistics over a batch
        self.restless = False  # whether a forward writes into the parameters every time
        self.still: set[Pass] = set()  # passes that draw no random numbers: a mode would see every operation in vain
        try:
            self.passes = self._settled(storages(model))
            plain = self._outputs()
            self.bank = Bank(self.frame, space)
            gap = relative_error(self._outputs(), plain) if self.bank.adapted else 0.0
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"the proof runs in float64, and there the model's forward failed: {type(error).__name__}: {error}; "
                "take dtypes from the tensors at hand (x.to(weight.dtype)) instead of naming them, and leave out fused "
                "kernels that know no float64 (in transformers: attn_implementation and experts_implementation 'eager')"
            ) from error
        if gap > TOLERANCE:
            kinds = sorted({type(module).__name__ for module in map(self.frame.get_submodule, self.bank.adapted)})
            raise TraceError(
                f"the adapters in place of {', '.join(kinds)} change the model's outputs by {gap:.1e}; an adapter must "
                "compute what the module it replaces computes (correct the subclass given to torchgrow.adapter)"
            )

    def _settled(self, original: dict[int, str]) -> list[Pass]:
        """The passes that run, each after one trial run, since some forwards do more at their first call."""
        waiting, found, wrote = passes(len(self.examples)), [], False
        while waiting:
            one = waiting.pop(0)
            try:
                with self._running(one, original) as (chance, steady):
                    before = fingerprint(self.frame)
                    call(self.frame, fresh(self.examples[one.example]))
                    wrote |= fingerprint(self.frame) != before
            except TraceError:
                raise
            except Exception as error:
                if one == Pass():
                    raise
                if too_small(error) and one.example not in self.small:
                    self.small.add(one.example)
                    waiting.insert(0, one)
                continue
            found.append(one)
            if not (chance.count or steady.used or gpus_in_use()):
                self.still.add(one)
            if chance.decides and one.draw == HIGH:
                waiting += one.drawn_anew()
        if wrote:
            self.still.clear()
            self._randomize()
            for one in found:
                with self._running(one, {}):
                    before = fingerprint(self.frame)
                    call(self.frame, fresh(self.examples[one.example]))
                    self.restless |= fingerprint(self.frame) != before
            self._randomize()
        return found

    @contextmanager
    def _running(self, one: Pass, original: dict[int, str]) -> Iterator[tuple[Chance, Steady]]:
        """A context in which all runs share random numbers, modes and state."""
        small, steady, still = one.training and one.example in self.small, Steady(), one in self.still
        with running(self.frame, one, still_norms=small) as chance, _no_fast_path():
            before = torch.get_rng_state() if still else None
            with nullcontext() if still else steady, nullcontext() if still else chance:
                chance.original = original
                yield chance, steady
            if before is not None and not torch.equal(before, torch.get_rng_state()):
                raise _DrawnError

    def _randomize(self) -> None:
        """Scales and offsets around 1, statistics away from 0 and 1, and weights neither large nor small.

        With twice their variance, as for training, EfficientNet-B6 blows rounding up from 1e-15 to 2e-7.
        """
        given = [p.detach() for p in self.frame.parameters() if p.is_floating_point() or p.is_complex()]
        parameters = [torch.view_as_real(p) if p.is_complex() else p for p in given]
        length = min(NOISE, sum(p.numel() for p in parameters))
        block = torch.randn(length, generator=self.generator, dtype=torch.float64)  # repeated: large layers are many
        start = 0  # go on where the last one ended: no two parameters alike
        with torch.no_grad():
            for parameter in parameters:
                noise, size = block[start : start + parameter.numel()], parameter.numel()
                if noise.numel() < size:
                    noise = torch.cat([noise, block.repeat(-(-size // length))])[:size]
                start = (start + size) % max(1, length)
                noise = noise.reshape(parameter.shape)
                fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
                parameter.copy_(noise * fan_in**-0.5 if parameter.dim() > 1 else 1 + noise / 4)
            for module in self.frame.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                    size = module.running_mean.numel()  # 0 in a layer that was left out before
                    draw = torch.rand(2, size, generator=self.generator, dtype=torch.float64)
                    module.running_mean.copy_(draw[0] - 0.5)
                    assert module.running_var is not None
                    module.running_var.copy_(draw[1] + 0.5)

    def draw(
        self, fraction: float | str, groups: list[int] | None = None, *, turn: int = 0, whole: bool = False
    ) -> Tensor:
        """A keep vector that drops about `fraction` of the removable units of each group (all groups if None).

        "ends" drops the first and the last one (the first only where that would leave none), "most" all but the fewest
        that a group keeps. Of a share, groups of one size lose different numbers of units, for one attribute may count
        them all: over some turns (0, 1, ...) any two of them differ. With `whole` all layers stay: units inside a layer
        that is left out would not be tried.
        """
        space = self.space
        keep = space.everything()
        groups = list(range(space.n_groups)) if groups is None else groups
        layers = torch.tensor(
            [s.unit for s in space.blocks if int(space.group_of[s.unit]) in groups], dtype=torch.int64
        )
        ranks = Counter[int]()

        def chosen(count: int, most: int, rank: int = 0) -> Tensor:
            """Which of so many."""
            if fraction == "ends":
                return torch.tensor([0, -1])[:most]
            number = most if isinstance(fraction, str) else _number(round(fraction * count), most, rank, turn)
            return torch.randperm(count, generator=self.generator)[:number]

        for group in groups:
            units = torch.nonzero((space.group_of == group) & space.removable).flatten()
            most = min(units.numel(), int((space.group_of == group).sum()) - 1)
            keep[units[chosen(units.numel(), most, ranks[most])]] = False
            ranks[most] += 1
        keep[layers] = True
        layers = layers[space.removable[layers]]
        if layers.numel() and not whole:
            keep[layers[chosen(layers.numel(), layers.numel())]] = False
        return keep

    def error(self, keep: Tensor) -> tuple[float, tuple[str, str]]:
        """Relative error between compact network and zeroed frame; what went wrong if the first fails, and the line.

        An error that may be rounding, blown up by a deep network, is looked at again on other random weights: a
        mistake in the structure shows on all of them.
        """
        worst, reason = self._error(keep)
        for _ in range(RETRIES):
            if not TOLERANCE < worst <= BLOWN_UP:
                break
            self._randomize()
            del self.bank  # before there is another
            self.bank = Bank(self.frame, self.space)
            worst, reason = self._error(keep)
        return worst, reason

    def _error(self, keep: Tensor) -> tuple[float, tuple[str, str]]:
        try:  # first, since most cuts that are wrong fail at once, where the frame takes its time
            self.bank.recut_(keep)
            found = self._outputs(keep)
        except Exception as error:
            text = f"the compact network fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return float("inf"), (text, line_of(error))
        finally:
            self.bank.recut_(self.space.everything())
        try:
            worst = relative_error(found, self._expected(keep))
        finally:
            self.bank.recut_(self.space.everything())
        return worst, (f"the compact network's outputs differ by {worst:.1e}", "")

    def _expected(self, keep: Tensor) -> list[Tensor]:
        """Outputs of the frame with the absent units zeroed; they stay zeroed."""
        with torch.no_grad():
            for name in self.space.parameters:
                for axis in self.space.cut_axes.get(name, ()):
                    dead = torch.nonzero(~live_positions(self.space.unit_of[name, axis], keep)).flatten()
                    self.bank.tensors[name].index_fill_(axis, dead.to(self.bank.tensors[name].device), ZERO)
            plain = {}  # layers whose gate of 0 is not removal: the frame without them is the reference (Eq 2)
            for block in self.space.blocks:
                if not keep[block.unit] and not block.residual:
                    plain.update(dict.fromkeys(block.modules, block.skip))
                elif not keep[block.unit]:
                    for name, axis in self.space.fold:
                        if axis == WHOLE and self.space.block_of[name] == block.unit:
                            self.bank.tensors[name].fill_(ZERO)
            skip_(self.frame, plain, plain)
            expected = self._outputs(shown=keep)
            skip_(self.frame, plain, {})
        return expected

    def adopt(self, found: list[Guess], keep: Tensor, *, thorough: bool = False) -> bool:
        """Have the first choice of attributes that makes `keep` exact follow the surgery; False if there is none."""
        before = self.space
        for choice in choices(found, self.followed, thorough=thorough):
            chosen = {(guess.attribute.module, guess.attribute.name): guess.attribute for guess in choice}
            others = tuple(a for a in before.attributes if (a.module, a.name) not in chosen)
            self.space = self.bank.space = replace(before, attributes=(*others, *chosen.values()))
            if self.error(keep)[0] <= TOLERANCE:
                self.followed |= {guess.attribute.name for guess in choice}
                return True
        self.space = self.bank.space = before
        return False

    def _outputs(self, keep: Tensor | None = None, *, shown: Tensor | None = None) -> list[Tensor]:
        """All tensors and numbers that the network returns, in all passes, from the same state every time.

        Given states are cut to the units in `keep`, as it is; of carried outputs, entries in `shown` count.
        """
        try:
            return _plain(self._outputs_now(keep, shown))
        except _DrawnError:  # after all
            self.still.clear()
            return _plain(self._outputs_now(keep, shown))

    def _outputs_now(self, keep: Tensor | None, shown: Tensor | None) -> list[Tensor]:
        found: list[Tensor] = []
        with unchanged(self.frame):
            for one in self.passes:
                example = self.examples[one.example]
                if keep is not None and self.space.carried:
                    example = _cut_states(self.space, example, keep)
                values = [p.detach().clone() for p in self.frame.parameters()] if self.restless else []
                with self._running(one, {}):
                    outputs = call(self.frame, fresh(example))
                    own = [leaf.value.clone() for leaf in put_out(outputs)]  # buffers may be restored afterwards
                if shown is not None:
                    for state in self.space.carried:
                        own[state.output] = recut(own[state.output], state.units, self.space.everything(), shown)
                found += own
                for parameter, value in zip(self.frame.parameters(), values, strict=False):
                    parameter.data = value
        return found


def _cut_states(space: Space, example: Any, keep: Tensor) -> Any:
    """An example with its carried states cut to the units in `keep`."""
    units, whole = {state.input: state.units for state in space.carried}, space.everything()
    cut = iter([recut(x, units.get(i, {}), whole, keep) for i, x in enumerate(tensors(example))])
    return mapped(example, lambda x: next(cut))


def _number(about: int, most: int, rank: int, turn: int) -> int:
    """About so many of 1 to `most`, and of two units none or one; over the turns another series for every rank."""
    ways, fewest = (most, 1) if most > 1 else (2, 0)
    step = rank // ways**turn % ways
    more = (step + 1) // 2 * (1 if step % 2 else -1)  # 0, 1, -1, 2, -2, ...
    return fewest + (min(max(1, about), most) - fewest + more) % ways


def _plain(found: list[Tensor]) -> list[Tensor]:
    """As dense tensors of real numbers, nested ones part by part."""
    found = [part for x in found for part in (x.unbind() if x.is_nested else [x])]
    found = [x.to_dense() if x.layout != torch.strided else x for x in found]
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in found]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error of outputs; infinite where their number or shapes differ, or there is a NaN."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.numel():
            gap = float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-12)
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without the fused encoder layers, which put zeros where they skip padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _doubled(x: Tensor) -> Tensor:
    """In double precision, real or complex; integers as they are."""
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x


def _double_inside(held: Mapping[str, Any] | list[Any], container: Any) -> None:
    """Replace the tensors in a container by doubled ones, in dicts and lists inside too; parameters stay."""
    for key, value in list(held.items() if isinstance(held, Mapping) else enumerate(held)):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            container[key] = _doubled(value.detach())
        elif type(value) is tuple and any(isinstance(x, Tensor) for x in value):
            entries = list(value)
            _double_inside(entries, entries)
            container[key] = tuple(entries)
        elif type(value) in (dict, list):
            _double_inside(value, value)
