"""The loss of a network that learns from the one it was cut from."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import torchgrow
from torchgrow import TorchgrowError


def test_the_loss_is_that_of_its_paper() -> None:
    """Against sums written out; a teacher that agrees leaves the cross entropy alone; gradients do not reach it."""
    scores, labels = torch.randn(4, 3).double().requires_grad_(), torch.tensor([0, 2, 1, 1])
    teacher = torch.randn(4, 3).double().requires_grad_()
    t, share = 3.0, 0.7
    p, q = (teacher.detach() / t).softmax(1), (scores.detach() / t).softmax(1)
    soft = sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for i in range(4) for k in range(3)) / 4
    hard = sum(-float(scores.detach().softmax(1)[i, labels[i]].log()) for i in range(4)) / 4
    loss = torchgrow.distillation_loss(scores, teacher, labels, temperature=t, share=share)
    assert float(loss.detach()) == pytest.approx((1 - share) * hard + share * t**2 * soft)
    loss.backward()
    assert teacher.grad is None
    assert scores.grad is not None
    same = torchgrow.distillation_loss(scores, scores, labels, share=0.25)
    torch.testing.assert_close(same, 0.75 * F.cross_entropy(scores, labels))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: torchgrow.distillation_loss(torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2)), r"got \(2, 3\) and"),
        (lambda: torchgrow.distillation_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2)), "flatten"),
        (
            lambda: torchgrow.distillation_loss(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2), share=2),
            r"share=2 lie in \[0, 1\]",
        ),
    ],
)
def test_a_wrong_loss_is_refused(call: Any, text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        call()
