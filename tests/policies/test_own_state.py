"""Settings and state of a policy of one's own: a checkpoint loads, or is refused before there is one."""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from growing import differences
from torchgrow import Budget, Grower, SavedModelError, TorchgrowError, TrainingError, load_checkpoint, save_checkpoint
from torchgrow.policies import Default, Paper, Policy, View, kit, named

INPUTS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def grown(policy: Policy) -> Grower:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Grower(model, optimizer, example_inputs=INPUTS, budget=Budget(params="60%"), updates=6, policy=policy)


def train(grower: Grower) -> None:
    (grower.model(INPUTS) - 1).square().mean().backward()
    grower.optimizer.step()
    grower.optimizer.zero_grad()


def resumed(grower: Grower, policy: Policy, folder: Path) -> None:
    """Load a checkpoint of the grower into a new one, and compare."""
    save_checkpoint(folder, grower)
    other = grown(policy)
    load_checkpoint(folder, other)
    assert differences(grower.policy.state_dict(), other.policy.state_dict()) == []


@dataclass(eq=False)
class Own(Policy):
    """Grows evenly; `begin` and `change` say what its state does."""

    setting: Any = 0.5

    def seed(self, view: View) -> Tensor:
        self.rank = kit.spread(view)
        self.begin(view)
        return kit.smallest(view.space, self.rank)

    def update(self, view: View) -> tuple[Tensor, bool]:
        self.change(view)
        return kit.one_per_group(view.space, self.rank < view.update / view.updates, -self.rank), False

    def begin(self, view: View) -> None: ...
    def change(self, view: View) -> None: ...


class Color(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value", [math.nan, torch.ones(2), Color.RED, Number.ONE, len, [1, {"a": math.nan}], np.ones(2)]
)
def test_a_setting_that_is_no_data_is_refused_when_the_grower_is_made(value: Any) -> None:
    with pytest.raises(
        TorchgrowError, match=r"^Own\.setting is a setting, .*, that no checkpoint could be compared by; "
    ):
        grown(Own(value))


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (Default(peak=2), named("default:peak=2")),
        (Default(peak=np.float32(1.5)), Default(peak=1.5)),
        (Own(np.float64(0.1)), Own(0.1)),
        (Own([np.int64(3), {"a": (1, None)}]), Own([3.0, {"a": (1.0, None)}])),
        (Own(math.inf), Own(math.inf)),
        (Own(None), Own(None)),
    ],
    ids=lambda policy: str(policy.settings()),
)
def test_settings_that_mean_the_same_are_the_same(saved: Policy, here: Policy, tmp_path: Path) -> None:
    resumed(grown(saved), here, tmp_path)
    resumed(grown(here), saved, tmp_path)


@pytest.mark.parametrize(("saved", "here"), [(1, True), (0.5, "0.5"), (None, 0), ([1, 2], [1]), ({"a": 1}, {"b": 1})])
def test_settings_that_differ_are_told(saved: Any, here: Any) -> None:
    state = grown(Own(saved)).state_dict()
    with pytest.raises(SavedModelError, match=r"a run with policy\.setting="):
        grown(Own(here)).load_state_dict(state)


@pytest.mark.parametrize("name", ["lambda_base", "layer_lambda_base", "weight_decay"])
def test_the_paper_checks_its_constants(name: Any) -> None:
    wrong: Any
    for wrong in (-1.0, math.nan, "0.5"):
        with pytest.raises(TorchgrowError, match=rf"Paper\({name}=.*\): {name} must lie in \[0, "):
            Paper(**{name: wrong})
    assert type(Paper(**{name: np.float32(0.5)}).settings()[name]) is float
    assert Paper(lambda_base=None).lambda_base is None
    with pytest.raises(TorchgrowError, match=r"Default\(peak=None\): peak must lie in"):
        Default(peak=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)])
def test_numbers_of_numpy_in_the_state_are_numbers(number: Any) -> None:
    def begin(policy: Any, view: View) -> None:
        policy.best = number

    policy = changing(begin, lambda policy, view: None)
    grower = grown(policy)
    assert type(grower.state_dict()["policy"]["best"]) is type(number.item())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"range": (1, 2)}, r"Changing\.memory\['range'\] is of class tuple"),
        ([0, {"a": [np.float64(1)]}], r"Changing\.memory\[1\]\['a'\]\[0\] is of class float64"),
        ({"a": {3: 1}}, r"Changing\.memory\['a'\] has a key of class int"),
        (len, r"Changing\.memory is of class builtin_function_or_method"),
    ],
)
def test_what_cannot_be_kept_is_told_by_its_place(value: Any, told: str) -> None:
    def begin(policy: Any, view: View) -> None:
        policy.memory = value

    with pytest.raises(TorchgrowError, match=rf"^{told}, which a checkpoint could not keep; hold tensors, numbers of"):
        grown(changing(begin, lambda policy, view: None))


