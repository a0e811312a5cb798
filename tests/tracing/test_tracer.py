"""What tracing finds: expected units per model (the proof cannot see over-freezing), reasons, and bad input."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import zoo
from torchgrow import Frozen, Space, TraceError, trace, verify
from torchgrow.lab.models import VGG16, ResNet, WideResNet
from torchgrow.tracing.dispatch import ValuesRead
from torchgrow.tracing.tracer import Tracer, replay

# What every model has: its first weights read the inputs, its last ones write the outputs.
USUAL = {"reads values that cannot be removed", "is an output of the model"}

LOOKED_UP = {"looks rows up by index"}
MEETS = {"operands with different or no labels meet here"}
STATISTICS = "takes statistics over this axis"

# Removable units per group, worked out from the drawings, and the reasons for what is frozen beyond the usual.
EXPECTED: dict[str, tuple[dict[str, int], set[str]]] = {
    "plain": ({"a": 6, "b": 5}, set()),
    "plain-bias": ({"a": 6, "b": 5}, set()),
    "residual": ({"stem": 6, "a": 5}, set()),
    "preact": ({"stem": 5, "a": 7, "b": 6}, set()),
    "concat": ({"a": 4, "b": 5, "c": 6}, set()),
    "dense": ({"stem": 4, "a": 3, "b": 3}, set()),
    "depthwise": ({"a": 6, "p": 5}, set()),
    "grouped": ({"a": 4, "p": 5}, {"every group keeps all its inputs: whole groups are the units"}),
    "grouped-2": ({"a": 4, "g": 6, "p": 5}, set()),
    "squeeze-excite": ({"a": 6, "down": 3, "b": 5}, set()),
    "shuffle": ({"a": 4, "b": 6}, set()),
    "chunk": ({"a": 4, "b": 5}, set()),
    "gated": ({"a": 6, "b": 5}, set()),
    "unequal-split": ({"b": 6}, {"takes a part of this axis at a place fixed in the forward"}),
    "number-pad": ({"stem": 4, "a": 6}, {"meets values that cannot be removed"}),
    "buffer-pad": ({"stem": 4, "a": 6, "b": 2, "b#2": 2}, set()),
    "shared": ({"stem": 6}, set()),
    "tied": ({"stem": 5}, set()),
    "gate-around": ({"a": 6, "b": 5}, set()),
    "sigmoid": ({"a": 6, "b": 5}, set()),
    "norm-only": ({"a": 6, "b": 5}, set()),
    "group-norm": ({"a": 4}, {"takes statistics over all channels"}),
    "flatten": ({"a": 5, "f1": 7}, set()),
    "cumsum": ({"b": 5}, {"mixes values along this axis"}),
    "fourier": ({"a": 6, "b": 5}, set()),
    "transposed": ({"a": 6, "up.weight[1]": 5}, set()),
    "two-outputs": ({"a": 6}, set()),
    "two-inputs": ({"a": 6, "b": 5}, set()),
    "raw-scale": ({"scale[0]": 6, "b": 5}, set()),
    "unused": ({"net.a": 6, "net.b": 5}, {"is not used by the forward"}),
    "buffers": ({"a": 6, "b": 5}, set()),
    "thin-middle": ({"a": 4, "d": 4}, set()),
    "attention": ({}, {"mixes values along this axis"}),
    "transposed-groups": ({"a": 4}, {"every group keeps all its outputs: whole groups are the units"}),
    "transposed-slots": ({"a": 4, "up.weight[1]": 6}, set()),
    "lstm": ({"embed.weight[1]": 6, "rnn.weight_ih_l0[0]": 5}, LOOKED_UP),
    "lstm-bidirectional": ({"embed.weight[1]": 6, "rnn.weight_ih_l0[0]": 5}, LOOKED_UP),
    "lstm-projected": (
        {"embed.weight[1]": 6, "rnn.weight_hh_l0[1]": 3},
        {*LOOKED_UP, "hidden_size must stay above proj_size, so only the projection can be narrowed"},
    ),
    "gru": ({"embed.weight[1]": 6, "rnn.weight_ih_l0[0]": 5}, LOOKED_UP),
    "rnn": ({"embed.weight[1]": 6, "rnn.weight_ih_l0[0]": 5}, LOOKED_UP),
    "packed": ({"a": 5, "rnn.weight_ih_l0[0]": 4}, set()),
    "states": ({"h": 4}, set()),
    "lstm-cell": ({"cell.weight_ih[0]": 5}, set()),
    "gru-cell": ({"cell.weight_ih[0]": 5}, set()),
    "rnn-cell": ({"cell.weight_ih[0]": 5}, set()),
    "heads": ({"q": 4}, MEETS),
    "heads-grouped": ({"q": 2}, MEETS),
    "heads-rotary": ({"q": 4}, MEETS),
    "heads-by-hand": ({"q": 4}, MEETS),
    "heads-counted": ({"qkv": 4}, set()),
    "multihead": ({"a": 6, "o.weight[1]": 6, "attention.in_proj_weight[0]": 3}, set()),
    "multihead-extra": ({"a": 6, "o.weight[1]": 6, "attention.in_proj_weight[0]": 3}, set()),
    "encoder": ({"layers.0.self_attn.in_proj_weight[0]": 2, "layers.0.linear1": 5}, {*MEETS, STATISTICS}),
    "decoder": (
        {"self_attn.in_proj_weight[0]": 2, "multihead_attn.in_proj_weight[0]": 2, "linear1": 5},
        {*MEETS, STATISTICS},
    ),
    "experts": ({"up[1]": 5}, {"mixes values along this axis", "takes one index of this axis"}),
    "vectors": ({"w[0]": 5}, set()),
    "two-sides": ({"a": 5, "b": 4, "mix": 6}, set()),
    "bag": ({"bag.weight[1]": 6}, LOOKED_UP),
    "shared-keys": ({"q": 2}, {STATISTICS}),
    "interleaved": ({"a": 2, "b": 5}, set()),
    "windows": ({"a": 4, "mix": 2, "b": 5}, set()),
    "weight-norm": ({"a.bias[0]": 6, "b.bias[0]": 5}, set()),
    "unpooled": ({"a": 6, "c": 5}, set()),
}

# (units, groups) of the models people use; all their units are removable.
BIG: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # 3 inner widths of 3 blocks, 9 groups; the stages share their first channels, shortcuts add 2 x 2 pads
    "resnet20-A": (ResNet, 3 * (16 + 32 + 64) + 64, 9 + 1 + 2 + 2),
    "resnet20-B": (lambda: ResNet(shortcut="B"), 3 * (16 + 32 + 64) + 16 + 32 + 64, 9 + 3),
    "vgg16": (VGG16, 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512, 13),
    # 6 inner widths, 3 stages and the stem
    "wrn-16-2": (lambda: WideResNet(depth=16, widen=2), 16 + 3 * (32 + 64 + 128), 10),
    "resnet18": (torchvision.models.resnet18, 3 * (64 + 128 + 256 + 512), 12),
    "resnet50": (torchvision.models.resnet50, 11456, 37),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, 8696, 30),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 9128, 25),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 4872, 27),
}


def live_widths(space: Space) -> dict[str, int]:
    return space.widths(space.everything())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_units_and_reasons_of_the_zoo(name: str) -> None:
    space = zoo.space(name)
    units, reasons = EXPECTED[name]
    assert live_widths(space) == units
    assert {frozen.reason for frozen in space.frozen} - USUAL == reasons
    assert bool(space.removable.all()), "the proof had to freeze something"


@pytest.mark.parametrize("name", BIG)
def test_units_of_known_networks(name: str) -> None:
    build, units, groups = BIG[name]
    space = replay(build(), torch.randn(1, 3, 32, 32))
    assert (space.n_units, space.n_groups) == (units, groups)
    assert {frozen.reason for frozen in space.frozen} == USUAL


@pytest.mark.parametrize("name", ["residual", "concat", "shuffle", "two-inputs"])
def test_batch_size_and_mode_do_not_matter(name: str) -> None:
    model = zoo.build(name)
    once, again = replay(model.train(), zoo.inputs(name, batch=1)), replay(model.eval(), zoo.inputs(name, batch=3))
    assert once.unit_of.keys() == again.unit_of.keys()
    assert all(torch.equal(once.unit_of[place], again.unit_of[place]) for place in once.unit_of)
    assert (once.batch, again.batch) == (1, 3)


@pytest.mark.parametrize("name", BIG)
def test_layout_does_not_matter(name: str) -> None:
    """Pooling a channels_last image to one pixel ends with an `as_strided_` that moves nothing."""
    model, x = BIG[name][0](), torch.randn(2, 3, 32, 32)
    once, again = replay(model, x), replay(model, x.contiguous(memory_format=torch.channels_last))
    assert once.unit_of.keys() == again.unit_of.keys()
    assert all(torch.equal(once.unit_of[place], again.unit_of[place]) for place in once.unit_of)
    assert [frozen.reason for frozen in once.frozen] == [frozen.reason for frozen in again.frozen]


def test_a_tensor_that_is_really_laid_out_anew_is_kept_whole() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.second(y.as_strided_((4, 4), (1, 4)))

    space = replay(Transposed(), torch.randn(4, 3))
    assert not bool(space.removable.any())
    assert "aten.as_strided_" in str(space.frozen)


def test_a_line_outside_of_the_model_is_never_blamed() -> None:
    """Where all modules are torch's, the innermost other frame is that of whoever asked."""
    space = replay(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)), torch.randn(5, 3))
    assert {frozen.line for frozen in space.frozen} == {""}
    assert "1: aten._softmax: mixes values along this axis [0.weight[0]]" in [str(frozen) for frozen in space.frozen]


