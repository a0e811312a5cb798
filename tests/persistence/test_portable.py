"""Laws of the structure that travels inside `state_dict()`: plain PyTorch loads a grown network into its frame."""

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import torchgrow
from torchgrow import Budget, Cost, Grower, SavedModelError, StructureError, TorchgrowError, portable_
from torchgrow.persistence.folder import SEAL, digest
from torchgrow.persistence.portable import KEY, aside, put_aside_

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Images(nn.Module):
    """With layers that can go, a grouped convolution, and tied weights."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(3)])
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.head, self.same = nn.Linear(width, width), nn.Linear(width, width)
        self.same.weight = self.head.weight
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.blocks(self.first(x))).mean((2, 3))
        return self.last(self.same(self.head(x).relu()).relu())


class Words(nn.Module):
    """With heads and recurrent units."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.TransformerEncoderLayer(6, 3, 16, batch_first=True, dropout=0.0)
        self.memory = nn.LSTM(6, 9, batch_first=True)
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(self.mixer(x))[0])


class Scaled(nn.Module):
    """With a buffer that is cut and not part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.scale).relu())


FRAMES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "images": (Images, IMAGES),
    "words": (Words, WORDS),
    "scaled": (Scaled, WORDS),
}


def build(name: str = "images") -> nn.Module:
    torch.manual_seed(3)
    return FRAMES[name][0]()


def begun(name: str = "images", updates: int = 6, **settings: Any) -> Grower:
    model, inputs = build(name), FRAMES[name][1]
    settings.setdefault("depth", name == "images")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Grower(model, optimizer, example_inputs=inputs, budget=Budget(params="50%"), updates=updates, **settings)


def step(grower: Grower, inputs: Tensor) -> None:
    for optimizer in grower.optimizers:
        optimizer.zero_grad()
    grower.model(inputs).square().mean().backward()
    for optimizer in grower.optimizers:
        optimizer.step()


def grown(name: str = "images", updates: int = 1, **settings: Any) -> Grower:
    grower = begun(name, **settings)
    for _ in range(updates):
        step(grower, FRAMES[name][1])
        grower.update()
    step(grower, FRAMES[name][1])
    return grower


@functools.cache
def run(name: str) -> list[tuple[nn.Module, Cost, dict[str, int], dict[str, int]]]:
    """The network after every update of one run, as a copy, and what it costs."""
    grower, found = begun(name), []
    for number in range(6):
        if number:
            grower.update()
        step(grower, FRAMES[name][1])
        found.append((copy.deepcopy(grower.model), grower.cost(), grower.widths(), grower.depths()))
    return found


def network(name: str = "images", updates: int = 2) -> nn.Module:
    """A copy of what a run has grown."""
    return copy.deepcopy(run(name)[updates][0])


def saved(model: nn.Module) -> dict[str, Any]:
    """A state dict that went through a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model: nn.Module, other: nn.Module, inputs: Tensor = IMAGES) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    models = [copy.deepcopy(each).eval() for each in (model, other)]
    assert torch.equal(models[0](inputs), models[1](inputs))


def reads(state: dict[str, Any], change: Callable[[Any], None]) -> dict[str, Any]:
    """The record in a state dict, changed, with a seal that fits."""
    record = json.loads(bytes(state[KEY].tolist()))
    record.pop(SEAL)
    change(record)
    record[SEAL] = digest(record)
    return {**state, KEY: torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("updates", [0, 1, 4])
def test_a_fresh_frame_becomes_the_network(name: str, updates: int) -> None:
    model, inputs = network(name, updates), FRAMES[name][1]
    frame = portable_(build(name))
    assert frame.load_state_dict(saved(model)) == ([], [])
    same(model, frame, inputs)


@pytest.mark.parametrize("name", ["images", "words"])
@pytest.mark.parametrize("times", [(0, 4), (4, 0), (2, 5)])
def test_a_network_of_another_structure_becomes_the_network(name: str, times: tuple[int, int]) -> None:
    first, second = (network(name, updates) for updates in times)
    assert run(name)[times[0]][2:] != run(name)[times[1]][2:]
    frame = portable_(build(name))
    frame.load_state_dict(saved(first))
    frame.load_state_dict(saved(second))
    same(second, frame, FRAMES[name][1])


def test_safetensors_keep_it(tmp_path: Path) -> None:
    model = network()
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    frame = portable_(build())
    safetensors.torch.load_model(frame, tmp_path / "model.safetensors")
    same(model, frame)


def test_records_compose() -> None:
    grower = grown(updates=2, depth=False)
    grower.finish()
    with pytest.warns(UserWarning, match="is a share of the network"), pytest.warns(UserWarning, match="looks trained"):
        again = Grower(
            grower.model,
            torch.optim.SGD(grower.model.parameters(), lr=0.1),
            example_inputs=IMAGES,
            budget=Budget(params="60%"),
            updates=2,
        )
    step(again, IMAGES)
    early = saved(again.model)
    again.finish()
    frame = portable_(build())
    frame.load_state_dict(saved(again.model))
    same(again.model, frame)
    with pytest.warns(UserWarning, match="the run has ended"):
        again.model.load_state_dict(early)
    frame.load_state_dict(early)
    same(again.model, frame)


@pytest.mark.parametrize(
    "wrap",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        nn.DataParallel,
        AveragedModel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.Sequential(m),
    ],
    ids=["deepcopy", "pickle", "parallel", "average", "compiled", "part"],
)
def test_copies_and_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, frame = wrap(network()), wrap(portable_(build()))
    frame.load_state_dict(saved(model))
    same(model, frame)


