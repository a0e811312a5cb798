"""`torchgrow inspect`: shares are those of really shrunk networks, JSON and tree agree, every error says the fix."""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import zoo
from torchgrow import Budget, Frozen, TorchgrowError, measure, shrink_, trace
from torchgrow.cli import app
from torchgrow.lab import inspect, recipes, sources
from torchgrow.lab.models import ResNet
from torchgrow.lab.names import DATASETS
from torchgrow.lab.recurrent import LSTM

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def build():
    print("noise on stdout")
    return Net(), torch.randn(2, 3, 8, 8)

def stiff():
    return nn.Linear(4, 3), torch.randn(2, 4)

def broken():
    raise ValueError("no such luck")

def seven():
    return 7

def leave():
    raise SystemExit("bye")

def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))

ready = Net()
ANSWER = 42
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(NETS)
    return "nets.py"


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments])


def plain(text: str) -> Any:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


# --- facts ---


def test_layers_are_asked_about_too() -> None:
    """What leaving a layer out frees is what all it holds costs."""
    build = partial(ResNet, depth=14, widths=(4, 6, 8), in_channels=1)
    inputs = torch.randn(2, 1, 8, 8)
    seen = inspect.inspect(build(), inputs, depth=True)
    layers = {part.name: part for part in seen.parts if part.name.endswith("(layer)")}
    assert list(layers) == ["layer1.1 (layer)", "layer2.1 (layer)", "layer3.1 (layer)"]
    model = build()
    for name, part in layers.items():
        path = name.removesuffix(" (layer)")
        assert (part.units, part.removable) == (1, 1)
        assert part.frees_params == sum(p.numel() for p in model.get_submodule(path).parameters())
    assert seen.exact
    assert seen.least_params < inspect.inspect(build(), inputs, proof=False).least_params
    assert "layer1.1 (layer)" in plain(invoke("digits", "--depth", "--json").stdout)


@pytest.mark.parametrize("name", ["Plain", "Residual", "Concat", "Depthwise"])
def test_shares_are_those_of_the_shrunk_network(name: str) -> None:
    build = getattr(zoo, name)
    inputs = torch.randn(2, 3, 8, 8)
    seen = inspect.inspect(build(), inputs, proof=False)
    frame = measure(build(), inputs)
    assert (seen.params, seen.flops) == (frame.params, frame.flops)
    assert seen.params == sum(p.numel() for p in build().parameters())
    groups = {part.name: part for part in seen.parts if part.units}
    space = trace(build(), inputs)
    assert set(groups) == set(space.group_names)
    smallest = space.everything()
    for index, group in enumerate(space.group_names):
        units = torch.nonzero((space.group_of == index) & space.removable).flatten()
        part, keep = groups[group], space.everything()
        assert (part.units, part.removable) == (int((space.group_of == index).sum()), len(units) - 1)
        keep[units[1:]] = smallest[units[1:]] = False
        model = build()
        shrink_(model, space, keep)
        left = sum(p.numel() for p in model.parameters())
        assert part.frees_params == frame.params - left
        assert part.params_share == pytest.approx(1 - left / frame.params)
        assert part.frees_flops == frame.flops - measure(model, inputs).flops
        assert part.flops_share == pytest.approx(part.frees_flops / frame.flops)
        assert part.frees_params <= part.touches <= frame.params
    model = build()
    shrink_(model, space, smallest)
    left = measure(model, inputs)
    assert (seen.least_params, seen.least_flops) == (left.params, left.flops)


def test_touched_parameters_are_counted_by_hand() -> None:
    """Of Plain's 6 channels: 6 x 27 weights, 2 x 6 of batch norm, and what the 5 of the next layer read of them."""
    seen = inspect.inspect(zoo.Plain(), torch.randn(2, 3, 8, 8), proof=False)
    assert {part.name: part.touches for part in seen.parts} == {
        "a": 6 * 27 + 2 * 6 + 5 * 6 * 9,
        "b": 5 * 6 * 9 + 5 + 4 * 5,
    }


