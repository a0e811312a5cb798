"""What was done to a model is found wherever its modules go, relative to the first frame: what is saved, loads."""

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import records
from damage import reseal
from records import Block, Network, cut, example, network
from torchgrow import (
    Budget,
    Grower,
    OptimizerError,
    SavedModelError,
    StructureError,
    load,
    prune_,
    save,
    shrink_,
    trace,
)


@functools.lru_cache
def shrunk(generations: int) -> Network:
    """A network cut so many times: layers go too in the first and the third generation."""
    model = network() if generations == 1 else copy.deepcopy(shrunk(generations - 1))
    cut(model, 0.3, seed=generations, layers={1: records.LAYERS, 2: (), 3: ("blocks.2",)}[generations])
    return model


class Holder(nn.Module):
    """Keeps a model as `self.model`, as task wrappers do, and a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("generations", [1, 2, 3])
def test_a_network_cut_several_times_is_relative_to_the_first_frame(generations: int, tmp_path: Path) -> None:
    model = copy.deepcopy(shrunk(generations))
    save(model, tmp_path / "net")
    again = load(tmp_path / "net", network)
    assert same(again, model, example())
    assert model.first.weight.shape[0] < 8
    save(again, tmp_path / "twice")
    texts = [(tmp_path / name / "structure.json").read_text() for name in ("net", "twice")]
    assert texts[0] == texts[1]


def test_a_loaded_network_is_cut_and_saved_over(tmp_path: Path) -> None:
    save(copy.deepcopy(shrunk(1)), tmp_path / "net")
    model = load(tmp_path / "net", network)
    assert isinstance(model, Network)
    cut(model, 0.3, seed=5, layers=())
    assert model.first.weight.shape[0] < shrunk(1).first.weight.shape[0]
    save(model, tmp_path / "net")
    assert same(load(tmp_path / "net", network), model, example())


def test_restored_it_is_the_first_structure_again(tmp_path: Path) -> None:
    model = copy.deepcopy(shrunk(1))
    save(model, tmp_path / "first")
    cut(model, 0.3, seed=5, layers=()).restore_()
    save(model, tmp_path / "net")
    texts = [(tmp_path / name / "structure.json").read_text() for name in ("net", "first")]
    assert texts[0] == texts[1]


def compiled_inside(model: Network) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    return model


WRAPPERS: dict[str, Callable[[Network], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "average": AveragedModel,
    "average of a compiled one in parallel": lambda model: AveragedModel(
        nn.DataParallel(torch.compile(model, backend="eager"))  # type: ignore[type-var]
    ),
    "a compiled part": compiled_inside,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_looked_through_on_both_sides(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(shrunk(2))
    expected = model.eval()(example())
    save(WRAPPERS[name](model), tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", network).eval()(example()), expected)
    if name != "average":
        wrapped = load(tmp_path / "net", lambda: WRAPPERS[name](network()))
        assert type(wrapped) is type(WRAPPERS[name](network()))
        assert torch.equal(load(tmp_path / "net", network).eval()(example()), expected)


def test_a_larger_model_and_a_part_load_with_factories_of_their_own(tmp_path: Path) -> None:
    model = copy.deepcopy(shrunk(2))
    outer = Holder(nn.DataParallel(model))
    save(outer, tmp_path / "outer")
    assert same(load(tmp_path / "outer", lambda: Holder(network())), outer.eval(), example())
    x = torch.randn(2, 5, model.first.weight.shape[0])
    for k in (0, 2):
        save(model.blocks[k], tmp_path / "part")
        assert same(load(tmp_path / "part", Block), model.blocks[k], x)
    both = nn.ModuleDict({"a": copy.deepcopy(shrunk(1)), "b": model, "again": model})
    save(both, tmp_path / "both")
    found = load(tmp_path / "both", lambda: nn.ModuleDict({"a": network(), "b": (one := network()), "again": one}))
    assert same(found["a"], both["a"], example())  # type: ignore[index]
    assert same(found["again"], model, example())  # type: ignore[index]


def halve(model: nn.Module, x: Tensor, step: int = 2) -> None:
    """Remove every second (or so) unit that may go, but for the first."""
    space = trace(model, x)
    keep = space.everything()
    keep[torch.nonzero(space.removable).flatten()[1::step]] = False
    shrink_(model, space, keep)


def test_parts_cut_one_after_the_other_and_then_the_whole(tmp_path: Path) -> None:
    def build() -> Any:
        body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        return nn.Sequential(body, nn.ReLU(), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)))

    model = build()
    halve(model[2], torch.randn(3, 8))
    halve(model[0], torch.randn(3, 4))
    halve(model, torch.randn(3, 4), step=3)
    halve(model[2], torch.randn(3, model[2][0].in_features), step=4)
    shapes = [tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1]
    assert all(now[0] < full for now, full in zip(shapes, (16, 8, 6), strict=False))
    save(model, tmp_path / "net")
    assert same(load(tmp_path / "net", build), model, torch.randn(3, 4))


class Tied(nn.Module):
    """Two layers with one weight, and one that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(x)).relu())


