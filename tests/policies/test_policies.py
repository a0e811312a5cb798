"""Policies: what they decide, what the grower makes of it, and that one of a user's own needs nothing else."""

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow
from growing import batch, differences, everything, make, run, sgd, train
from oracle import SmallResNet
from own_policy import cubic, source
from torchgrow import Budget, Grower, Method, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.policies import Default, Paper, Policy, Random, Shrink, View, kit, named, policy_of


@dataclass(eq=False)
class Churn(Policy):
    """Draws anew at every update, with state of every kind."""

    share: float = 0.5

    def seed(self, view: View) -> Tensor:
        self.seen, self.numbers, self.named = torch.zeros(view.space.n_units), [0.0], {"last": "seed"}
        return torch.zeros(view.space.n_units, dtype=torch.bool)

    def update(self, view: View) -> tuple[Tensor, bool]:
        keep = torch.rand(view.space.n_units, generator=view.generator) < self.share
        self.seen += keep  # in place, on purpose: an update that fails must take it back
        self.numbers.append(float(keep.sum()))
        self.named["last"] = f"update {view.update}"
        return keep, False


def grown(policy: Policy, updates: int = 6, optimizer: Any = sgd) -> Grower:
    return make(policy=policy, updates=updates, optimizer=optimizer)


def test_one_of_your_own_is_20_lines() -> None:
    assert len([line for line in source().splitlines() if line.strip()]) <= 20


def test_one_of_your_own_starts_from_the_whole_and_ends_at_the_budget() -> None:
    grower = grown(cubic()())
    assert grower.history[0].params == grower.frame_cost.params
    run(grower)
    sizes = [event.params for event in grower.history]
    assert all(after <= max(before, grower.limits.params or 0) for before, after in itertools.pairwise(sizes))
    assert grower.finished or grower.finish()
    assert grower.cost().params <= grower.limits.params  # type: ignore[operator]


@pytest.mark.parametrize("policy", [Churn(), "cubic", Default(ramp=0.5), Paper(), Random()], ids=str)
def test_a_resumed_run_is_the_unbroken_one(policy: Any, tmp_path: Path) -> None:
    """Law 4, for free: nothing about checkpoints stands in the policy."""
    make_policy = cubic() if policy == "cubic" else lambda: copy.copy(policy)
    whole = run(grown(make_policy()))
    first = run(grown(make_policy()), 3)
    save_checkpoint(tmp_path, first)
    second = grown(make_policy())
    load_checkpoint(tmp_path, second)
    assert not differences(first.policy.state_dict(), second.policy.state_dict())
    for epoch in range(3, 6):
        train(second, 2 * epoch)
        second.update()
    assert not differences(everything(whole, run=False), everything(second, run=False))


