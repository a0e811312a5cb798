"""Loading a state dict of another structure into a growing network: the run continues from that structure."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import StructureError, TorchgrowError
from ..exchange import Exchange, forget_compiled, trainable
from ..policies import Policy, View
from ..renamed import frames_to_user
from ..structure.kept import keep_of
from ..structure.record import Record
from .event import Event
from .live_network import LiveNetwork
from .plan import Plan
from .run_state import RunState


class _Running(Protocol):
    """The part of `Run` that is used here."""

    plan: Plan
    policy: Policy
    optimizers: list[torch.optim.Optimizer]
    state: RunState
    ranks: Ranks
    live: LiveNetwork

    def state_dict(self) -> dict[str, Any]: ...
    def view(self, number: int) -> View: ...


def note(run: _Running, exchange: Exchange, history: list[Event], finished: bool) -> None:
    """Have `exchange` note the progress of a run on the network, for `save` and other growers."""
    growth, last, limits = run.live.bank.growth, history[-1], run.plan.limits
    costs = (("parameters", last.params, limits.params), ("FLOPs", last.flops, limits.flops))
    known = tuple((what, now, most) for what, now, most in costs if most is not None)
    exchange.fields(growth, done=len(history) - 1, finished=finished, limits=known)


class Loading:
    """Handles `model.load_state_dict(state)` for one run."""

    def __init__(self, run: _Running) -> None:
        self.run = run

    @property
    def finished(self) -> bool:
        """Whether the structure is final."""
        return self.run.state.finished

    @trainable()
    def loaded(
        self, model: nn.Module, record: Record, left_out: Collection[str], contents: Mapping[str, Tensor]
    ) -> None:
        """Cut the network to the structure of a state dict that PyTorch is about to load into it.

        During the run this is like an update to that structure: optimizer state is re-cut, units that leave are stored,
        followers change too. After the run nothing is stored any more, so optimizer state of tensors that change is
        reset, with a warning. See `Owner.loaded`. Refused (`StructureError`) are followers, structures that the run
        could not have reached, and policies with gates.
        """
        run, exchange = self.run, Exchange()
        live, state, space = run.live, run.state, run.plan.space
        keep, policy = self._allowed(model, record, left_out), run.policy.copied()
        if state.finished:
            self._change_at_end(exchange, keep, contents)
        else:
            view = run.view(len(state.history) - 1)
            live.change(exchange, keep, None, first=True, last=False, silent=None)
            policy.applied(replace(view, keep=keep))
            exchange.fields(run.policy, **vars(policy))
        cost = run.plan.costs.cost(keep)
        last = replace(state.history[-1], params=cost.params, flops=cost.flops, widths=space.widths(keep))
        last = replace(last, born=0, regrown=0, detached=0)
        exchange.fields(state, before=live.keep, ever=state.ever | space.present(keep))
        history = [*state.history[:-1], last]
        exchange.fields(state, history=history)
        note(run, exchange, history, state.finished)
        run.ranks.invalidate(exchange)
        exchange.make()
        forget_compiled()
        if state.finished:
            limits = run.plan.limits
            known = ((cost.params, limits.params, "parameters"), (cost.flops, limits.flops, "FLOPs"))
            costs = [f"{now:,} {what}, of {most:,} in the budget" for now, most, what in known if most is not None]
            warnings.warn(
                f"the run has ended, and {type(model).__name__} now gets another structure by load_state_dict: "
                f"{' and '.join(costs)}. To compare only networks on the budget, choose the best one after the last "
                "update",
                stacklevel=frames_to_user(),
            )

    def took(self, model: nn.Module) -> None:
        """See `Owner.took`: no other optimizer has changed these weights."""
        if model is self.run.live.model and not self.finished:
            exchange = Exchange()
            self.run.live.watch.begin(exchange, self.run.live.contents())
            exchange.make()

    def _allowed(self, model: nn.Module, record: Record, left_out: Collection[str]) -> Tensor:
        """The structure (bool [n]) of a record, if it may be loaded into this model now."""
        if model is not self.run.live.model:
            raise StructureError(
                f"the state dict is of another structure, and this {type(model).__name__} follows a network that "
                "grows: it is cut when the network is. Load the whole run, grower.load_state_dict(state), which brings "
                "followers along, or load it into a copy that does not follow: torchgrow.portable_(build()). Nothing "
                "was changed"
            )
        keep = keep_of(self.run.live.bank, record, left_out, "the state dict")
        if self.run.policy.gate is not None and not self.run.state.finished:
            raise StructureError(
                f"the state dict is of another structure, and {type(self.run.policy).__name__} scales weights by "
                "gates, which are not in it: divided by those of now, its weights could become anything. Load the "
                "whole run, grower.load_state_dict(state), or load into a model of its own: "
                "torchgrow.portable_(build()). Nothing was changed"
            )
        return keep

    def _change_at_end(self, exchange: Exchange, keep: Tensor, contents: Mapping[str, Tensor]) -> None:
        """Change a final structure: nothing is stored; optimizer state of changed tensors is reset."""
        bank = self.run.live.bank
        here = {name: bank.tensors[name].detach() for name in bank.order}
        change = bank.stage_contents(keep, {**here, **contents})
        for name, swap in change.swaps.items():
            for optimizer in self.run.optimizers if swap.tensor.shape != swap.new.shape else ():
                exchange.drop(optimizer.state, bank.tensors[name])
        change.into(exchange)

    def release(self) -> dict[str, Any]:
        """See `Grower.release`."""
        run = self.run
        if run.state.finished:
            raise TorchgrowError(
                "the run is over and the structure final; there is nothing another grower could go on with"
            )
        state, exchange = run.state_dict(), Exchange()
        run.live.change(exchange, run.plan.space.everything(), None, first=True, last=True, silent=None)
        exchange.fields(run.state, finished=True, early=True, released=True)
        exchange.fields(run.live.bank.growth, finished=True)
        run.ranks.invalidate(exchange)
        exchange.make()
        forget_compiled()
        return state
