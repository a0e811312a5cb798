"""Loading a state dict of another structure into a growing network: the run continues from that structure."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import StructureError, TorchgrowError
from ..exchange import Exchange, forget_compiled, trainable
from ..policies import Policy, View
from ..renamed import frames_to_user
from ..structure.bank import Bank
from ..structure.cost import Cost
from ..structure.kept import keep_of
from ..structure.limits import Limits
from ..structure.record import Record
from .event import Event
from .live_network import LiveNetwork
from .plan import Plan
from .run_state import RunState


class Running(Protocol):
    """The part of `Run` that is used here."""

    plan: Plan
    policy: Policy
    optimizers: list[torch.optim.Optimizer]
    state: RunState
    ranks: Ranks
    live: LiveNetwork

    def state_dict(self) -> dict[str, Any]:
        """The whole run."""

    def view(self, number: int) -> View:
        """The run as a policy sees it at an update."""


def note(run: Running, exchange: Exchange, history: list[Event], finished: bool) -> None:
    """Have `exchange` note the progress of a run on the network, for `save` and other growers."""
    growth, last, limits = run.live.bank.growth, history[-1], run.plan.limits
    costs = (("parameters", last.params, limits.params), ("FLOPs", last.flops, limits.flops))
    known = tuple((what, now, most) for what, now, most in costs if most is not None)
    exchange.fields(growth, done=len(history) - 1, finished=finished, limits=known)


class Loading:
    """Handles `model.load_state_dict(state)` for one run."""

    def __init__(self, run: Running) -> None:
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
        reset.

        Args:
            model: the network, or a follower.
            record: the structure, relative to the first frame.
            left_out: names of modules that are left out.
            contents: what tensors hold until they are loaded, where nothing is stored.

        Raises:
            StructureError: the model is a follower, the run could not have reached this structure, or its policy has
                gates.

        Warns:
            UserWarning: the run is over, and the structure is another than the one it ended with.
        """
        run, exchange = self.run, Exchange()
        live, state, space = run.live, run.state, run.plan.space
        check_follower(live, model)
        keep = keep_of(live.bank, record, left_out, "the state dict")
        policy = run.policy.copied()
        if state.finished:
            change_at_end(exchange, live.bank, keep, contents, run.optimizers)
        else:
            check_gates(policy)
            view = run.view(len(state.history) - 1)
            live.change(exchange, keep, None, first=True, last=False, zeroed=None)
            policy.applied(replace(view, keep=keep))
            exchange.fields(run.policy, **vars(policy))
        cost = run.plan.costs.cost(keep)
        last = replace(
            state.history[-1],
            params=cost.params,
            flops=cost.flops,
            widths=space.widths(keep),
            born=0,
            regrown=0,
            detached=0,
        )
        exchange.fields(state, before=live.keep, ever=state.ever | space.present(keep))
        history = [*state.history[:-1], last]
        exchange.fields(state, history=history)
        note(run, exchange, history, state.finished)
        run.ranks.invalidate(exchange)
        exchange.make()
        forget_compiled()
        if state.finished:
            tell_end(model, cost, run.plan.limits)

    def release(self) -> dict[str, Any]:
        """See `Grower.release`."""
        run = self.run
        if run.state.finished:
            raise TorchgrowError(
                "the run is over and the structure final; there is nothing another grower could go on with"
            )
        state, exchange = run.state_dict(), Exchange()
        run.live.change(exchange, run.plan.space.everything(), None, first=True, last=True, zeroed=None)
        exchange.fields(run.state, finished=True, early=True, released=True)
        exchange.fields(run.live.bank.growth, finished=True)
        run.ranks.invalidate(exchange)
        exchange.make()
        forget_compiled()
        return state


def check_follower(live: LiveNetwork, model: nn.Module) -> None:
    """Refuse to load another structure into a follower.

    Raises:
        StructureError: the model is not the network itself.
    """
    if model is not live.model:
        raise StructureError(
            f"the state dict is of another structure, and this {type(model).__name__} follows a network that "
            "grows: it is cut when the network is. Load the whole run, grower.load_state_dict(state), which brings "
            "followers along, or load it into a copy that does not follow: torchgrow.portable_(build()). Nothing "
            "was changed"
        )


def check_gates(policy: Policy) -> None:
    """Refuse to load another structure under a policy with gates.

    Raises:
        StructureError: it has some.
    """
    if policy.gate is not None:
        raise StructureError(
            f"the state dict is of another structure, and {type(policy).__name__} scales weights by gates, which "
            "are not in it: divided by those of now, its weights could become anything. Load the whole run, "
            "grower.load_state_dict(state), or load into a model of its own: torchgrow.portable_(build()). Nothing "
            "was changed"
        )


def change_at_end(
    exchange: Exchange,
    bank: Bank,
    keep: Tensor,
    contents: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Have `exchange` change a final structure: nothing is stored; optimizer state of changed tensors is reset.

    Args:
        exchange: makes it.
        bank: of the network.
        keep: bool [n].
        contents: what tensors hold until they are loaded.
        optimizers: that train it.
    """
    here = {name: bank.tensors[name].detach() for name in bank.order}
    change = bank.stage_contents(keep, {**here, **contents})
    for name, swap in change.swaps.items():
        for optimizer in optimizers if swap.tensor.shape != swap.new.shape else ():
            exchange.drop(optimizer.state, bank.tensors[name])
    change.into(exchange)


def tell_end(model: nn.Module, cost: Cost, limits: Limits) -> None:
    """Warn that a finished network gets another structure."""
    known = ((cost.params, limits.params, "parameters"), (cost.flops, limits.flops, "FLOPs"))
    costs = " and ".join(f"{now:,} {what}, of {most:,} in the budget" for now, most, what in known if most is not None)
    warnings.warn(
        f"the run has ended, and {type(model).__name__} now gets another structure by load_state_dict: {costs}. To "
        "compare only networks on the budget, choose the best one after the last update",
        stacklevel=frames_to_user(),
    )
