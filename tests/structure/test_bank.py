"""Cutting and putting back: Laws 2, 8, 10 and 11, what `keep` may say, and changes made whole or not at all."""

import copy
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchgrow.exchange
import zoo
from cutting import OPTIMIZERS, half, step
from growing import breaking
from torchgrow import Bank, OptimizerError, Space, StructureError, shrink_, trace
from torchgrow.exchange import uninterrupted
from torchgrow.structure.record import RECORD
from torchgrow.structure.store import gather, scatter_
from torchgrow.structure.surgery import replace_

DEEP = ["residual", "concat", "grouped-2", "flatten", "shuffle", "buffers", "tied", "depthwise"]


def everything_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that surgery may touch, cloned: tensors, slots, gradients, plain int attributes."""
    found: dict[str, Any] = {}
    names = {}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[key] = tensor.detach().clone()
        found[f"{key}.grad"] = None if tensor.grad is None else tensor.grad.clone()
        names[tensor] = key
    for path, module in model.named_modules():
        found |= {f"{path}.{name}": value for name, value in vars(module).items() if type(value) is int}
    found["record"] = copy.deepcopy(vars(model).get(RECORD))
    if optimizer is not None:
        for tensor, state in optimizer.state.items():
            for key, value in state.items():
                found[f"{names[tensor]}/{key}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[key]), key
            assert value.dtype == b[key].dtype, key
        elif key != "record":
            assert value == b[key], key
    assert repr(a["record"]) == repr(b["record"])


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Space, torch.optim.Optimizer]:
    """A residual network with two steps of Adam (or what the test asks for) behind it."""
    name, optimizer_name = getattr(request, "param", ("residual", "adam"))
    model, example = zoo.build(name), zoo.inputs(name)
    space = zoo.space(name)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    step(model, optimizer, example)
    return model, example, space, optimizer


# --- Law 2 and Law 10 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [("residual", o) for o in OPTIMIZERS] + [(n, "adam") for n in DEEP], indirect=True)
def test_laws_2_and_10_detach_and_regrow_is_the_identity(trained: Any) -> None:
    model, example, space, optimizer = trained
    optimizer.zero_grad()
    before, objects = everything_of(model, optimizer), [*model.parameters(), *model.buffers()]
    before.pop("record")
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    bank = shrink_(model, space, half(space), optimizer)
    assert any(tensor.shape != before[key].shape for key, tensor in model.named_parameters())
    for parameter in model.parameters():
        for key, slot in optimizer.state[parameter].items():
            if isinstance(slot, Tensor) and slot.dim():
                assert slot.shape == parameter.shape, key
    for seed in (1, 2, 3):
        bank.resize_(half(space, seed))
    bank.restore_()
    after = everything_of(model, optimizer)
    after.pop("record")
    assert_same({**before, "record": None}, {**after, "record": None})
    assert all(a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    step(model, optimizer, example)


def test_what_lives_is_the_old_slice_and_what_is_stored_comes_back_trained(trained: Any) -> None:
    """A unit that trains alone changes only its own positions in the restored frame."""
    model, example, space, optimizer = trained
    keep = half(space)
    before = everything_of(model, optimizer)
    bank = shrink_(model, space, keep, optimizer)
    for name, tensor in model.named_parameters():
        expected, slot = before[name], before[f"{name}/exp_avg"]
        for axis in range(expected.dim()):
            units = space.unit_of[name, axis]
            live = torch.tensor([u < 0 or bool(keep[u]) for u in units.tolist()])
            expected, slot = _take(expected, axis, live), _take(slot, axis, live)
        assert torch.equal(tensor, expected)
        assert torch.equal(optimizer.state[tensor]["exp_avg"], slot)
    step(model, optimizer, example)
    small = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    bank.restore_()
    for name, tensor in model.named_parameters():
        part, asleep = tensor.detach(), torch.ones(tensor.shape, dtype=torch.bool)
        for axis in range(part.dim()):
            live = torch.tensor([u < 0 or bool(keep[u]) for u in space.unit_of[name, axis].tolist()])
            part = _take(part, axis, live)
            asleep &= live.reshape([-1 if k == axis else 1 for k in range(tensor.dim())])
        assert torch.equal(part, small[name])
        assert torch.equal(tensor[~asleep], before[name][~asleep])


def _take(tensor: Tensor, axis: int, live: Tensor) -> Tensor:
    return tensor.index_select(axis, torch.nonzero(live).flatten())


@pytest.mark.parametrize("name", ["depthwise", "grouped", "grouped-2", "group-norm", "transposed", "plain", "flatten"])
def test_attributes_count_what_lives(name: str) -> None:
    model, example = zoo.build(name), zoo.inputs(name)
    space = zoo.space(name)
    shrink_(model, space, half(space))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == module.weight.shape[0]
            assert module.in_channels == module.weight.shape[1] * module.groups
        elif isinstance(module, nn.ConvTranspose2d):
            assert (module.in_channels, module.out_channels) == module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)  # type: ignore[arg-type]
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)
    model(example)


def test_gather_and_scatter_are_inverse_on_several_axes() -> None:
    full = torch.arange(4 * 5 * 6.0).reshape(4, 5, 6)
    index = {0: torch.tensor([1, 3]), 2: torch.tensor([0, 4, 5])}
    part = gather(full, index)
    assert torch.equal(part, full[[1, 3]][:, :, [0, 4, 5]])
    other = full.clone()
    scatter_(other, index, -part)
    assert torch.equal(gather(other, index), -part)
    other[[[1], [3]], :, [0, 4, 5]] = full[[[1], [3]], :, [0, 4, 5]]
    assert torch.equal(other, full)
    whole = gather(full, {})
    assert torch.equal(whole, full)
    assert whole.data_ptr() != full.data_ptr()


# --- what keep may say ----------------------------------------------------------------------------------------


def test_keep_is_checked() -> None:
    space = zoo.space("concat")
    n = space.n_units
    frozen = space.freeze([0, 1], torchgrow.Frozen("test", "", "", "", ()))
    empty = space.everything()
    empty[space.group_of == space.group_names.index("c")] = False
    for asked, keep, text in [
        (space, torch.ones(n + 1, dtype=torch.bool), rf"bool tensor of shape \({n},\).*got torch.bool \({n + 1},\)"),
        (space, torch.ones(n), r"got torch.float32"),
        (space, [True] * n, r"got list; start from space.everything\(\)"),
        (frozen, torch.arange(n) > 0, r"units \[0\] of a are not removable .*use keep \| ~space.removable"),
        (space, empty, r"leaves axis 0 of c.weight \(6, 9, 3, 3\) empty; keep at least one unit"),
    ]:
        model = zoo.build("concat")
        before = everything_of(model)
        with pytest.raises(StructureError, match=text):
            shrink_(model, asked, keep)  # type: ignore[arg-type]
        assert_same(before, everything_of(model))


def test_one_part_of_a_concatenation_cannot_vanish_alone() -> None:
    space = zoo.space("concat")
    keep = space.everything()
    keep[space.group_of == space.group_names.index("a")] = False
    with pytest.raises(StructureError, match=r"leaves axis 0 of a\.weight"):
        space.check_keep(keep)


def test_a_model_that_is_not_the_frame_is_refused() -> None:
    model = zoo.build("plain")
    space = zoo.space("plain")
    shrink_(model, space, half(space))
    with pytest.raises(StructureError, match=r"is \(3, 3, 3, 3\) but the space was traced with \(6, 3, 3, 3\)"):
        shrink_(model, space, half(space))
    with pytest.raises(StructureError, match=r"stem\.weight is nothing but the space"):
        Bank(zoo.build("plain"), zoo.space("residual"))


def test_an_emptied_bank_says_so() -> None:
    model = zoo.build("plain")
    space = zoo.space("plain")
    bank = shrink_(model, space, half(space))
    bank.empty()
    before = everything_of(model)
    with pytest.raises(StructureError, match="bank has been emptied"):
        bank.restore_()
    assert_same(before, everything_of(model))


def test_factored_slots_are_refused_before_anything_changes() -> None:
    model, example = zoo.build("plain"), zoo.inputs("plain")
    space = zoo.space("plain")
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, example)
    before = everything_of(model, optimizer)
    with pytest.raises(OptimizerError, match=r"Adafactor cannot be served: it keeps 'row_var' of .*use SGD, Adam"):
        shrink_(model, space, half(space), optimizer)
    assert_same(before, everything_of(model, optimizer))


# --- all or nothing -------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("first", [True, False])
def test_a_failing_change_leaves_everything_as_it_was(
    trained: Any, error: type[BaseException], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its writes fails: tensors, slots, attributes, the record, the bank's books."""
    model, example, space, optimizer = trained
    bank = Bank(model, space, optimizer)
    if not first:
        bank.resize_(half(space))
        step(model, optimizer, example)
    before, keep = everything_of(model, optimizer), bank.keep
    assert before["fc.weight.grad"] is not None
    for call in range(1000):
        with monkeypatch.context() as patch:
            patch.setattr(torchgrow.exchange, "run", breaking(call, error()))
            try:
                bank.resize_(half(space, seed=7))
                break
            except error:
                assert_same(before, everything_of(model, optimizer))
                assert bank.keep is keep
                assert (RECORD in vars(model)) is not first
    assert 50 < call < 200
    step(model, optimizer, example)
    bank.resize_(half(space, seed=7))
    bank.restore_()
    step(model, optimizer, example)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which a test run in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_a_change_to_be_whole(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example, space, optimizer = trained
    bank, keep = Bank(model, space, optimizer), half(space)
    monkeypatch.setattr(torchgrow.exchange, "run", breaking(30, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        bank.resize_(keep)
    monkeypatch.undo()
    assert torch.equal(bank.keep, keep)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    step(model, optimizer, example)
    bank.restore_()


@pytest.mark.usefixtures("ctrl_c")
def test_uninterrupted_can_be_nested() -> None:
    reached = []

    def block() -> Iterator[None]:
        with uninterrupted(), uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(1)
        yield

    with pytest.raises(KeyboardInterrupt):
        next(block())
    assert reached == [1]


# --- Law 8 and Law 11 -----------------------------------------------------------------------------------------


def test_law_8_cutting_silent_units_changes_nothing() -> None:
    """Units whose positions are all zero leave: the function stays; they come back: it stays again."""
    for name in ("residual", "dense", "squeeze-excite", "depthwise", "grouped"):
        model, example = zoo.build(name).double().eval(), zoo.inputs(name).double()
        space = zoo.space(name)
        keep = half(space)
        for (tensor, axis), units in space.unit_of.items():
            if tensor in space.parameters:
                dead = torch.tensor([u >= 0 and not bool(keep[u]) for u in units.tolist()])
                model.get_parameter(tensor).data.index_fill_(axis, torch.nonzero(dead).flatten(), 0)
        before = model(example)
        bank = shrink_(model, space, keep)
        torch.testing.assert_close(model(example), before, rtol=1e-12, atol=1e-12)
        bank.restore_()
        assert torch.equal(model(example), before)


def test_law_11_a_live_loss_does_not_disturb_the_next_backward(trained: Any) -> None:
    model, example, space, optimizer = trained
    loss = model(example).sum()  # stays bound
    running = model(example).sum() + model(example).sum()
    bank = shrink_(model, space, half(space), optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad(set_to_none=False)
    step(model, optimizer, example)
    fresh = copy.deepcopy(model)
    for net in (model, fresh):
        net.zero_grad()
        F.mse_loss(net(example), torch.zeros(2, 4)).backward()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert a.grad is not None
        assert a.grad.shape == a.shape
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    bank.restore_()
    step(model, optimizer, example)
    del running


def test_replace_drops_gradient_accumulator_and_version() -> None:
    parameter = nn.Parameter(torch.ones(4))
    alive = (parameter**2).sum()
    parameter.grad, version = torch.ones(4), parameter._version
    replace_(parameter, torch.full((2,), 3.0))
    assert parameter.grad is None
    assert parameter._version > version
    (parameter**2).sum().backward()  # the accumulator of the old shape would refuse this gradient
    assert parameter.grad.tolist() == [6.0, 6.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        alive.backward()


def test_a_change_drops_every_gradient_and_outdates_every_graph(trained: Any) -> None:
    """Those of parameters that are not cut too: their gradients belong to another network."""
    model, _, space, optimizer = trained
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    assert model.fc.bias.grad is not None
    shrink_(model, space, half(space), optimizer)
    assert model.fc.bias.shape == (4,)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert parameter._version > versions[name], name


def test_hooks_of_the_user_survive(trained: Any) -> None:
    model, example, space, optimizer = trained
    seen: list[tuple[int, ...]] = []
    model.a.weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    bank = shrink_(model, space, half(space), optimizer)
    step(model, optimizer, example, steps=1)
    bank.restore_()
    step(model, optimizer, example, steps=1)
    assert seen == [(3, 3, 3, 3), (5, 6, 3, 3)]


def test_post_accumulate_hooks_survive(trained: Any) -> None:
    model, example, space, optimizer = trained
    seen: list[tuple[int, ...]] = []
    model.a.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    bank = shrink_(model, space, half(space), optimizer)
    step(model, optimizer, example, steps=1)
    bank.restore_()
    step(model, optimizer, example, steps=1)
    assert seen == [(3, 3, 3, 3), (5, 6, 3, 3)]


def test_frozen_parameters_stay_frozen_and_are_cut() -> None:
    model, example = zoo.build("plain"), zoo.inputs("plain")
    model.a.requires_grad_(False)
    space = zoo.space("plain")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    step(model, optimizer, example)
    bank = shrink_(model, space, half(space), optimizer)
    assert not model.a.weight.requires_grad
    assert model.a.weight.shape == (3, 3, 3, 3)
    step(model, optimizer, example)
    bank.restore_()
    assert not model.a.weight.requires_grad


class Replacing(nn.Module):
    """c3(3, 6) minus a running mean whose buffer is another object after every forward -> 1x1(6, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 2, 3)).reshape(-1, 1, 1)
        return self.b(torch.relu(h - self.mean))


def test_a_buffer_that_the_forward_replaces_is_cut_all_the_same() -> None:
    """It would broadcast without a word if one unit of it were left; and it comes back as the forward left it."""
    torch.manual_seed(0)
    model, x = Replacing(), torch.randn(2, 3, 8, 8)
    space = trace(model, x)
    keep = space.everything()
    keep[space.removable.nonzero().flatten()[1:]] = False
    bank = shrink_(model, space, keep)
    model(x)
    mean = model.mean.clone()
    bank.restore_()
    assert model.mean.shape == (6, 1, 1)
    assert torch.equal(model.mean[:1], mean)
    model(x)
    bank.resize_(keep)
    assert model.mean.shape == (1, 1, 1)
