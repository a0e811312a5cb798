"""A run, in the order of Algorithm 1: measure, update the penalty, draw, cut, record."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import TorchgrowError
from ..exchange import Exchange, forget_compiled
from ..onednn_guard import guard_
from ..persistence.portable import owned_
from ..persistence.randomness import random_state
from ..policies import Policy, View
from ..policies.policy import NEWBORNS
from ..structure.limits import Budget
from ..structure.optimizer_slots import Layout
from ..structure.optimizers import check_optimizers, first_rate, untrained_hint
from ..structure.space import Space
from ..tracing.model_call import examples_of
from ..tracing.nested import tensors
from .advice import Course, course, warn_if_trained
from .attaching import check_removable, pin_untrained, trained_names
from .birth import rescale_
from .compensation import check_plain, shifts_of
from .event import Event
from .live_network import LiveNetwork
from .live_state import LiveState, state_of
from .loading import Loading, note
from .plan import Plan
from .run_state import RunState, event_of, read_keep
from .saved import FORMAT, examine
from .start import begin, check_unspent, name_of
from .state import fingerprint, policy_state, read_policy
from .watch import warn_idle, warn_spread

log = logging.getLogger("torchgrow")


class Asked(Protocol):
    """The arguments of a run, as attributes of a `Grower`."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    budget: Budget
    updates: int
    seed: int
    start: str | Tensor | nn.Module
    rescale: bool