def test_a_failed_update_takes_the_policy_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it wrote in place, into lists and dicts."""
    grower = run(grown(Churn()), 2)
    before = copy.deepcopy(grower.policy.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(torchgrow.exchange.Exchange, "make", lambda self: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.raises(MemoryError):
            grower.update()
    assert not differences(before, grower.policy.state_dict())
    grower.update()
    assert grower.policy.named == {"last": "update 3"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda n: torch.ones(n), r"Wrong\.update returned torch\.float32 \(\d+,\) for a structure, it must be a bool"),
        (lambda n: torch.ones(n + 1, dtype=torch.bool), r"returned torch\.bool \(\d+,\) for a structure"),
        (lambda n: [True] * n, r"returned list for a structure"),
    ],
)
def test_what_is_no_structure_is_refused_and_nothing_changed(returned: Callable[[int], Any], text: str) -> None:
    class Wrong(Churn):
        def update(self, view: View) -> tuple[Tensor, bool]:
            return returned(view.space.n_units), False

    grower = grown(Wrong())
    before = everything(grower)
    with pytest.raises(TorchgrowError, match=text):
        grower.update()
    assert not differences(before, everything(grower))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gate", lambda n, groups: torch.ones(n + 1, dtype=torch.float64)),
        ("gate", lambda n, groups: torch.ones(n)),
        ("gate", lambda n, groups: torch.zeros(n, dtype=torch.float64)),
        ("gate", lambda n, groups: torch.full((n,), 1.5, dtype=torch.float64)),
        ("gate", lambda n, groups: torch.full((n,), math.nan, dtype=torch.float64)),
        ("gate", lambda n, groups: [1.0] * n),
        ("multiples", lambda n, groups: torch.zeros(groups, dtype=torch.int64)),
        ("multiples", lambda n, groups: torch.ones(n, dtype=torch.int64)),
        ("multiples", lambda n, groups: torch.ones(groups)),
        ("multiples", lambda n, groups: 8),
    ],
)
def test_what_is_no_gate_or_multiple_is_refused_and_nothing_changed(name: str, wrong: Callable[..., Any]) -> None:
    """At the beginning (there the budget is not yet met, so that no multiples are asked for), and in an update."""

    class Wrong(Churn):
        def update(self, view: View) -> tuple[Tensor, bool]:
            found = super().update(view)[0], True
            setattr(self, name, wrong(view.space.n_units, view.space.n_groups))
            return found

    class AtOnce(Churn):
        def seed(self, view: View) -> Tensor:
            setattr(self, name, wrong(view.space.n_units, view.space.n_groups))
            return super().seed(view)

    text = rf"^(Wrong|AtOnce)\.{name} is .*, must be None or torch\.(float|int)64 \(\d+,\), .*; nothing was changed$"
    grower = grown(Wrong())
    before = everything(grower)
    with pytest.raises(TorchgrowError, match=text):
        grower.update()
    assert not differences(before, everything(grower))
    if name == "gate":
        with pytest.raises(TorchgrowError, match=text):
            grown(AtOnce())


def test_a_policy_may_edit_what_it_is_given() -> None:
    """The view's tensors are copies: what a policy does to them is what it returns, and no more."""

    class Edits(Churn):
        def update(self, view: View) -> tuple[Tensor, bool]:
            view.keep[::3] = ~view.keep[::3]
            view.limits[:] = 10**9
            return view.keep, False

    grower = grown(Edits())
    limits, before = grower.run.plan.limit_tensor.clone(), grower.keep
    grower.update()
    assert not torch.equal(grower.keep, before)
    assert sum(p.numel() for p in grower.model.parameters()) == grower.cost().params
    assert torch.equal(grower.run.plan.limit_tensor, limits)


@pytest.mark.parametrize("score", [torch.zeros(3), [0.0]])
def test_a_score_that_has_not_a_number_per_unit_is_refused(score: Any) -> None:
    """Units beyond it would never leave, whatever the budget."""

    class Wrong(Churn):
        def update(self, view: View) -> tuple[Tensor, bool]:
            return view.space.everything(), True

        def score(self, view: View) -> Any:
            return score

    grower = grown(Wrong())
    before = everything(grower)
    with pytest.raises(
        TorchgrowError, match=r"Wrong\.score returned .*, it must be a tensor of \d+ numbers, one a unit"
    ):
        grower.update()
    assert not differences(before, everything(grower))


def test_an_update_that_returns_no_pair_is_refused() -> None:
    class Wrong(Churn):
        def update(self, view: View) -> Any:
            return view.keep

    with pytest.raises(TorchgrowError, match=r"Wrong\.update returned Tensor, it must .* as in `return keep, False`"):
        grown(Wrong()).update()


def test_state_that_no_checkpoint_could_keep_is_refused_at_the_start() -> None:
    class Holds(Churn):
        def seed(self, view: View) -> Tensor:
            self.rule = len
            return super().seed(view)

    with pytest.raises(TorchgrowError, match=r"Holds\.rule is of class builtin_.*, .*name it _rule"):
        grown(Holds())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Default(ramp=2), r"Default\(ramp=2\): ramp must lie in \[0, 1\]"),
        (lambda: Default(prune="all"), r"Default\(prune='all'\): prune must be one of \('alike', 'worth'\)"),
        (
            lambda: Paper(final_inverse_temperature=0.5),
            r"Paper\(final_inverse_temperature=0\.5\): final_inverse_temperature must lie in \[1, 1000000\.0\]",
        ),
        (lambda: Paper(relaxation="hot"), r"Paper\(relaxation='hot'\): relaxation must be one of"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], Policy], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        build()


def test_a_policy_without_its_two_methods_is_told_at_once() -> None:
    class Half(Policy):
        def seed(self, view: View) -> Tensor:
            return view.keep

    with pytest.raises(TypeError, match=r"abstract class Half .*update"):
        Half()  # type: ignore[abstract]


def test_a_name_in_place_of_a_policy_is_refused() -> None:
    with pytest.raises(TorchgrowError, match=r"policy must be an object such as .*Paper\(\), got 'paper'; names go to"):
        grown("paper")  # type: ignore[arg-type]