def test_several_grown_parts_and_what_is_around_them() -> None:
    def large(*parts: nn.Module) -> nn.ModuleDict:
        torch.manual_seed(5)
        return nn.ModuleDict({"a": parts[0], "b": nn.Sequential(parts[1]), "c": nn.Linear(2, 2)})

    parts = [network("images", 2), network("words", 3)]
    model = large(*parts)
    for frame in (portable_(large(build(), build("words"))), large(portable_(build()), portable_(build("words")))):
        assert frame.load_state_dict(saved(model)) == ([], [])
        assert all(map(torch.equal, model.parameters(), frame.parameters()))
        assert torch.equal(parts[1](WORDS), frame.get_submodule("b.0")(WORDS))


def test_a_part_of_a_grown_network() -> None:
    model = network()
    part, frame = portable_(model.get_submodule("blocks")), portable_(build().get_submodule("blocks"))
    frame.load_state_dict(saved(part))
    assert [p.shape for p in frame.parameters()] == [p.shape for p in part.parameters()]
    assert [torch.equal(*pair) for pair in zip(frame.parameters(), part.parameters(), strict=True)]


def test_assign_onto_the_meta_device() -> None:
    model = network()
    with torch.device("meta"):
        frame = portable_(Images())
    frame.load_state_dict(saved(model), assign=True)
    frame.same.weight = frame.head.weight
    same(model, frame)


def test_strict_is_as_ever() -> None:
    model, frame = network(), portable_(build())
    state = saved(model)
    state["stranger"] = state.pop("last.bias")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "last.bias"(.|\n)*"stranger"'):
        frame.load_state_dict(state)
    del state["head.bias"]
    frame = portable_(build())
    assert frame.load_state_dict(state, strict=False) == (["head.bias", "last.bias"], ["stranger"])
    kept = json.loads(bytes(model.state_dict()[KEY].tolist()))["kept"]["head.bias"]["0"]
    assert torch.equal(frame.get_parameter("head.bias"), build().get_parameter("head.bias")[kept])


def test_who_does_not_take_it_reads_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: ".*load_into_torchgrow_portable_"'):
        build().load_state_dict(network().state_dict())


def test_a_model_that_was_never_cut_adds_nothing() -> None:
    model = portable_(build())
    assert model.state_dict().keys() == build().state_dict().keys()
    model.load_state_dict(build().state_dict())


def test_on_and_off_again() -> None:
    model = network()
    assert KEY in portable_(portable_(model)).state_dict()
    assert len(model._state_dict_hooks) == len(model._load_state_dict_pre_hooks) == 1
    portable_(model, False)
    assert model.state_dict().keys() == build().state_dict().keys()
    assert KEY not in vars(model)
    with pytest.raises(TorchgrowError, match="portable_ takes a torch"):
        portable_({})  # type: ignore[type-var]


