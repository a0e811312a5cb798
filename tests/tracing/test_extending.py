"""What users can teach: named freezes and couplings, rules, module rules, adapters; the document is run as it is."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
import zoo_sequences
from damage import reseal
from torchgrow import (
    Budget,
    Context,
    Grower,
    SavedModelError,
    TorchgrowError,
    TraceError,
    adapter,
    load,
    save,
    shrink_,
    trace,
    verify,
)
from torchgrow.adapters.registry import ADAPTERS, adapt_, adaptable, adapted
from torchgrow.tracing.model_call import call
from torchgrow.tracing.prover import Prover
from torchgrow.tracing.rules.registry import MODULE_RULES, RULES
from torchgrow.tracing.tracer import replay

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"

CHECKS = """
class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(6, 6), nn.Linear(6, 3), middle
    def forward(self, x):
        return self.b(self.middle(self.a(x)))

x = torch.randn(2, 6)
for middle, widths in [
    (torch.ops.mine.wobble.default, {"a": 6}), (Wobble(), {"a": 6}), (Fixed(), {"a": 6, "middle.up": 12, "b[1]": 6})
]:
    net = Net(None)
    net.middle = middle if isinstance(middle, nn.Module) else None
    if net.middle is None:
        net.__dict__["middle"] = middle
    report = torchgrow.verify(net, x)
    assert report.ok and sum(report.groups.values()) == sum(widths.values()), report