def test_a_name_and_a_policy_together_are_refused() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(
        TorchgrowError, match=r"preset='paper' and policy=Default\(\.\.\.\) both say how to grow; give one"
    ):
        Grower(
            model,
            optimizer,
            example_inputs=torch.ones(1, 4),
            budget=Budget(params="50%"),
            updates=2,
            preset="paper",
            policy=Default(),
        )


def test_the_budget_holds_whatever_is_wanted() -> None:
    """A policy that wants everything, always."""

    class All(Churn):
        def update(self, view: View) -> tuple[Tensor, bool]:
            return view.space.everything(), False

    grower = run(grown(All()))
    assert grower.history[-3].params == grower.frame_cost.params
    assert grower.cost().params <= grower.limits.params  # type: ignore[operator]
    assert [event.detached for event in grower.history][-1] == 0, "the structure is final from update T-1 on"


def test_without_gates_nothing_is_folded() -> None:
    """No second copy of any weight, and nothing but counting in a step."""
    grower = run(grown(Random()), 3)
    assert grower.policy.gate is None
    assert grower.run.live.raw() == {}
    assert grower.run.live.gates.fold is not None
    assert grower.run.live.gates.fold.names == []
    assert grower.state_dict()["raw"] == {}


@pytest.mark.parametrize("optimizer", [sgd, lambda model: torch.optim.AdamW(model.parameters(), 0.01)])
def test_the_default_measures_importance_and_leaves_the_step_alone(optimizer: Any) -> None:
    """Between updates the live network trains bit for bit as the same network without a grower."""
    grower = run(grown(Default(ramp=0.5), optimizer=optimizer), 3)
    plain = copy.deepcopy(grower.model)
    other = optimizer(plain)
    other.load_state_dict(copy.deepcopy(grower.optimizer.state_dict()))
    grower.optimizer.zero_grad()
    before = grower.policy.importance.clone()  # type: ignore[attr-defined]
    for step in range(3):
        x, target = batch(100 + step)
        for model, own in ((grower.model, grower.optimizer), (plain, other)):
            own.zero_grad()
            F.cross_entropy(model(x), target).backward()
            own.step()
    assert all(map(torch.equal, grower.model.parameters(), plain.parameters()))
    assert not torch.equal(before, grower.policy.importance)  # type: ignore[attr-defined]