def test_modules_kept_whole_stand_in_order() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
            self.up, self.down, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.last(x + self.down(torch.relu(self.up(x))))

    seen = inspect.inspect(Net(), torch.randn(2, 4), proof=False)
    assert [(part.name, part.units, part.touches) for part in seen.parts] == [
        ("first", 0, 30),
        ("norm", 0, 12),
        ("up", 8, 8 * 6 + 8 + 6 * 8),
        ("last", 0, 12),
    ]
    assert any("layer_norm" in reason.op for reason in seen.frozen)
    assert [reason.params for reason in seen.frozen] == sorted((r.params for r in seen.frozen), reverse=True)


def test_the_second_proof_is_run_unless_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    model, inputs = zoo.Plain(), torch.randn(2, 3, 8, 8)
    seen = inspect.inspect(model, inputs, tell=stages.append)
    assert seen.exact is True
    assert seen.proof.startswith("exact: relative error at most ")
    assert len(stages) == 2
    fake = SimpleNamespace(ok=False, max_error=0.5, trials=3)
    monkeypatch.setattr(inspect, "verify", lambda *arguments, **keywords: fake)
    assert inspect.inspect(model, inputs).proof.startswith("NOT EXACT: relative error at most 5.0e-01")
    seen = inspect.inspect(model, inputs, proof=False)
    assert seen.exact is None
    assert seen.proof == "each group came out exact while tracing (float64); the second proof was left out"


def test_reasons_that_differ_by_the_proofs_digits_are_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).cumsum(1)  # no rule
            return x

    seen = inspect.inspect(Net(), torch.randn(2, 4), proof=False)
    assert len(seen.frozen) == len({(reason.op, reason.reason) for reason in seen.frozen})
    twice = (
        Frozen("proof", "a", "", "outputs differ by 1.2e-01", (("a", 0),)),
        Frozen("proof", "b", "f.py:3", "outputs differ by 3.4e+00", (("b", 0), ("a", 0))),
        Frozen("proof", "", "", "fails", (("b.weight", 0),)),
    )
    assert [(r.reason, r.places, r.params, r.where) for r in inspect.reasons_of(twice, {"a": 7, "b.weight": 9})] == [
        ("fails", 1, 9, ("b.weight",)),
        ("outputs differ by 1.2e-01", 2, 7, ("a", "b (f.py:3)")),
    ]


def test_budgets() -> None:
    model, inputs = zoo.Plain(), torch.randn(2, 3, 8, 8)
    seen = inspect.inspect(model, inputs, budget=Budget(params="50%"), proof=False)
    assert (seen.feasible, seen.budget) == (True, "params <= 50%")
    assert seen.budget_verdict == f"feasible: params <= 50% allows {seen.params // 2:,} params"
    seen = inspect.inspect(model, inputs, budget=Budget(flops=1), proof=False)
    assert seen.feasible is False
    assert f"feasible here: flops from {seen.least_flops:,}" in seen.budget_verdict


# --- ways to show them ---


def test_json_and_tree_agree(file: Path) -> None:
    done = invoke("nets.py:build", "--json", "--budget", "36%")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)  # though the file prints
    assert facts["inputs"] == [[2, 3, 8, 8]]
    assert facts["exact"] is facts["feasible"] is True
    text = invoke("nets.py:build", "--budget", "36%").stdout
    assert [part["name"] for part in facts["parts"]] == ["body.0", "body.2"]
    assert "noise" not in text
    lines = {line.split()[1]: line.split()[2:] for line in text.splitlines() if "─ " in line and "/" in line}
    assert lines == {
        part["name"].rpartition(".")[2]: [
            f"{part['removable']}/{part['units']}",
            f"{part['params_share']:.1%}",
            f"{part['flops_share']:.1%}",
        ]
        for part in facts["parts"]
    }
    assert f"{facts['removable_params']:.1%} can go, down to {facts['least_params']}" in text
    assert f"{facts['removable_flops']:.1%} can go, down to " in text
    assert facts["removable_params"] == 1 - facts["least_params"] / facts["params"]
    assert facts["proof"] in plain(text)
    assert facts["budget_verdict"] in plain(text)
    for reason in facts["frozen"]:
        assert f"{reason['op']}: {reason['reason']}" in plain(text)
        assert reason["where"][0] in text


