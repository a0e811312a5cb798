"""Weights begin at the scale of a network built as small as the one that is to come."""

import copy
import math
import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgrow import Budget, Grower, SavedModelError, trace
from torchgrow.growth.birth import birth_scales
from torchgrow.lab.baselines import initialised
from torchgrow.policies import Default, Paper, Policy, Random, View
from torchgrow.structure.store import Births, live_shapes

UPDATES = 3


class Rule(nn.Linear):
    """A linear layer that is initialised by a rule of its own."""

    def __init__(self, inputs: int, outputs: int, rule: Callable[[Tensor], object]) -> None:
        self.rule = rule
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """By the rule; biases as PyTorch does."""
        super().reset_parameters()
        self.rule(self.weight)


RULES: dict[str, Callable[[Tensor], object]] = {
    "PyTorch": lambda w: nn.init.kaiming_uniform_(w, math.sqrt(5)),
    "He": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "He, fan out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "He, leaky": lambda w: nn.init.kaiming_normal_(w, 0.2),
    "Glorot": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "tanh": lambda w: nn.init.xavier_normal_(w, gain=nn.init.calculate_gain("tanh")),
    "fixed": lambda w: nn.init.normal_(w, std=0.02),
}


def mlp(rule: str = "PyTorch") -> nn.Sequential:
    """Wide and without norms; sides that differ."""
    sizes = [60, 240, 320, 160, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [Rule(inputs, outputs, RULES[rule]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Conv(nn.Sequential):
    """Convolutions without norms."""

    def __init__(self) -> None:
        wide = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
        super().__init__(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), *wide, *head)


class Recurrent(nn.Module):
    """Two layers of an LSTM under a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(20, 128, num_layers=2, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the last step."""
        scores: Tensor = self.head(self.inner(x)[0][:, -1])
        return scores


class Tied(nn.Module):
    """The head's weights are the embedding's, with the head's own initial values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.inner = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 50, bias=False)
        self.table.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        """Scores, of a vector for every row."""
        scores: Tensor = self.head(self.inner(self.table(x.long() % 50)))
        return scores


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"MLP, {rule}": (lambda rule=rule: mlp(rule), (512, 60)) for rule in RULES},  # type: ignore[misc]
    "convolutions": (Conv, (16, 3, 12, 12)),
    "LSTM": (Recurrent, (64, 12, 20)),
    "tied": (Tied, (64, 12)),
}


def grown(model: nn.Module, x: Tensor, policy: Policy | None = None, **settings: bool) -> Grower:
    """Grown to 20 % at a learning rate of 0."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    grower = Grower(
        model,
        optimizer,
        example_inputs=x[:2],
        budget=Budget(params="20%"),
        updates=UPDATES,
        policy=policy,
        **settings,  # type: ignore[arg-type]
    )
    for _ in range(UPDATES):
        model(x).square().mean().backward()
        optimizer.step()
        grower.update()
    return grower


def layers(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Root mean square of what every module with weights puts out."""
    found: dict[str, list[float]] = {}
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):

            def note(_: nn.Module, __: object, out: Tensor | tuple[Tensor, object], name: str = name) -> None:
                first = out if isinstance(out, Tensor) else out[0]
                found.setdefault(name, []).append(float(first.double().square().mean().sqrt()))

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return {name: values[0] for name, values in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_grown_network_puts_out_what_a_fresh_one_of_its_shape_does(name: str) -> None:
    """Root mean squares of every layer, over draws of both; no unit leaves on the way, as the strong would stay."""
    build, shape = MODELS[name]
    draws = 6
    torch.manual_seed(0)
    x = torch.randn(shape)
    ratios: dict[str, list[float]] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        model = build()
        grown(model, x, Default(peak=1))
        ours = layers(model, x)
        torch.manual_seed(1000 + seed)
        fresh = layers(initialised(copy.deepcopy(model)), x)
        for layer, value in ours.items():
            ratios.setdefault(layer, []).append(value / fresh[layer])
    for layer, values in ratios.items():
        logs = torch.tensor(values).log()
        spread = float(logs.std()) / math.sqrt(draws)
        assert abs(float(logs.mean())) < 0.05 + 3 * spread, (layer, values)


@pytest.mark.parametrize("name", ["MLP, PyTorch", "convolutions"])
def test_at_the_frames_scale_it_does_not(name: str) -> None:
    """What the law above would have said before."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    x, model = torch.randn(shape), build()
    grown(model, x, rescale=False)
    last = list(layers(model, x).values())[-1]
    assert last < 0.8 * list(layers(initialised(copy.deepcopy(model)), x).values())[-1]


@pytest.mark.parametrize("policy", [Default(), Paper(), Random()])
def test_of_every_rule_the_one_that_was_used_is_found(policy: Policy) -> None:
    """Factors are roots of ratios of the right fans, for the widths that the policy plans."""
    for rule, fan in (("PyTorch", "in"), ("He", "in"), ("He, fan out", "out"), ("Glorot", "mean"), ("tanh", "mean")):
        torch.manual_seed(1)
        model = mlp(rule)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        budget = Budget(params="20%")
        grower = Grower(
            model, optimizer, example_inputs=torch.randn(2, 60), budget=budget, updates=UPDATES, policy=policy
        )
        plan = grower.run.plan
        view = plan.view(0, grower.keep, 1.0, grower.run.state.generator, dict)
        planned = live_shapes(plan.space, plan.target(grower.policy, view, grower.keep))
        for layer in (0, 2, 4, 6):
            (o, i), (lo, li) = shapes[f"{layer}.weight"], planned[f"{layer}.weight"]
            ratio = {"in": i / li, "out": o / lo, "mean": (i + o) / (li + lo)}[fan]
            assert plan.scales.get(f"{layer}.weight", 1.0) == pytest.approx(math.sqrt(ratio)), (rule, layer)
            assert plan.scales.get(f"{layer}.bias", 1.0) == pytest.approx(math.sqrt(i / li)), (rule, layer)


def test_a_fixed_spread_stays() -> None:
    """As transformers have it, whatever rule a single shape would fit."""
    torch.manual_seed(0)
    model = mlp("fixed")
    grower = grown(model, torch.randn(8, 60))
    assert not [name for name in grower.run.plan.scales if name.endswith("weight")]
    table = nn.Sequential(nn.Embedding(50, 64), nn.Flatten(), nn.Linear(64 * 4, 10))
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    example = torch.zeros(2, 4, dtype=torch.int64)
    grower = Grower(table, optimizer, example_inputs=example, budget=Budget(params="30%"), updates=4)
    assert set(grower.run.plan.scales) == {"2.weight", "2.bias"}


def test_trained_weights_are_never_touched() -> None:
    """Neither with a start nor where the model looks trained."""
    x = torch.randn(64, 60)
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings: dict[str, Any] = {"example_inputs": x[:2], "budget": Budget(params="20%"), "updates": 4}
    with pytest.warns(UserWarning, match="looks trained"):
        grower = Grower(model, optimizer, **settings)
    assert not grower.run.plan.scales
    grower.release()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for start in ("frame", grower.keep):
        other = mlp()
        before = {name: p.detach().clone() for name, p in other.named_parameters()}
        grower = Grower(other, torch.optim.SGD(other.parameters(), 0.05), start=start, **settings)
        grower.release()
        assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_a_policy_that_begins_with_everything_begins_as_it_is() -> None:
    """What is trained first is the frame, whatever it shrinks to, and whether it was trained before or not."""

    class Whole(Default):
        def seed(self, view: View) -> Tensor:
            super().seed(view)
            return view.space.everything()

    x = torch.randn(64, 60)
    for steps in (0, 2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.step()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="20%"), updates=4, policy=Whole())
        assert not grower.run.plan.scales
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_copy_of_the_frame_follows_with_the_same_scale() -> None:
    """An average that was made before the grower has the weights that units will be born with."""
    x = torch.randn(16, 60)
    model, others = mlp(), mlp()
    average = copy.deepcopy(model)
    before = copy.deepcopy(others.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="20%"), updates=UPDATES)
    grower.follow(average)
    grower.follow(others)
    for _ in range(UPDATES):
        model(x).square().mean().backward()
        optimizer.step()
        grower.update()
    for name, p in average.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    assert torch.isin(others.get_parameter("2.weight"), before["2.weight"]).all(), "weights of its own stay"