def test_a_line_of_the_lab_is_named_like_any_other() -> None:
    space = replay(ResNet(), torch.randn(1, 3, 8, 8))
    assert any(frozen.line.startswith("models.py:") for frozen in space.frozen)


def test_every_axis_has_a_vector_of_its_size() -> None:
    for name in zoo.ZOO:
        model = zoo.build(name)
        space = replay(model, zoo.inputs(name))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert space.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            for axis, size in enumerate(tensor.shape):
                vector = space.unit_of[key, axis]
                assert vector.shape == (size,)
                assert vector.dtype == torch.int64
        assert space.group_of.shape == space.removable.shape


def test_vectors_of_a_concatenation_and_a_flatten() -> None:
    space = replay(zoo.build("concat"), zoo.inputs("concat"))
    a, b = space.unit_of["a.weight", 0], space.unit_of["b.weight", 0]
    assert torch.equal(space.unit_of["c.weight", 1], torch.cat([a, b]))
    assert torch.equal(space.unit_of["bn.running_var", 0], torch.cat([a, b]))
    space = replay(zoo.build("flatten"), zoo.inputs("flatten"))
    assert torch.equal(space.unit_of["f1.weight", 1], space.unit_of["a.weight", 0].repeat_interleave(16))


def test_frozen_names_operation_module_and_line() -> None:
    space = replay(zoo.build("cumsum"), zoo.inputs("cumsum"))
    (frozen,) = [f for f in space.frozen if f.op == "aten.cumsum"]
    assert frozen.places == (("a.weight", 0),)
    assert frozen.line.startswith("zoo.py:")
    assert str(frozen).startswith("model: aten.cumsum (zoo.py:")
    assert str(frozen).endswith("mixes values along this axis [a.weight[0]]")
    (output,) = [f for f in space.frozen if f.op == "output"]
    assert output.line == ""


