"""Outputs and inputs inside objects: whatever holds a tensor, it is found, kept and compared."""

import collections
import dataclasses
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgrow import TraceError, trace, verify
from torchgrow.tracing.nested import leaves, mapped, put_out, tensors


@dataclasses.dataclass
class Features:
    one: Any
    two: Any = None


class Slotted:
    __slots__ = ("__hidden", "shown")

    def __init__(self, shown: Any, hidden: Any) -> None:
        self.shown, self.__hidden = shown, hidden


class Under(Slotted):
    __slots__ = ("more",)
    more: dict[str, Tensor]


class Dictionary(dict[str, Any]):
    pass


Pair = collections.namedtuple("Pair", ["one", "two"])


def circular(h: Tensor) -> list[Any]:
    ring: list[Any] = [h]
    ring.append(ring)
    return ring


def hung_on(y: Tensor, h: Tensor) -> Tensor:
    y = y + 0
    y.features = h  # type: ignore[attr-defined]
    return y


def attribute_of_dict(h: Tensor) -> Dictionary:
    found = Dictionary(count=1)
    found.features = h  # type: ignore[attr-defined]
    return found


def under(h: Tensor) -> Under:
    found = Under(1, None)
    found.more = {"h": h}
    return found


HOLDERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass in a tuple": lambda y, h: (y, Features(h)),
    "dataclasses in a list": lambda y, h: [y, [Features(None, Features(h))]],
    "namespace": lambda y, h: types.SimpleNamespace(y=y, deep=types.SimpleNamespace(h=h)),
    "slots": lambda y, h: (y, Slotted(None, h)),
    "slots of a base class": lambda y, h: (y, under(h)),
    "named tuple": lambda y, h: Pair(y, Pair(h, 3)),
    "dict with an attribute": lambda y, h: (y, attribute_of_dict(h)),
    "mapping": lambda y, h: types.MappingProxyType({"y": y, "h": collections.OrderedDict(a=h)}),
    "deque": lambda y, h: (y, collections.deque([h])),
    "values of a dict": lambda y, h: {"y": y, "h": h}.values(),
    "cycle": lambda y, h: (y, circular(h)),
    "tensor with an attribute": hung_on,
    "closure": lambda y, h: (y, lambda: h.sum()),
    "bound method": lambda y, h: (y, h.sum),
    "partial": lambda y, h: (y, functools.partial(torch.add, h)),
    "exception": lambda y, h: (y, ValueError("with", h)),
    "distribution": lambda y, h: (y, torch.distributions.Categorical(logits=h)),
    "transformed distribution": lambda y, h: (
        y,
        torch.distributions.TransformedDistribution(
            torch.distributions.Normal(h, 1.0), [torch.distributions.transforms.ExpTransform()]
        ),
    ),
    "array": lambda y, h: (y, h.numpy()),
    "numbers": lambda y, h: (y, h.tolist()),
    "array of objects": lambda y, h: (y, _objects(h)),
}


def _objects(h: Tensor) -> Any:
    import numpy as np

    found = np.empty(1, dtype=object)
    found[0] = h
    return found


class Net(nn.Module):
    """h = a(3, 6);  y = b(6, 4) -> c(4, 2); puts out y and h in a holder"""

    def __init__(self, holder: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.holder = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2), holder

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return self.holder(self.c(torch.relu(self.b(h))), h)


@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_holds_a_tensor_that_is_put_out_the_tensor_stays(name: str) -> None:
    torch.manual_seed(0)
    report = verify(Net(HOLDERS[name]), torch.randn(5, 3), trials=1)
    assert report.ok
    assert report.groups == {"b": 4}


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "lock": (
        lambda y, h: (y, {"features": [Features(1), Features(threading.Lock())]}),
        r"output\[1\]\['features'\]\[1\]\.one is a lock, in which tensors cannot be looked for.* return tensors",
    ),
    "generator": (lambda y, h: (y, (x for x in [h])), r"output\[1\] is a generator, whose values are made after"),
    "map": (lambda y, h: {"y": y, "h": map(torch.sum, [h])}, r"output\['h'\] is a map"),
    "set of tensors": (lambda y, h: Features(y, {h}), r"output\.two is a set"),
    "module": (lambda y, h: (y, nn.Identity()), r"output\[1\] is a Identity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_looked_into_is_refused_by_its_path(name: str) -> None:
    holder, text = REFUSED[name]
    with pytest.raises(TraceError, match=text):
        trace(Net(holder), torch.randn(5, 3))


def test_plain_data_beside_the_tensors_is_no_hindrance() -> None:
    def holder(y: Tensor, h: Tensor) -> Any:
        return {"y": y, "name": "net", "none": None, "shape": y.shape, "kind": y.dtype, "where": y.device, "type": int}

    assert verify(Net(holder), torch.randn(5, 3), trials=1).groups == {"a": 6, "b": 4}


def test_where_a_frozen_output_lies_is_said() -> None:
    space = trace(Net(HOLDERS["dataclasses in a list"]), torch.randn(5, 3))
    assert [f.op for f in space.frozen if f.places == (("a.weight", 0),)] == ["output[1][0].two.one"]


def test_inputs_in_objects_are_followed_and_proven() -> None:
    class Wrapped(Net):
        def forward(self, batch: Any) -> Tensor:
            y, _ = super().forward(batch.one["x"])
            return y * batch.two

    model = Wrapped(lambda y, h: (y, h))
    report = verify(model, Features({"x": torch.randn(5, 3)}, torch.ones(5, 2)), trials=1)
    assert report.ok
    assert report.groups == {"a": 6, "b": 4}


def test_an_input_that_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(TraceError, match=r"example_inputs\[1\] is a generator, which can be read only once"):
        trace(Net(lambda y, h: y), (torch.randn(5, 3), (i for i in range(3))))


def test_mapping_keeps_objects_and_changes_tensors() -> None:
    shared = torch.ones(2)
    value = {"a": Features(shared, [shared, 3]), "b": Slotted("x", torch.zeros(1)), "lock": threading.Lock()}
    found = mapped(value, Tensor.double)
    assert [x.dtype for x in tensors(found)] == [torch.float64] * 3
    assert found["a"].one is found["a"].two[0]
    assert found["lock"] is value["lock"]
    assert tensors(value)[0] is shared


def test_paths_and_entries() -> None:
    found = leaves((Pair(torch.ones(1), {"k": torch.ones(1)}), 2.0), "output")
    assert [(leaf.path, leaf.entries) for leaf in found] == [
        ("output[0].one", (0,)),
        ("output[0].two['k']", (0,)),
        ("output[1]", (1,)),
    ]
    assert [leaf.path for leaf in put_out(types.SimpleNamespace(a=1, b=torch.ones(1)))] == ["output.b", "output.a"]
    assert [leaf.entries for leaf in leaves(Pair(torch.ones(1), 2), "output")] == [(0, "one"), (1, "two")]
