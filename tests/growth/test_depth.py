"""Layers that may be left out: found or named, exact, skipped for real, grown like Eq 6 says, saved and loaded."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from growing import begun_as, indicators_of, same_indicators, same_parameters, step_both
from layered import Plain, Residual, Stages, batch
from oracle import Eq6
from planned import Planned
from torchgrow import Budget, Grower, Space, TraceError, load, save, shrink_, trace, verify
from torchgrow.policies import Paper, Random
from torchgrow.structure.store import Births, Store, gather, scatter_
from torchgrow.tracing.prover import Prover


class Tuples(nn.Module):
    """Blocks in a ModuleList that take keywords and return tuples, as those of Hugging Face do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, hidden: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return hidden + scale * self.down(F.gelu(self.up(self.norm(hidden)))), None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.layers = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for layer in self.layers:
            x = layer(hidden=x, scale=0.5, mask=None)[0]
        return self.head(x)


def blocks(space: Space) -> dict[str, int]:
    return {block.modules[0]: block.unit for block in space.blocks if space.removable[block.unit]}


FRAMES = {
    "residual": (Stages, (2, 3, 6, 6), ["stage.1", "stage.2", "stage.3"]),
    "plain": (lambda: Stages(Plain), (2, 3, 6, 6), ["stage.1", "stage.2", "stage.3"]),
    "tuples": (Tuples, (2, 3), ["layers.1", "layers.2"]),
    "resnet18": (torchvision.models.resnet18, (1, 3, 32, 32), [f"layer{k}.1" for k in (1, 2, 3, 4)]),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True), 3, enable_nested_tensor=False
        ),
        (2, 5, 8),
        ["layers.1", "layers.2"],
    ),
    "post-norm encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3, enable_nested_tensor=False
        ),
        (2, 5, 8),
        ["layers.1", "layers.2"],
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_found_and_exact(name: str) -> None:
    factory, shape, expected = FRAMES[name]
    torch.manual_seed(0)
    model, x = factory(), torch.randn(shape)
    space = trace(model, x, depth=True)
    assert sorted(blocks(space)) == expected
    prover = Prover(model, space, x, seed=5)
    for fraction in (0.3, 0.6, "ends"):
        keep = prover.draw(fraction)
        assert any(not keep[unit] for unit in blocks(space).values())
        assert prover.error(keep)[0] <= 1e-9


def test_strided_blocks_stay() -> None:
    space = trace(torchvision.models.resnet18(), torch.randn(1, 3, 32, 32), depth=True)
    assert not any(block.holds("layer2.0.conv1.weight") for block in space.blocks)


def test_named() -> None:
    model, (x, _) = Stages().double(), batch()
    assert list(blocks(trace(model, x, depth=["stage.0", "stage.2"]))) == ["stage.0", "stage.2"]
    flat = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    space = trace(flat, x.float(), depth=[("1", "2", "3")])
    assert space.blocks[0].modules == ("1", "2", "3")
    assert not space.blocks[0].residual
    bank = shrink_(flat, space, space.everything() & ~_only(space, space.blocks[0].unit))
    assert flat[1].weight.shape == (0,)
    alone = nn.Sequential(flat[0], flat[4])
    torch.testing.assert_close(flat.eval()(x.float()), alone(x.float()))
    bank.restore_()
    assert flat[1].weight.shape == (5, 5, 3, 3)


def _only(space: Space, *units: int) -> Tensor:
    return torch.isin(torch.arange(space.n_units), torch.tensor(units))


@pytest.mark.parametrize(
    ("depth", "says"),
    [
        (["stage.9"], "depth names 'stage.9', which no module has"),
        (["head"], r"depth names 'head', which turns \(8, 6\) into \(8, 4\)"),
        ([("stage.0", "stage.2")], "the second does not read the first"),
    ],
)
def test_names_that_do_not_fit(depth: Any, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace(Stages().double(), batch()[0], depth=depth)


def test_nothing_to_leave_out_is_said() -> None:
    with pytest.raises(TraceError, match="name the layers that may be left out"):
        trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3), depth=True)


