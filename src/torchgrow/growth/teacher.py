"""What helps a network over the loss of its units: its frame as a teacher, and statistics of what it is now."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TorchgrowError
from ..persistence.portable import portable_
from ..structure.record import Mark, set_mark
from ..tracing.passes import twin
from .run import Run


def teacher_of(run: Run) -> nn.Module:
    """See `Grower.teacher`.

    Raises:
        TorchgrowError: the frame as it was is gone, or the model cannot be copied.
    """
    state, live = run.state, run.live
    if len(state.history) > 1 or any(live.gates.taken) or state.finished:
        raise TorchgrowError(
            "the network has been trained since the run began, so the frame as it was is gone; call "
            "teacher = grower.teacher() before the first optimizer step. For a run that is resumed, build the model, "
            "load its first weights and keep a copy.deepcopy(model).eval() of it before Grower(...)"
        )
    model, bank = twin(live.model), copy.copy(live.bank)
    bank.model, bank.layouts, bank.slots = model, (), {}
    bank.recut_(run.plan.space.everything())  # what is stored is the frame still
    cut = bool(bank.base.kept)
    for path, module in model.named_modules():
        set_mark(module, Mark(bank.base, path) if cut else None)
    return portable_(model, on=cut).eval().requires_grad_(False)


def recalibrate(model: nn.Module, loader: Iterable[Any]) -> None:
    """See `Grower.recalibrate`."""
    device = next((tensor.device for tensor in model.parameters()), None)
    torch.optim.swa_utils.update_bn(loader, model, device)


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
        share: of the teacher in the loss, in [0, 1].

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
