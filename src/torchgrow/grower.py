"""The order of things (Algorithm 1): measure, press, draw, cut, count. Everything it calls is data or pure."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget, Limits, check_feasible, fit, largest_shift, pressure
from .cost import Cost, CostModel
from .errors import BudgetError, SavedModelError, StructureError, TorchgrowError, TraceError, TrainingError
from .fold import Fold, Folding
from .guard import guard_
from .indicators import PRESETS, Indicators, Method
from .optimizers import check_optimizer
from .proof import trace
from .replay import Couples, replay
from .space import Frozen, Place, Space
from .state import (
    FORMAT,
    Field,
    check_frame,
    copies,
    fingerprint,
    live_shapes,
    optimizer_state,
    read_bank_slots,
    read_indicators,
    read_optimizer,
    read_tensors,
    swapped_in,
)
from .surgery import Bank, named_tensors, uninterrupted


@dataclass(frozen=True)
class Event:
    """What one update did; event 0 is the seed.

    Attributes:
        update: number of the update.
        params: parameters of the network after it.
        flops: FLOPs of the network after it, for one sample.
        widths: live units per group.
        pressure: lambda of Eq 4 for the epoch to come, or with controller "plan" the shift of all indicators.
        temperature: mean beta per group.
        born: units present for the first time.
        regrown: units that came back with their old weights.
        detached: units that left.
        seconds: wall-clock time of the update.
    """

    update: int
    params: int
    flops: int
    widths: dict[str, int]
    pressure: float
    temperature: dict[str, float]
    born: int
    regrown: int
    detached: int
    seconds: float


class Grower:
    """Grows a model to a budget while you train it.

    At construction the model (the frame, the largest it may become) is shrunk in place to a seed of one unit per
    group. Train as usual; call `update()` after every epoch, or every k steps. All Parameter objects and the
    optimizer stay; gradients are dropped at an update.

    Args:
        model: the frame, a plain module on one device.
        optimizer: the optimizer that trains it; its state is re-cut with the parameters.
        example_inputs: a small batch for tracing: a tensor, a tuple, or a dict of keywords.
        budget: what the final network may cost; it is never above and no removable unit still fits under it.
        updates: T, the number of updates in the run. The structure is final from update T-1 on.
        preset: "default" (planned cost, persistent draws), "paper" (literal), or a `Method` of your own.
        seed: of all draws.
        freeze: what keeps its shape, as for `trace`.
        couple: what is cut alike, as for `trace`.

    Raises:
        TraceError: the model cannot be traced with these inputs.
        OptimizerError: the optimizer cannot be served or does not train this model.
        BudgetError: the budget is out of reach; the message names the feasible range.
        StructureError: every unit of the model is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        example_inputs: Any,
        budget: Budget,
        updates: int,
        preset: str | Method = "default",
        seed: int = 0,
        freeze: Sequence[str | Place] = (),
        couple: Couples = (),
    ) -> None:
        if not isinstance(budget, Budget):
            raise BudgetError(f'budget must be a torchgrow.Budget such as Budget(params="36%"), got {budget!r}')
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise TorchgrowError(f"updates={updates!r} must be a whole number >= 1: how often you will call update()")
        if isinstance(preset, str) and preset not in PRESETS:
            raise TorchgrowError(f"preset {preset!r} is unknown; use one of {sorted(PRESETS)} or a torchgrow.Method")
        self.method = preset if isinstance(preset, Method) else PRESETS[preset]()
        self.model, self.optimizer, self.budget, self.updates, self.seed = model, optimizer, budget, updates, seed
        space = trace(model, example_inputs, freeze=freeze, couple=couple)
        if not space.proven:
            raise TraceError("the model is on the meta device, where nothing can train; use model.to_empty(device=...)")
        check_optimizer(optimizer, model)
        self.space = _pin_untrained(space, _trained_names(model, optimizer))
        if not bool(self.space.removable.any()):
            reasons = "; ".join(str(frozen) for frozen in self.space.frozen[:5])
            raise StructureError(f"nothing can grow here, because {reasons or 'the model has no units'}")
        self._costs = CostModel(self.space)
        self.frame_cost = self._costs.cost(self.space.everything())
        self.limits: Limits = budget.limits(self.frame_cost)
        check_feasible(budget, self.limits, self._costs)
        guard_(model)
        self._indicators = Indicators(self.space, self.method, updates, seed)
        self._bank = Bank(model, self.space, optimizer)
        self._parameters = dict(model.named_parameters())
        self._gated = sorted({name for name, _ in self.space.fold})
        self._initial_lr = self._learning_rate(initial=True)
        self._folding = Folding(optimizer, self._step, lambda: self._indicators.gate)
        self._penalty = 0.0
        self._ever = torch.zeros(self.space.n_units, dtype=torch.bool)
        self.finished = False
        self.history: list[Event] = []
        self._seed_cost = self._costs.both(self._costs.live(self._indicators.seed_structure()))
        try:
            self._change_to(self._indicators.seed_structure(), time.perf_counter(), shift=0.0)
        except BaseException:
            self._folding.remove()
            raise

    # --- what the user asks for ---

    def update(self) -> Event:
        """Grow, detach and regrow once. Evaluate before: newborn units are untrained.

        Raises:
            TorchgrowError: the run is over.
            TrainingError: the last optimizer step did not finish.
        """
        number = len(self.history)
        if self.finished:
            raise TorchgrowError(
                f"the run is over: update() was called {self.updates} times or finish() once; "
                f"for a longer run construct Grower(..., updates={number + 1} or more)"
            )
        if number >= self.updates:
            return self.finish()
        start = time.perf_counter()
        self._folding.recover()
        indicators = self._indicators
        before = indicators.snapshot()
        final = max(1, self.updates - max(1, math.ceil(self.method.settle * self.updates)))
        try:
            shift = 0.0
            if number > final:
                keep = self._bank.keep
            elif self.method.controller == "plan":
                shift, keep = largest_shift(indicators.shifted(), self._costs, self._planned(number))
                indicators.shift(shift)
            else:
                keep = indicators.draw()
            ramped = self.method.controller == "plan" and self._progress(number) == 1.0
            if number == final or (ramped and number < final):
                keep = fit(self.space, self._costs, keep, indicators.score(), self.limits, indicators.steps)
            indicators.advance(keep)
            return self._change_to(keep, start, shift)
        except BaseException:
            if len(self.history) == number:  # a Ctrl-C held back while swapping in arrives after it is done
                indicators.restore(before)
            raise

    def finish(self) -> Event:
        """End the run now: the network is brought to the budget, the bank is emptied, the hooks come off.

        Called before update T-1 the network may have to change once more; units that enter here are silent
        (their gated weights are 0), so that the function of the network is what survived of it.

        Raises:
            TorchgrowError: the run is over already.
        """
        if self.finished:
            raise TorchgrowError(
                "finish() was called before; the network is final, save it with torchgrow.save(model, folder)"
            )
        start = time.perf_counter()
        old, indicators = self._bank.keep, self._indicators
        keep = fit(self.space, self._costs, old, indicators.score(), self.limits, indicators.steps)
        with uninterrupted():
            event = self._change_to(keep, start, shift=0.0, silent=keep & ~old)
            self._folding.remove()
            self._bank.empty()
            self.finished = True
        return event

    def state_dict(self) -> dict[str, Any]:
        """The whole run so far: network, bank, indicators, counters, draws, history, optimizer; as copies.

        Plain data: nested dicts and lists of tensors, numbers and text. A grower built alike that loads it goes on bit
        for bit (with the same number of threads). Gradients are part of it, so it may be taken between `backward`
        and `step`; call `optimizer.zero_grad()` before if they are spent. Random numbers outside the grower
        (dropout, shuffling) are not; `save_checkpoint` stores those too.

        Raises:
            TrainingError: the last optimizer step did not finish.
        """
        self._folding.recover()
        fold = self._folding.fold
        assert fold is not None
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        return {
            "format": FORMAT,
            "frame": fingerprint(self.space, self._bank.tensors),
            "settings": self._settings(),
            "history": [asdict(event) for event in self.history],
            "finished": self.finished,
            "penalty": self._penalty,
            "initial_lr": self._initial_lr,
            "keep": self._bank.keep.clone(),
            "ever": self._ever.clone(),
            "trained": self._bank.trained.clone(),
            "indicators": self._indicators.state_dict(),
            "network": copies(named_tensors(self.model)),
            "gradients": copies(gradients),
            "raw": copies(dict(zip(fold.names, fold.raw, strict=True))),
            "bank": copies(self._bank.full),
            "bank_slots": [[name, key, slot.clone()] for (name, key), slot in self._bank.slots.items()],
            "optimizer": optimizer_state(self.optimizer, self._parameters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a run where `state_dict` left it: everything is checked first, then all of it is taken, or nothing.

        Build model, optimizer and grower as in the saved run; what this grower did before is lost. The state is
        copied, so it can be loaded again. Load the state of a learning rate scheduler after this.

        Args:
            state: what `state_dict` returned.

        Raises:
            SavedModelError: a field is missing, damaged, or does not fit this model, optimizer or grower; the message
                names it, and nothing was changed.
        """
        saved = self._examine(state)
        space, bank, parameters = self.space, self._bank, self._parameters
        units = (space.n_units,)
        keep, ever, trained = (saved[name].tensor(units, torch.bool).cpu() for name in ("keep", "ever", "trained"))
        try:
            space.check_keep(keep)
        except StructureError as error:
            raise SavedModelError(f"the state's structure is damaged: {error}") from error
        finished, penalty = saved["finished"].flag(), saved["penalty"].number()
        initial_lr = saved["initial_lr"].number(low=0)
        history = self._read_history(saved["history"], keep, finished)
        shapes = live_shapes(space, keep)
        network = read_tensors(saved["network"], named_tensors(self.model), shapes)
        gradients = read_tensors(saved["gradients"], parameters, shapes, some=True)
        raw = read_tensors(saved["raw"], {name: parameters[name] for name in self._gated}, shapes)
        cut = {} if finished else {name: bank.tensors[name] for name in space.cut_axes}
        full = read_tensors(saved["bank"], cut, space.shapes)
        slots, settings = read_optimizer(saved["optimizer"], self.optimizer, parameters, shapes)
        sleepers = {name: parameter for name, parameter in parameters.items() if name in cut}
        sleeping = read_bank_slots(saved["bank_slots"], sleepers, space, slots)
        indicators = self._indicators.loaded(read_indicators(saved["indicators"], space.n_units, len(history)))
        raw = {name: tensor.to(parameters[name].device, copy=True) for name, tensor in raw.items()}
        fold = Fold(space, parameters, keep, raw)
        factors = fold.factors(indicators.gate)
        change = bank.stage_contents(keep, network)
        full, sleeping = copies(full), {at: slot.clone() for at, slot in sleeping.items()}
        grads = {name: gradient.to(parameters[name].device, copy=True) for name, gradient in gradients.items()}
        with suppress(TrainingError):  # an unfinished step is of no interest any more
            self._folding.recover()
        with uninterrupted():
            with swapped_in(self.optimizer, slots, settings):
                bank.commit(change)
            for name, gradient in grads.items():
                parameters[name].grad = gradient
            bank.full, bank.slots, bank.trained = full, sleeping, trained.clone()
            self._folding.install(fold, factors)
            if finished:
                self._folding.remove()
            else:
                self._folding.attach()
            self._indicators, self._ever, self.history = indicators, ever.clone(), history
            self.finished, self._penalty, self._initial_lr = finished, penalty, initial_lr

    def cost(self) -> Cost:
        """Cost of the live network."""
        return self._costs.cost(self._bank.keep)

    def widths(self) -> dict[str, int]:
        """Live units per group."""
        return self.space.widths(self._bank.keep)

    def full_widths(self) -> dict[str, int]:
        """Units per group in the frame."""
        return self.space.widths(self.space.everything())

    # --- how it is done ---

    def _settings(self) -> dict[str, Any]:
        """What a state must share with the grower that loads it."""
        limits, method = self.limits, self.method
        return {
            "updates": self.updates,
            "seed": self.seed,
            "params": limits.params,
            "flops": limits.flops,
            **{f"method.{name}": value for name, value in asdict(method).items()},
        }

    def _examine(self, state: Mapping[str, Any]) -> dict[str, Field]:
        """Fields of a state that was saved by a grower such as this one, of a frame such as this one."""
        form = Field(state).fields().get("format", Field(None)).value
        if type(form) is not int or form != FORMAT:
            raise SavedModelError(f"the state has format {form!r}, this version of torchgrow reads {FORMAT}")
        saved, here = Field(state).fields(FIELDS), self._settings()
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

    def _planned(self, number: int) -> Tensor:
        """Planned parameters and FLOPs (int64 [2]) at an update: a line from the seed to the budget, then flat."""
        progress = self._progress(number)
        limits = self.limits.tensor()
        limited = torch.tensor([self.limits.params is not None, self.limits.flops is not None])
        planned = self._seed_cost + ((limits - self._seed_cost).double() * progress).long()
        return torch.where(limited, planned, limits)

    def _progress(self, number: int) -> float:
        """How far the planned cost has come at an update, from 0 (the seed) to 1 (the budget)."""
        return min(1.0, number / max(1, math.ceil(self.method.ramp * self.updates)))

    def _change_to(self, keep: Tensor, start: float, shift: float, silent: Tensor | None = None) -> Event:
        """Make `keep` the live structure, all or nothing, and record it."""
        bank, folding, gate = self._bank, self._folding, self._indicators.gate
        old = bank.keep if self.history else keep
        raw = folding.raw() or {name: self._parameters[name].detach() for name in self._gated}
        change = bank.stage(keep, raw)
        fresh = {name: change.swaps[name].new for name in self._gated}
        if silent is not None:
            _silence(self.space, fresh, keep, silent)
        fold = Fold(self.space, self._parameters, keep, fresh)
        factors = fold.factors(gate)
        for name, folded in fold.folded(factors).items():
            change.swaps[name].new = folded
        cost = self._costs.cost(keep)
        penalty = 0.0
        if self.method.controller == "pressure":
            penalty = pressure(self.method.lambda_base, self.limits, self.frame_cost, cost)
        born, back = keep & ~self._ever, keep & ~old & self._ever
        event = Event(
            update=len(self.history),
            params=cost.params,
            flops=cost.flops,
            widths=self.space.widths(keep),
            pressure=penalty if self.method.controller == "pressure" else shift,
            temperature=self._temperature(),
            born=int((born & self.space.removable).sum()),
            regrown=int(back.sum()),
            detached=int((old & ~keep).sum()),
            seconds=time.perf_counter() - start,
        )
        with uninterrupted():
            bank.commit(change)
            folding.install(fold, factors)
            self._penalty, self._ever = penalty, self._ever | keep
            self.history.append(event)
        return event

    def _temperature(self) -> dict[str, float]:
        space, beta = self.space, self._indicators.beta
        sums = torch.zeros(space.n_groups, dtype=torch.float64).index_add_(0, space.group_of, beta)
        means = (sums / self._costs.sizes).tolist()
        return {name: means[g] for g, name in enumerate(space.group_names)}

    def _step(self, task_gradient: Tensor) -> None:
        """After every optimizer step: the indicators take one of their own."""
        rate = self._learning_rate() / self._initial_lr if self._initial_lr else 1.0
        self._indicators.step(task_gradient, self._penalty, rate)

    def _learning_rate(self, initial: bool = False) -> float:
        group = self.optimizer.param_groups[0]
        return float(group.get("initial_lr", group["lr"]) if initial else group["lr"])


FIELDS = (
    *("format", "frame", "settings", "history", "finished", "penalty", "initial_lr", "keep", "ever", "trained"),
    *("indicators", "network", "gradients", "raw", "bank", "bank_slots", "optimizer"),
)
"""Fields of a state of format `FORMAT`."""


def read_event(field: Field) -> Event:
    """One event of a saved history."""
    saved = field.fields(event_field.name for event_field in fields(Event))
    counts = {name: saved[name].whole() for name in ("update", "params", "flops", "born", "regrown", "detached")}
    return Event(
        widths={name: width.whole() for name, width in saved["widths"].fields().items()},
        pressure=saved["pressure"].number(),
        temperature={name: beta.number(low=0) for name, beta in saved["temperature"].fields().items()},
        seconds=saved["seconds"].number(low=0),
        **counts,
    )


def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters and FLOPs (2 x multiply-accumulates, one sample) of a model as it is.

    Args:
        model: any plain module.
        example_inputs: a small batch: a tensor, a tuple, or a dict of keywords.

    Raises:
        TraceError: the model cannot be run on the inputs.
    """
    space = replay(model, example_inputs)
    return CostModel(space).cost(space.everything())


def _trained_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held and p.requires_grad}


def _pin_untrained(space: Space, trained: set[str]) -> Space:
    """Pin units whose gate would have no place, or a place that is not trained: no gradient could reach it."""
    gated = torch.zeros(space.n_units, dtype=torch.bool)
    for (name, axis), vector in space.fold.items():
        units = vector[vector >= 0].unique()
        gated[units] = True
        if name not in trained:
            units = units[space.removable[units]]
            reason = "the unit's gate would sit on a parameter that the optimizer does not train"
            if units.numel():
                space = space.freeze(
                    units.tolist(), Frozen("gate", name.rpartition(".")[0], "", reason, ((name, axis),))
                )
    bare = torch.nonzero(~gated & space.removable).flatten().tolist()
    if bare:
        reason = f"{len(bare)} units have no place where a gate of 0 equals removal"
        names = {space.group_names[int(space.group_of[u])] for u in bare}
        space = space.freeze(bare, Frozen("gate", ", ".join(sorted(names)[:3]), "", reason, ()))
    return space


def _silence(space: Space, raw: Mapping[str, Tensor], keep: Tensor, silent: Tensor) -> None:
    """Zero the gated raw weights of the units in `silent` (bool [n])."""
    for (name, axis), vector in space.fold.items():
        live = vector[keep[space.unit_of[name, axis].clamp(min=0)] | (space.unit_of[name, axis] < 0)]
        positions = torch.nonzero((live >= 0) & silent[live.clamp(min=0)]).flatten()
        if positions.numel():
            raw[name].index_fill_(axis, positions.to(raw[name].device), 0)
