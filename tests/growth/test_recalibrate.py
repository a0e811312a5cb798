"""Statistics of batch norms, estimated anew: where there are none."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import torchgrow
from growing import differences, sgd
from torchgrow import Budget, Grower


def test_statistics_that_are_not_there_are_told_of() -> None:
    """Nothing is asked of the loader, and nothing changes."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    grower = Grower(model, sgd(model), example_inputs=torch.randn(2, 3), budget=Budget(params="50%"), updates=4)
    before = copy.deepcopy(model.state_dict())
    for recalibrate in (grower.recalibrate, partial(torchgrow.recalibrate, model)):
        with pytest.warns(UserWarning, match="^Sequential has no batch norms with running statistics, so") as told:
            recalibrate(iter(()))
        assert [warning.filename for warning in told] == [__file__]
    assert not differences(before, model.state_dict())