def test_shared_and_repeated_layers_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    with pytest.raises(TraceError, match="is called 2 times in a forward"):
        trace(Twice(), torch.randn(2, 3, 6, 6), depth=["block"])


def test_a_layer_that_never_hands_its_input_on_stays() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    model = nn.Sequential(nn.Linear(3, 5), Shift(), nn.Linear(5, 2))
    space = trace(model, torch.randn(2, 3), depth=["1"])
    assert not blocks(space)
    assert any("returns neither its input nor zero" in frozen.reason for frozen in space.frozen)


def test_detach_then_regrow_is_the_identity() -> None:
    torch.manual_seed(0)
    model, (x, target) = Stages().double(), batch()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    space = trace(model, x, depth=True)
    objects = dict(model.named_parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    keep = space.everything()
    keep[[blocks(space)["stage.1"], blocks(space)["stage.3"]]] = False
    bank = shrink_(model, space, keep, optimizer)
    assert all(objects[name] is p for name, p in model.named_parameters())
    assert all(t.numel() == 0 for name, t in model.state_dict().items() if name.startswith(("stage.1", "stage.3")))
    left = nn.Sequential(model.stem, model.norm, nn.ReLU(), model.stage[0], model.stage[2])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.head(left(x).mean((2, 3))))
    bank.restore_()
    after = model.state_dict(), optimizer.state_dict()
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items())
    for index, state in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][index][key]) for key, value in state.items())


def make(block: type[nn.Module], optimizer: Any = None, **settings: Any) -> Grower:
    torch.manual_seed(0)
    model = Stages(block).double()
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3))
    settings = {"budget": Budget(params="60%"), "updates": 8, **settings}
    return Grower(model, optimizer(model.parameters()), example_inputs=batch()[0], depth=True, **settings)


@pytest.mark.parametrize("block", [Residual, Plain])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_grows_to_the_budget(block: type[nn.Module], preset: str) -> None:
    grower = make(block, preset=preset)
    assert not any(
        "stage" in n and p.numel() for n, p in grower.model.named_parameters() if not n.startswith("stage.0")
    )
    for epoch in range(8):
        for step in range(2):
            x, target = batch(2 * epoch + step)
            grower.optimizer.zero_grad()
            F.cross_entropy(grower.model(x), target).backward()
            grower.optimizer.step()
        event = grower.update()
        measured = sum(p.numel() for p in grower.model.parameters())
        assert event.params == measured == grower.cost().params
    limit = grower.limits.params
    assert limit is not None
    assert grower.cost().params <= limit
    keep, space = grower.keep, grower.space
    for unit in torch.nonzero(space.removable & ~keep).flatten().tolist():
        owner = int(space.owner[unit])
        if owner < 0 or keep[owner]:
            assert grower.run.plan.costs.cost(keep | _only(space, unit)).params > limit


