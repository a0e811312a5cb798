"""Every error torchgrow raises on purpose, under one root."""


class TorchgrowError(Exception):
    """Root of all errors raised by torchgrow. The message names what was wrong and what works instead."""


class TraceError(TorchgrowError):
    """The model could not be traced: its forward failed, or its inputs do not fit."""


class StructureError(TorchgrowError):
    """A change of structure was asked for that the space does not allow."""


class BudgetError(TorchgrowError):
    """A budget that is malformed or out of reach."""


class OptimizerError(TorchgrowError):
    """An optimizer that cannot be served, or that does not train this model."""


class TrainingError(TorchgrowError):
    """Training went wrong in a way that must not reach the indicators (NaN, an interrupted step)."""


class SavedModelError(TorchgrowError):
    """A saved folder that is missing, damaged, or does not fit the frame."""