def test_the_tree_is_nested_as_names_are() -> None:
    def part(name: str) -> Any:
        return inspect.Part(
            name=name, units=2, removable=1, touches=1, frees_params=1, frees_flops=1, params_share=0.1, flops_share=0.1
        )

    names = ["stem", "layer.0.a", "layer.0.b", "layer.0", "layer.1.body.c", "head.fc"]
    lines = inspect.branches(tuple(part(name) for name in names))
    assert [(label, part and part.name) for label, part in lines] == [
        ("stem", "stem"),
        ("layer", None),
        ("├─ 0", "layer.0"),
        ("│  ├─ a", "layer.0.a"),
        ("│  └─ b", "layer.0.b"),
        ("└─ 1.body.c", "layer.1.body.c"),
        ("head.fc", "head.fc"),
    ]


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0.0%"), (0.0001, "<0.1%"), (0.25, "25.0%"), (0.9997, ">99.9%"), (1.0, "100.0%")]
)
def test_shares_never_round_to_nothing_or_all(share: float, text: str) -> None:
    assert inspect.percent(share) == text


def test_the_picture_names_every_group_and_equals_itself(file: Path, tmp_path: Path) -> None:
    done = invoke("nets.py:build", "--svg", "groups.svg", "--no-proof")
    assert done.exit_code == 0, done.output
    root = ElementTree.parse(tmp_path / "groups.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"body.0", "body.2", "5 of 6 units", "4 of 5 units"} <= set(words)
    assert [p.name for p in tmp_path.glob("groups*")] == ["groups.svg"]
    before = (tmp_path / "groups.svg").read_bytes()
    assert invoke("nets.py:build", "--svg", "groups.svg", "--no-proof").exit_code == 0
    assert (tmp_path / "groups.svg").read_bytes() == before


@pytest.mark.parametrize("place", ["nowhere/x.svg", "there"])
def test_a_picture_that_cannot_be_written_keeps_nothing_from_the_user(file: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = invoke("nets.py:build", "--svg", place, "--no-proof")
    assert done.exit_code == 1
    assert f"error: {place} cannot be written: " in plain(done.stderr)
    assert "can go, down to" in plain(done.stdout)
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before


def test_nothing_can_change(file: Path) -> None:
    done = invoke("nets.py:stiff")
    assert done.exit_code == 3
    assert "nothing can change" in done.output
    assert "output: is an output of the model" in plain(done.output.partition("nothing can change")[2])
    done = invoke("nets.py:stiff", "--json", "--svg", "stiff.svg")
    assert done.exit_code == 3
    facts = json.loads(done.stdout)
    assert facts["nothing_can_change"] is True
    assert facts["exact"] is None
    assert facts["proof"] == "nothing to prove"
    assert facts["least_params"] == facts["params"] == 15


def test_a_budget_out_of_reach_is_an_answer_and_a_failure(file: Path) -> None:
    done = invoke("nets.py:build", "--budget", "params=5", "--no-proof")
    assert done.exit_code == 1
    assert "allows 5 params, but what cannot be removed costs" in plain(done.output)


# --- models by name ---


def test_models_in_files(file: Path) -> None:
    assert invoke("nets.py:Net", "--input", "1x3x8x8", "--no-proof").exit_code == 0  # a class is a factory too
    done = invoke("nets.py:ready", "--input", "1x3x9x9", "--json", "--no-proof")  # and a model needs none
    assert json.loads(done.stdout)["inputs"] == [[1, 3, 9, 9]]


def test_recipes_and_torchvision() -> None:
    done = invoke("digits", "--json", "--no-proof")
    facts = json.loads(done.stdout)
    assert (facts["model"], facts["inputs"]) == ("digits", [[2, 1, 8, 8]])
    done = invoke("torchvision:squeezenet1_1", "--input", "1x3x32x32", "--json", "--no-proof")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["inputs"] == [[1, 3, 32, 32]]


def test_a_recipe_says_whether_layers_go_and_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom torchgrow.lab.recipes import get\n"
        "def recipe():\n    return replace(get('digits'), name='mine')\n"
    )
    for name in ("digits", f"{tmp_path / 'mine.py'}:recipe"):
        found = {}
        for option in ((), ("--depth",), ("--no-depth",)):
            done = invoke(name, "--json", "--no-proof", *option)
            assert done.exit_code == 0, done.output
            found[option] = json.loads(done.stdout)["parts"]
        assert found[()] == found["--depth",]
        assert len(found[()]) > len(found["--no-depth",])


def test_models_and_inputs_are_the_same_every_time() -> None:
    first, x = sources.load("digits")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    second, y = sources.load("digits")
    assert torch.equal(x, y)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_recipe_has_inputs() -> None:
    drawn = {"shapes", "shape-masks"}  # of the scale smoke, which no recipe has as its own
    assert {*sources.RECIPE_IMAGES, "text"} == set(DATASETS) - drawn
    for name in recipes.RECIPES:
        model, inputs = sources.load(name)
        model.eval()(*inputs) if isinstance(inputs, tuple) else model.eval()(inputs)


def test_a_recurrent_recipe_is_inspected_with_the_state_it_carries() -> None:
    model, (words, state) = sources.load("lstm-ptb", [(2, 3)])
    small = LSTM(words=7, embedding=4, hidden=(3, 5))
    seen = inspect.inspect(small, (words % 7, small.start(2)))
    assert (words.shape, len(state)) == ((2, 3), len([*model.get_submodule("layers").children()]))
    assert [(part.units, part.removable) for part in seen.parts if part.removable] == [(4, 3), (3, 2), (5, 4)]
    assert seen.exact
    with pytest.raises(TorchgrowError, match="lstm-ptb takes one --input, the shape of its words; got 2"):
        sources.load("lstm-ptb", [(2, 3), (2, 3)])


def test_sizes_that_torchvision_states() -> None:
    assert sources.load("torchvision:mobilenet_v3_small")[1].shape == (2, 3, 224, 224)
    assert sources.load("torchvision:inception_v3")[1].shape == (2, 3, 299, 299)
    assert sources.load("torchvision:r3d_18")[1].shape == (2, 3, 16, 112, 112)


def test_timm_and_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> Any:
        assert (name, pretrained) == ("tiny", False)
        model: Any = zoo.Plain()
        model.default_cfg = {"input_size": (3, 10, 10)}
        return model

    monkeypatch.setitem(
        sys.modules, "timm", SimpleNamespace(list_models=lambda: ["tiny", "timid"], create_model=create)
    )
    assert sources.load("timm:tiny")[1].shape == (2, 3, 10, 10)
    with pytest.raises(TorchgrowError, match="timm has no model 'tinny'; did you mean timm:tiny"):
        sources.load("timm:tinny")

    class Language(nn.Module):
        main_input_name = "input_ids"

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(config.vocab_size, 4), nn.Linear(4, 2)

        def forward(self, input_ids: Any, decoder_input_ids: Any = None) -> Tensor:
            return self.out(self.words(input_ids))

    class Vision(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, pixel_values: Any) -> Tensor:
            return self.conv(pixel_values)

    configs = {
        "words": SimpleNamespace(vocab_size=11, is_encoder_decoder=True, model=Language),
        "sight": SimpleNamespace(image_size=9, num_channels=1, model=Vision),
        "sound": SimpleNamespace(model=Vision),
    }
    fake = SimpleNamespace(
        CONFIG_MAPPING=configs,
        AutoConfig=SimpleNamespace(for_model=configs.__getitem__),
        AutoModel=SimpleNamespace(from_config=lambda config: config.model(config)),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    inputs = sources.load("hf:words")[1]
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {"input_ids": (2, 16), "decoder_input_ids": (2, 16)}
    assert inputs["input_ids"].dtype == torch.int64
    assert inputs["input_ids"].max() < 11
    assert sources.load("hf:words", [(1, 5)])[1]["input_ids"].shape == (1, 5)
    assert sources.load("hf:sight")[1]["pixel_values"].shape == (2, 1, 9, 9)
    assert sources.load("hf:sound", [(1, 1, 7, 7)])[1]["pixel_values"].shape == (1, 1, 7, 7)
    with pytest.raises(
        TorchgrowError, match="hf:sound takes pixel_values, of which no shape is known; give it with --input, or write"
    ):
        sources.load("hf:sound")
    with pytest.raises(TorchgrowError, match="hf has no model 'worts'; did you mean hf:words"):
        sources.load("hf:worts")


def test_models_too_large_for_memory_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 100)
    with pytest.raises(TorchgrowError, match=r"has 1,235,496 parameters, .* needs about 0 GB of memory"):
        sources.load("torchvision:squeezenet1_1")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resnet5"], "there is no model 'resnet5'; did you mean torchvision:resnet50"),
        (["nonsense"], "what works: torchvision:NAME, timm:NAME, hf:TYPE, path/to/file.py:factory, or a recipe"),
        (["torchvision:resnet51"], "torchvision has no model 'resnet51'; did you mean torchvision:resnet"),
        (["torchvision:fasterrcnn_resnet50_fpn"], "takes a list of images"),
        (["timm:resnet18"], "this needs the package timm, which cannot be imported"),
        (["timm:resnet18"], "pip install timm"),
        (["hf:bert"], "pip install transformers"),
        (["net.py:build"], "there is no file net.py; did you mean nets.py?"),
        (["nets.py"], "nets.py needs the name of a function that returns the model: nets.py:build"),
        (["nets.py:built"], "nets.py defines no 'built'; did you mean nets.py:build?"),
        (["nets.py:xyzzy"], "nets.py defines no 'xyzzy'; did you mean nets.py:Net or nets.py:build or"),
        (["nets.py:ANSWER"], "nets.py has no callable 'ANSWER'"),
        (["nets.py:broken"], "nets.py:broken failed (line 22): ValueError: no such luck; it is called without"),
        (["nets.py:leave"], "nets.py:leave failed (line 28): SystemExit: bye"),
        (["nets.py:seven"], "nets.py:seven returned int; return a torch.nn.Module, or (module, example_inputs)"),
        (["nets.py:Net"], "no inputs are known for nets.py:Net; give their shape with --input 1x3x224x224"),
        (["nets.py:Net", "--input", "1x5x8x8"], "the model's forward failed on example_inputs of shapes"),
        (["nets.py:Net", "--input", "1,3,8,8"], "cannot read the input shape '1,3,8,8'; write it with the batch first"),
        (["nets.py:Net", "--input", "0x3"], "cannot read the input shape '0x3'"),
        (["bad.py:build"], "bad.py failed (line 2): ZeroDivisionError: division by zero; run it with python"),
        (["typo.py:build"], "typo.py failed: SyntaxError"),
        (["nets.py:build", "--budget", "half"], "cannot read the budget 'half'"),
        (
            ["nets.py:words", "--input", "2x7"],
            "; for word numbers (integers) let the function return (model, example_in",
        ),
        (
            ["nets.py:words", "--input", "2x7"],
            "nets.py:words cannot read what --input makes, numbers with fractions: Expected tensor",
        ),
    ],
)
def test_errors_are_one_clean_message(
    arguments: Any, text: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.py").write_text("x = 1\nx / 0\n")
    (tmp_path / "typo.py").write_text("def build(:\n")
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.removeprefix("noise on stdout\n").startswith("error: ")
    assert text in plain(done.output)
    assert "Traceback" not in done.output
    assert done.stdout == ""
