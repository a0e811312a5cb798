"""What of a grower outlives its process: its state as plain data, and how another grower takes it over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import SavedModelError, StructureError
from ..exchange import Exchange, forget_compiled, trainable
from ..persistence.beside import (
    check_late,
    check_network,
    extra_states,
    extra_states_set,
    held_beside,
    late_shapes,
    of_state,
    read_network,
    take_buffers,
)
from ..persistence.plain_data import Field
from ..policies import Policy
from ..structure.cost import CostModel
from ..structure.limits import Limits
from ..structure.space import Space
from ..structure.store import Store, live_shapes
from ..structure.surgery import Bank
from .event import Event, read_event
from .gates import Fold, Folding
from .saved_optimizer import Slots, exchange_state, fold_copies, optimizer_state, read_bank_slots, read_optimizer
from .state import (
    FORMAT,
    check_frame,
    copies,
    fingerprint,
    read_policy,
    read_stores,
    read_tensors,
    store_state,
    stores_state,
)
from .watch import Watch

FIELDS = (
    *("format", "frame", "settings", "history", "finished", "policy", "generator", "initial_lr", "keep", "before"),
    *("ever", "trained", "network", "gradients", "raw", "steps", "bank", "bank_slots", "optimizers"),
    "followers",
)
"""Fields of a state of format `FORMAT`."""

LATER = ("extra_states", "early", "buffers")
"""Those that states of older versions lack; with what came later in their fields, a run goes on as it did then."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a state holds, once it is checked; the names are those of its fields."""

    keep: Tensor
    before: Tensor
    ever: Tensor
    trained: Tensor
    finished: bool
    early: bool
    history: list[Event]
    initial_lr: float
    policy: Policy
    generator: torch.Generator
    network: dict[str, Tensor]
    gradients: dict[str, Tensor]
    raw: dict[str, Tensor]
    bank: dict[str, Store]
    bank_slots: dict[tuple[str, str], Store]
    optimizers: list[tuple[Slots, list[dict[str, Any]]]]
    waiting: list[bool]
    summed: Tensor | None
    taken: list[int]
    moved: bool
    followers: list[tuple[Bank, dict[str, Tensor], dict[str, Store], dict[str, Tensor]]]
    extra_states: list[dict[str, Any]]


