"""Search for shapes by successive halving: candidates on the budget are trained, the better half further.

Successive halving: Jamieson and Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter Optimization*
(AISTATS 2016). Judged is by the mean training loss, which tells shapes apart while the learning rate is high.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..default_device import gpus_in_use, on_default, on_host
from ..errors import BudgetError, TorchgrowError, TrainingError
from ..exchange import Exchange
from ..onednn_guard import guard_
from ..persistence.portable import shrink_
from ..policies.kit import fit, one_per_group
from ..policies.shapes import Shape, counts, proposals, stages, told
from ..renamed import frames_to_user
from ..structure.cost import Cost
from ..structure.limits import Budget
from ..structure.space import Place, Space
from ..structure.store import is_meta
from ..structure.surgery import named_tensors
from ..tracing.blocks import Named
from ..tracing.model_call import Carries
from ..tracing.requests import Couples
from ..tracing.verification import trace
from .advice import trained
from .attaching import check_removable, pin_untrained
from .birth import birth_scales, rescale_
from .plan import Plan
from .shown import depths_of

RUNGS = (0.2, 0.3, 0.5)
"""Shares of a whole training after which the worse half goes."""

MOST = 12
"""Proposals at most, where the user does not say how many."""


@dataclass(eq=False)
class Trial:
    """One candidate: its shape, what it costs, and how its training went so far.

    Attributes:
        number: its place among the candidates, from 0.
        name: of its shape.
        keep: bool [n], the structure, exactly at the budget.
        cost: parameters and FLOPs of one sample.
        widths: units by group.
        depths: blocks by stage; empty where layers are not looked at.
        model: the trained network, small and plain; None once it has been dropped.
        memory: anything `train` needs at the next rung, such as the optimizer; emptied with the model.
        losses: what `train` returned, one a rung.
        done: how long it was trained so far, in the unit of `train`.
        training_flops: 3 x forward FLOPs x samples so far.
    """

    number: int
    name: str
    keep: Tensor
    cost: Cost
    widths: dict[str, int]
    depths: dict[str, int]
    model: nn.Module | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    done: int = 0
    training_flops: int = 0

    def __str__(self) -> str:
        depths = f", blocks {'-'.join(map(str, self.depths.values()))}" if self.depths else ""
        losses = ", ".join(f"{loss:.4f}" for loss in self.losses) or "not trained"
        return (
            f"{self.number}: {self.name}{depths}: {self.cost.params:,} parameters, {self.cost.flops:,} FLOPs, "
            f"loss {losses}"
        )


class Search:
    """Candidates and their results; iterate over it to search. See `search`.

    Stopped on the way, by `break`, Ctrl-C or an error of `train`, it goes on when iterated again. A rung in which
    `train` was stopped is asked for again as a whole, of the model as it is then.

    Attributes:
        trials: all candidates.
        rungs: how long a trial has been trained after each rung, in the unit of `train`.
        length: of a whole training, in the unit of `train`.
        samples: in one such unit.
        space: of the frame.
        frame_cost: what the frame costs.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        train: Callable[[Trial, int], float],
        plan: Plan,
        trials: Sequence[Trial],
        rungs: Sequence[int],
        length: int,
        samples: int,
    ) -> None:
        self._factory, self._train, self._plan = factory, train, plan
        self.trials, self.rungs, self.length, self.samples = list(trials), tuple(rungs), length, samples
        self.space, self.frame_cost = plan.space, plan.frame_cost
        self._left, self._passed = self.trials, 0  # of the rungs

    def __iter__(self) -> Iterator[Trial]:
        """Search, or go on with it; yields a trial whenever it has been trained to its next rung.

        Raises:
            TorchgrowError: the search is over, or `train` returned no number.
            TrainingError: no loss of a rung is finite.
        """
        if self._over:
            raise TorchgrowError("this search is over, see search.winner; call torchgrow.search(...) for another one")
        while not self._over:  # all that is known of the way is in the object, whoever iterates, and however often
            rung = self.rungs[self._passed]
            trial = next((trial for trial in self._left if trial.done < rung), None)
            if trial is not None:
                self._on(trial, rung)
                yield trial
                continue
            self._left, self._passed = self._better(self._left), self._passed + 1
            for trial in self.trials:
                if trial not in self._left:
                    trial.model = None
                    trial.memory.clear()

    def run(self) -> Trial:
        """Search to the end; returns the winner."""
        for _ in self:
            pass
        return self.winner

    @property
    def winner(self) -> Trial:
        """The candidate with the lowest loss in the last rung; its `model` is trained as far as that.

        Raises:
            TorchgrowError: the search is not over.
        """
        if not self._over:
            raise TorchgrowError(
                "the search is not over, so there is no winner; iterate to its end: best = search.run()"
            )
        return self._left[0]

    @on_host()
    def fresh(self, trial: Trial, seed: int | None = None) -> nn.Module:
        """A new plain network of a trial's shape, with new weights; the global random state does not change.

        Args:
            trial: of this search.
            seed: of the weights; None: that of the search, so the very weights that the trial began with.

        Raises:
            TorchgrowError: the factory does not make the frame that it made at first.
        """
        space, model = self.space, _frame(self._factory, self._plan.seed if seed is None else seed)
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        for name in space.cut_axes:
            if shapes.get(name) != space.shapes[name]:
                raise TorchgrowError(
                    f"factory made a network whose {name} is {shapes.get(name, 'not there')}, at first it was "
                    f"{space.shapes[name]}; it must build the same frame anew at every call: lambda: Net(), not "
                    "lambda: net"
                )
        if not trained(model):
            rescale_(model, birth_scales(model, space, trial.keep), Exchange())
        shrink_(model, space, trial.keep, store=False)
        guard_(model)
        return model

    @property
    def training_flops(self) -> int:
        """Of all trials so far: 3 x forward FLOPs x samples."""
        return sum(trial.training_flops for trial in self.trials)

    @property
    def dense_flops(self) -> int:
        """Of one whole training of the frame."""
        return 3 * self.frame_cost.flops * self.samples * self.length

    @property
    def most(self) -> float:
        """Most that the search and a whole training of its winner, from new weights, may cost relative to one dense."""
        flops, whole = [trial.cost.flops for trial in self.trials], self.frame_cost.flops * self.length
        return _most(flops, self.rungs, self.length) / max(1, whole)

    def __str__(self) -> str:
        lines = [f"{'*' if self._over and trial in self._left else ' '} {trial}" for trial in self.trials]
        share = self.training_flops / max(1, self.dense_flops)
        return "\n".join(
            [*lines, f"training FLOPs so far: {self.training_flops:.3g}, {share:.2f} of one dense training"]
        )

    # --- how it is done ---

    @property
    def _over(self) -> bool:
        return self._passed == len(self.rungs)

    def _on(self, trial: Trial, rung: int) -> None:
        """Train a trial to a rung."""
        if trial.model is None:
            trial.model = self.fresh(trial)
        loss = self._train(trial, rung - trial.done)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = loss.item()
        if isinstance(loss, bool) or not isinstance(loss, Real):  # numbers of NumPy too
            raise TorchgrowError(
                f"train returned {type(loss).__name__} for {trial.name!r}; it must return the mean training loss of "
                "what it trained, a number"
            )
        trial.losses.append(float(loss))
        trial.training_flops += 3 * trial.cost.flops * self.samples * (rung - trial.done)
        trial.done = rung

    def _better(self, trials: list[Trial]) -> list[Trial]:
        """The better half of them by their last loss, rounded up; after the last rung the best one."""
        order = sorted(trials, key=lambda trial: (_finite(trial.losses[-1]), trial.number))
        if _finite(order[0].losses[-1]) == math.inf:
            raise TrainingError(
                f"no candidate has a finite loss after {trials[0].done} of {self.length}; a lower learning rate or "
                "clipped gradients may help"
            )
        kept = order[: 1 if self._passed == len(self.rungs) - 1 else (len(order) + 1) // 2]
        return [trial for trial in trials if trial in kept]


@on_host()
def search(
    factory: Callable[[], nn.Module],
    budget: Budget,
    *,
    example_inputs: Any,
    train: Callable[[Trial, int], float],
    length: int,
    samples: int = 1,
    candidates: int | Sequence[Shape | Tensor] | None = None,
    rungs: Sequence[float] = RUNGS,
    seed: int = 0,
    protect: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
) -> Search:
    """Find the shape of a network by trying: candidates of exactly the budget are trained a bit, the better ones more.

    A candidate is a plain small network, cut from a fresh frame, which your own loop trains. Nothing is trained before
    you iterate: `for trial in search: print(trial)`, or `best = search.run()`. Afterwards `best.model` is trained as
    far as the last rung; train it on (`search.length - best.done`), start again from `search.fresh(best)`, or let it
    grow further: `Grower(factory(), ..., start=best.model)`. All remaining candidates are in memory.

    Args:
        factory: makes the frame, the largest network there may be, with new weights; called for every candidate, with
            PyTorch seeded, so without seeds of its own. Layers that it freezes (requires_grad False) keep their widths.
        budget: what each candidate uses exactly.
        example_inputs: as for `trace`.
        train: `train(trial, more)` trains `trial.model` further, by `more` epochs or steps (your unit), and returns
            the mean training loss of that. Keep the learning rate constant as long as the rungs last, and let it fall
            afterwards. What the next call needs, such as the optimizer, goes into `trial.memory`.
        length: of a whole training, in the unit of `train`.
        samples: in one such unit; only for costs in FLOPs, shares of one dense training need none.
        candidates: how many proposals, or your own: `torchgrow.policies.Shape`s, or keep vectors (bool [n]); of each
            the nearest structure exactly at the budget is taken. None: so many proposals, at most 12 and at least 2,
            that the search and a whole training of the winner from new weights cost less than one dense training.
        rungs: rising shares of `length` after each of which the worse half goes; after the last one the best wins.
        seed: of all first weights, and of proposals.
        protect: as for `trace`.
        couple: as for `trace`.
        depth: as for `trace`: whether candidates differ in layers too.
        carried: as for `trace`.

    Raises:
        TraceError, BudgetError: as for `Grower`.
        StructureError: a candidate of yours is none of this frame, or nothing in it can be cut.
        TorchgrowError: a number lies outside.
    """
    at = _rungs(rungs, length)
    _check(budget, candidates, samples, train)
    frame = _frame(factory, seed)
    space = trace(frame, example_inputs, protect=protect, couple=couple, depth=depth, carried=carried)
    plan = _planned(frame, space, budget, seed)
    trials = [
        Trial(number, name, keep, plan.costs.cost(keep), space.widths(keep), depths_of(frame, space, keep))
        for number, (name, keep) in enumerate(_candidates(plan, at, length, candidates))
    ]
    return Search(factory, train, plan, trials, at, length, samples)


def _planned(frame: nn.Module, space: Space, budget: Budget, seed: int) -> Plan:
    """A plan in which frozen layers keep their widths, as in a run, in which the winner may grow on."""
    space = pin_untrained(space, {name for name, p in frame.named_parameters() if p.requires_grad})
    check_removable(space, "be cut")
    return Plan.of(frame, space, budget, updates=2, seed=seed)


def _frame(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A frame with weights drawn from a seed; a `TorchgrowError` if the factory makes none."""
    model: Any = factory
    if not isinstance(factory, nn.Module):
        with torch.random.fork_rng(devices=gpus_in_use()), on_default():
            torch.manual_seed(seed)
            model, seeded = factory(), torch.initial_seed() != seed
        if seeded:
            warnings.warn(
                "factory seeds itself, so its weights may be the same for every seed; leave it to search(..., seed=1)",
                stacklevel=frames_to_user(),
            )
    if model is factory or not isinstance(model, nn.Module):
        raise TorchgrowError(
            f"factory {'is' if model is factory else 'made'} a {type(model).__name__}; it must be a function that "
            "makes the frame, a torch.nn.Module, anew at every call: lambda: Net(), not Net()"
        )
    if is_meta(model):
        raise TorchgrowError(
            f"factory made a {type(model).__name__} on the meta device, and candidates are cut from frames that have "
            "weights; build it on a real device"
        )
    return model


# --- candidates ---


def _candidates(
    plan: Plan, rungs: Sequence[int], length: int, wanted: int | Sequence[Shape | Tensor] | None
) -> list[tuple[str, Tensor]]:
    """Names and structures of what is tried, each structure once."""
    own = wanted if isinstance(wanted, (list, tuple)) else ()
    first: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    for number, one in enumerate(own):
        keep = _given(plan, one)
        first.setdefault(counts(plan.space, keep), (one.name if isinstance(one, Shape) else f"given {number}", keep))
    found = list(first.values()) or _proposed(plan, rungs, length, wanted)
    least = len(own) or (wanted if isinstance(wanted, int) else 2)
    if len(found) < least:
        warnings.warn(
            f"only {len(found)} of {least} candidates differ at {plan.budget}, and each shape is tried once; for more "
            "of them make the frame larger, search with depth=True, or give other torchgrow.policies.Shape objects",
            stacklevel=frames_to_user(),
        )
    return found


def _proposed(plan: Plan, rungs: Sequence[int], length: int, wanted: Any) -> list[tuple[str, Tensor]]:
    """Proposals and their structures: as many as wanted; None: as many as cost less, in all, than a dense network."""
    space, view = plan.space, plan.view(0, plan.space.everything(), 1.0, torch.Generator(), dict)
    found: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    others: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    flops: list[int] = []
    for shape in proposals(space, plan.seed):
        if len(found) == (MOST if wanted is None else wanted):
            break
        try:
            keep = shape.fitted(view)
        except BudgetError:  # so many layers are too much
            continue
        asked = [shape.depths.get(stage, len(units)) for stage, units in stages(space).items()]
        own = counts(space, keep)
        layers = list(own[len(own) - len(asked) :])
        if layers != asked:  # the frame is too narrow for so few layers
            others.setdefault(own, (told(layers), keep))
        elif own not in found:
            flops.append(plan.costs.cost(keep).flops)
            most, whole = _most(flops, rungs, length), plan.frame_cost.flops * length
            if wanted is None and len(flops) > 2 and most > whole:
                break
            found[own] = shape.name, keep
    if len(found) < 2:  # where little but layers can go: as many of these as the budget holds
        return list((found | others | found).values())[: 2 if wanted is None else wanted]
    return list(found.values())


def _given(plan: Plan, one: Any) -> Tensor:
    """The structure of a candidate of the user's, exactly at the budget."""
    space, view = plan.space, plan.view(0, plan.space.everything(), 1.0, torch.Generator(), dict)
    if isinstance(one, Shape):
        return one.fitted(view)
    if not isinstance(one, Tensor):
        raise TorchgrowError(
            f"a candidate is a {type(one).__name__}; give torchgrow.policies.Shape objects or keep vectors (bool [n]), "
            "or a number of proposals"
        )
    if one.shape == space.removable.shape and one.dtype == torch.bool:
        one = one | ~space.removable
    keep = one_per_group(space, space.check_keep(one), torch.zeros(space.n_units))
    return fit(space, plan.costs, keep, keep.double(), plan.limit_tensor)


# --- numbers ---


def _most(flops: Sequence[int], rungs: Sequence[int], length: int) -> int:
    """Most that a search and a whole training of its winner can cost, in forward FLOPs x length."""
    dearest, total, done, left = sorted(flops, reverse=True), 0, 0, len(flops)
    for rung in rungs:
        total += sum(dearest[:left]) * (rung - done)
        done, left = rung, (left + 1) // 2
    return total + dearest[0] * length


def _finite(loss: float) -> float:
    """A loss for comparison: infinite unless it is finite."""
    return loss if math.isfinite(loss) else math.inf


def _rungs(shares: Sequence[float], length: int) -> list[int]:
    """Rungs in the unit of `train`, each later than the one before."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise TorchgrowError(f"length={length!r} must be a whole number of epochs or steps, those of a whole training")
    several = isinstance(shares, (list, tuple)) and all(isinstance(x, (int, float)) and x is not True for x in shares)
    if not several or not shares or not shares[-1] <= 1 or not all(a < b for a, b in pairwise((0.0, *shares))):
        raise TorchgrowError(f"rungs={shares!r} must be rising shares of a whole training, such as {RUNGS}")
    found: list[int] = []
    for share in shares:
        rung = max(1, round(share * length))
        found += [rung] if not found or rung > found[-1] else []  # a short training has fewer rungs
    return found


def _check(budget: Budget, candidates: Any, samples: int, train: object) -> None:
    """Check arguments early: budget, number of candidates, training, number of samples."""
    if not isinstance(budget, Budget):
        raise BudgetError(f'search takes a torchgrow.Budget such as Budget(params="36%"), got {budget!r}')
    number = len(candidates) if isinstance(candidates, (list, tuple)) else 2 if candidates is None else candidates
    if isinstance(candidates, bool) or not isinstance(number, int) or number < 1:
        raise TorchgrowError(
            f"candidates={candidates!r}: give how many (2 or more make a search), or a list of torchgrow.policies.Shape"
        )
    if not callable(train):
        raise TorchgrowError(
            f"train={train!r} must be a function of a trial and how much more to train it, which returns the mean "
            "training loss: train(trial, more) -> float"
        )
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise TorchgrowError(f"samples={samples!r} must be a whole number >= 1: the samples in one unit of length")
