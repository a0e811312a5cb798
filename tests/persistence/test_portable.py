"""Laws of the structure that travels inside `state_dict()`: plain PyTorch loads a grown network into its frame."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import torchgrow
from portables import FRAMES, IMAGES, WORDS, Images, build, grown, network, run, same, saved, step
from torchgrow import Budget, Grower, StructureError, TorchgrowError, portable_
from torchgrow.persistence.portable import KEY


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