def test_what_is_loaded_and_shrunk_is_portable(tmp_path: Path) -> None:
    grower = grown(updates=1)
    grower.finish()
    model = grower.model
    torchgrow.save(model, tmp_path / "small")
    loaded = torchgrow.load(tmp_path / "small", build)
    same(model, loaded)
    frame = build()
    space = torchgrow.trace(frame, IMAGES)
    keep = space.everything()
    keep[space.removable.nonzero()[::2]] = False
    bank = torchgrow.shrink_(frame, space, keep)
    other = portable_(build())
    other.load_state_dict(saved(frame))
    same(frame, other)
    frame.load_state_dict(saved(model))
    same(model, frame)
    with pytest.raises(StructureError, match="cut by somebody else since"):
        bank.restore_()


def test_distributed_checkpoints_know_the_key() -> None:
    model = network()
    frame = nn.ModuleDict({"a": portable_(build())})
    set_model_state_dict(frame, get_model_state_dict(nn.ModuleDict({"a": model})))
    same(model, frame["a"])


def test_a_cut_buffer_that_does_not_travel() -> None:
    first, second = grown("scaled", 3), network("scaled", 1)
    frame = portable_(build("scaled"))
    frame.load_state_dict(saved(first.model))
    before = saved(frame)
    with pytest.raises(StructureError, match=r"scale is not in the state dict(.|\n)*portable_\(build\(\)\)"):
        frame.load_state_dict(saved(second))
    assert all(torch.equal(x, frame.state_dict()[name]) for name, x in before.items())
    first.model.load_state_dict(saved(second))  # of a run it sleeps in the bank
    same(second, first.model, WORDS)


# --- runs ---


@pytest.mark.parametrize("name", ["images", "words"])
@pytest.mark.parametrize("times", [(0, 2), (4, 0)])
def test_a_run_goes_on_from_the_structure(name: str, times: tuple[int, int]) -> None:
    inputs, (source, cost, widths, depths) = FRAMES[name][1], run(name)[times[0]]
    grower = grown(name, times[1])
    follower = copy.deepcopy(grower.model)
    grower.follow(follower)
    parameters = list(grower.model.parameters())
    shapes = [p.shape for p in parameters]
    grower.model.load_state_dict(saved(source))
    assert [p.shape for p in parameters] != shapes
    same(source, grower.model, inputs)
    assert (grower.widths(), grower.cost(), grower.depths()) == (widths, cost, depths)
    assert all(a is b for a, b in zip(parameters, grower.model.parameters(), strict=True))
    assert [p.shape for p in follower.parameters()] == [p.shape for p in parameters]
    other = begun(name)
    other.follow(copy.deepcopy(other.model))
    other.load_state_dict(grower.state_dict())
    for each in (grower, other):
        step(each, inputs)
        each.update()
    same(grower.model, other.model, inputs)
    grower.finish()
    assert grower.limits.params is not None
    assert 0.8 * grower.limits.params < grower.cost().params <= grower.limits.params


@pytest.mark.parametrize("preset", ["paper", "global"])
def test_a_run_with_gates_takes_no_other_structure(preset: str) -> None:
    """Its weights would be divided by gates they were not folded with, and those of pushed out units are near zero."""
    grower = grown("words", 3, preset=preset)
    before = {name: x.clone() for name, x in grower.model.state_dict().items()}
    with pytest.raises(StructureError, match=r"scales weights by gates, which are not in it.*grower\.load_state_dict"):
        grower.model.load_state_dict(saved(network("words", 0)))
    assert all(torch.equal(x, before[name]) for name, x in grower.model.state_dict().items())
    grower.finish()
    with pytest.warns(UserWarning, match="the run has ended") as told:
        grower.model.load_state_dict(saved(network("words", 0)))
    assert told[0].filename == __file__, "the warning names the line of the user"
    same(network("words", 0), grower.model, WORDS)


def test_functional_calls_take_the_state_dict() -> None:
    model = network("words", 2).eval()
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.state_dict()), (WORDS,)), model(WORDS))


def test_a_released_run_says_so() -> None:
    grower = grown("words", 2)
    state = grower.release()
    for call in (grower.update, grower.finish, grower.state_dict):
        with pytest.raises(TorchgrowError, match=r"this run was released.*other\.load_state_dict\(state\)"):
            call()
    assert grower.cost() == grower.frame_cost
    assert state["history"]


