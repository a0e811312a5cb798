"""A state dict of another structure is loaded into a network that grows: the run goes on from that structure."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError, TorchgrowError
from ..exchange import Exchange, forget_compiled, trainable
from ..policies import View
from ..structure.record import Record
from ..structure.space import Space
from ..structure.store import Index
from ..structure.surgery import Bank, Change
from .gates import Fold
from .saved import Saved


class Loading(Saved):
    """The part of `Grower` that takes over what `model.load_state_dict(state)` brings."""

    def _stage(
        self, keep: Tensor, gate: Tensor | None, silent: Tensor | None
    ) -> tuple[list[Change], tuple[Fold, list[Tensor], dict[tuple[str, str], Tensor]]]:
        raise NotImplementedError  # of Grower

    def _view(self, number: int) -> View:
        raise NotImplementedError  # of Grower

    @trainable()
    def loaded(
        self, model: nn.Module, record: Record, left_out: Collection[str], contents: Mapping[str, Tensor]
    ) -> None:
        """Cut the network to the structure of a state dict that PyTorch is about to load into it.

        While the run lasts it is as if an update had chosen that structure: optimizer state is carried along, what
        leaves sleeps, followers follow. After its end nothing sleeps any more, so the optimizer state of what changes
        begins anew.

        Args:
            model: the network, or a follower.
            record: the structure, relative to the first frame.
            left_out: names of modules that are left out.
            contents: what tensors hold until they are loaded.

        Raises:
            StructureError: the model is a follower, or the run could not have reached this structure.

        Warns:
            UserWarning: the run is over, and the structure is another than the one it ended with.
        """
        if model is not self.model:
            raise StructureError(
                f"the state dict is of another structure, and this {type(model).__name__} follows a network that "
                "grows: it is cut when the network is. Load the whole run, grower.load_state_dict(state), which brings "
                "followers along, or load it into a copy that does not follow: torchgrow.portable_(build()). Nothing "
                "was changed"
            )
        bank = self._bank
        keep = keep_of(self.space, bank, record, left_out)
        exchange, policy = Exchange(), self.policy.copied()
        if self.finished:
            changes = [bank.stage_contents(keep, {**{n: bank.tensors[n].detach() for n in bank.order}, **contents})]
            changed = [name for name, swap in changes[0].swaps.items() if swap.tensor.shape != swap.new.shape]
            for optimizer in self.optimizers:
                for name in changed:
                    exchange.drop(optimizer.state, bank.tensors[name])
        else:
            view = self._view(len(self.history) - 1)
            changes, installed = self._stage(keep, policy.gate, None)
            policy.applied(replace(view, keep=keep))
            self._folding.install(exchange, *installed)
            self._folding.begin(exchange)
        for change in changes:
            change.into(exchange)
        if not self.finished:
            raw = installed[0].contents
            self._watch.begin(exchange, {**self._contents(), **changes[0].contents(self._parameters), **raw})
            exchange.fields(self.policy, **vars(policy))
        cost = self._costs.cost(keep)
        last = replace(self.history[-1], params=cost.params, flops=cost.flops, widths=self.space.widths(keep))
        history = [*self.history[:-1], last]
        exchange.fields(self, history=history, _before=bank.keep, _ever=self._ever | self.space.present(keep))
        self._note(exchange, history, self.finished)
        self.ranks.invalidate(exchange)
        exchange.make()
        forget_compiled()
        if self.finished:
            warnings.warn(
                f"the run has ended, and {type(model).__name__} now gets another structure by load_state_dict: "
                f"{cost.params:,} parameters, {cost.flops:,} FLOPs, the budget allows {self.limits}. To compare only "
                "networks on the budget, choose the best one after the last update",
                stacklevel=5,
            )

    @trainable()
    def release(self) -> dict[str, Any]:
        """Bring the whole frame back, and end this run for another one to go on from its state.

        For loops that make their optimizer anew in the middle of a run: a Grower of the same model and the new
        optimizer takes the state over by `load_state_dict`.

        Returns:
            What `state_dict` returns.

        Raises:
            TorchgrowError: the run is over, and what slept is gone.
        """
        if self.finished:
            raise TorchgrowError(
                "the run is over and the structure final; there is nothing another grower could go on with"
            )
        state, exchange = self.state_dict(), Exchange()
        changes, _ = self._stage(self.space.everything(), None, None)
        for change in changes:
            change.into(exchange)
        self._folding.remove(exchange)
        for one in (self._bank, *self._followers):
            exchange.fields(one, full={}, slots={})
        exchange.fields(self, finished=True, _early=True)
        exchange.fields(self._bank.growth, finished=True)
        self.ranks.invalidate(exchange)
        exchange.make()
        forget_compiled()
        return state


def keep_of(space: Space, bank: Bank, record: Record, left_out: Collection[str]) -> Tensor:
    """The units (bool [n]) that a record of the same first frame keeps.

    Raises:
        StructureError: it is no structure of this space; the message names a tensor.
    """
    keep, base = space.everything(), bank.base.kept
    for (name, axis), units in space.unit_of.items():
        where = record.kept.get(name, {}).get(axis)
        if where is None:
            continue
        before = base.get(name, {}).get(axis)
        live = torch.isin(torch.arange(units.numel()) if before is None else before, where)
        gone = units[~live]
        keep[gone[gone >= 0]] = False
    for slot in space.slots:
        keep[slot.unit] = not all(path in left_out for path in slot.modules)
    keep = space.check_keep(keep)
    here = bank.record_of(keep)
    strange = [name for name in space.cut_axes if not alike(here.kept.get(name, {}), record.kept.get(name, {}))]
    strange += sorted(set(left_out) ^ bank.skipped(keep).keys())
    if strange:
        raise StructureError(
            f"the state dict is of a structure that this run cannot have, as {strange[0]} shows: its frame was "
            "another, or other units could go there (freeze, couple, depth). Construct Grower as in the run that was "
            "saved, or load it into a model of its own: torchgrow.portable_(build()). Nothing was changed"
        )
    return keep


def alike(one: Index, other: Index) -> bool:
    """Whether two indices keep the same positions."""
    return one.keys() == other.keys() and all(torch.equal(one[axis], other[axis]) for axis in one)