class WithLayers(Eq6):
    """Eq 6 with layers: an absent one hands its input on, the gate of a present one scales f (Eq 2)."""

    def __call__(self, x: Tensor) -> Tensor:
        for block in self.space.blocks:
            module = self.frame.get_submodule(block.modules[0])
            module.__dict__.pop("forward", None)
            if not self.q[block.unit]:
                module.forward = lambda x: x
        return super().__call__(x)

    def absent(self, name: str) -> Tensor:
        if self.space.absent(name, self.q):
            return torch.ones(self.space.shapes[name], dtype=torch.bool)
        return super().absent(name)

    def live(self, full: Any, name: str) -> Tensor:
        return full[name].new_empty(0) if self.space.absent(name, self.q) else super().live(full, name)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.mark.parametrize("block", [Residual, Plain])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_grows_like_eq_6(block: type[nn.Module], kind: str) -> None:
    method = Paper(lambda_base=1.0, final_inverse_temperature=20.0)
    method = replace(method, paced=False)  # one step of Eq 6 is one step
    torch.manual_seed(0)
    frame = Stages(block).double()
    grower = make(block, OPTIMIZERS[kind], policy=method, updates=40)
    indicators = indicators_of(grower)
    begun_as(grower, frame)
    oracle = WithLayers(
        frame, OPTIMIZERS[kind](frame.parameters()), grower.space, method,
        s=indicators.s, q=grower.keep, beta=indicators.beta,
    )  # fmt: skip
    policy: Any = grower.policy
    share = policy.lambda_share
    assert {round(float(x), 9) for x in share} == {1.0, 0.1}
    seen = set()
    for epoch in range(3 if kind == "sgd" else 1):  # what is born is the one difference Adam's second moments make
        for step in range(3):
            x, target = batch(3 * epoch + step)
            grower.optimizer.zero_grad()
            live, literal = F.cross_entropy(grower.model(x), target), F.cross_entropy(oracle(x), target)
            every = torch.sigmoid(oracle.beta * oracle.s)[grower.space.removable]
            extra = (policy.penalty[grower.space.removable] * every).sum()
            extra.backward()
            step_both(grower, oracle, live, literal, 0.0)
        same_indicators(grower, oracle)
        seen.add(tuple(grower.keep[[block.unit for block in grower.space.blocks]].tolist()))
        grower.update()
        oracle.update(grower.keep, indicators.gamma, indicators.t)
        raw = {**dict(grower.model.named_parameters()), **grower.run.live.raw()}
        same_parameters(grower, oracle, raw, f"after epoch {epoch}")
    assert kind != "sgd" or len(seen) > 1


def test_counters_rise_only_where_a_unit_is_there() -> None:
    grower = make(Residual, policy=Planned(ramp=1.0, settle=0.5))
    x, target = batch()
    F.cross_entropy(grower.model(x), target).backward()
    grower.optimizer.step()
    grower.update()
    inside = grower.space.owner >= 0
    layers_out = ~grower.keep[grower.space.owner.clamp(min=0)] & inside
    assert bool(layers_out.any())
    assert int(indicators_of(grower).t[layers_out].max()) == 0


