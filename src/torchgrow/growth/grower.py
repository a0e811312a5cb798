"""The order of things (Algorithm 1): measure, press, draw, cut, count. Everything it calls is data or pure."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import BudgetError, OptimizerError, StructureError, TorchgrowError
from ..exchange import Exchange, forget_compiled, trainable
from ..onednn_guard import guard_
from ..persistence.portable import owned_
from ..persistence.randomness import random_state
from ..policies import Policy, View, policy_of
from ..policies.indicators import Method
from ..policies.kit import one_per_group
from ..structure.budget import check_feasible, fit
from ..structure.cost import Cost, CostModel
from ..structure.limits import Budget, Limits
from ..structure.optimizers import check_optimizers, first_rate, optimizers_of, peak_rate, present_rate, untrained_hint
from ..structure.record import Growth, growths, recorded
from ..structure.space import WHOLE, Frozen, Place, Space, live_positions
from ..structure.store import is_meta
from ..structure.surgery import Bank, Change, named_tensors, recut
from ..tracing.blocks import Named
from ..tracing.model_call import Carries, examples_of
from ..tracing.nested import mapped
from ..tracing.nested import tensors as tensors_in
from ..tracing.tracer import Couples, replay
from ..tracing.verification import prove, trace
from .advice import Course, course, summary, warn_if_trained
from .event import Event
from .gates import Fold, Folding, attached, converted
from .loading import Loading
from .watch import Watch, warn_idle, warn_spread

log = logging.getLogger("torchgrow")


class Grower(Loading):
    """Grows a model to a budget while you train it.

    At construction the model (the frame, the largest it may become) is shrunk in place to a seed of one unit per
    group. Train as usual; call `update()` after every epoch, or every k steps. All Parameter objects and the
    optimizer stay; gradients are dropped at an update.

    Args:
        model: the frame, a plain module on one device. On the meta device (`with torch.device("meta"): ...`) it takes
            no memory but for what grows: what comes to life is initialised by its own module's `reset_parameters`, on
            the device of the example inputs. What the model's constructor sets afterwards (He's rule for convolutions,
            say) is lost there: write it into a `reset_parameters` of the modules.
        optimizer: the optimizer that trains it, or a list of several; their state is re-cut with the parameters.
            With several, the indicators move once all that hold gates have stepped, and follow the first one's rate.
        example_inputs: a small batch for tracing: a tensor, a tuple, or a dict of keywords; or a list of several such
            examples, for forwards that take other ways on other inputs, or other arguments in training.
        budget: what the final network may cost; it is never above and no removable unit still fits under it.
        updates: T, the number of updates in the run. The structure is final from update T-1 on.
        preset: how it grows, by name: "default" (evenly beyond the budget, then the least important units of every
            group go), "paper" (literal), "global" (with one temperature for all), "nas" (its settings for architecture
            search), "random" (its baseline); with other values behind a colon ("default:peak=1").
        policy: how it grows, as an object in place of a name: `torchgrow.policies.Paper(lambda_base=0.3)`, or a
            `torchgrow.policies.Policy` of your own. The grower works on a copy, `grower.policy`.
        seed: of all draws.
        freeze: what keeps its shape, as for `trace`.
        couple: what is cut alike, as for `trace`.
        depth: whether layers grow too, as for `trace`. A layer that is left out costs nothing: its module hands its
            input on, and its parameters (still the same objects, in the optimizer too) are empty.
        carried: outputs that become arguments of the next call, as for `trace`; see `carry`.

    Raises:
        TraceError: the model cannot be traced with these inputs.
        OptimizerError: the optimizer cannot be served or does not train this model, or a trainable parameter that can
            be cut is held by none.
        BudgetError: the budget is out of reach; the message names the feasible range.
        StructureError: every unit of the model is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        example_inputs: Any,
        budget: Budget,
        updates: int,
        preset: str | Method = "default",
        policy: Policy | None = None,
        seed: int = 0,
        freeze: Sequence[str | Place] = (),
        couple: Couples = (),
        depth: bool | Sequence[Named] = False,
        carried: Carries | None = None,
    ) -> None:
        if not isinstance(budget, Budget):
            raise BudgetError(f'budget must be a torchgrow.Budget such as Budget(params="36%"), got {budget!r}')
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise TorchgrowError(f"updates={updates!r} must be a whole number >= 1: how often you will call update()")
        if policy is not None and not isinstance(policy, Policy):
            raise TorchgrowError(
                f"policy must be an object such as torchgrow.policies.Paper(), got {policy!r}; names go to preset="
            )
        if isinstance(preset, Method):
            warnings.warn(
                "Method is deprecated and goes with the next version: give Grower a policy, as in policy="
                f'torchgrow.policies.{type(policy_of(preset)).__name__}(...), or a name, preset="default:peak=1"',
                DeprecationWarning,
                stacklevel=2,
            )
        method = preset if isinstance(preset, Method) else Method.named(preset, layers=bool(depth))
        self.policy: Policy = copy.copy(policy) if policy is not None else policy_of(method)
        self.model, self.budget, self.updates, self.seed = model, budget, updates, seed
        self.optimizers = optimizers_of(optimizer)
        _check_free(model, self.optimizers)
        exchange = Exchange()
        if isinstance(model, nn.Module):
            exchange.remember(model)
        try:
            with trainable():
                space = trace(model, example_inputs, freeze=freeze, couple=couple, carried=carried, depth=depth)
                if not space.proven:  # a frame on the meta device
                    space = prove(model, space, example_inputs)
                self._attach(space, example_inputs, exchange)
        except BaseException as error:
            exchange.undo()
            if isinstance(model, nn.Module) and is_meta(
                model
            ):  # weak references in the frames of a failed trace would forbid another try
                traceback.clear_frames(error.__traceback__)
            raise

    def _attach(self, space: Space, example_inputs: Any, exchange: Exchange) -> None:
        """Shrink the model to its seed; `exchange` can take all of it back."""
        model, budget, updates, seed = self.model, self.budget, self.updates, self.seed
        layouts = check_optimizers(self.optimizers, model)
        self.optimizer = self.optimizers[0]
        self.space = _pin_untrained(space, _trained_names(model, self.optimizers))
        if not bool(self.space.removable.any()):
            reasons = "; ".join(str(frozen) for frozen in self.space.frozen[:5])
            raise StructureError(
                f"nothing can grow here, because {reasons or 'the model has no units'}"
                f"{untrained_hint(self.optimizers, model)}"
            )
        self._costs = CostModel(self.space)
        self.frame_cost = self._costs.cost(self.space.everything())
        _tell_share(model, budget, self.frame_cost)
        self.limits: Limits = budget.limits(self.frame_cost)
        check_feasible(budget, self.limits, self._costs)
        warn_if_trained(model, self.optimizers)
        guard_(model)
        self._generator = torch.Generator().manual_seed(seed)
        everything = View(
            self.space, self._costs, self.limits.tensor(), 0, updates, self.space.everything(), 1.0, self._generator
        )
        seed_structure = self._legal(self.policy.seed(everything), "seed")
        self.ranks = Ranks()
        self.ranks.agree(lambda: self._decided(None, self.policy, self._generator))
        self.ranks.share([tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta])
        device = tensors_in(examples_of(example_inputs)[0])[0].device
        self._bank = Bank(model, self.space, seed=seed, device=device, layouts=layouts, exchange=exchange)
        self._bank.growth = Growth(updates)
        self._parameters = dict(model.named_parameters())
        self._watch = Watch(self.space, self.optimizers, self._parameters)
        cut = {n: t for n, t in named_tensors(model).items() if n in self._parameters or n in self.space.cut_axes}
        self._kinds = {name: (tensor.dtype, tensor.device) for name, tensor in cut.items()}
        self._gated = sorted({name for name, _ in self.space.fold})
        self._initial_lr = first_rate(self.optimizers[0])
        self._folding = Folding(layouts, self._step, lambda: self.policy.gate)
        self._followers: list[Bank] = []
        self._outer: list[nn.Module] = []  # the followers as they were given
        self._copies: list[Bank] = []  # those of them that began with the frame's own weights
        self._ever = torch.zeros(self.space.n_units, dtype=torch.bool)
        self._before = self.space.everything()  # the structure before the last change
        self.finished = False
        self._early = False  # whether finish() ended the run, before update() could
        self.history: list[Event] = []
        self._seed_cost = self._costs.both(self._costs.live(seed_structure))
        log.info("%s goes %s", type(model).__name__, self.course())
        self.policy.applied(replace(everything, keep=seed_structure))
        self.policy.state_dict()  # what could not be kept is told now, not at the first checkpoint
        self._change_to(seed_structure, self.policy, self._generator, time.perf_counter(), exchange=exchange)
        owned_(model, self)

    # --- what the user asks for ---

    def update(self) -> Event:
        """Grow, detach and regrow once. Evaluate before: newborn units are untrained.

        With several processes every rank calls it; buffers such as running statistics become rank 0's, and every rank
        hears of the random states of all, for `save_checkpoint`.

        Raises:
            TorchgrowError: the run is over, or the ranks do not agree.
            TrainingError: the last optimizer step did not finish, or something else than the given optimizers trains
                the network.

        Warns:
            UserWarning: no given optimizer took a step since the last update, or the indicators wait for one that
                takes none; or, at the first, a copy of the frame that does not follow was averaged with the seed.
        """
        number = len(self.history)
        if self.finished:
            raise TorchgrowError(
                f"the run is over: finish() was called after {number - 2} of {self.updates} updates; call it only when "
                "no update follows"
                if self._early
                else f"the run is over: update() was called {self.updates} times; for a longer run construct "
                f"Grower(..., updates={self.updates + 1}) or with more"
            )
        with trainable(), self.ranks.together(self._buffers(), random_state):
            self._check_trained()
            warn_idle(self.optimizers, self._folding.taken, self._folding.moved or not self._folding.listens)
            if number == 1:
                warn_spread(self.model, self.space)
            return self._finish() if number >= self.updates else self._update(number)

    def finish(self) -> Event:
        """End the run now: the network is brought to the budget, the bank is emptied, the hooks come off.

        Called before update T-1 the network may have to change once more; units that enter here are silent
        (their gated weights are 0), so that the function of the network is what survived of it.

        Raises:
            TorchgrowError: the run is over already, or the ranks do not agree.
        """
        if self.finished:
            raise TorchgrowError(
                "finish() was called before; the network is final, save it with torchgrow.save(model, folder)"
            )
        with trainable(), self.ranks.together(self._buffers(), random_state):
            self._check_trained()
            return self._finish(early=True)

    def wrap(self, **settings: Any) -> nn.Module:
        """The network for data-parallel training; call it anew after every update: `ddp = grower.wrap()`.

        Returns a new DistributedDataParallel, or, where no process group was started, the model itself. Wrappers
        made before an update raise when they are called after it. Evaluate and save the model, not the wrapper.

        Args:
            **settings: of DistributedDataParallel, such as `find_unused_parameters`.

        Raises:
            TorchgrowError: there are several processes, but no process group, or it was started after the grower.
        """
        return self.ranks.wrap(self.model, settings)

    @trainable()
    def follow(self, module: nn.Module) -> None:
        """Let a second model of the same frame, such as a moving average, follow every change of structure.

        It keeps weights and buffers of its own, those of detached units too: a unit that comes back is in it as it
        left. A unit that a copy has no history of starts in it as in the network.

        Args:
            module: a copy of the frame or of the live network, or what holds one in `.module`, such as
                `torch.optim.swa_utils.AveragedModel`; or a whole frame with other weights, which stay as they are. Let
                an average follow before its first update: averaging over another size broadcasts, without an error.

        Raises:
            StructureError: it does not fit; the message names tensors and shapes.
            TorchgrowError: the run is over, or it is no module.
        """
        if self.finished:
            raise TorchgrowError("the run is over and the structure final; a copy of the network needs no following")
        if not isinstance(module, nn.Module):
            raise TorchgrowError(
                "follow takes a torch.nn.Module with weights of its own, such as copy.deepcopy(model) or "
                f"torch.optim.swa_utils.AveragedModel(model), got {type(module).__name__}; an average kept as a "
                "list of tensors cannot be cut along"
            )
        outer, inner = module, getattr(module, "module", None)
        if isinstance(inner, nn.Module) and not module.state_dict().keys() & self._bank.tensors.keys():
            module = inner
        own = {id(tensor): name for name, tensor in named_tensors(module).items()}
        for follower in self._followers:
            for tensor in named_tensors(follower.model).values():
                if id(tensor) in own:
                    raise StructureError(
                        f"{own[id(tensor)]} of {type(module).__name__} follows already; call follow once for every copy"
                    )
        exchange = Exchange()
        exchange.remember(module)
        try:
            follower = self._bank.follower(module, exchange)
            guard_(follower.model)
            exchange.append(self._followers, follower)
            exchange.append(self._outer, outer)
            if self._bank.sleeps_alike(follower):
                exchange.append(self._copies, follower)
            exchange.make()
        except BaseException:
            exchange.undo()
            raise
        owned_(follower.model, self)

    def __setattr__(self, name: str, value: Any) -> None:
        """What a run was planned with stays: a new value would be shown, but not followed."""
        if name in ("model", "budget", "limits", "updates", "seed", "policy", "space") and name in vars(self):
            raise TorchgrowError(
                f"{name} of a Grower cannot be changed during the run, which is planned with it; finish() this one "
                f"and construct Grower(...) anew with the {name} you want"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Neither copied nor pickled: it acts on the very model and optimizer it was given."""
        raise TorchgrowError(
            "a Grower cannot be copied or pickled: it hangs on the objects of its model and optimizer. To store a run "
            "use torchgrow.save_checkpoint(folder, grower); to branch off, build model, optimizer and Grower anew and "
            "call other.load_state_dict(grower.state_dict()); for the network alone copy.deepcopy(grower.model)"
        )

    @property
    def keep(self) -> Tensor:
        """The live units, bool [n], as a copy; `space` says where each of them lives."""
        return self._bank.keep.clone()

    def cost(self) -> Cost:
        """Cost of the live network."""
        return self._costs.cost(self._bank.keep)

    def widths(self) -> dict[str, int]:
        """Live units per group."""
        return self.space.widths(self._bank.keep)

    def depths(self) -> dict[str, int]:
        """Live blocks per stage, those that always stay included; layers named by the user count under ""."""
        return self._blocks(self._bank.keep)

    def _blocks(self, keep: Tensor) -> dict[str, int]:
        found: dict[str, int] = {}
        for slot in self.space.slots:
            blocks = len(list(self.model.get_submodule(slot.stage).children())) if slot.stage else 0
            live = bool(keep[slot.unit])
            found.setdefault(slot.stage, blocks)
            found[slot.stage] += int(live) if not slot.stage else int(live) - 1
        return found

    def full_widths(self) -> dict[str, int]:
        """Units per group in the frame."""
        return self.space.widths(self.space.everything())

    def course(self) -> Course:
        """How the cost goes over the run: seed, peak, end, and after how many updates; logged at the start (INFO)."""
        costs = [self.policy.planned(self._view(number)) for number in range(self.updates + 1)]
        planned = [cost for cost in costs if cost is not None]
        return course(self._seed_cost, planned, self.frame_cost, self.limits, self.policy.final(self.updates))

    def summary(self) -> str:
        """The run on one screen: how the budget is reached, what grows, what keeps its size and why."""
        return summary(
            type(self.model).__name__,
            self.budget,
            self.course(),
            self.cost(),
            self.frame_cost,
            self.widths(),
            self.full_widths(),
            self.space.frozen,
            len(self.history) - 1,
        )

    def __repr__(self) -> str:
        now, done = self.cost(), max(0, len(self.history) - 1)
        stage = "finished" if self.finished else f"update {done} of {self.updates}"
        share = now.params / max(1, self.frame_cost.params)
        return (
            f"<Grower of {type(self.model).__name__}: {self.budget}, {stage}, {now.params:,} parameters ({share:.2%})>"
        )

    def full_depths(self) -> dict[str, int]:
        """Blocks per stage in the frame."""
        return self._blocks(self.space.everything())

    # --- how it is done ---

    def _update(self, number: int) -> Event:
        start = time.perf_counter()
        self._folding.recover()
        generator = torch.Generator()
        generator.set_state(self._generator.get_state())
        policy, view = self.policy.copied(), replace(self._view(number), generator=generator)
        wanted = policy.update(view)
        if not isinstance(wanted, tuple) or len(wanted) != 2:
            raise TorchgrowError(
                f"{type(policy).__name__}.update returned {type(wanted).__name__}, it must return the structure wanted "
                "(bool [n]) and whether it shall be brought exactly to the budget, as in `return keep, False`"
            )
        keep = self._legal(wanted[0], "update")
        if wanted[1] or number >= self.updates - 1:
            keep = self._fitted(keep, policy, view)
        policy.applied(replace(view, keep=keep))
        return self._change_to(keep, policy, generator, start)

    def _view(self, number: int) -> View:
        """The run as the policy sees it at an update."""
        limits, keep = self.limits.tensor(), self._bank.keep
        return View(self.space, self._costs, limits, number, self.updates, keep, self._rate(), self._generator)

    def _legal(self, keep: Any, asked: str) -> Tensor:
        """A structure as a policy wants it, with what cannot be removed and one unit of every group.

        Raises:
            TorchgrowError: it is no structure; the message names the policy.
        """
        n = self.space.n_units
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != (n,):
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise TorchgrowError(
                f"{type(self.policy).__name__}.{asked} returned {found} for a structure, it must be a bool tensor of "
                f"{n} units, True where one lives; nothing was changed"
            )
        return one_per_group(self.space, keep.cpu(), torch.zeros(n))

    def _fitted(self, keep: Tensor, policy: Policy, view: View) -> Tensor:
        """The nearest structure exactly at the budget."""
        multiples = policy.multiples
        ones = torch.ones(self.space.n_groups, dtype=torch.int64)
        score = policy.score(view)
        return fit(self.space, self._costs, keep, score, self.limits, ones if multiples is None else multiples)

    def _check_parameters(self) -> None:
        """The optimizer trains, and the bank writes into, the parameter objects that were there at the start."""
        now = dict(self.model.named_parameters())
        for name, parameter in self._parameters.items():
            if now.get(name) is not parameter:
                found = "sharded (fully_shard)" if hasattr(now.get(name), "device_mesh") else "exchanged or taken out"
                raise StructureError(
                    f"{name} is not the parameter any more that Grower was given: it was {found} since. "
                    "Write into the objects that are there (load_state_dict without assign=True), and use DDP instead "
                    "of fully_shard"
                )
        tensors = named_tensors(self.model)
        for name, (dtype, device) in self._kinds.items():
            tensor = tensors.get(name)
            if tensor is not None and (tensor.dtype, tensor.device) != (dtype, device):
                raise StructureError(converted(name, tensor, dtype, device))
            if tensor is not None and tensor.is_inference():
                raise StructureError(
                    f"{name} was made under torch.inference_mode() since Grower was given the model, so that it cannot "
                    "be cut; run the forward that makes it under torch.no_grad()"
                )
        for follower in self._followers:
            own = named_tensors(follower.model)
            for name in follower.index:
                here, there = tuple(tensors[name].shape), tuple(own[name].shape) if name in own else None
                if here != there:
                    raise StructureError(
                        f"{name} of a follower is {there or 'missing'}, not {here} as in the network: it was exchanged "
                        "or taken out since follow(). Write into the objects that are there. Nothing was changed"
                    )

    def _check_trained(self) -> None:
        """The optimizers that were given train the network, and no other."""
        self._check_parameters()
        self._folding.recover()
        self._watch.check_trained(self._contents(), self._folding.taken)

    def _finish(self, early: bool = False) -> Event:
        start = time.perf_counter()
        self._folding.recover()
        old = self._bank.keep
        keep = self._fitted(old, self.policy, self._view(len(self.history) - 1))
        return self._change_to(keep, self.policy, self._generator, start, silent=keep & ~old, last=True, early=early)

    @trainable()
    def carry(self, state: Any) -> Any:
        """What the model put out before the last change of structure, as it takes it now.

        Truncated backpropagation through time hands the hidden state of a recurrent network from one step to the
        next. Where the structure changes in between, call this once: after every `update()`, after `finish()`, and
        after construction if there was a state of the frame before.

        Args:
            state: the carried tensors, in any nesting; with several carried arguments, a tuple of them all. Sizes of
                axes that no unit lives on (of the batch, say) are free.

        Returns:
            `state`, detached: entries of units that stayed are the same bit for bit, those of units that came are
            0, those of units that left are gone.

        Raises:
            StructureError: nothing was declared as carried, or the state is not the one of the structure before.
        """
        carried, old, new = self.space.carried, self._before, self._bank.keep
        if not carried:
            raise StructureError(
                "no state was declared; construct Grower(..., example_inputs=(x, state), carried={1: 1}) for a model "
                "called as out, state = model(x, state)"
            )
        tensors = tensors_in(state)
        if len(tensors) != len(carried):
            raise StructureError(
                f"the state holds {len(tensors)} tensors, but {len(carried)} were declared as carried; pass the whole "
                "state as the model returned it"
            )
        for i, (tensor, place) in enumerate(zip(tensors, carried, strict=True)):
            for axis, units in place.units.items():
                size = int(live_positions(units, old).sum())
                if tensor.dim() <= axis or tensor.shape[axis] != size:
                    raise StructureError(
                        f"tensor {i} of the state is {tuple(tensor.shape)}, but axis {axis} had {size} positions "
                        "before the last update; call carry once after every update, with what the model returned last"
                    )
        cut = iter([recut(x, place.units, old, new) for x, place in zip(tensors, carried, strict=True)])
        return mapped(state, lambda x: next(cut), "the state")

    def _change_to(
        self,
        keep: Tensor,
        policy: Policy,
        generator: torch.Generator,
        start: float,
        *,
        silent: Tensor | None = None,
        last: bool = False,
        early: bool = False,
        exchange: Exchange | None = None,
    ) -> Event:
        """Make `keep` the live structure, with the policy and generator that chose it, all or nothing; record it."""
        self._check_parameters()
        bank, gate = self._bank, policy.gate
        previous = bank.keep
        old = previous if self.history else keep
        stays = bool(self.history) and torch.equal(keep, previous) and self._folding.folded_with(gate)
        changes, installed = ([bank.unchanged()], None) if stays else self._stage(keep, gate, silent)
        cost = self._costs.cost(keep)
        here, before = self.space.present(keep), self.space.present(old)
        born, back = here & ~self._ever, here & ~before & self._ever
        event = Event(
            update=len(self.history),
            params=cost.params,
            flops=cost.flops,
            widths=self.space.widths(keep),
            pressure=float(policy.pressure),
            temperature=self._temperature(policy.temperature),
            born=int((born & self.space.removable).sum()),
            regrown=int(back.sum()),
            detached=int((before & ~here).sum()),
            seconds=time.perf_counter() - start,
        )
        reshapes, exchange = changes[0].reshapes, exchange or Exchange()
        for change in changes:
            change.into(exchange)
        raw = {}
        if installed is not None:
            self._folding.install(exchange, *installed)
            raw = installed[0].contents
        self._folding.begin(exchange)
        self._watch.begin(exchange, {**self._contents(), **changes[0].contents(self._parameters), **raw})
        if last:
            self._folding.remove(exchange)
            for one in (bank, *self._followers):
                exchange.fields(one, full={}, slots={})
            exchange.fields(self, finished=True, _early=early)
        else:
            self._folding.attach(exchange)
        exchange.fields(self.policy, **vars(policy))
        exchange.fields(self, _before=previous, _ever=self._ever | here, _generator=generator)
        exchange.append(self.history, event)
        self._note(exchange, [*self.history, event], last)
        self.ranks.invalidate(exchange)
        exchange.call(torch.clear_autocast_cache)  # casts of weights as they were, if a context is open
        if reshapes:
            forget_compiled()
        self.ranks.agree(lambda: self._decided(keep, policy, generator))
        exchange.make()
        if reshapes:
            _give_back()
        return event

    def _stage(
        self, keep: Tensor, gate: Tensor | None, silent: Tensor | None
    ) -> tuple[list[Change], tuple[Fold, list[Tensor], dict[tuple[str, str], Tensor]]]:
        """The changes of the network and its followers to `keep`, not made as yet, and what `Folding.install` needs."""
        bank = self._bank
        raw = self._folding.raw() or {name: self._parameters[name].detach() for name in self._gated}
        change = bank.stage(keep, raw, self._folding.raw_copies())
        fresh = {name: change.swaps[name].new for name in self._gated if not self.space.absent(name, keep)}
        if silent is not None:
            _silence(self.space, fresh, keep, silent)
            for name in fresh:
                for part in change.swaps[name].raw_copies().values():
                    _silence(self.space, {name: part}, keep, silent)
        fold = self._fold(keep, fresh, gate)
        factors = fold.factors(gate)
        folded = fold.folded(factors)
        followed = self._followed(keep, fresh, folded)
        copies: dict[tuple[str, str], Tensor] = {}
        for (name, contents), factor in zip(folded.items(), factors, strict=True):
            swap = change.swaps[name]
            copies |= {(name, key): part.clone() for key, part in swap.raw_copies().items()}
            swap.new = contents
            swap.fold_copies(factor)
        return [change, *followed], (fold, factors, copies)

    def _followed(self, keep: Tensor, raw: Mapping[str, Tensor], folded: Mapping[str, Tensor]) -> list[Change]:
        """The change to `keep` of every follower; where a copy still holds what the bank holds, it gets that folded."""
        changes = []
        for follower in self._followers:
            change = follower.stage(keep)
            for name in change.swaps.keys() & folded.keys() if follower in self._copies else ():
                own, value = change.swaps[name].new, folded[name].to(change.swaps[name].new)
                change.swaps[name].new = torch.where(own == raw[name].to(own), value, own)
            changes.append(change)
        return changes

    def _buffers(self) -> list[Tensor]:
        return [buffer for bank in (self._bank, *self._followers) for buffer in bank.model.buffers()]

    def _decided(
        self, keep: Tensor | None, policy: Policy, generator: torch.Generator
    ) -> dict[str, list[Tensor | str]]:
        """What must be the same on all ranks: before anything else (keep None), and at every update."""
        limits, shapes, settings = self.limits, sorted(self.space.shapes.items()), policy.settings()
        weights: list[Tensor | str] = []
        if keep is not None:
            weights += [p for bank in (self._bank, *self._followers) for p in bank.model.parameters()]
            for optimizer in self.optimizers:
                weights += [slot for p in optimizer.state.values() for slot in p.values() if isinstance(slot, Tensor)]
        return {
            "calls": [f"{len(self.history) if keep is not None else 'start'}"],
            "settings": [f"{limits} {self.updates} {type(policy).__name__} {settings} {shapes} {len(self.optimizers)}"],
            "draws": [generator.get_state()],
            "policy": [v if isinstance(v, Tensor) else f"{key} {v}" for key, v in sorted(policy.state_dict().items())],
            "weights": weights,
            "structure": [] if keep is None else [keep],
        }

    def _temperature(self, beta: Tensor | None) -> dict[str, float]:
        if beta is None:
            return {}
        space = self.space
        sums = torch.zeros(space.n_groups, dtype=torch.float64).index_add_(0, space.group_of, beta)
        means = (sums / self._costs.sizes).tolist()
        return {name: means[g] for g, name in enumerate(space.group_names)}

    def _step(self, task_gradient: Tensor) -> None:
        """After every optimizer step: the policy is told."""
        self.policy.step(self._view(len(self.history) - 1), task_gradient)

    def _rate(self) -> float:
        """Present over full learning rate of the weights, never above 1.

        Full is the peak of a one-cycle schedule, else the first rate or the highest since: where the first is low the
        indicators' own would be carried many times beyond what it is made for.
        """
        rate = present_rate(self.optimizers[0])
        self._initial_lr = max(self._initial_lr, rate)
        full = peak_rate(self.optimizers[0]) or self._initial_lr
        return min(1.0, rate / full) if full else 1.0


def _give_back() -> None:
    """Let glibc return the memory that is free: between blocks of ever other sizes it keeps more with every update."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters and FLOPs (2 x multiply-accumulates, one sample) of a model as it is.

    Args:
        model: any plain module.
        example_inputs: a small batch: a tensor, a tuple, or a dict of keywords; of a list of them the first counts.

    Raises:
        TraceError: the model cannot be run on the inputs.
    """
    space = replay(model, example_inputs, counting=True)
    return CostModel(space).cost(space.everything())


def _check_free(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse a model and optimizers that another grower has not finished with.

    Raises:
        StructureError: the model, a part of it or a model around it is growing.
        OptimizerError: an optimizer trains a network that is growing.
    """
    advice = (
        "go on with the grower that is there, or end it with grower.finish() before another one begins. To begin anew, "
        "build model and optimizer anew (in a notebook: run their cell again too)"
    )
    for growth in growths(model):
        raise StructureError(f"{type(model).__name__} is growing already: {growth}; {advice}")
    for optimizer in optimizers:
        if attached(optimizer):
            raise OptimizerError(f"{type(optimizer).__name__} already trains a network that is growing; {advice}")


def _tell_share(model: nn.Module, budget: Budget, cost: Cost) -> None:
    """Warn of a share of a network that was itself cut from a larger one."""
    shares = [x for x in (budget.params, budget.flops) if isinstance(x, float) or (isinstance(x, str) and "%" in x)]
    cut = recorded(model.named_modules())
    if shares and any(cut.kept.values()):
        first = sum(math.prod(cut.shapes.get(name, p.shape)) for name, p in model.named_parameters())
        warnings.warn(
            f"the budget {shares[0]} is a share of the network as it is, {cost.params:,} parameters, which was cut "
            f"from a frame of {first:,} before; for a share of that frame give a number, such as Budget(params=...)",
            stacklevel=4,
        )


def _trained_names(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> set[str]:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
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
        if name not in raw:
            continue
        if axis == WHOLE:
            if bool(silent[vector]):
                raw[name].zero_()
            continue
        live = vector[live_positions(space.unit_of[name, axis], keep)]
        positions = torch.nonzero((live >= 0) & silent[live.clamp(min=0)]).flatten()
        if positions.numel():
            raw[name].index_fill_(axis, positions.to(raw[name].device), 0)