def test_importance_is_the_mean_square_of_m_dl_dm() -> None:
    """By finite differences: scale everything that one unit's gate scales."""
    grower = run(grown(Default(ramp=0.5)), 3)
    unit = int(torch.nonzero(grower.keep & grower.space.removable).flatten()[0])
    x, target = batch(7)
    grower.model.eval()

    def loss(scale: float) -> float:
        model = copy.deepcopy(grower.model)
        with torch.no_grad():
            for (name, axis), units in grower.space.fold.items():
                live = units[torchgrow.structure.space.live_positions(grower.space.unit_of[name, axis], grower.keep)]
                place = torch.nonzero(live == unit).flatten()
                parameter = dict(model.named_parameters())[name]
                parameter.index_copy_(axis, place, scale * parameter.index_select(axis, place))
        return float(F.cross_entropy(model(x), target).detach())

    expected = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    before = float(grower.policy.importance[unit])  # type: ignore[attr-defined]
    grower.optimizer.zero_grad()
    F.cross_entropy(grower.model(x), target).backward()
    grower.optimizer.step()
    found = float(grower.policy.importance[unit])  # type: ignore[attr-defined]
    assert found == pytest.approx(0.99 * before + 0.01 * expected**2, rel=1e-4)


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("default", Default),
        ("default:peak=1,align=8", Default),
        ("paper", Paper),
        ("paper:relaxation=gumbel", Paper),
        ("global", Paper),
        ("nas", Paper),
        ("random", Random),
        ("shrink", Shrink),
        ("shrink:until=0.3,importance=l1", Shrink),
    ],
)
def test_names_mean_policies(preset: str, kind: type[Policy]) -> None:
    assert type(named(preset)) is kind


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("shrnk", r"preset 'shrnk' is unknown; use one of \['default', .*'shrink'\], or give policy="),
        ("search", r"preset 'search' is unknown; .*; shapes are searched for by torchgrow\.search\(factory, budget, "),
        ("shrink:peak=1", r"'peak=1' in preset 'shrink:peak=1' is not a setting of torchgrow\.policies\.Shrink with"),
        (
            "shrink:until=soon",
            r"'until=soon' in preset .*write it like shrink:until=0\.2,power=3.*\(settings: until, power",
        ),
        ("late:importance=l1", r"write it like late:until=0\.5,factor=2\.0 \(settings: until, factor, grow"),
        (
            "default:paced=False",
            r"'paced=False' in preset 'default:paced=False' is not a setting of torchgrow.policies.Default",
        ),
        (
            "default:peak=1,lambda_base=2",
            r"'lambda_base=2' .* is not a setting of .*write it like default:ramp=0.03,peak=1.35 \(settings: ramp",
        ),
        ("paper:peak=2", r"'peak=2' in preset 'paper:peak=2' is not a setting of torchgrow.policies.Paper"),
        ("fast", r"preset 'fast' is unknown; use one of \['default', 'global'"),
        ("default:peak", r"'peak' in preset 'default:peak' is not a setting .*with its value"),
        ("default:peak=much", r"'peak=much' .* with its value"),
        ("default:gates=1", r"'gates=1' .* is not a setting of torchgrow.policies.Default"),
        ("default:peak=0.5", r"Default\(peak=0\.5\): peak must lie in \[1"),
        ("paper:heat=9,final_inverse_temperature=3", r"or there by its other name too"),
        ("paper:final_inverse_temperature=3,heat=9", r"or there by its other name too"),
        ("shrink:until=2", r"Shrink\(until=2\.0\): until must lie in \[0, 1\]"),
        ("shrink:importance=fisher", r"importance must be one of \('taylor', 'l1', "),
    ],
)
def test_a_name_that_is_none_is_told(preset: str, text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        named(preset)


def test_names_and_objects_grow_alike() -> None:
    one, other = run(make("paper:lambda_base=0.3", updates=6)), run(grown(Paper(lambda_base=0.3)))
    assert not differences(everything(one), everything(other))
    assert named("default: peak=2.5,align=4").settings() == Default(peak=2.5, align=4).settings()
    assert named("default:peak=2,peak=3").settings() == Default(peak=3.0).settings(), "a recipe's own way, and more"
    assert named("paper", layers=True).settings() == Paper(lambda_base=1.0).settings()
    assert (
        named("paper:temperature=global,heat=9").settings()
        == replace(Paper(lambda_base=0.5), temperature_rises="global", final_inverse_temperature=9.0).settings()
    )


def test_a_method_is_deprecated_and_names_its_policy() -> None:
    arguments: Any = {"example_inputs": batch(0)[0], "budget": torchgrow.Budget(params="50%"), "updates": 4}
    model = SmallResNet().double()
    with pytest.warns(DeprecationWarning, match=r"Method is deprecated .*policy=torchgrow\.policies\.Paper\(\.\.\.\)"):
        grower = Grower(model, sgd(model), preset=Method.paper(), **arguments)
    assert grower.policy.settings() == Paper(lambda_base=0.5).settings()


def test_a_method_is_the_policy_of_its_name() -> None:
    for name in ("default", "paper", "global", "nas", "random"):
        method: Method = getattr(Method, {"global": "global_"}.get(name, name))()
        assert policy_of(method).settings() == named(name).settings(), name
    assert policy_of(Method.paper(layers=True)).settings() == named("paper", layers=True).settings()
    changed = replace(Method.paper(), temperature="global", heat=9.0, penalised="all")
    assert policy_of(changed).settings() == named("paper:temperature=global,heat=9,penalised=all").settings()
    with pytest.raises(TorchgrowError, match=r"no policy grows by .* draws='persistent' and gates=True; give policy="):
        policy_of(Method())
    with pytest.raises(TorchgrowError, match=r"Default\(ramp=2\): ramp must lie in"):
        policy_of(replace(Method.default(), ramp=2))


def test_one_per_group_takes_the_best() -> None:
    grower = grown(Churn())
    space = grower.space
    score = torch.rand(space.n_units, generator=torch.Generator().manual_seed(0))
    keep = kit.one_per_group(space, torch.zeros(space.n_units, dtype=torch.bool), score)
    for group in range(space.n_groups):
        units = torch.nonzero(space.group_of == group).flatten()
        fixed = ~space.removable[units]
        wanted = units[fixed] if bool(fixed.any()) else units[score[units].argmax()].reshape(1)
        assert torch.equal(torch.nonzero(keep & (space.group_of == group)).flatten(), wanted.sort().values)


@pytest.mark.parametrize("name", ["paper", "default"])
def test_a_policy_is_read_in_five_minutes(name: str) -> None:
    source = Path(inspect.getfile({"paper": Paper, "default": Default}[name])).read_text()
    assert len(source.splitlines()) <= 120
