"""What may be done to a network while the training loop trains it: a penalty, a mask, blocks that are added."""

from typing import Any

from torch import Tensor

from torchgrow import Cost


class Hooks:
    """What `torchgrow.lab.train.fit` calls at its turns; this one does nothing.

    Attributes:
        over: whether the training ends before its last epoch; asked before each.
        flops: done in steps and evaluations of its own, so far; they are part of what the training cost.
    """

    over: bool = False
    flops: int = 0

    def penalty(self) -> Tensor | None:
        """A scalar to be added to the loss of a step; None for nothing. It is not counted in FLOPs."""
        return None

    def stepped(self, done: float) -> None:
        """After every optimizer step; ``done`` are the epochs trained so far, with the part of the present one."""

    def ended(self, epoch: int) -> None:
        """After an epoch (counted from 1) and its evaluation; network and optimizer may change their structure."""

    def cost(self) -> Cost | None:
        """What the network costs now; None: what it cost when the training began."""
        return None

    def depths(self) -> dict[str, int]:
        """Live blocks of every stage, where they change."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside network and optimizer, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; called before network and optimizer are loaded."""