def test_a_setting_that_hides_a_method_is_refused() -> None:
    with pytest.raises(
        TorchgrowError, match=r"^Hiding\.settings hides Policy\.settings\(\); give that setting another"
    ):

        @dataclass(eq=False)
        class Hiding(Own):
            settings: int = 0  # type: ignore[assignment]


def halves(view: View) -> Tensor:
    return torch.full((view.space.n_units,), 0.5, dtype=torch.float64)


CHANGES: dict[str, tuple[Any, Any, str]] = {
    "gates go": (lambda s, v: s.__dict__.update(gate=halves(v)), lambda s, v: s.__dict__.update(gate=None), "gate"),
    "gates come": (lambda s, v: None, lambda s, v: s.__dict__.update(gate=halves(v)), "gate"),
    "a tensor gets longer": (
        lambda s, v: s.__dict__.update(x=torch.zeros(0)),
        lambda s, v: s.__dict__.update(x=torch.zeros(v.update)),
        "x",
    ),
    "None becomes a tensor": (lambda s, v: s.__dict__.update(x=None), lambda s, v: s.__dict__.update(x=v.keep), "x"),
    "a new attribute": (lambda s, v: None, lambda s, v: s.__dict__.update(x=1), "x"),
    "one that goes": (lambda s, v: s.__dict__.update(x=1), lambda s, v: s.__dict__.pop("x"), "x"),
    "a number becomes NaN": (lambda s, v: s.__dict__.update(x=1.0), lambda s, v: s.__dict__.update(x=math.nan), "x"),
    "a tensor becomes infinite": (
        lambda s, v: s.__dict__.update(x=torch.zeros(3)),
        lambda s, v: s.__dict__.update(x=torch.full((3,), math.inf)),
        "x",
    ),
}


def changing(begin: Callable[[Any, View], Any], change: Callable[[Any, View], Any]) -> Policy:
    class Changing(Own):
        def begin(self, view: View) -> None:
            begin(self, view)

        def change(self, view: View) -> None:
            if view.update == 2:
                change(self, view)

    return Changing()


@pytest.mark.parametrize("name", CHANGES)
def test_state_that_no_run_could_load_is_refused_by_the_update(name: str, tmp_path: Path) -> None:
    begin, change, attribute = CHANGES[name]
    grower = grown(changing(begin, change))
    train(grower)
    grower.update()
    keep = grower.keep.clone()
    with pytest.raises(
        TorchgrowError, match=rf"^Changing\.{attribute} is .* and was .* when the run began, so that no run"
    ):
        grower.update()
    assert torch.equal(grower.keep, keep)
    assert len(grower.history) == 2
    resumed(grower, changing(begin, change), tmp_path)


def test_state_that_a_step_spoils_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Spoils(Own):
        sensitive = True

        def begin(self, view: View) -> None:
            self.x = 1.0

        def step(self, view: View, sensitivity: Tensor) -> None:
            self.x = math.inf

    grower = grown(Spoils())
    train(grower)
    with pytest.raises(TorchgrowError, match=r"^Spoils\.x is inf \(float\) and was 1\.0 \(float\) when the run began"):
        save_checkpoint(tmp_path, grower)
    assert list(tmp_path.iterdir()) == []


def test_what_comes_and_grows_in_lists_and_dicts_comes_back(tmp_path: Path) -> None:
    def change(policy: Any, view: View) -> None:
        policy.costs.append(view.cost(view.keep).tolist())
        policy.best["keep"] = view.keep
        policy.late = "now"

    def begin(policy: Any, view: View) -> None:
        policy.costs, policy.best, policy.late = [], {}, None

    grower = grown(changing(begin, change))
    for _ in range(3):
        train(grower)
        grower.update()
    resumed(grower, changing(begin, change), tmp_path)


@pytest.mark.parametrize("wrong", [0.0, math.nan, 1.5, None], ids=str)
def test_a_wrong_gate_is_refused_in_the_step_that_sets_it(wrong: float | None) -> None:
    """By the policy's name; the weights stay folded with the gates of before, and training goes on."""

    class Closes(Own):
        sensitive, closed = True, True

        def begin(self, view: View) -> None:
            self.gate = halves(view)

        def step(self, view: View, sensitivity: Tensor) -> None:
            if type(self).closed and wrong is None:
                self.gate = None
            elif type(self).closed:
                self.gate.fill_(wrong)  # type: ignore[union-attr, arg-type]  # in place, on purpose

    grower = grown(Closes())
    with pytest.raises(TorchgrowError, match=r"^Closes\.gate is "):
        train(grower)
    Closes.closed = False
    with pytest.raises(TrainingError, match=r"the last optimizer\.step\(\) did not finish; the weights were put back"):
        grower.update()
    assert torch.equal(grower.policy.gate, halves(grower.run.view(0)))  # type: ignore[arg-type]
    assert all(bool(parameter.isfinite().all()) for parameter in grower.model.parameters())
    grower.optimizer.zero_grad()
    train(grower)
    grower.update()