@pytest.mark.parametrize("block", [Residual, Plain])
def test_save_and_load(block: type[nn.Module], tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, (x, _) = Stages(block).double(), batch(7)
    space = trace(model, x, depth=True)
    shrink_(model, space, Prover(model, space, x, seed=1).draw(0.6))
    assert any(not p.numel() for p in model.parameters())
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", lambda: Stages(block).double())
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_depths_and_widths() -> None:
    grower = make(Residual, updates=20)
    assert grower.depths() == {"stage": 1}
    seen = set()
    for _ in range(4):
        grower.update()
        live = [p.numel() > 0 for name, p in grower.model.named_parameters() if name.endswith("conv1.weight")]
        assert grower.depths() == {"stage": sum(live)}
        widths = grower.widths()
        assert [widths[f"stage.{k}.conv1"] > 0 for k in range(4)] == live
        seen.add(sum(live))
    assert max(seen) > 1


def on_meta(block: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return Stages(block).double()


@pytest.mark.parametrize("block", [Residual, Plain])
def test_a_frame_on_the_meta_device_grows_as_a_real_one_does(block: type[nn.Module]) -> None:
    """A real frame, begun as `Births` says, is the reference: same structures, weights and buffers at every update."""
    real, meta = Stages(block).double(), on_meta(block)
    births = Births(meta, 3)
    with torch.no_grad():
        for name, tensor in [*real.named_parameters(), *real.named_buffers()]:
            tensor.copy_(births.full(name))
    objects = dict(meta.named_parameters())
    growers = []
    for model in (real, meta):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        growers.append(
            Grower(
                model,
                optimizer,
                example_inputs=batch()[0],
                budget=Budget(params="60%"),
                updates=8,
                seed=3,
                depth=True,
                policy=Random(),
            )
        )
    assert sum(store.held.numel() for store in growers[1].run.live.bank.full.values()) == 0
    assert {p.dtype for p in meta.parameters()} == {torch.float64}
    detached = 0
    for epoch in range(8):
        for grower in growers:
            for step in range(2):
                x, target = batch(2 * epoch + step)
                grower.optimizer.zero_grad()
                F.cross_entropy(grower.model(x), target).backward()
                grower.optimizer.step()
            detached += grower.update().detached
        assert torch.equal(growers[0].keep, growers[1].keep)
        for (name, a), b in zip(real.state_dict().items(), meta.state_dict().values(), strict=True):
            assert torch.equal(a, b), (epoch, name)
        for a, b in zip(real.parameters(), meta.parameters(), strict=True):
            for key, slot in growers[0].optimizer.state[a].items():
                assert torch.equal(slot, growers[1].optimizer.state[b][key])
    assert detached > 0
    assert all(objects[name] is p for name, p in meta.named_parameters())


def test_what_nobody_initialises_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    with torch.device("meta"):
        model = nn.Sequential(Scaled(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TraceError, match=r"0\.scale begins: give Scaled a reset_parameters\(\)"):
        Grower(model, optimizer, example_inputs=torch.randn(2, 3), budget=Budget(params="50%"), updates=2)


@pytest.mark.parametrize("seed", range(20))
def test_a_store_reads_what_was_written_and_else_what_was_there(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 1, 4)
    full = torch.randn(shape, generator=generator)
    store, reference = Store(full.clone, shape, full.dtype, whole=bool(seed % 2)), full.clone()
    for _ in range(12):
        index: Any = {}
        for axis in (0, 2):
            chosen = torch.nonzero(torch.rand(shape[axis], generator=generator) < 0.6).flatten()
            if 0 < chosen.numel() < shape[axis]:
                index[axis] = chosen
        assert torch.equal(store.read(index), gather(reference, index))
        if torch.rand(1, generator=generator) < 0.5:
            part = torch.randn(gather(full, index).shape, generator=generator)
            store.write(index, part)
            scatter_(reference, index, part)
    assert torch.equal(store.read({}), reference)
    assert store.read(None).numel() == 0


def test_verify_with_depth() -> None:
    report = verify(Stages(), batch()[0].float(), depth=True)
    assert report.ok
    assert report.groups["stage.1 (layer)"] == 1


def test_a_network_whose_layers_were_left_out_grows_again(tmp_path: Any) -> None:
    """What is gone is gone: it is no block of the new frame, and the record names it still."""
    first = make(Residual, budget=Budget(params="40%"))
    while not first.finished:
        first.update()
    model, left = first.model, first.depths()["stage"]
    assert 1 < left < first.full_depths()["stage"]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.warns(UserWarning, match="is a share of the network as it is"):
        again = Grower(model, optimizer, example_inputs=batch()[0], depth=True, budget=Budget(params="60%"), updates=3)
    assert again.full_depths() == {"stage": left}
    while not again.finished:
        again.update()
    live = [p.numel() > 0 for name, p in model.named_parameters() if name.endswith("conv1.weight")]
    assert again.depths() == {"stage": sum(live)}
    assert again.cost().params == sum(p.numel() for p in model.parameters()) <= (again.limits.params or 0)
    save(model, tmp_path / "net")
    loaded = load(tmp_path / "net", lambda: Stages(Residual).double()).eval()
    assert torch.equal(loaded(batch()[0]), model.eval()(batch()[0]))


class Counts(nn.Module):
    """x + b(y len(y)), y = relu(a(x)): no hidden unit may go, since the length counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return x + self.b(y * y.shape[-1])


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_what_is_inside_a_layer_is_tried_with_the_layer_there(blocks: int) -> None:
    """Of few layers the same one may be out in all trials."""
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Sequential(*(Counts() for _ in range(blocks))), nn.Linear(16, 3)
    )
    depth: Any = True if blocks > 1 else ["2.0"]
    space = trace(model, torch.randn(4, 8), depth=depth)
    assert not [name for name in space.widths(space.everything()) if name.endswith(".a")]
    assert verify(model, torch.randn(4, 8), space=space).ok