def gates(name: str) -> dict[str, int]:
    """Number of gates per place."""
    space = replay(zoo.build(name), zoo.inputs(name))
    return {f"{place[0]}[{place[1]}]": int((units >= 0).sum()) for place, units in space.fold.items()}


def test_gates_sit_on_the_last_affine_map_or_on_what_reads() -> None:
    assert gates("plain") == {"bn.weight[0]": 6, "bn.bias[0]": 6, "b.weight[0]": 5, "b.bias[0]": 5}
    # where zero does not survive to the reader, the reader's columns carry the gates
    b = {"b.weight[0]": 5, "b.bias[0]": 5}
    assert gates("sigmoid") == {"b.weight[1]": 6, **b}
    assert gates("norm-only") == {"b.weight[1]": 6, **b}
    assert gates("gate-around") == {"b.weight[1]": 6, **b}
    # a GLU is silent where its value half is
    assert gates("gated") == {"a.weight[0]": 12, "a.bias[0]": 12, **b}


class Doubling(nn.Module):
    """Fails on anything but 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def ddp() -> nn.Module:
    """A DistributedDataParallel without processes."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = zoo.build("plain")
    return wrapped


def with_a_compiled_layer() -> nn.Module:
    model = Doubling()
    model.fc = torch.compile(model.fc)  # type: ignore[assignment]
    return model