def test_a_part_with_a_tied_weight_knows_its_own_name_of_it(tmp_path: Path) -> None:
    model = Tied()
    halve(model, torch.randn(3, 4))
    save(model.b, tmp_path / "b")
    assert same(load(tmp_path / "b", lambda: nn.Linear(4, 6)), model.b, torch.randn(3, 4))
    save(model, tmp_path / "net")
    assert same(load(tmp_path / "net", Tied), model, torch.randn(3, 4))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Network()


def test_a_frame_on_the_meta_device_comes_to_life(tmp_path: Path) -> None:
    model = copy.deepcopy(shrunk(1))
    save(model, tmp_path / "net")
    again = load(tmp_path / "net", on_meta)
    assert same(again, model, example())
    again.train()(example()).sum().backward()
    assert all(p.grad is not None for p in again.parameters() if p.numel())

    def with_table() -> nn.Module:
        frame = on_meta()
        frame.table = torch.ones(3, device="meta")
        return frame

    with pytest.raises(SavedModelError, match=r"on the meta device whose table is neither parameter nor buffer"):
        load(tmp_path / "net", with_table)


def test_format_2_still_loads_and_goes_on(tmp_path: Path) -> None:
    model = load(records.FOLDER, network)
    expected = load_file(records.FOLDER.parent / "format-2-outputs.safetensors")["outputs"]
    torch.testing.assert_close(model.eval()(example()), expected)
    assert isinstance(model, Network)
    cut(model, 0.3, seed=1, layers=())
    save(model, tmp_path / "net")
    assert same(load(tmp_path / "net", network), model, example())


# --- what cannot be rebuilt is refused while it is saved -------------------------------------------------------


def replace_layer(model: Network) -> None:
    model.last = nn.Linear(model.last.in_features, 5)


def replace_contents(model: Network) -> None:
    model.first.weight.data = model.first.weight.data[:2]


def parametrize(model: Network) -> None:
    parametrizations.weight_norm(model.first)


def change_count(model: Network) -> None:
    attention = model.blocks[0].attention
    assert isinstance(attention, records.Attention)
    attention.num_heads += 1


def quantise(model: Network) -> None:
    model.last = torch.ao.nn.quantized.dynamic.Linear(4, 2)  # type: ignore[assignment]


