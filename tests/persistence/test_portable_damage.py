"""Structures inside `state_dict()` that are damaged, hostile, or cannot be written."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchgrow
from portables import IMAGES, build, grown, network, reads, same, saved
from torchgrow import SavedModelError, StructureError, portable_
from torchgrow.persistence.portable import KEY
from torchgrow.structure.record import RECORD


def damaged(state: dict[str, Any]) -> dict[str, Any]:
    text = bytes(state[KEY].tolist())
    state[KEY] = state[KEY].clone()
    state[KEY][text.index(b"12", text.index(b"frame_shapes")) + 1] ^= 1  # 13: still a record, of another frame
    return state


def put(value: Any, *path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return lambda state: reads(state, change)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a flipped bit": (damaged, "is damaged: "),
    "cut off": (lambda s: {**s, KEY: s[KEY][:-9]}, "is damaged: "),
    "empty": (lambda s: {**s, KEY: s[KEY][:0]}, "is damaged: "),
    "no tensor": (lambda s: {**s, KEY: "text"}, "is str, it must be the uint8 tensor"),
    "two axes": (lambda s: {**s, KEY: s[KEY][None]}, r"is torch.uint8 \(1, \d+\) on cpu, it must be"),
    "no values": (lambda s: {**s, KEY: s[KEY].to("meta")}, "on meta, it must be"),
    "a list": (lambda s: {**s, KEY: torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)}, "is damaged"),
    "deep": (lambda s: {**s, KEY: torch.full((100_000,), ord("["), dtype=torch.uint8)}, "is damaged"),
    "large": (lambda s: {**s, KEY: torch.full((2**26 + 1,), 32, dtype=torch.uint8)}, "is damaged"),
    "not a number": (lambda s: {**s, KEY: torch.full((9,), torch.nan)}, "is damaged"),
    "averaged": (lambda s: {**s, KEY: (s[KEY] + s[KEY] + s[KEY]) / 3}, r"average\['.*'\] = one\['.*'\]"),
    "of the future": (put(5, "format"), "has format 5, this version of torchgrow reads 4"),
    "of the wrong type": (put([], "kept"), "fields are missing, foreign or of the wrong type"),
    "an unknown tensor": (put({"0": [0]}, "kept", "z.weight"), r"no tensor 'z\.weight'"),
    "out of range": (put([0, 12], "kept", "head.bias", "0"), "are not rising positions in range"),
    "too many": (put(list(range(12)), "kept", "head.bias", "0"), r"head.bias of the state dict is \(\d+,\), but"),
    "another frame": (put([13], "frame_shapes", "head.bias"), "cut from a frame with other shapes"),
    "an unknown module": (put(["", 0], "skipped", "blocks.9"), "no module 'blocks.9' to leave out"),
    "a module that has no adapter": (put(["first"], "adapted"), "needs an adapter for first"),
    "a number that counts nothing": (put([["", "training", 1]], "attributes"), "does not fit the frame"),
    "weights of another network": (lambda s: {**s, "head.bias": torch.zeros(12)}, "weights and structure are of two"),
}


live = functools.cache(lambda: grown(updates=3))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", ["fresh", "cut", "live"])
def test_hostile_records_change_nothing(fault: str, target: str) -> None:
    change, message = FAULTS[fault]
    state = change(dict(saved(network())))
    model = portable_(build()) if target == "fresh" else network(updates=4) if target == "cut" else live().model
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises((SavedModelError, StructureError), match=message):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert kinds == [type(module) for module in model.modules()]
    model(IMAGES)


def test_state_dicts_that_were_calculated_with() -> None:
    model = network()
    state = saved(model)
    frame = portable_(build())
    frame.load_state_dict({name: x.double() for name, x in state.items()})
    same(model, frame)
    average = {name: (x + x + x) / 3 for name, x in state.items()}
    frame.load_state_dict(average)
    assert [p.shape for p in frame.parameters()] == [p.shape for p in model.parameters()]


def test_a_structure_that_cannot_be_written_is_told() -> None:
    model = network()
    layer: Any = model.depthwise
    layer.extra = 7
    mark = vars(layer)[RECORD]
    mark.record.attributes[mark.path, "extra"], mark.record.wholes[mark.path, "extra"] = 7, 999
    with pytest.warns(UserWarning, match="holds weights without their structure, since depthwise.extra went from 999"):
        assert KEY not in model.state_dict()


def test_only_layers_are_left_out() -> None:
    frame = build()
    space = torchgrow.trace(frame, IMAGES, depth=True)
    keep = space.everything()
    keep[space.blocks[0].unit] = False
    torchgrow.shrink_(frame, space, keep)
    other, again = portable_(build()), portable_(build())
    other.load_state_dict(saved(frame))
    again.load_state_dict(saved(other))
    same(frame, again)