def learnt(model: nn.Module, x: Tensor, steps: int) -> nn.Module:
    """Trained a little by an optimizer that nobody hears of."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("steps", [1, 60])
def test_one_trained_part_leaves_all_as_it_is(steps: int) -> None:
    """A trained part before many new layers looks fresh as a whole; values beyond a rule's bounds tell."""
    torch.manual_seed(0)
    x = torch.randn(64, 60)
    part = learnt(
        nn.Sequential(nn.Linear(60, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 60)), x, steps
    )
    new = [layer for _ in range(10) for layer in (nn.ReLU(), nn.Linear(60, 60))]
    model = nn.Sequential(part, *new)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    grower = Grower(model, optimizer, example_inputs=x[:2], budget=Budget(params="40%"), updates=4)
    assert not grower.run.plan.scales


def test_what_no_optimizer_trains_stays() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    grower = Grower(model, optimizer, example_inputs=torch.randn(2, 60), budget=Budget(params="40%"), updates=4)
    assert "6.weight" in grower.run.plan.scales
    assert not {"2.weight", "2.bias"} & grower.run.plan.scales.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_average_in_another_dtype_follows_too(dtype: torch.dtype) -> None:
    """As averages of networks in half precision are kept in full."""
    model = mlp().to(dtype)
    average = copy.deepcopy(model).float()
    grower = Grower(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        example_inputs=torch.randn(2, 60, dtype=dtype),
        budget=Budget(params="20%"),
        updates=4,
    )
    grower.follow(average)
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.to(dtype), model.get_parameter(name), rtol=0.02, atol=0.0, msg=name)