REFUSED: dict[str, tuple[Callable[[Network], object], str]] = {
    "another layer": (replace_layer, r"last\.weight is \(5, \d\), of a module put there after the cut; .* \(2, 8\)"),
    "other contents": (replace_contents, r"first\.weight is \(2, 4\), the record makes it \(\d, 4\) of \(8, 4\)"),
    "another count": (change_count, r"blocks\.0\.attention\.num_heads is \d, the record makes it \d"),
    "packed weights": (quantise, r"LinearPackedParams\) keeps \['_packed_params', 'dtype'\] outside of its tensors"),
    "meta": (lambda m: m.last.to("meta") and None, r"last\.weight is on the meta device and has no values"),
    "lazy": (
        lambda m: m.add_module("lazy", nn.LazyLinear(3)),
        r"lazy\.weight is not initialised yet, .*; run",
    ),
    "sparse": (
        lambda m: m.register_buffer("s", torch.eye(3).to_sparse()),
        r"s is a torch.sparse_coo tensor, .*; use",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_loaded_is_not_saved(name: str, tmp_path: Path) -> None:
    damage, text = REFUSED[name]
    model = copy.deepcopy(shrunk(1))
    damage(model)
    with pytest.raises(SavedModelError, match=text):
        save(model, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_part_may_be_gone(tmp_path: Path) -> None:
    model = copy.deepcopy(shrunk(1))
    model.blocks = nn.ModuleList([nn.Identity(), *model.blocks[1:]])
    save(model, tmp_path / "net")

    def without() -> nn.Module:
        frame = network()
        frame.blocks[0] = nn.Identity()
        return frame

    assert same(load(tmp_path / "net", without), model, example())


class Stateful(nn.Linear):
    """A layer with a state outside of its tensors, which it gives away."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_goes_along_as_data(tmp_path: Path) -> None:
    model = Stateful(2, 3)
    model.state = {"scale": torch.arange(3.0), "steps": (1, None)}
    save(model, tmp_path / "net")
    again = load(tmp_path / "net", lambda: Stateful(2, 3))
    assert isinstance(again, Stateful)
    assert again.state["steps"] == (1, None)
    assert torch.equal(again.state["scale"], model.state["scale"])
    with pytest.raises(SavedModelError, match=r"has the extra state of \[''\], the frame has some in \[\]"):
        load(tmp_path / "net", lambda: nn.Linear(2, 3))
    model.state = object()
    with pytest.raises(SavedModelError, match=r"the extra state of .* is of type object, which cannot be stored"):
        save(model, tmp_path / "net")


# --- a forged record -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("forged") / "net"
    save(copy.deepcopy(shrunk(1)), where)
    return where


ATTENTION = "blocks.0.attention"

FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a kernel": (lambda r: r["attributes"].append(["pool", "kernel_size", 1]), r"pool\.kernel_size = 1, of 2 in the"),
    "a stride": (
        lambda r: r["attributes"].append(["pool", "stride", 1, "first.weight", 0, 1, 0]),
        r"pool\.stride = 1, of 2 in the frame, follows from no kept positions; only",
    ),
    "the user's own": (lambda r: r["attributes"].append(["", "step", 1]), r"\.step = 1, of 2 in the frame"),
    "a head's width": (
        lambda r: r["attributes"].append([ATTENTION, "head_dim", 2, f"{ATTENTION}.qkv.weight", 0, 3, 0]),
        r"head_dim = 2, of 3 in the frame",
    ),
    "torch's head width": (lambda r: r["attributes"].append(["torchs", "head_dim", 1]), r"torchs\.head_dim = 1, of 2"),
    "evidence of no tensor": (
        lambda r: r["attributes"].append([ATTENTION, "head_dim", 2, ATTENTION, 7, -1, 0]),
        r"head_dim = 2, of 3",
    ),
    "an activation": (lambda r: r["skipped"].update({"blocks.0.mlp.1": ["", 0]}), r"mlp\.1 \(ReLU\) has no parameters"),
    "a pool": (lambda r: r["skipped"].update({"pool": ["", 0, "relu"]}), r"pool \(MaxPool1d\) has no parameters"),
    "all of it": (lambda r: r["skipped"].update({"": ["", 0]}), r"no module '' to leave out"),
    "a layer": (lambda r: r["skipped"].update({"last": ["", 0]}), r"last\.weight is .* makes it torch\.float32 \(0,\)"),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("form", [2, 3])
def test_a_record_lowers_counts_and_leaves_out_blocks_and_nothing_else(
    name: str, form: int, folder: Path, tmp_path: Path
) -> None:
    forge, text = FORGED[name]
    record = json.loads((folder / "structure.json").read_text())
    if form == 2:
        record["format"] = 2
        del record["extra_state"], record["buffers"]
        record["attributes"] = [entry[:3] for entry in record["attributes"]]
        record["skipped"] = {path: entry[:2] for path, entry in record["skipped"].items()}
    forge(record)
    if form == 2 and name in ("a pool", "the user's own"):
        pytest.skip("format 2 does not say what belongs together, nor which axis was counted")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "structure.json").write_text(json.dumps(record))
    reseal(tmp_path, "structure.json", "model.safetensors")
    frame: Any = network()
    before = {key: value.clone() for key, value in frame.state_dict().items()}
    with pytest.raises(SavedModelError, match=text):
        load(tmp_path, lambda: frame)
    assert all(torch.equal(value, before[key]) for key, value in frame.state_dict().items())
    assert (frame.step, frame.pool.kernel_size, frame.blocks[0].attention.head_dim) == (2, 2, 3)


def test_an_instance_in_the_place_of_a_factory(folder: Path) -> None:
    with pytest.raises(
        SavedModelError, match=r"must be a function that builds the frame, got a Network; call torchgrow"
    ):
        load(folder, network())
    with pytest.raises(SavedModelError, match=r"model that has been cut already: first\.weight is .*at full size"):
        load(folder, lambda: copy.deepcopy(shrunk(1)))


# --- another grower --------------------------------------------------------------------------------------------


def test_a_second_grower_is_refused_until_the_first_has_finished(tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    outer = nn.Sequential(model, nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def attach(module: nn.Module, trained: torch.optim.Optimizer) -> Grower:
        return Grower(module, trained, example_inputs=x, budget=Budget(params="60%"), updates=4)

    grower = attach(model, optimizer)
    for module in (model, outer):
        with pytest.raises(StructureError, match=r"growing already: update\(\) was called 0 of 4 times.*finish\(\)"):
            attach(module, torch.optim.SGD(module.parameters(), 0.1))
    other = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer.add_param_group({"params": list(other.parameters())})
    with pytest.raises(OptimizerError, match=r"SGD already trains a network that is growing; go on with the grower"):
        attach(other, optimizer)
    with pytest.warns(UserWarning, match=r"before its growth has finished: update\(\) was called 0 of 4 times.*budget"):
        save(model, tmp_path / "early")
    grower.finish()
    save(model, tmp_path / "net")
    with pytest.warns(UserWarning, match=r"60% is a share of the network as it is, \d+ par.* frame of 114 before"):
        attach(model, torch.optim.SGD(model.parameters(), 0.1)).finish()
    save(model, tmp_path / "net")
    again = load(tmp_path / "net", lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)))
    assert same(again, model, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_growing_network_is_free(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Its structure is known, it is not of the run: it is pruned, or grown on, while that goes on."""
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="60%"), updates=4)
    model(x).square().mean().backward()
    optimizer.step()
    grower.update()
    best = copied(model)
    with pytest.raises(StructureError, match=r"growing already"):
        prune_(model, x, budget=Budget(params=40))
    assert prune_(best, x, budget=Budget(params=40))
    again = copied(model)
    trained = torch.optim.SGD(again.parameters(), 0.1)
    Grower(again, trained, example_inputs=x, budget=Budget(params=40), updates=2, start="frame").finish()
    grower.finish()
    assert max(sum(p.numel() for p in one.parameters()) for one in (best, again)) <= 40
