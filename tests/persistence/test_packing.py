"""What goes into a record: plain data survives it, what it never makes is refused."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchgrow import SavedModelError
from torchgrow.persistence.folder import pack, unpack


def test_everything_plain_survives_the_packing() -> None:
    from collections import Counter

    shared = torch.arange(6.0).reshape(2, 3)
    expanded = torch.ones(1).expand(4)
    value = {
        "numbers": [0, -1, 10**30, 0.1, -0.0, 1e-300, float("inf"), -float("inf"), True, None, "text", "\ud800é\n"],
        "tuple": ((), (1, [2, (3,)])),
        "!odd": {1: "a", -2: "b", (1, "x"): {"!tuple": []}, None: 0, False: 5, 0.5: 6},
        "counter": Counter({3: 2, 5: 1}),
        "tensors": [shared, shared.t(), shared[0], torch.tensor(5), torch.zeros(0, 3), torch.ones(2) > 0],
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "nhwc": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "thin": torch.randn(4, 1, 1, 1).to(memory_format=torch.channels_last),
        "expanded": expanded,
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    tensors: dict[str, Tensor] = {}
    packed = pack(value, tensors)
    again = unpack(json.loads(json.dumps(packed)), tensors)
    flat_a, tree_a = torch.utils._pytree.tree_flatten(value)
    flat_b, tree_b = torch.utils._pytree.tree_flatten(again)
    assert str(tree_a) == str(tree_b)
    assert type(again["counter"]) is Counter
    for a, b in zip(flat_a, flat_b, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
            assert a.stride() == b.stride() or a.data_ptr() == expanded.data_ptr()
        else:
            assert a == b
            assert str(a) == str(b)  # -0.0
    assert np.isnan(unpack(pack({"x": float("nan")}, {}), {})["x"])


@pytest.mark.parametrize(
    "bad",
    [
        {"!tensor": "none"},
        {"!tensor": ["x"]},
        {"!tensor": "x", "more": 1},
        {"!tensor": "x", "stride": [1]},
        {"!tensor": "x", "stride": [1, 1]},
        {"!tensor": "x", "stride": [2**70, 1]},
        {"!tensor": "x", "stride": [-3, 1]},
        {"!tensor": "x", "stride": [5, 0]},
        {"!tensor": "x", "stride": [True, 2]},
        {"!tuple": 5},
        {"!tuple": [], "x": 1},
        {"!float": "1"},
        {"!float": []},
        {"!dict": [[1]]},
        {"!dict": [[[1], 2]]},
        {"!dict": 1},
        {"!evil": 1},
    ],
    ids=str,
)
def test_what_packing_never_makes(bad: Any) -> None:
    with pytest.raises(SavedModelError, match=r"a record has .*(stands for nothing|for a tensor of shape \(2, 3\))"):
        unpack([bad], {"x": torch.zeros(2, 3)})
