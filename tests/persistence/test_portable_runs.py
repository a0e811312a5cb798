"""A run whose model loads another structure: it goes on from there, or refuses and says why."""

import copy
import json

import pytest
import torch
from torch import nn

from portables import FRAMES, IMAGES, WORDS, begun, build, grown, network, run, same, saved, step
from torchgrow import Budget, Grower, StructureError, TorchgrowError, portable_
from torchgrow.integrations.borrowed_loop import aside, put_aside_
from torchgrow.persistence.portable import KEY


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


def end_alike(straight: Grower, other: Grower) -> None:
    """Both go on for two updates."""
    for grower in (straight, other):
        for _ in range(2):
            grower.update()
            step(grower, IMAGES)
    same(straight.model, other.model)


def test_the_order_of_accelerate() -> None:
    straight, source = grown(updates=2), grown(updates=2)
    state = copy.deepcopy([source.model.state_dict(), source.optimizers[0].state_dict(), source.state_dict()])
    other = begun()
    for one, what in zip((other.model, *other.optimizers, other), state, strict=True):
        one.load_state_dict(what)
    end_alike(straight, other)


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
    end_alike(straight, other)
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