print("all exact")
"""


def test_the_document_does_what_it_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 5
    assert all(block.count("\n") <= 16 for block in blocks)
    script = tmp_path / "document.py"
    script.write_text("\n".join(blocks) + CHECKS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "all exact\n", done.stderr


@pytest.mark.parametrize(
    ("protect", "left"),
    [
        (["stem"], {"a": 5}),
        (["a.*"], {}),  # its columns read the stem
        ([("a.weight", 0)], {"stem": 6}),
        (["fc.weight"], {"a": 5}),
        (["bn1.running_mean"], {"stem": 6}),
    ],
)
def test_named_parts_keep_their_shape(protect: list[str | tuple[str, int]], left: dict[str, int]) -> None:
    model, example = zoo.build("residual"), zoo.inputs("residual")
    space = trace(model, example, protect=protect)
    assert space.widths(space.everything()) == left
    assert "was named to stay as it is" in {frozen.reason for frozen in space.frozen}
    assert verify(model, example, protect=protect).groups == left
    assert verify(model, example).groups == {"stem": 6, "a": 5}, "and only for as long as one says so"


def test_couplings_cut_alike() -> None:
    model, example = zoo.build("concat"), zoo.inputs("concat")
    free = trace(model, example)
    assert free.widths(free.everything()) == {"a": 4, "b": 5, "c": 6}
    with pytest.raises(TraceError, match=r"\('a.weight', 0\) of 4 positions and .* of 5; only axes of the same length"):
        trace(model, example, couple=[(("a.weight", 0), ("b.weight", 0))])
    space = trace(zoo.build("plain"), zoo.inputs("plain"), couple=[(("b.weight", 0), ("fc.weight", 1))])
    assert space.widths(space.everything()) == {"a": 6, "b": 5}
    both = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    tied = trace(both, torch.randn(2, 3), couple=[(("0.weight", 0), ("2.weight", 0))])
    assert tied.n_units == 6
    assert torch.equal(tied.unit_of["0.weight", 0], tied.unit_of["4.weight", 1])


@pytest.mark.parametrize("argument", ["protect", "couple"])
def test_unknown_names_are_answered_with_close_ones(argument: str) -> None:
    value = ["stam.weight"] if argument == "protect" else [(("stam.weight", 0), ("a.weight", 0))]
    with pytest.raises(
        TraceError, match=rf"{argument} names .*stam.weight.* close are stem.weight \(axes \[0, 1, 2, 3\]\)"
    ):
        trace(zoo.build("residual"), zoo.inputs("residual"), **{argument: value})  # type: ignore[arg-type]


def test_a_grower_takes_both() -> None:
    model = zoo.build("residual")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grower = Grower(
        model,
        optimizer,
        example_inputs=zoo.inputs("residual"),
        budget=Budget(params="80%"),
        updates=2,
        protect=["stem"],
    )
    assert grower.widths() == {"a": 1}
    assert model.stem.out_channels == 6


# --- adapters -------------------------------------------------------------------------------------------------------


def attention_cases() -> list[tuple[str, dict[str, object], dict[str, object]]]:
    causal = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    per_head = torch.randn(2 * 3, 4, 4)
    return [
        ("plain", {}, {}),
        ("no weights", {}, {"need_weights": False}),
        ("weights of each head", {}, {"average_attn_weights": False}),
        ("sequence first", {"batch_first": False}, {}),
        ("mask", {}, {"attn_mask": causal}),
        ("mask and padding", {}, {"attn_mask": causal, "key_padding_mask": padding}),
        ("padding, no weights", {}, {"key_padding_mask": padding, "need_weights": False}),
        ("causal", {}, {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        ("mask per head", {}, {"attn_mask": per_head}),
        ("no bias", {"bias": False}, {}),
        ("extra keys", {"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": padding}),
        ("own widths", {"kdim": 6, "vdim": 6, "bias": False}, {}),
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("case", "build", "call"), attention_cases(), ids=lambda case: case if isinstance(case, str) else ""
)
def test_adapted_attention_computes_the_same(
    case: str, build: dict[str, object], call: dict[str, object], training: bool
) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 3, **{"batch_first": True, **build}).train(training)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    q, k = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    if not build.get("batch_first", True):
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    with torch.set_grad_enabled(training):
        expected, weights = module(q, k, k.flip(0), **call)
        with adapted(module):
            found, again = module(q, k, k.flip(0), **call)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, weights)
    assert type(module) is nn.MultiheadAttention


def test_adapted_attention_of_one_sequence() -> None:
    module, x = nn.MultiheadAttention(6, 3), torch.randn(4, 6)
    expected = module(x, x, x)
    with adapted(module):
        torch.testing.assert_close(module(x, x, x), expected)
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            module(x, x, x, is_causal=True)


def test_encoders_compute_the_same_with_padding_in_evaluation() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 5, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 4, 6), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        expected = model(x, src_key_padding_mask=padding)
        with adapted(model):
            found = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


def swin_and_maxvit() -> list[tuple[str, nn.Module, torch.Tensor]]:
    from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    torch.manual_seed(1)
    grid = torch.randn(2, 7, 9, 12)  # neither side is a multiple of the window
    film = torch.randn(2, 3, 5, 4, 12)
    return [
        ("swin", ShiftedWindowAttention(12, [4, 4], [0, 0], 3), grid),
        ("swin shifted", ShiftedWindowAttention(12, [4, 4], [2, 2], 3), grid),
        ("swin shifted one way", ShiftedWindowAttention(12, [8, 4], [2, 2], 3), grid),
        ("swin v2 shifted", ShiftedWindowAttentionV2(12, [4, 4], [2, 2], 3), grid),
        ("swin 3d", ShiftedWindowAttention3d(12, [2, 4, 4], [0, 0, 0], 3), film),
        ("swin 3d shifted", ShiftedWindowAttention3d(12, [2, 4, 4], [1, 2, 2], 3), film),
        ("maxvit", RelativePositionalMultiHeadAttention(12, 4, 9), torch.randn(2, 5, 9, 12)),
    ]


@pytest.mark.parametrize(
    ("name", "module", "x"), swin_and_maxvit(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_window_attention_computes_the_same_and_loses_heads(name: str, module: nn.Module, x: torch.Tensor) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    expected = module(x)
    with adapted(module):
        torch.testing.assert_close(module(x), expected)
    report = verify(module, x, fraction=0.4)
    assert report.ok, report
    assert 3 in report.groups.values(), report


def test_what_was_adapted_is_recorded_and_comes_back(tmp_path: Path) -> None:
    model, example = zoo.build("multihead").eval(), zoo.inputs("multihead")
    space = zoo.space("multihead")
    keep = space.everything()
    heads = next(g for g, name in enumerate(space.group_names) if name.startswith("attention"))
    keep[torch.nonzero(space.group_of == heads)[1]] = False
    bank = shrink_(model, space, keep)
    assert model.attention.num_heads == 2
    expected = model(example)
    save(model, tmp_path / "net")
    torch.testing.assert_close(load(tmp_path / "net", lambda: zoo.build("multihead")).eval()(example), expected)
    bank.restore_()
    assert model.attention.num_heads == 3
    record = tmp_path / "net" / "structure.json"
    structure = json.loads(record.read_text())
    assert structure["adapted"] == ["attention"]
    record.write_text(json.dumps({**structure, "adapted": ["a"]}))
    reseal(record.parent, record.name, "model.safetensors")
    with pytest.raises(SavedModelError, match="'a' is Linear, which has no adapter"):
        load(tmp_path / "net", lambda: zoo.build("multihead"))


def test_only_what_can_be_cut_is_adapted() -> None:
    model, example = zoo.build("multihead"), zoo.inputs("multihead")
    space = trace(model, example, protect=["attention"])
    shrink_(model, space, space.everything())
    assert type(model.attention) is nn.MultiheadAttention


def test_an_adapter_that_computes_something_else_is_refused() -> None:
    class Twice(nn.Linear):
        pass

    class Wrong(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    adapter(Twice)(Wrong)
    try:
        with pytest.raises(
            TraceError, match=r"adapters in place of Wrong change the model's outputs by [0-9.]+e[-+]0[01]"
        ):
            trace(nn.Sequential(Twice(3, 5), nn.Linear(5, 2)), torch.randn(4, 3))
    finally:
        del ADAPTERS[Twice]


def test_adapters_must_be_subclasses_and_known() -> None:
    with pytest.raises(TorchgrowError, match="Linear must be a subclass of Conv2d"):
        adapter(nn.Conv2d)(nn.Linear)
    with pytest.raises(TorchgrowError, match="'nowhere' is NoneType, which has no adapter"):
        adapt_(zoo.build("plain"), ["nowhere"])
    assert adaptable(zoo.build("encoder")) == ["", "layers.0", "layers.0.self_attn"]
    assert nn.MultiheadAttention in ADAPTERS


# --- the rest of what tracing promises ------------------------------------------------------------------------------


def test_without_a_rule_an_operation_freezes_and_with_one_it_does_not() -> None:
    class Fold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.rot90(self.a(x), 2))

    example = torch.randn(4, 3)
    assert "aten.rot90" in str(verify(Fold(), example))

    RULES["rot90"] = RULES["relu"]  # wrong: it turns the order round
    try:
        space = trace(Fold(), example)
    finally:
        del RULES["rot90"]
    assert not space.removable.any(), "a wrong rule is caught by the proof"
    assert any(frozen.op == "proof" for frozen in space.frozen)


class Middle(nn.Module):
    """a(3, 6) -> what is given -> b(6, 4) -> relu -> c(4, 2)"""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.middle = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(self.middle(self.a(x)))))


def in_place(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y.view(-1, 3, 2)[:, 0].sinh_()
    return y


def failing(context: Context, func: object, named: dict[str, object], out: torch.Tensor) -> None:
    """A rule that has already passed labels on, and lost an argument, when it fails."""
    context.set_labelled(out, context.labelled(named.pop(next(iter(named)))))  # type: ignore[arg-type]
    raise ValueError("no such axis\nand more")


@pytest.mark.parametrize(
    ("middle", "where"),
    [(torch.sinh, "model: aten.sinh (test_extending.py:"), (in_place, "model: aten.sinh_ (test_extending.py:")],
)
def test_a_rule_that_fails_keeps_what_enters_as_if_there_were_none(
    middle: Callable[[torch.Tensor], torch.Tensor], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "sinh", failing)
    space = trace(Middle(middle), torch.randn(5, 3))
    assert space.widths(space.everything()) == {"b": 4}
    (frozen,) = [frozen for frozen in space.frozen if frozen.op.startswith("aten.sinh")]
    assert str(frozen).startswith(where)
    assert frozen.places == (("a.weight", 0),)
    assert frozen.reason == "has a rule that failed (ValueError: no such axis), so what enters it is kept"


def test_a_module_rule_that_fails_keeps_what_enters_and_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE_RULES, nn.PReLU, failing)
    space = trace(Middle(nn.PReLU(6)), torch.randn(5, 3))
    assert space.widths(space.everything()) == {"b": 4}
    (frozen,) = [frozen for frozen in space.frozen if frozen.op == "PReLU"]
    assert frozen.module == "middle"
    assert frozen.places == (("a.weight", 0), ("middle.weight", 0))
    assert "a rule that failed (ValueError: no such axis)" in frozen.reason


def test_a_result_nobody_reads_costs_no_freedom() -> None:
    class Watched(nn.Module):
        def __init__(self, read: bool) -> None:
            super().__init__()
            self.a, self.b, self.read = nn.Linear(3, 6), nn.Linear(6, 2), read

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            mean = y.mean(-1, keepdim=True)
            return self.b(y) + (mean if self.read else 0)

    x = torch.randn(4, 3)
    assert verify(Watched(False), x).units == 6
    report = verify(Watched(True), x)
    assert report.units == 0
    assert "reduces over this axis" in str(report)


@pytest.mark.parametrize("name", ["plain", "residual", "heads", "lstm", "multihead", "heads-rotary"])
def test_meta_frames_have_the_same_units(name: str) -> None:
    model, example = zoo.build(name), zoo.inputs(name)
    real = replay(model, example)
    space = trace(model.to("meta"), example)
    assert not space.proven
    assert space.unit_of.keys() == real.unit_of.keys()
    assert all(torch.equal(space.unit_of[place], real.unit_of[place]) for place in real.unit_of)
    with pytest.raises(TraceError, match=r"on the meta device, where nothing can be proven; use trace"):
        verify(model, example)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if name == "heads-rotary":  # a parameter of its own, of which nothing says how it begins
        with pytest.raises(TraceError, match=r"nothing says how angle begins: give Heads a reset_parameters\(\)"):
            Grower(model, optimizer, example_inputs=example, budget=Budget(params="90%"), updates=1)
        return
    grower = Grower(model, optimizer, example_inputs=example, budget=Budget(params="90%"), updates=1)
    grower.update()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert call(model, example) is not None


def test_values_decide_on_the_meta_device_too() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            place = torch.arange(x.shape[1], device=x.device)
            y = self.embed(x)
            return self.out(y if (place >= 0).all() and int(x.max()) < 5 else y[..., :3])

    space = trace(Careful().to("meta"), torch.tensor([[1, 2, 4]]))
    assert space.widths(space.everything()) == {"embed.weight[1]": 6}


def test_attributes_that_count_follow_and_come_back() -> None:
    model, example = zoo.build("heads-counted").eval(), zoo.inputs("heads-counted")
    space = zoo.space("heads-counted")
    assert {(a.module, a.name) for a in space.attributes} >= {("", "num_heads"), ("", "all_head_size")}
    keep = space.everything()
    keep[1] = False
    bank = shrink_(model, space, keep)
    assert (model.num_heads, model.all_head_size, model.qkv.out_features) == (3, 9, 27)
    model(example)
    bank.restore_()
    assert (model.num_heads, model.all_head_size, model.qkv.out_features) == (4, 12, 36)


def test_an_attribute_that_cannot_follow_leaves_its_group_whole() -> None:
    class Elsewhere(zoo_sequences.CountedHeads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.num_heads = 4  # whatever surgery says
            return super().forward(x)

    space = trace(Elsewhere(), zoo.inputs("heads-counted"))
    assert not space.removable.any()
    assert any("the compact network fails" in str(frozen) for frozen in space.frozen)


def test_hidden_size_must_stay_above_a_projection() -> None:
    model, example = zoo.build("lstm-projected"), zoo.inputs("lstm-projected")
    space = zoo.space("lstm-projected")
    prover = Prover(model, space, example, seed=0)
    smallest = space.everything()
    for group in range(space.n_groups):
        units = torch.nonzero((space.group_of == group) & space.removable).flatten()
        smallest[units[1:]] = False
    assert prover.error(smallest)[0] < 1e-12


def test_recurrent_rules_serve_exact_classes_only() -> None:
    class Mine(nn.LSTM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)[0].flip(-1)

    assert Mine not in MODULE_RULES
    report = verify(nn.Sequential(Mine(3, 4), nn.Linear(4, 2)), torch.randn(5, 2, 3))
    assert report.units == 0, "an LSTM seen from outside has no rule"