def test_state_of_kept_units_stays() -> None:
    grower, source = grown("words", 3), network("words", 0)
    name = "mixer.linear1.bias"
    parameter = grower.model.get_parameter(name)
    before = grower.optimizers[0].state[parameter]["exp_avg"].clone()
    records = [json.loads(bytes(model.state_dict()[KEY].tolist())) for model in (grower.model, source)]
    positions = [record["kept"].get(name, {}).get("0") for record in records]
    old = list(range(16)) if positions[0] is None else positions[0]
    grower.model.load_state_dict(saved(source))
    after = grower.optimizers[0].state[parameter]["exp_avg"]
    assert len(positions[1]) < len(old)
    shared = [p for p in positions[1] if p in old]
    assert shared
    assert all(after[positions[1].index(p)] == before[old.index(p)] for p in shared)


def test_the_order_of_accelerate() -> None:
    straight, source = grown(updates=2), grown(updates=2)
    state = copy.deepcopy([source.model.state_dict(), source.optimizers[0].state_dict(), source.state_dict()])
    other = begun()
    for one, what in zip((other.model, *other.optimizers, other), state, strict=True):
        one.load_state_dict(what)
    for grower in (straight, other):
        for _ in range(2):
            grower.update()
            step(grower, IMAGES)
    same(straight.model, other.model)


def test_after_the_end_it_is_told() -> None:
    grower = grown(updates=1)
    grower.finish()
    last, cost = saved(grower.model), grower.cost()
    grower.model.load_state_dict(last)  # of the same structure: no word about it
    with pytest.warns(UserWarning, match="the run has ended"):
        grower.model.load_state_dict(saved(network(updates=1)))
    same(network(updates=1), grower.model)
    assert grower.cost() == run("images")[1][1] != cost
    step(grower, IMAGES)
    with pytest.warns(UserWarning, match="the run has ended"):
        grower.model.load_state_dict(last)
    assert grower.cost() == cost


def test_followers_and_what_is_around_a_run_refuse() -> None:
    grower, other = grown(updates=2), network(updates=0)
    follower = copy.deepcopy(grower.model)
    grower.follow(follower)
    with pytest.raises(StructureError, match="follows a network that grows"):
        follower.load_state_dict(saved(other))
    around = nn.ModuleDict({"net": grower.model})
    portable_(around)
    large = portable_(nn.ModuleDict({"net": portable_(other, False)}))
    with pytest.raises(StructureError, match="shares tensors with the ModuleDict that loads it"):
        around.load_state_dict(saved(large))
    free = copy.deepcopy(grower.model)
    free.load_state_dict(saved(portable_(other)))
    same(other, free)


def test_a_structure_that_the_run_cannot_have() -> None:
    grower = begun(protect=["first"])
    before = saved(grower.model)
    with pytest.raises(StructureError, match=r"are not removable|that this run cannot have"):
        grower.model.load_state_dict(saved(network(updates=0)))
    assert all(torch.equal(x, grower.model.state_dict()[name]) for name, x in before.items())
    shallow = begun(depth=False)
    deep = next(model for model, _, _, depths in run("images") if depths["blocks"] < 3)
    with pytest.raises(StructureError, match="that this run cannot have, as"):
        shallow.model.load_state_dict(saved(deep))


def test_another_optimizer_takes_a_run_over() -> None:
    straight, broken = grown(updates=2), grown(updates=2)
    state = broken.release()
    assert broken.finished
    same_frame = [tuple(p.shape) for p in build().parameters()]
    assert [tuple(p.shape) for p in broken.model.parameters()] == same_frame
    optimizer = torch.optim.AdamW(broken.model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="looks trained"):
        other = Grower(
            broken.model, optimizer, example_inputs=IMAGES, budget=Budget(params="50%"), updates=6, depth=True
        )
    other.load_state_dict(state)
    for grower in (straight, other):
        for _ in range(2):
            grower.update()
            step(grower, IMAGES)
    same(straight.model, other.model)
    other.finish()
    with pytest.raises(TorchgrowError, match="nothing another grower could go on with"):
        other.release()


def test_put_aside() -> None:
    source, frame = network(), build()
    put_aside_(frame)
    frame.load_state_dict(saved(source))
    assert all(torch.equal(a, b) for a, b in zip(frame.parameters(), build().parameters(), strict=True))
    found = aside(frame)
    assert all(torch.equal(x, found[name]) for name, x in source.state_dict().items())
    frame.load_state_dict(found)
    same(source, frame)


# --- hostile data ---


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
    mark = vars(layer)["_torchgrow_record"]
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