def test_a_lone_tensor_that_tells_little_stays() -> None:
    """A head of its own class beside layers of a fixed spread; experts' axis is in no fan."""

    class Own(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(*shape) * 128**-0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.einsum("bi,eio->bo", x, self.w)
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 128), nn.ReLU(), Own(4, 128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    grower = Grower(model, optimizer, example_inputs=torch.randn(2, 60), budget=Budget(params="40%"), updates=4)
    assert "2.w" not in grower.run.plan.scales
    assert grower.run.plan.scales.keys() <= {"4.weight", "4.bias"}


def test_a_state_of_before_on_the_meta_device_is_refused() -> None:
    """What was never born there would begin otherwise."""
    with torch.device("meta"):
        models = [mlp() for _ in range(3)]
    growers = [
        Grower(
            model,
            torch.optim.SGD(model.parameters(), 0.05),
            example_inputs=torch.randn(2, 60),
            budget=Budget(params="20%"),
            updates=4,
            rescale=rescale,
        )
        for model, rescale in zip(models, (False, True, False), strict=True)
    ]
    state = growers[0].state_dict()
    del state["settings"]["rescale"]
    with pytest.raises(SavedModelError, match=r"construct Grower\(\.\.\., rescale=False\)"):
        growers[1].load_state_dict(state)
    growers[2].load_state_dict(state)


def test_a_refused_run_leaves_the_weights() -> None:
    """Whatever fails after they were multiplied."""

    class Fails(Default):
        def applied(self, view: object) -> None:
            raise RuntimeError("no")

    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(RuntimeError, match="no"):
        Grower(
            model,
            optimizer,
            example_inputs=torch.randn(2, 60),
            budget=Budget(params="20%"),
            updates=4,
            policy=Fails(),
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_frame_on_the_meta_device_begins_likewise() -> None:
    """The same factors, on values that are made one module at a time."""
    x = torch.randn(512, 60)
    with torch.device("meta"):
        model = mlp("He")
    real = mlp("He")
    grower = grown(model, x)
    assert grower.run.plan.scales.keys() == grown(real, x).run.plan.scales.keys() != set()
    torch.manual_seed(3)
    fresh = layers(initialised(copy.deepcopy(model)), x)
    for name, value in layers(model, x).items():
        assert value == pytest.approx(fresh[name], rel=0.35), name


def test_what_is_known_of_a_tensor_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame too large for memory is looked at without ever being there as a whole."""
    with torch.device("meta"):
        model = mlp("He")
    space = trace(model, torch.randn(2, 60))
    original, seen = Births.full, list[weakref.ref[Any]]()
    alive = list[int]()

    def watched(self: Births, name: str) -> Tensor:
        alive.append(sum(one() is not None for one in seen))
        values = original(self, name).numpy()  # lives as long as a tensor that shares its memory
        seen.append(weakref.ref(values))
        return torch.from_numpy(values)

    monkeypatch.setattr(Births, "full", watched)
    birth_scales(model, space, space.everything())
    assert alive == [0, *[1] * 7]


def test_a_resumed_run_has_to_be_told_alike() -> None:
    """Unborn units of a frame on the meta device would begin otherwise."""
    x = torch.randn(16, 60)
    states = {}
    for rescale in (True, False):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        grower = Grower(model, optimizer, example_inputs=x[:2], budget=Budget(params="20%"), updates=4, rescale=rescale)
        states[rescale] = grower.state_dict()
    with pytest.raises(SavedModelError, match="rescale=True"):
        grower.load_state_dict(states[True])
    earlier = copy.deepcopy(states[True])
    del earlier["settings"]["rescale"]  # as versions before wrote it
    grower.load_state_dict(earlier)


def test_networks_with_everything_are_as_they_were() -> None:
    """A budget of the whole frame changes no weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        grower = Grower(model, optimizer, example_inputs=torch.randn(2, 60), budget=Budget(params="100%"), updates=4)
    assert not grower.run.plan.scales
    assert birth_scales(mlp(), grower.space, grower.space.everything()) == {}


class Masters(torch.optim.Optimizer):
    """SGD on copies of the weights that are there from the start on; `counts` says whether it counts its steps."""

    def __init__(self, parameters: Any, counts: bool) -> None:
        super().__init__(parameters, {"lr": 1e-9})
        for parameter in self.param_groups[0]["params"]:
            own = {"master": parameter.detach().clone()}
            self.state[parameter] = {"step": 0, **own} if counts else own

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["master"].sub_(1e-9 * parameter.grad)
            parameter.copy_(state["master"])


@pytest.mark.parametrize("counts", [True, False])
def test_copies_of_the_weights_in_an_optimizer_get_the_same_scale(counts: bool) -> None:
    """Else the first step would take it back; and copies are no sign of training."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(8, 60)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Masters(model.parameters(), counts)
    budget = Budget(params="10%")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grower = Grower(model, optimizer, example_inputs=x, budget=budget, updates=4, start="seed")
    grown = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaled = [name for name, p in grown.items() if not bool(torch.isin(p, before[name]).all())]
    assert scaled
    model(x).square().mean().backward()
    optimizer.step()
    assert all(torch.allclose(p, grown[name], atol=1e-6) for name, p in model.named_parameters())
    grower.finish()