def over_two_devices() -> nn.Module:
    model = zoo.build("plain")
    model.fc.to("meta")
    return model


def sparse() -> nn.Module:
    model = zoo.build("plain")
    model.s = nn.Parameter(torch.eye(3).to_sparse())
    return model


IMAGE = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (lambda: "resnet", IMAGE, r"must be a torch.nn.Module, got str"),
        (Doubling, None, r"holds no tensor; pass a small batch .*images\[:2\]"),
        (Doubling, (), r"holds no tensor"),
        (Doubling, {}, r"holds no tensor"),
        (Doubling, torch.zeros(2, 3, 9, 9), r"forward failed on example_inputs of shapes \[\(2, 3, 9, 9\)\]: RuntimeE"),
        (Doubling, {"y": IMAGE}, r"unexpected keyword argument 'y'.*; pass inputs that model\(\.\.\.\) accepts"),
        (Doubling, (IMAGE, IMAGE), r"TypeError"),
        (ddp, IMAGE, r"wrapped in DistributedDataParallel; pass model\.module"),
        (lambda: nn.DataParallel(Doubling()), IMAGE, r"wrapped in DataParallel; pass model\.module"),
        (lambda: torch.compile(Doubling()), IMAGE, r"compiled; pass the plain module \(model\._orig_mod\)"),
        (
            with_a_compiled_layer,
            IMAGE,
            r"layer 'fc' is a torch\.compile.* compile it in place, model\.fc\.compile\(\), or",
        ),
        (over_two_devices, IMAGE, r"spread over cpu, meta; move it to one device"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), IMAGE, r"0\.weight is not materialised yet; run one forward"),
        (sparse, IMAGE, r"s is torch\.sparse_coo.*only dense tensors"),
    ],
)
def test_bad_input_gets_an_error_with_the_fix(model: Callable[[], nn.Module], example: object, text: str) -> None:
    with pytest.raises(TraceError, match=text):
        trace(model(), example)


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = zoo.build("buffers").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TraceError):
        trace(model, torch.zeros(2, 4, 8, 8))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_nothing_to_remove_is_a_space_too() -> None:
    space = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), IMAGE)
    assert (space.n_units, space.n_groups, live_widths(space)) == (0, 0, {})
    assert {frozen.reason for frozen in space.frozen} == USUAL
    assert space.check_keep(space.everything()).shape == (0,)


def test_labels_of_raw_operations_do_not_outlive_an_in_place_write() -> None:
    class Stale(nn.Module):
        """y = c3(x);  y[:, :3] is overwritten by another layer's channels: neither may be cut alone"""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = zoo.c3(3, 6), zoo.c3(3, 3), zoo.c3(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:, :3] = self.b(x)
            return self.c(y)

    space = trace(Stale(), IMAGE)
    assert live_widths(space) == {}


