"""`Space.columns`: where a unit is read. With these weights at 0 a unit has no effect, although it is computed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from drawn import without
from torchgrow import shrink_, trace


def doubled(x: Any) -> Any:
    """Example inputs in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return {key: doubled(v) for key, v in x.items()} if isinstance(x, dict) else tuple(doubled(v) for v in x)


def outputs(model: torch.nn.Module, x: Any) -> list[Tensor]:
    """All tensors that a model returns."""

    def flat(out: Any) -> list[Tensor]:
        if isinstance(out, Tensor):
            return [out]
        return [tensor for part in (out.values() if isinstance(out, dict) else out) for tensor in flat(part)]

    with torch.no_grad():
        return flat(model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", zoo.ZOO)
def test_units_that_nothing_reads_have_no_effect(name: str) -> None:
    """The whole network with columns of 0 computes what the compact one does, to the last rounding."""
    space, model, x = zoo.space(name), zoo.build(name).double().eval(), doubled(zoo.inputs(name))
    read = torch.cat([torch.empty(0, dtype=torch.int64), *space.columns.values()])
    others = ~torch.isin(torch.arange(space.n_units), read)  # of a norm over units, say
    assert name == "weight-norm" or not bool((others & space.removable).any())
    keep = without(space, 0.5, seed=0) | others
    compact = copy.deepcopy(model)
    shrink_(compact, space, keep)
    before = outputs(model, x)
    for (parameter, axis), vector in space.columns.items():
        silent = torch.nonzero((vector >= 0) & ~keep[vector.clamp(min=0)]).flatten()
        model.get_parameter(parameter).data.index_fill_(axis, silent, 0)
    for small, whole in zip(outputs(compact, x), outputs(model, x), strict=True):
        torch.testing.assert_close(whole, small, rtol=1e-9, atol=1e-11)
    if not bool(keep.all()):
        assert any(not torch.equal(one, other) for one, other in zip(before, outputs(model, x), strict=True))


class Scores(torch.nn.Module):
    """Attention whose queries and keys have an inner width of their own: each weight is summed over along two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6), torch.nn.Linear(8, 10)
        self.out = torch.nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x))


def test_keys_are_silent_since_queries_are_not() -> None:
    """What reads a unit may be produced itself; it is no case of weights that read what they produce."""
    space = trace(Scores(), torch.randn(2, 5, 8))
    read = torch.cat(list(space.columns.values()))
    assert set(read[read >= 0].tolist()) == set(torch.nonzero(space.removable).flatten().tolist())
    assert space.widths(space.everything()) == {"q": 6, "v": 10}
