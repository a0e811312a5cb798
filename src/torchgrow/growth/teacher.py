"""Recovery after pruning: distillation from the frame, and re-estimated statistics of batch norms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..default_device import on_host
from ..errors import TorchgrowError
from ..persistence.portable import portable_
from ..renamed import frames_to_user
from ..structure.record import Mark, set_mark
from ..tracing.model_call import feed
from ..tracing.passes import twin
from .run import Run


def teacher_of(run: Run) -> nn.Module:
    """See `Grower.teacher`."""
    state, live = run.state, run.live
    if len(state.history) > 1 or any(live.gates.taken) or state.finished:
        raise TorchgrowError(
            "the network has been trained since the run began, so the frame as it was is gone; call "
            "teacher = grower.teacher() before the first optimizer step. For a run that is resumed, build the model, "
            "load its first weights and keep a copy.deepcopy(model).eval() of it before Grower(...)"
        )
    model, bank, plan = twin(live.model), copy.copy(live.bank), run.plan
    if plan.start is not None:  # live units keep their function, whatever was loaded since
        bank.full = live.bank.stored({}, {})[0]
    bank.model, bank.layouts, bank.slots = model, (), {}
    known = plan.start if plan.begins.startswith("network") else None  # the rest of the frame is untrained
    bank.recut_(plan.space.everything() if known is None else known)
    record = bank.base if known is None else replace(bank.record, growth=None)
    cut = bool(record.kept)
    for path, module in model.named_modules():
        set_mark(module, Mark(record, path) if cut else None)
    return portable_(model, on=cut).eval().requires_grad_(False)


@on_host()
@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Re-estimate the running statistics of all batch norms, as means over the batches; nothing else changes.

    After units have left, the old statistics belong to other activations.

    Args:
        model: the network, of any kind.
        loader: of inputs, or of tuples and lists that begin with them; a few batches will do. Dicts are keywords, and
            several positional inputs a tuple of their own, as in `((x, mask), labels)`.

    Raises:
        TorchgrowError: there are no batches; as after any error, statistics are as before. No norms: a warning.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        warnings.warn(
            f"{type(model).__name__} has no batch norms with running statistics, so recalibrate changes nothing",
            stacklevel=frames_to_user(),
        )
    modes = {module: module.training for module in model.modules()}
    before = [
        (norm.momentum, {name: b.clone() for name, b in norm._buffers.items() if b is not None}) for norm in norms
    ]
    done, whole = 0, False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        for given in loader if norms else ():
            feed(model, given)
            done += 1
        whole = done > 0
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            for name, value in buffers.items() if not whole else ():
                norm._buffers[name].copy_(value)  # type: ignore[union-attr]
        for module, mode in modes.items():
            module.training = mode
    if norms and not done:
        raise TorchgrowError(
            "recalibrate was given no batches, so statistics are as before; pass some: "
            "torchgrow.recalibrate(model, itertools.islice(loader, 20))"
        )


def distillation_loss(
    scores: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float = 4.0, share: float = 0.9
) -> Tensor:
    """Cross entropy with the targets and with a teacher's softened scores (Hinton et al., 2015).

    (1 - share) CE(scores, targets) + share temperature^2 KL(softmax(teacher / temperature) |
    softmax(scores / temperature)), the second as a mean over samples; temperature^2 keeps its gradients as large as at
    temperature 1.

    Args:
        scores: logits of the network, [samples, classes]; of sequences flatten the leading axes first.
        teacher: logits of the teacher for the same inputs, of the same shape; computed under `torch.no_grad()`.
        targets: classes, int64 [samples], as `torch.nn.functional.cross_entropy` takes them.
        temperature: above 0; higher tells more of the classes that the teacher finds unlikely.
        share: of the teacher in the loss, in [0, 1]. With 1 there are no gradients as long as the network still is its
            own teacher: nothing that importance by Taylor could go by.

    Raises:
        TorchgrowError: shapes differ, or a number lies outside.
    """
    if scores.shape != teacher.shape or scores.dim() != 2:
        raise TorchgrowError(
            f"distillation_loss takes logits of one shape, [samples, classes], got {tuple(scores.shape)} and "
            f"{tuple(teacher.shape)} of the teacher; flatten other axes: scores.flatten(0, -2)"
        )
    if not temperature > 0 or not 0 <= share <= 1:
        raise TorchgrowError(f"temperature={temperature} must be above 0, and share={share} lie in [0, 1]")
    soft = F.kl_div(
        F.log_softmax(scores / temperature, 1),
        F.log_softmax(teacher.detach() / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - share) * F.cross_entropy(scores, targets) + share * temperature**2 * soft