class Run:
    """A run: the live network, how far it has come, and the policy that decides, on all ranks alike.

    The model, a frame, is brought to its seed, which `exchange.undo` takes back. Attributes of the policy change in
    place. `device`: of the real tensors of a frame on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        policy: Policy,
        layouts: Sequence[Layout],
        device: torch.device,
        exchange: Exchange,
    ) -> None:
        space, self.plan, self.policy = plan.space, plan, policy
        self.optimizers = [layout.optimizer for layout in layouts]
        self.state = RunState(
            generator=torch.Generator().manual_seed(plan.seed),
            before=space.everything(),
            ever=torch.zeros(space.n_units, dtype=torch.bool),
            initial_lr=first_rate(self.optimizers[0]),
            history=[],
        )
        view = plan.view(0, space.everything(), 1.0, self.state.generator, lambda: dict(model.named_parameters()))
        policy.check(newborns=NEWBORNS)
        chosen = plan.legal(policy.seed(view), policy, "seed")
        seed = chosen if plan.start is None else plan.start
        self.ranks = Ranks()
        self.ranks.agree(lambda: self._decided(None, policy, self.state.generator))
        self.ranks.share([tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta])
        learnt = plan.start is not None or warn_if_trained(model, self.optimizers, seed)
        if plan.rescale and not any(self.ranks.gather(learnt)):
            self.plan = plan = plan.scaled(model, policy, view, seed, trained_names(model, self.optimizers))
            rescale_(model, plan.scales, exchange, layouts)
        self.live = LiveNetwork(model, plan, layouts, policy, self._step, device, exchange)
        self.seed_cost = plan.costs.both(plan.costs.live(seed))
        log.info("%s goes %s", type(model).__name__, self.course())
        policy.applied(replace(view, keep=seed))
        self.kinds = policy.state_dict()
        self.change_to(seed, policy, self.state.generator, time.perf_counter(), exchange=exchange)
        self.loading = Loading(self)
        owned_(model, self.loading)

    @classmethod
    def begin(cls, asked: Asked, policy: Policy | None, space: Space, example_inputs: Any, exchange: Exchange) -> Run:
        """Bring a model to the structure that its run begins with; errors are as for `Grower`.

        Without a policy it is one that suits the start. `example_inputs` tell the device. `undo` takes all of it back.
        """
        model, optimizers = asked.model, asked.optimizers
        layouts = check_optimizers(optimizers, model)
        space = pin_untrained(space, trained_names(model, optimizers))
        check_removable(space, "grow", untrained_hint(optimizers, model))
        plan = Plan.of(model, space, asked.budget, asked.updates, asked.seed)
        check_unspent(asked.start, optimizers)
        keep = begin(asked.start, model, space, exchange)
        plan = replace(plan, start=keep, begins=name_of(asked.start, keep), rescale=asked.rescale)
        guard_(model)
        device = tensors(examples_of(example_inputs)[0])[0].device
        return cls(model, plan, plan.policy(policy, layers=bool(space.blocks)), layouts, device, exchange)

    def course(self) -> Course:
        """See `Grower.course`."""
        plan, policy = self.plan, self.policy
        ends = policy.final(plan.updates), plan.updates
        return course(self.seed_cost, lambda n: policy.planned(self.view(n)), plan.frame_cost, plan.limits, *ends)

    def update(self, batches: Iterable[Any] | None = None) -> Event:
        """See `Grower.update`."""
        self.state.check_released()
        number, state, updates = len(self.state.history), self.state, self.plan.updates
        if state.finished:
            raise TorchgrowError(
                f"the run is over: finish() was called after {number - 2} of {updates} updates; call it only when "
                "no update follows"
                if state.early
                else f"the run is over: update() was called {updates} times; for a longer run construct "
                f"Grower(..., updates={updates + 1}) or with more"
            )
        live = self.live
        with self.ranks.together(live.buffers(), random_state):
            live.check_trained()
            warn_idle(self.optimizers, live.gates.taken, live.gates.moved or not live.gates.listens)
            if number == 1:
                warn_spread(live.model, live.space)
            return self._finish(batches) if number >= updates else self._update(number, batches)

    def finish(self, batches: Iterable[Any] | None = None) -> Event:
        """See `Grower.finish`."""
        self.state.check_released()
        if self.state.finished:
            raise TorchgrowError(
                "finish() was called before; the network is final, save it with torchgrow.save(model, folder)"
            )
        with self.ranks.together(self.live.buffers(), random_state):
            self.live.check_trained()
            return self._finish(batches, early=True)

    def state_dict(self) -> dict[str, Any]:
        """See `Grower.state_dict`."""
        self.state.check_released()
        return {
            "format": FORMAT,
            "frame": fingerprint(self.live.space, self.live.bank.tensors),
            "settings": self.plan.settings(self.policy),
            "policy": policy_state(self.policy, self.kinds),
            **self.state.state_dict(),
            **state_of(self.live, self.state.finished),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Grower.load_state_dict`."""
        live, plan, frame = self.live, self.plan, fingerprint(self.live.space, self.live.bank.tensors)
        saved = examine(state, frame, plan.settings(self.policy), live.bank.births is not None)
        keep = read_keep(saved["keep"], plan.space)
        here = RunState.read(saved, plan.costs, keep, plan.updates)
        network = LiveState.read(saved, live, keep, here.finished)
        policy = read_policy(saved["policy"], self.policy, self.kinds, len(here.history))
        exchange = Exchange()
        network.into(exchange, live, policy)
        exchange.fields(self.policy, **vars(policy))
        exchange.fields(self.state, **vars(here))
        note(self, exchange, here.history, here.finished)
        self.ranks.invalidate(exchange)
        forget_compiled()
        with network.extra_states_set(live):
            exchange.make()

    def follow(self, module: nn.Module) -> None:
        """See `Grower.follow`."""
        if self.state.finished:
            raise TorchgrowError("the run is over and the structure final; a copy of the network needs no following")
        self.live.follow(module)
        owned_(self.live.followers[-1].model, self.loading)

    def view(self, number: int) -> View:
        """The run as the policy sees it at an update."""
        keep = self.live.keep if self.state.history else self.plan.space.everything()
        rate = self.state.rate(self.optimizers[0])
        return self.plan.view(number, keep, rate, self.state.generator, self.live.contents)

    def _step(self, sensitivity: Tensor) -> None:
        """Call the policy after an optimizer step; by wrong gates nothing is folded, the old ones stay."""
        policy, view = self.policy, self.view(len(self.state.history) - 1)
        gate = None if policy.gate is None else policy.gate.clone()  # it may be written in place
        try:
            policy.step(view, sensitivity)
            if gate is not None:  # on the host, of few numbers: a GPU is not waited for
                present = self.plan.space.present(self.live.keep)
                if self.plan.checked(policy, "gate", torch.float64, present) is None:
                    policy_state(policy, self.kinds)  # it went
        except BaseException:
            if gate is not None:
                policy.gate = gate
            raise

    def _update(self, number: int, batches: Iterable[Any] | None) -> Event:
        start, (policy, view) = time.perf_counter(), self._asked(number)
        wanted = policy.update(view)
        if not isinstance(wanted, tuple) or len(wanted) != 2:
            raise TorchgrowError(
                f"{type(policy).__name__}.update returned {type(wanted).__name__}, it must return the structure wanted "
                "(bool [n]) and whether it shall be brought exactly to the budget, as in `return keep, False`"
            )
        keep = self.plan.legal(wanted[0], policy, "update")
        if wanted[1] or number >= self.plan.updates - 1:
            keep = self.plan.fitted(keep, policy, view)
        policy.applied(replace(view, keep=keep))
        born = self.plan.space.present(keep) & ~self.state.ever
        silent = born if policy.newborns == "silent" else None
        return self.change_to(keep, policy, view.generator, start, batches, silent=silent)

    def _finish(self, batches: Iterable[Any] | None, early: bool = False) -> Event:
        start, old, (policy, view) = time.perf_counter(), self.live.keep, self._asked(len(self.state.history) - 1)
        keep = self.plan.fitted(old, policy, view)
        silent = keep & ~old
        return self.change_to(keep, policy, view.generator, start, batches, silent=silent, last=True, early=early)

    def _asked(self, number: int) -> tuple[Policy, View]:
        """The policy, and the run at an update, as copies: if the change is refused, what they drew has not been."""
        generator = torch.Generator().set_state(self.state.generator.get_state())
        return self.policy.copied(), replace(self.view(number), generator=generator)

    def change_to(
        self,
        keep: Tensor,
        policy: Policy,
        generator: torch.Generator,
        start: float,
        batches: Iterable[Any] | None = None,
        *,
        silent: Tensor | None = None,
        last: bool = False,
        early: bool = False,
        exchange: Exchange | None = None,
    ) -> Event:
        """Make `keep` the live structure, with the policy and generator that chose it, all or nothing; record it."""
        self.live.check()
        state, exchange, previous = self.state, exchange or Exchange(), self.live.keep
        first, before = not state.history, previous if state.history else keep
        check_plain(policy, batches)
        gate = self.plan.checked(policy, "gate", torch.float64, self.plan.space.present(keep))
        policy_state(policy, self.kinds)  # what no checkpoint could bring back is refused now, not when it is loaded
        if last and gate is not None and silent is not None:
            gate = gate.masked_fill(silent, 1)  # for good: by a small one they would never learn
        shifts = shifts_of(self.live.model, self.plan.space, before, keep, batches, self.ranks.exchanged)
        how = {"first": first, "last": last, "as_is": first and self.plan.start is not None}
        reshapes = self.live.change(exchange, keep, gate, silent=silent, shifts=shifts, **how)
        event = event_of(self.plan.costs, state, keep, before, policy, start)
        if last:
            exchange.fields(state, finished=True, early=early)
        exchange.fields(self.policy, **vars(policy))
        exchange.fields(state, before=previous, ever=state.ever | self.plan.space.present(keep), generator=generator)
        exchange.append(state.history, event)
        note(self, exchange, [*state.history, event], last)
        self.ranks.invalidate(exchange)
        exchange.call(torch.clear_autocast_cache)  # autocast keeps casts of the old weights
        if reshapes:
            forget_compiled()
        self.ranks.agree(lambda: self._decided(keep, policy, generator))
        exchange.make()
        if reshapes:
            del exchange  # for its undo it holds the storages of before
            give_back()
        return event

    def _decided(
        self, keep: Tensor | None, policy: Policy, generator: torch.Generator
    ) -> dict[str, list[Tensor | str]]:
        """What must be equal on all ranks, before a change (keep None) and at every update."""
        plan, settings = self.plan, policy.settings()
        limits, updates, shapes = plan.limits, plan.updates, sorted(plan.space.shapes.items())
        weights: list[Tensor | str] = []
        if keep is not None:
            weights += [parameter for bank in self.live.banks for parameter in bank.model.parameters()]
            for optimizer in self.optimizers:
                weights += [slot for p in optimizer.state.values() for slot in p.values() if isinstance(slot, Tensor)]
        return {
            "calls": [f"{len(self.state.history) if keep is not None else 'start'}"],
            "settings": [
                f"{limits} {updates} {plan.begins} {type(policy).__name__} {settings} {shapes} {len(self.optimizers)}"
            ],
            "draws": [generator.get_state()],
            "policy": [v if isinstance(v, Tensor) else f"{key} {v}" for key, v in sorted(policy.state_dict().items())],
            "weights": weights,
            "structure": [] if keep is None else [keep],
        }


def give_back() -> None:
    """Return free memory, of GPUs and of glibc: tensors of ever new sizes fragment it, and every update takes more."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
