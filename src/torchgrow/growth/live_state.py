"""The state of a live network as plain data: live and stored tensors, optimizers, followers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SavedModelError
from ..exchange import Exchange
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
from ..structure.space import Shapes
from ..structure.store import Store, live_shapes
from .live_network import LiveNetwork
from .saved_optimizer import Slots, fold_copies, optimizer_state, read_bank_slots, read_optimizer
from .state import copies, read_stores, read_tensors, store_state


def state_of(live: LiveNetwork, finished: bool) -> dict[str, Any]:
    """The whole live network as plain data, copied.

    Raises:
        TrainingError: the last optimizer step did not finish.
        SavedModelError: a tensor is not as the structure makes it, so that the state could never be loaded.
    """
    live.gates.recover()
    bank, space = live.bank, live.space
    for one in live.banks:
        check_network(space, bank.keep, one.model)
    fold = live.gates.fold
    assert fold is not None
    raw_copies = {} if finished else live.gates.raw_copies()
    full, slots = bank.stored(fold.contents, raw_copies)
    optimizers = [layout.optimizer for layout in bank.layouts]
    return {
        "keep": bank.keep.clone(),
        "trained": bank.trained.clone(),
        "network": copies(of_state(live.model)),
        "gradients": copies({name: p.grad.to_dense() for name, p in live.parameters.items() if p.grad is not None}),
        "raw": copies(fold.contents),
        "steps": live.gates.state_dict(),
        "bank": {name: store_state(store) for name, store in full.items()},
        "bank_slots": [[name, key, store_state(slot)] for (name, key), slot in slots.items()],
        "optimizers": [optimizer_state(optimizer, live.parameters, raw_copies) for optimizer in optimizers],
        "followers": [
            {
                "network": copies(of_state(one.model)),
                "bank": {name: store_state(store) for name, store in one.stored({}, {})[0].items()},
                "beside": copies(held_beside(wrapper, one.model)),
            }
            for one, wrapper in zip(live.followers, live.wrappers, strict=True)
        ],
        "extra_states": [extra_states(one.model) for one in live.banks],
        "buffers": [late_shapes(space, one.model) for one in live.banks],
    }


@dataclass(frozen=True, kw_only=True)
class Follower:
    """State of a follower: live contents, stored contents, and tensors of its wrapper."""

    network: dict[str, Tensor]
    bank: dict[str, Store]
    beside: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """The checked result of `state_of`, as copies on the right devices, with fields of the same names."""

    keep: Tensor
    trained: Tensor
    finished: bool
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
    followers: list[Follower]
    extra_states: list[dict[str, Any]]

    @classmethod
    def read(cls, saved: dict[str, Field], live: LiveNetwork, keep: Tensor, finished: bool) -> LiveState:
        """Check everything that a state of the structure `keep` (bool [n]) says of the network.

        If it is final (`finished`), nothing is stored beside it.

        Raises:
            SavedModelError: a field is damaged, or does not fit; the message names it.
        """
        space, bank, parameters = live.space, live.bank, live.parameters
        shapes, blank = live_shapes(space, keep), {} if finished else bank.blank()
        names = live.gated if live.policy.gate is not None else ()
        gated = {name: parameters[name] for name in names if not space.absent(name, keep)}
        full = read_stores(saved["bank"], blank, space, bank.tensors)
        optimizers = [
            read_optimizer(one, layout, parameters, shapes, space.shapes)
            for one, layout in zip(saved["optimizers"].items(len(bank.layouts)), bank.layouts, strict=True)
        ]
        slots = {parameter: kept for found, _ in optimizers for parameter, kept in found.items()}
        stored = {name: parameters[name] for name in full if name in parameters}
        steps = saved["steps"].fields(("waiting", "sum"), later=("taken", "moved"))
        total, taken, count = steps["sum"], steps["taken"], len(bank.layouts)
        network = read_network(saved["network"], space, live.model, shapes)
        followers = _read_followers(saved["followers"], live, shapes, finished)
        extra: list[dict[str, Any]] = [{} for _ in live.banks]
        if saved["extra_states"].value is not None:  # for the same modules as here
            for mine, one, entry in zip(extra, live.banks, saved["extra_states"].items(len(extra)), strict=True):
                mine |= {path: x.value for path, x in entry.fields(extra_states(one.model)).items()}
        if saved["buffers"].value is not None:
            contents = [network, *(follower.network for follower in followers)]
            for one, found, listed in zip(live.banks, contents, saved["buffers"].items(len(contents)), strict=True):
                check_late(listed, found, space, one.model)
        return cls(
            keep=keep,
            trained=saved["trained"].tensor((space.n_units,), torch.bool).cpu().clone(),
            finished=finished,
            network=network,
            gradients=_copied_to(read_tensors(saved["gradients"], parameters, shapes, some=True), parameters),
            raw=_copied_to(read_tensors(saved["raw"], gated, shapes), parameters),
            bank=full,
            bank_slots=read_bank_slots(saved["bank_slots"], stored, bank.empty_slot, bank.layouts, slots, space.shapes),
            optimizers=optimizers,
            waiting=[entry.flag() for entry in steps["waiting"].items(count)],
            summed=None
            if total.value is None
            else total.tensor((space.n_units,), torch.float64, finite=True).cpu().clone(),
            taken=[] if taken.value is None else [one.whole() for one in taken.items(count)],
            moved=steps["moved"].value is not None and steps["moved"].flag(),
            followers=followers,
            extra_states=extra,
        )

    def into(self, exchange: Exchange, live: LiveNetwork, policy: Policy) -> None:
        """Have `exchange` load this state into the network; `policy` has the gates of the state."""
        fold = live.fold(self.keep, self.raw, policy.gate)
        factors = fold.factors(policy.gate)
        raw_copies: dict[tuple[str, str], Tensor] = {}
        for layout, (slots, settings) in zip(live.bank.layouts, self.optimizers, strict=True):
            if not self.finished:
                raw_copies |= fold_copies(slots, layout, fold, factors, live.space.shapes)
            exchange.fill(layout.optimizer.state, slots)
            for group, new in zip(layout.optimizer.param_groups, settings, strict=True):
                exchange.fill(group, new)
        change = live.bank.stage_contents(self.keep, self.network)
        change.into(exchange)
        for one, follower in zip(live.followers, self.followers, strict=True):
            one.stage_contents(self.keep, follower.network).into(exchange)
        for name, gradient in self.gradients.items():
            exchange.give_gradient(live.parameters[name], gradient)
        exchange.fields(live.bank, full=self.bank, slots=self.bank_slots, trained=self.trained)
        take_buffers(exchange, live.model, self.network)
        for one, wrapper, follower in zip(live.followers, live.wrappers, self.followers, strict=True):
            exchange.fields(one, full=follower.bank)
            take_buffers(exchange, one.model, follower.network)
            for name, tensor in held_beside(wrapper, one.model).items():
                exchange.write(tensor, follower.beside[name])
        live.gates.install(exchange, fold, factors, raw_copies)
        live.gates.load_state(exchange, self.waiting, self.summed)
        live.gates.begin(exchange, self.taken, self.moved)
        live.watch.begin(exchange, {**change.contents(live.parameters), **fold.contents})
        if self.finished:
            live.gates.remove(exchange)
        else:
            live.gates.attach(exchange)

    @contextmanager
    def extra_states_set(self, live: LiveNetwork) -> Iterator[None]:
        """Set the modules' extra states to those of this state; restore the old ones if the block raises."""
        with ExitStack() as stack:
            for one, states in zip(live.banks, self.extra_states, strict=True):
                stack.enter_context(extra_states_set(one.model, states))
            yield


def _read_followers(field: Field, live: LiveNetwork, shapes: Shapes, finished: bool) -> list[Follower]:
    """The state of every follower."""
    saved = field.items()
    if len(saved) != len(live.followers):
        raise SavedModelError(
            f"the state has {len(saved)} followers, this Grower {len(live.followers)}; call grower.follow(module) "
            "as often as in the saved run, before loading. Nothing was changed"
        )
    found = []
    for entry, bank, wrapper in zip(saved, live.followers, live.wrappers, strict=True):
        parts = entry.fields(("network", "bank"), later=("beside",))
        own = held_beside(wrapper, bank.model)
        wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
        values = own if parts["beside"].value is None else read_tensors(parts["beside"], own, wanted)
        found.append(
            Follower(
                network=read_network(parts["network"], live.space, bank.model, shapes),
                bank=read_stores(parts["bank"], {} if finished else bank.blank(), live.space, bank.tensors),
                beside=_copied_to(values, own),
            )
        )
    return found


def _copied_to(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the devices of the network's own tensors of the same names."""
    return {name: tensor.to(own[name].device, copy=True) for name, tensor in tensors.items()}
