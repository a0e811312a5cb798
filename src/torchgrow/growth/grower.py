"""The Grower: the public interface of a run."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from ..errors import BudgetError, TorchgrowError
from ..exchange import Exchange, by_one_thread, trainable
from ..policies import Policy, named, policy_of
from ..policies.method import Method
from ..renamed import frames_to_user, renamed_arguments
from ..structure.limits import Budget
from ..structure.optimizers import optimizers_of
from ..structure.space import Place
from ..structure.store import is_meta
from ..tracing.blocks import Named
from ..tracing.model_call import Carries
from ..tracing.requests import Couples
from ..tracing.verification import proven
from .attaching import check_free
from .carrying import carried_over
from .event import Event
from .run import Run
from .shown import Shown
from .start import check_start
from .teacher import recalibrate, teacher_of

PLANNED = {"model", "optimizers", "budget", "limits", "updates", "seed", "start", "rescale", "policy", "space", "run"}
"""Attributes of a grower that cannot be set again."""


class Grower(Shown):
    """Grows a model to a budget while you train it.

    At construction the model (the frame, the largest it may become) is shrunk in place to a seed of one unit per
    group, or begins as it is: see `start`. Train as usual; call `update()` after every epoch, or every k steps. All
    Parameter objects and the optimizer stay; gradients are dropped at an update.

    Args:
        model: the frame, a plain module on one device. On the meta device (`with torch.device("meta"): ...`) only
            what grows takes memory: it is initialised by its own module's `reset_parameters`, on the device of the
            example inputs. What the model's constructor sets afterwards (He's rule, say) has to be written there.
        optimizer: the optimizer that trains it, or a list of several; their state is re-cut with the parameters.
            With several, the indicators move once all that hold gates have stepped, and follow the first one's rate.
        example_inputs: a small batch for tracing: a tensor, a tuple, or a dict of keywords; or a list of several such
            examples, for forwards that take other ways on other inputs, or other arguments in training.
        budget: what the final network may cost; it is never above and no removable unit still fits under it.
        updates: T, the number of updates in the run. The structure is final from update T-1 on.
        start: what the run begins with: "seed"; "frame", the whole model with its weights; some of its units, bool [n]
            as in `space`; or a network that was cut from such a model before, from `torchgrow.load` or an earlier
            run: its weights are copied into the model, and the run begins from its structure.
        rescale: whether untrained weights are rescaled from the widths of the frame to those planned for the end of the
            run, as in a network built that small (He et al., 2015, Eq 10). The initialisation rule is identified from
            the variance of the weights; if no rule with a fan fits, they stay. Never with `start`.
        preset: how it grows, by name: "default" (evenly beyond the budget, then the least important units of every
            group go), "shrink" (from the start down to the budget), "paper" (its own), "global" (with one temperature
            for all), "nas" (its settings for architecture search), "random" (its baseline); with other values behind
            a colon ("default:peak=1"). None: "shrink" where the start is beyond the budget, else "default".
        policy: how it grows, as an object in place of a name: `torchgrow.policies.Paper(lambda_base=0.3)`, or a
            `torchgrow.policies.Policy` of your own. The grower works on a copy, `grower.policy`.
        seed: of all draws.
        protect: parameters or modules that keep their shape, as for `trace`.
        couple: axes that are cut alike, as for `trace`.
        depth: whether layers grow too, as for `trace`. A layer that is left out costs nothing: its module hands its
            input on, and its parameters (still the same objects, in the optimizer too) are empty.
        carried: outputs that become arguments of the next call, as for `trace`; see `carry`.

    `run`, to look at, shows how it is done: `run.live` is the network, `run.state` how far it has come.

    Raises:
        TraceError: the model cannot be traced with these inputs.
        OptimizerError: the optimizer cannot be served or does not train this model, or a trainable parameter that can
            be cut is held by none.
        BudgetError: the budget is out of reach; the message names the feasible range.
        StructureError: every unit of the model is frozen.
    """

    @renamed_arguments(freeze="protect")
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        example_inputs: Any,
        budget: Budget,
        updates: int,
        start: str | Tensor | nn.Module = "seed",
        rescale: bool = True,
        preset: str | Method | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        protect: Sequence[str | Place] = (),
        couple: Couples = (),
        depth: bool | Sequence[Named] = False,
        carried: Carries | None = None,
    ) -> None:
        _check(budget, updates, rescale)
        check_start(start)
        chosen = _policy(preset, policy, layers=bool(depth))
        self.model, self.budget, self.updates, self.seed, self.start = model, budget, updates, seed, start
        self.rescale = rescale
        self.optimizers, self._inside = optimizers_of(optimizer), dict[str, int]()
        check_free(model, self.optimizers)
        with _all_or_nothing(model) as exchange:
            space = proven(model, example_inputs, protect=protect, couple=couple, carried=carried, depth=depth)
            self.run = Run.begin(self, chosen, space, example_inputs, exchange)
        self.policy, self.optimizer, self.ranks = self.run.policy, self.optimizers[0], self.run.ranks
        plan = self.run.plan
        self.space, self.limits, self.frame_cost = plan.space, plan.limits, plan.frame_cost

    def update(self, batches: Iterable[Any] | None = None) -> Event:
        """Grow, detach and regrow once. Evaluate before: new units are untrained.

        With `batches`, biases take over what the leaving units gave on average: the network then computes what it did
        with the outputs of these units replaced by their means, where they are read by linear maps and convolutions
        that have a bias and no zero padding; other readers lose them as ever. Followers keep their own biases.

        With several processes every rank calls it; buffers such as running statistics become rank 0's. Every rank
        receives the random states of all ranks; `save_checkpoint` needs them.

        Args:
            batches: to measure means on, in evaluation mode, as for `recalibrate`; means are over all ranks that give
                some. Read only if units leave.

        Raises:
            TorchgrowError: the run is over, the ranks do not agree, or another thread is at it; there are no batches,
                the policy folds gates into weights, or a mean is not finite.
            TrainingError: the last optimizer step did not finish, or something else than the given optimizers trains
                the network.

        Warns:
            UserWarning: no given optimizer took a step since the last update, or the indicators wait for one that
                takes none; or a copy of the frame that does not follow was averaged with the seed.
        """
        with trainable(), by_one_thread(self._inside):
            return self.run.update(batches)

    def finish(self, batches: Iterable[Any] | None = None) -> Event:
        """End the run now: the network is brought to the budget, the bank is emptied, the hooks come off.

        Called before update T-1 the network may change once more. Units that enter here have no effect at first, as the
        weights by which they are read are 0: outputs stay, and training on makes use of them. Some could not learn so
        and enter as ever: plain layers, branches that end in a ReLU, units in a norm or sum over them, tied weights.
        With `batches` biases take over from units that leave, as in `update`.

        Raises:
            TorchgrowError: the run is over already, or as for `update`.
        """
        with trainable(), by_one_thread(self._inside):
            return self.run.finish(batches)

    def wrap(self, **settings: Any) -> nn.Module:
        """The network for data-parallel training; call it again after every update: `ddp = grower.wrap()`.

        Returns a new DistributedDataParallel, or, where no process group was started, the model itself. Wrappers
        made before an update raise when they are called after it. Evaluate and save the model, not the wrapper.
        `settings` are DistributedDataParallel's own, such as `find_unused_parameters`.

        Raises:
            TorchgrowError: there are several processes, but no process group, or it was started after the grower.
        """
        return self.ranks.wrap(self.model, settings)

    @trainable()
    def follow(self, module: nn.Module) -> None:
        """Let a second model of the same frame, such as a moving average, follow every change of structure.

        It keeps its own weights and buffers, also of detached units: one that comes back has the values it left with.
        A unit that is new to the copy starts with the network's values.

        Args:
            module: a copy of the frame or of the live network, or what holds one in `.module`, such as
                `torch.optim.swa_utils.AveragedModel`; or a whole frame with other weights, which stay. Let an average
                follow before its first update: averaging over another size broadcasts, without an error.

        Raises:
            StructureError: it does not fit; the message names tensors and shapes.
            TorchgrowError: the run is over, or it is no module.
        """
        self.run.follow(module)

    @trainable()
    def carry(self, state: Any) -> Any:
        """Re-cut a hidden state that the model returned before the last change of structure.

        Truncated backpropagation through time hands the hidden state of a recurrent network from one step to the
        next. Where the structure changes in between, call this once: after every `update()`, after `finish()`, and
        after construction if there was a state of the frame before.

        Args:
            state: the carried tensors, in any nesting; with several carried arguments, a tuple of them all. Sizes of
                axes that no unit lives on (of the batch, say) are free.

        Returns:
            `state`, detached: entries of units that stayed are the same bit for bit, of those that came 0.

        Raises:
            StructureError: nothing was declared as carried, or the state is not the one of the structure before.
        """
        return carried_over(self.space, state, self.run.state.before, self.run.live.keep)

    @trainable()
    def teacher(self) -> nn.Module:
        """A copy of the network that the run began with: no gradients, evaluation mode, no shared tensors.

        For a run from the seed that is the frame, for a run from a smaller network that network.

        For distillation: ask for it before the first step, and train with `torchgrow.distillation_loss`.

        Raises:
            TorchgrowError: the run has an update or a step behind it, so that the frame as it was is gone.
        """
        return teacher_of(self.run)

    @trainable()
    def recalibrate(self, loader: Iterable[Any]) -> None:
        """Re-estimate the network's batch statistics: `torchgrow.recalibrate`. Followers keep theirs."""
        recalibrate(self.model, loader)

    @trainable()
    def state_dict(self) -> dict[str, Any]:
        """The whole run so far: network, bank, indicators, counters, draws, history, optimizer; as copies.

        Plain data: nested dicts and lists of tensors, numbers and text. An equal grower that loads it continues bit
        for bit (with the same number of threads). Gradients are part of it, so it may be taken between `backward`
        and `step`; call `optimizer.zero_grad()` before if they are spent. So are followers. Random numbers outside the
        grower (dropout, shuffling) are not; `save_checkpoint` stores those too.

        Raises:
            TrainingError: the last optimizer step did not finish.
            SavedModelError: a tensor is not as the structure makes it, so that the state could never be loaded.
        """
        return self.run.state_dict()

    @trainable()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the `state_dict` of a run. Everything is checked first; then all of it is loaded, or nothing.

        Build model, optimizer and grower as in the saved run; what this grower did before is lost. The state is
        copied, so it can be loaded again. Let followers follow before, and load the state of a learning rate
        scheduler after this.

        Raises:
            SavedModelError: a field is missing, damaged, or does not fit here; nothing was changed.
        """
        with by_one_thread(self._inside):
            self.run.load_state_dict(state)

    @trainable()
    def release(self) -> dict[str, Any]:
        """Bring the whole frame back and end this run; returns its state, which another Grower can load.

        For training loops that build a new optimizer during the run.

        Raises:
            TorchgrowError: the run is over, and what was stored is gone.
        """
        with by_one_thread(self._inside):
            return self.run.loading.release()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change what the run was planned with: a new value would be shown, but have no effect."""
        if name in ("history", "finished") or (name in PLANNED and name in vars(self)):
            raise TorchgrowError(
                f"{name} of a Grower cannot be changed during the run, which is planned with it; finish() this one "
                f"and construct Grower(...) anew with the {name} you want"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled: a grower belongs to one model and one optimizer."""
        raise TorchgrowError(
            "a Grower cannot be copied or pickled: it hangs on the objects of its model and optimizer. To store a run "
            "use torchgrow.save_checkpoint(folder, grower); to branch off, build model, optimizer and Grower anew and "
            "call other.load_state_dict(grower.state_dict()); for the network alone copy.deepcopy(grower.model)"
        )


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[Exchange]:
    """Restore the model if the block raises."""
    exchange = Exchange()
    if isinstance(model, nn.Module):
        exchange.remember(model)
    try:
        with trainable():
            yield exchange
    except BaseException as error:
        exchange.undo()
        if isinstance(model, nn.Module) and is_meta(model):
            traceback.clear_frames(error.__traceback__)  # whose weak references would forbid another try
        raise


def _check(budget: Budget, updates: int, rescale: bool) -> None:
    if not isinstance(budget, Budget):
        raise BudgetError(f'budget must be a torchgrow.Budget such as Budget(params="36%"), got {budget!r}')
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
        raise TorchgrowError(f"updates={updates!r} must be a whole number >= 1: how often you will call update()")
    if not isinstance(rescale, bool):
        raise TorchgrowError(f"rescale={rescale!r} must be True or False: whether fresh weights begin at a new scale")


def _policy(preset: str | Method | None, policy: Policy | None, *, layers: bool) -> Policy | None:
    """A copy of the policy that was asked for; None for the default; a `TorchgrowError` if it is none, or two are."""
    if policy is not None and not isinstance(policy, Policy):
        raise TorchgrowError(
            f"policy must be an object such as torchgrow.policies.Paper(), got {policy!r}; names go to preset="
        )
    if policy is not None and preset is not None:
        raise TorchgrowError(
            f"preset={preset!r} and policy={type(policy).__name__}(...) both say how to grow; give one"
        )
    if isinstance(preset, Method):
        warnings.warn(
            "Method is deprecated and goes with the next version: give Grower a policy, as in policy="
            f'torchgrow.policies.{type(policy_of(preset)).__name__}(...), or a name, preset="default:peak=1"',
            DeprecationWarning,
            stacklevel=frames_to_user(),
        )
    if policy is not None:
        return copy.copy(policy)
    if isinstance(preset, Method):
        return policy_of(preset)
    return None if preset is None else named(preset, layers=layers)