class Saved:
    """The part of `Grower` that gives its state away and takes one back."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    space: Space
    limits: Limits
    updates: int
    seed: int
    finished: bool
    _early: bool
    history: list[Event]
    _bank: Bank
    _followers: list[Bank]
    _outer: list[nn.Module]
    _folding: Folding
    policy: Policy
    _generator: torch.Generator
    _costs: CostModel
    ranks: Ranks
    _watch: Watch
    _parameters: dict[str, nn.Parameter]
    _gated: list[str]
    _initial_lr: float
    _before: Tensor
    _ever: Tensor

    @trainable()
    def state_dict(self) -> dict[str, Any]:
        """The whole run so far: network, bank, indicators, counters, draws, history, optimizer; as copies.

        Plain data: nested dicts and lists of tensors, numbers and text. A grower built alike that loads it goes on bit
        for bit (with the same number of threads). Gradients are part of it, so it may be taken between `backward`
        and `step`; call `optimizer.zero_grad()` before if they are spent. So are followers. Random numbers outside the
        grower (dropout, shuffling) are not; `save_checkpoint` stores those too.

        Raises:
            TrainingError: the last optimizer step did not finish.
            SavedModelError: a tensor is not as the structure makes it, so that the state could never be loaded.
        """
        self._folding.recover()
        for bank in (self._bank, *self._followers):
            check_network(self.space, self._bank.keep, bank.model)
        fold = self._folding.fold
        assert fold is not None
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        raw = fold.contents
        raw_copies = {} if self.finished else self._folding.raw_copies()
        full, slots = self._bank.asleep(raw, raw_copies)
        return {
            "format": FORMAT,
            "frame": fingerprint(self.space, self._bank.tensors),
            "settings": self._settings(),
            "history": [asdict(event) for event in self.history],
            "finished": self.finished,
            "policy": self.policy.state_dict(),
            "generator": self._generator.get_state(),
            "early": self._early,
            "initial_lr": self._initial_lr,
            "keep": self._bank.keep.clone(),
            "before": self._before.clone(),
            "ever": self._ever.clone(),
            "trained": self._bank.trained.clone(),
            "network": copies(of_state(self.model)),
            "gradients": copies(gradients),
            "raw": copies(raw),
            "steps": self._folding.state_dict(),
            "bank": stores_state(full),
            "bank_slots": [[name, key, store_state(slot)] for (name, key), slot in slots.items()],
            "optimizers": [optimizer_state(optimizer, self._parameters, raw_copies) for optimizer in self.optimizers],
            "followers": [
                {
                    "network": copies(of_state(bank.model)),
                    "bank": stores_state(bank.asleep({}, {})[0]),
                    "beside": copies(held_beside(outer, bank.model)),
                }
                for bank, outer in zip(self._followers, self._outer, strict=True)
            ],
            "extra_states": [extra_states(bank.model) for bank in (self._bank, *self._followers)],
            "buffers": [late_shapes(self.space, bank.model) for bank in (self._bank, *self._followers)],
        }

    @trainable()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a run where `state_dict` left it: everything is checked first, then all of it is taken, or nothing.

        Build model, optimizer and grower as in the saved run; what this grower did before is lost. The state is
        copied, so it can be loaded again. Let followers follow before, and load the state of a learning rate
        scheduler after this.

        Args:
            state: what `state_dict` returned.

        Raises:
            SavedModelError: a field is missing, damaged, or does not fit this model, optimizer or grower; the message
                names it, and nothing was changed.
        """
        found = self._read(self._examine(state))
        bank, parameters = self._bank, self._parameters
        fold = self._fold(found.keep, found.raw, found.policy.gate)
        factors = fold.factors(found.policy.gate)
        raw_copies: dict[tuple[str, str], Tensor] = {}
        for layout, (slots, _) in zip(bank.layouts, found.optimizers, strict=True) if not found.finished else ():
            raw_copies |= fold_copies(slots, layout, fold, factors, self.space.shapes)
        changes = [bank.stage_contents(found.keep, found.network)]
        changes += [own.stage_contents(found.keep, contents) for own, contents, *_ in found.followers]
        exchange = Exchange()
        for own, (slots, settings) in zip(self.optimizers, found.optimizers, strict=True):
            exchange_state(exchange, own, slots, settings)
        for change in changes:
            change.into(exchange)
        for name, gradient in found.gradients.items():
            exchange.give_gradient(parameters[name], gradient)
        exchange.fields(bank, full=found.bank, slots=found.bank_slots, trained=found.trained)
        take_buffers(exchange, self.model, found.network)
        for (follower, contents, asleep, held), outer in zip(found.followers, self._outer, strict=True):
            exchange.fields(follower, full=asleep)
            take_buffers(exchange, follower.model, contents)
            for name, tensor in held_beside(outer, follower.model).items():
                exchange.write(tensor, held[name])
        self._folding.install(exchange, fold, factors, raw_copies)
        self._folding.load_state(exchange, found.waiting, found.summed)
        self._folding.begin(exchange, found.taken, found.moved)
        raw = fold.contents
        self._watch.begin(exchange, {**changes[0].contents(self._parameters), **raw})
        if found.finished:
            self._folding.remove(exchange)
        else:
            self._folding.attach(exchange)
        exchange.fields(self.policy, **vars(found.policy))
        exchange.fields(self, _generator=found.generator, _before=found.before, _ever=found.ever)
        exchange.fields(
            self, history=found.history, finished=found.finished, _early=found.early, _initial_lr=found.initial_lr
        )
        self._note(exchange, found.history, found.finished)
        self.ranks.invalidate(exchange)
        forget_compiled()
        with ExitStack() as stack:
            for one, states in zip((self._bank, *self._followers), found.extra_states, strict=True):
                stack.enter_context(extra_states_set(one.model, states))
            exchange.make()

    def _note(self, exchange: Exchange, history: list[Event], finished: bool) -> None:
        """Have `exchange` write on the network how far the run has come, for `save` and for another grower to see."""
        growth, last, limits = self._bank.growth, history[-1], self.limits
        costs = (("parameters", last.params, limits.params), ("FLOPs", last.flops, limits.flops))
        known = tuple((what, now, most) for what, now, most in costs if most is not None)
        exchange.fields(growth, done=len(history) - 1, finished=finished, limits=known)

    def _read(self, saved: dict[str, Field]) -> _Found:
        """Everything in a state, checked, as copies on the right devices."""
        space, bank, parameters = self.space, self._bank, self._parameters
        units = (space.n_units,)
        keep, before, ever, trained = (
            saved[name].tensor(units, torch.bool).cpu().clone() for name in ("keep", "before", "ever", "trained")
        )
        try:
            space.check_keep(keep)
        except StructureError as error:
            raise SavedModelError(f"the state's structure is damaged: {error}") from error
        finished, shapes = saved["finished"].flag(), live_shapes(space, keep)
        history = self._read_history(saved["history"], keep, finished)
        names = self._gated if self.policy.gate is not None else ()
        gated = {name: parameters[name] for name in names if not space.absent(name, keep)}
        full = read_stores(saved["bank"], {} if finished else bank.blank(), space, bank.tensors)
        optimizers = [
            read_optimizer(one, layout, parameters, shapes, space.shapes)
            for one, layout in zip(saved["optimizers"].items(len(self.optimizers)), bank.layouts, strict=True)
        ]
        slots = {parameter: kept for found, _ in optimizers for parameter, kept in found.items()}
        sleepers = {name: parameters[name] for name in full if name in parameters}
        steps = saved["steps"].fields(("waiting", "sum"), later=("taken", "moved"))
        total, taken = steps["sum"], steps["taken"]
        network = read_network(saved["network"], space, self.model, shapes)
        followers = self._read_followers(saved["followers"], shapes, finished)
        if saved["buffers"].value is not None:
            pairs = [(bank, network), *((own, contents) for own, contents, *_ in followers)]
            for (own, contents), listed in zip(pairs, saved["buffers"].items(len(pairs)), strict=True):
                check_late(listed, contents, space, own.model)
        return _Found(
            keep=keep,
            before=before,
            ever=ever,
            trained=trained,
            finished=finished,
            early=saved["early"].flag() if saved["early"].value is not None else len(history) <= self.updates,
            history=history,
            initial_lr=saved["initial_lr"].number(low=0),
            policy=read_policy(saved["policy"], self.policy, len(history)),
            generator=torch.Generator().set_state(saved["generator"].generator()),
            network=network,
            gradients=_copied_to(read_tensors(saved["gradients"], parameters, shapes, some=True), parameters),
            raw=_copied_to(read_tensors(saved["raw"], gated, shapes), parameters),
            bank=full,
            bank_slots=read_bank_slots(
                saved["bank_slots"], sleepers, bank.empty_slot, bank.layouts, slots, space.shapes
            ),
            optimizers=optimizers,
            waiting=[entry.flag() for entry in steps["waiting"].items(len(self.optimizers))],
            summed=None if total.value is None else total.tensor(units, torch.float64, finite=True).clone(),
            taken=[] if taken.value is None else [one.whole() for one in taken.items(len(self.optimizers))],
            moved=steps["moved"].value is not None and steps["moved"].flag(),
            followers=followers,
            extra_states=self._read_extra_states(saved["extra_states"]),
        )

    def _fold(self, keep: Tensor, raw: Mapping[str, Tensor], gate: Tensor | None) -> Fold:
        """Where the units of a structure live, and what is folded there; nowhere if nobody asks."""
        asked = self._parameters if gate is not None or self.policy.sensitive else {}
        space = self.space if asked else replace(self.space, fold={})
        return Fold(space, asked, keep, raw, gated=gate is not None)

    def _contents(self) -> dict[str, Tensor]:
        """Contents of all parameters, raw where they are gated."""
        return {**self._parameters, **self._folding.raw()}

    def _settings(self) -> dict[str, Any]:
        """What a state must share with the grower that loads it."""
        limits, policy = self.limits, self.policy
        return {
            "updates": self.updates,
            "seed": self.seed,
            "params": limits.params,
            "flops": limits.flops,
            "policy": type(policy).__name__,
            **{f"policy.{name}": value for name, value in policy.settings().items()},
        }

    def _read_followers(
        self, field: Field, shapes: Mapping[str, tuple[int, ...]], finished: bool
    ) -> list[tuple[Bank, dict[str, Tensor], dict[str, Store], dict[str, Tensor]]]:
        """Every follower's bank, live contents, what sleeps, and what its wrapper holds beside."""
        saved = field.items()
        if len(saved) != len(self._followers):
            raise SavedModelError(
                f"the state has {len(saved)} followers, this Grower {len(self._followers)}; call grower.follow(module) "
                "as often as in the saved run, before loading. Nothing was changed"
            )
        found = []
        for entry, bank, outer in zip(saved, self._followers, self._outer, strict=True):
            parts = entry.fields(("network", "bank"), later=("beside",))
            contents = read_network(parts["network"], self.space, bank.model, shapes)
            asleep = read_stores(parts["bank"], {} if finished else bank.blank(), self.space, bank.tensors)
            own = held_beside(outer, bank.model)
            wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
            values = own if parts["beside"].value is None else read_tensors(parts["beside"], own, wanted)
            found.append((bank, contents, asleep, copies(values)))
        return found

    def _read_extra_states(self, field: Field) -> list[dict[str, Any]]:
        """Those of the model and of every follower, of the same modules as here."""
        models = [bank.model for bank in (self._bank, *self._followers)]
        if field.value is None:
            return [{} for _ in models]
        found = zip(field.items(len(models)), models, strict=True)
        return [{p: one.value for p, one in entry.fields(extra_states(model)).items()} for entry, model in found]

    def _examine(self, state: Mapping[str, Any]) -> dict[str, Field]:
        """Fields of a state that was saved by a grower such as this one, of a frame such as this one."""
        if not isinstance(state, dict) or "format" not in state:
            raise SavedModelError(_no_state(state))
        form = Field(state).fields()["format"].value
        if type(form) is not int or form != FORMAT:
            raise SavedModelError(f"the state has format {form!r}, this version of torchgrow reads {FORMAT}")
        saved, here = Field(state).fields(FIELDS, LATER), self._settings()
        check_frame(saved["frame"], fingerprint(self.space, self._bank.tensors))
        for key, field in saved["settings"].fields(here).items():
            if type(field.value) is not type(here[key]) or field.value != here[key]:
                raise SavedModelError(
                    f"the state is of a run with {key}={str(field.value)[:60]}, this Grower has {here[key]}; "
                    "construct it with the budget, updates, preset and seed of the saved run. Nothing was changed"
                )
        return saved

    def _read_history(self, field: Field, keep: Tensor, finished: bool) -> list[Event]:
        """Events of a saved run, of which the last one must describe the structure `keep`."""
        history = [read_event(entry) for entry in field.items()]
        cost = self._costs.cost(keep)
        here = (cost.params, cost.flops, self.space.widths(keep))
        numbered = [event.update for event in history] == list(range(len(history)))
        last = history[-1] if history else None
        if (
            last is None
            or not numbered
            or len(history) > self.updates + finished
            or (last.params, last.flops, last.widths) != here
        ):
            field.refuse(f"events 0 to at most {self.updates}, the last one of the structure {self.space.widths(keep)}")
        return history


def _copied_to(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the devices of the parameters of the same names."""
    return {name: tensor.to(parameters[name].device, copy=True) for name, tensor in tensors.items()}


def _no_state(given: Any) -> str:
    """What to do with something that is no state of a grower."""
    advice = "weights alone go into model.load_state_dict(...)"
    if isinstance(given, (str, os.PathLike)):
        advice = "of a folder, torchgrow.load_checkpoint(folder, grower)"
    elif isinstance(given, Saved):
        advice = "of another grower, grower.load_state_dict(other.state_dict())"
    elif isinstance(given, dict):
        inside = [key for key, value in given.items() if isinstance(value, dict) and value.keys() >= {*FIELDS}]
        advice = f"which is in it as state[{inside[0]!r}]" if inside else advice
    found = f"a dict with {sorted(map(str, given))[:3]}" if isinstance(given, dict) else f"a {type(given).__name__}"
    return f"load_state_dict takes what grower.state_dict() returned, got {found}; {advice}. Nothing was changed"