def test_a_grouped_convolution_of_the_inputs_keeps_its_groups_even() -> None:
    """Each group must put out as many channels, whatever may be known of what enters."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1))
    space = trace(model, torch.randn(2, 6, 5, 5))
    assert live_widths(space) == {"0": 4}
    assert space.unit_of["0.weight", 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


class Reading(nn.Module):
    """Which way it goes depends on values that a convolution and a product have made, found in several ways."""

    def __init__(self, how: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.one, self.other, self.how = nn.Conv2d(3, 6, 1), nn.Linear(6, 4), nn.Linear(6, 4), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x)).mean((2, 3))
        return self.one(y) if self.how(y) else self.other(y)


READINGS: dict[str, Callable[[torch.Tensor], bool]] = {
    "if": lambda y: bool(y.sum() > 0),
    "item": lambda y: y.sum().item() > 0,
    "tolist": lambda y: y.sum(1).tolist()[0] > 0,
    "numpy": lambda y: y.detach().numpy().sum() > 0,
    "list": lambda y: sum(float(value) for value in y[0]) > 0,
    "nonzero": lambda y: len(y.nonzero()) > 0,
    "mask": lambda y: y[y > 0].numel() > 0,
    "equal": lambda y: not torch.equal(y, torch.zeros_like(y)),
    "unique": lambda y: y.unique().numel() > 1,
    "quietly": lambda y: _caught(y),
}


def _caught(y: torch.Tensor) -> bool:
    try:
        return y.sum().item() > 0
    except Exception:  # such as a forward may have; tracing must not be led astray by it
        return False


@pytest.mark.parametrize("name", READINGS)
def test_a_forward_that_looks_at_values_sees_the_real_ones(name: str) -> None:
    """Tracing leaves out the costly operations until somebody looks: then it starts again with all of them."""
    torch.manual_seed(0)
    space = replay(Reading(READINGS[name]), torch.rand(2, 3, 4, 4))
    assert {frozen.op for frozen in space.frozen if frozen.places[0][0].startswith("other")} == {"unused"}
    assert not any(frozen.op == "unused" and frozen.places[0][0].startswith("one") for frozen in space.frozen)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_labels_need_no_values(name: str) -> None:
    """The same space, whether convolutions and products are computed or not."""
    model, example = zoo.build(name), zoo.inputs(name)
    spaces = []
    for values in (False, True):
        tracer = Tracer(model, values=values)
        try:
            tracer.run(example)
        except ValuesRead:
            assert not values
            return
        spaces.append(tracer.context.found.space(2))
    a, b = spaces
    assert a.unit_of.keys() == b.unit_of.keys()
    assert all(torch.equal(a.unit_of[place], b.unit_of[place]) for place in a.unit_of)
    assert a.frozen == b.frozen
    assert [(t.constant, t.module) for t in a.flops] == [(t.constant, t.module) for t in b.flops]
    assert a.fold.keys() == b.fold.keys()
    assert all(torch.equal(a.fold[place], b.fold[place]) for place in a.fold)


class Standardised(nn.Module):
    """Weights normalised by a batch norm of their own that has a scale and no offset, as NFNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.gain = nn.Parameter(torch.ones(6, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv.weight.flatten(1)[None]
        scaled = nn.functional.batch_norm(weight, None, None, weight=self.gain.view(-1), training=True)
        y = nn.functional.conv2d(x, scaled.reshape_as(self.conv.weight), self.conv.bias)
        return self.head(torch.relu(y).mean((2, 3)))


def test_a_scale_without_an_offset_belongs_to_its_channels() -> None:
    x = torch.randn(2, 3, 6, 6)
    space = trace(Standardised(), x)
    assert int(space.removable.sum()) == 6
    assert torch.equal(space.unit_of["gain", 0], space.unit_of["conv.weight", 0])
    assert verify(Standardised(), x).ok


class Beside(nn.Module):
    """Runs a wide layer whose width must stay, and has a convolution that nothing uses"""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Conv2d(2, 4, 3).requires_grad_(False)
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 40), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.a(x))).sort(-1).values)


def test_what_keeps_most_parameters_is_said_first_and_kernels_are_not() -> None:
    """Report, summaries and errors show the beginning of one list."""
    space = replay(Beside(), torch.randn(4, 3))
    concerned = [{name for name, _ in frozen.places} for frozen in space.frozen]
    sizes = [sum(dict(Beside().named_parameters())[name].numel() for name in names) for names in concerned]
    assert sizes == sorted(sizes, reverse=True)
    assert concerned[0] >= {"b.weight"}
    assert [frozen.places for frozen in space.frozen if frozen.op == "unused"] == [
        (("idle.weight", 0), ("idle.weight", 1), ("idle.bias", 0))
    ]
    later = space.freeze([0], Frozen("proof", "b", "", "is kept", (("b.weight", 0), ("c.weight", 1))))
    assert later.frozen[0].op == "proof"
