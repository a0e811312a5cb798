"""What a state or an optimizer that does not fit gets: a reason, and nothing changed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchgrow.exchange
import torchgrow.persistence.folder
import torchgrow.structure.bank
from growing import (
    adamw,
    breaking,
    differences,
    everything,
    failing,
    interrupted_step,
    make,
    prodigy,
    refusing,
    run,
    train,
)
from torchgrow import Grower, SavedModelError, TorchgrowError, TrainingError, load_checkpoint, save_checkpoint


def frame(**arguments: Any) -> Callable[[], Grower]:
    return lambda: make("paper", updates=6, **arguments)


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    grower = run(make("paper", updates=6), 3)
    train(grower, 6)
    return grower.state_dict()


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


def filled(value: float, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for key in path:
            inner = inner[key]
        inner[1] = value

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no format": (drop("format"), r"got a dict with \['bank', 'bank_slots', 'before'\]; weights alone go into"),
    "a later format": (put(3, "format"), r"the state has format 3"),
    "a bool for the format": (put(True, "format"), r"the state has format True"),
    "a missing field": (drop("keep"), r"state lacks \['keep'\] and has the foreign \[\]; nothing was changed"),
    "a foreign field": (put(1, "code"), r"has the foreign \['code'\]"),
    "other updates": (put(7, "settings", "updates"), r"a run with updates=7, this Grower has 6; construct it with the"),
    "another method": (
        put(0.8, "settings", "policy.momentum"),
        r"a run with policy\.momentum=0\.8, this Grower has 0\.9",
    ),
    "another seed": (put(3, "settings", "seed"), r"a run with seed=3, this Grower has 0"),
    "a bool for a number": (put(False, "settings", "seed"), r"a run with seed=False"),
    "another shape of the frame": (
        put([9, 3, 3, 3], "frame", "shapes", "conv1.weight"),
        r"another frame: conv1\.weight is \[9, 3, 3, 3\] in it and \[6, 3, 3, 3\] here; the model must be built just",
    ),
    "another dtype": (put("torch.float32", "frame", "dtypes", "fc1.bias"), r"fc1\.bias is torch\.float32 in it and"),
    "other units": (put("00", "frame", "units"), r"has other units than this frame, though the shapes agree"),
    "keep of another size": (
        put(torch.ones(3, dtype=torch.bool), "keep"),
        r"state\['keep'\] is torch\.bool \(3,\), it",
    ),
    "keep of another dtype": (
        lambda s: s.update(keep=s["keep"].float()),
        r"state\['keep'\] is torch\.float32 \(\d+,\), it must be",
    ),
    "an empty structure": (lambda s: s["keep"].zero_(), r"the state's structure is damaged: "),
    "another structure": (lambda s: s["keep"].fill_(True), r"state\['history'\] is .* the last one of"),
    "no history": (put([], "history"), r"state\['history'\] is \[\] \(list\), it must be events 0 to at most 6"),
    "a history too long": (
        lambda s: s["history"].extend({**s["history"][-1], "update": i} for i in range(4, 9)),
        r"it must be events 0 to at most 6",
    ),
    "an event too many": (lambda s: s["history"].insert(0, s["history"][0]), r"must be events 0 to"),
    "text in an event": (
        put("3", "history", 2, "born"),
        r"state\['history'\]\[2\]\['born'\] is 3 \(str\), it must be a",
    ),
    "NaN pressure": (
        put(float("nan"), "history", 1, "pressure"),
        r"\['pressure'\] is nan \(float\), it must be a finite",
    ),
    "a negative width": (put(-1, "history", 1, "widths", "conv1"), r"it must be a whole number in \[0, "),
    "an event of two fields": (put({"update": 0, "born": 1}, "history", 0), r"history'\]\[0\] lacks \['detached', "),
    "finished in a word": (put("no", "finished"), r"state\['finished'\] is no \(str\), it must be True or False"),
    "an infinite penalty": (put(float("inf"), "policy", "pressure"), r"\['pressure'\] is inf"),
    "a huge rate": (put(10**400, "initial_lr"), r"state\['initial_lr'\] is 1000"),
    "s with NaN": (filled(float("nan"), "policy", "s"), r"\['policy'\]\['s'\] is .* without NaN and infinity"),
    "more updates than events": (
        filled(99, "policy", "t"),
        r"Paper is damaged: t must lie in \[0, 4\], the number of updates",
    ),
    "no generator": (
        put(torch.zeros(5056, dtype=torch.uint8), "generator"),
        r"state of a torch\.Generator",
    ),
    "a short generator": (
        put(torch.zeros(16, dtype=torch.uint8), "generator"),
        r"it must be torch\.uint8",
    ),
    "a missing weight": (drop("network", "fc1.bias"), r"state\['network'\] lacks \['fc1\.bias'\]"),
    "a foreign weight": (put(torch.ones(1), "network", "evil.weight"), r"has the foreign \['evil\.weight'\]"),
    "a weight at full size": (
        put(torch.ones(6, 3, 3, 3).double(), "network", "conv1.weight"),
        r"it must be torch\.float64",
    ),
    "a sparse weight": (
        lambda s: s["network"].update({"fc1.weight": s["network"]["fc1.weight"].to_sparse()}),
        r"\['fc1\.weight'\] is torch\.float64",
    ),
    "raw of another shape": (put(torch.ones(9).double(), "raw", "bn1.weight"), r"\['raw'\]\['bn1\.weight'\] is"),
    "a gradient of another shape": (
        put({"fc1.bias": torch.ones(99).double()}, "gradients"),
        r"gradients'\]\['fc1\.bias'\]",
    ),
    "a bank without a tensor": (drop("bank", "conv1.weight"), r"state\['bank'\] lacks \['conv1\.weight'\]"),
    "a foreign slot": (
        put([["evil", "momentum_buffer", torch.ones(1)]], "bank_slots"),
        r"a slot of a parameter that can",
    ),
    "a slot of another shape": (
        put(torch.ones(2).double(), "bank_slots", 0, 2),
        r"bank_slots'\]\[0\] is torch\.float64 \(2,",
    ),
    "other groups": (put([], "optimizers", 0, "groups"), r"has 0 groups of parameters, this one has 1"),
    "another order": (
        lambda s: s["optimizers"][0]["groups"][0]["params"].reverse(),
        r"in another order; build it just as",
    ),
    "a setting missing": (
        drop("optimizers", 0, "groups", 0, "momentum"),
        r"has no setting 'momentum'; build the optimizer as in the saved run, of the same class\. Nothing was changed",
    ),
    "text for a rate": (
        put("0.1", "optimizers", 0, "groups", 0, "lr"),
        r"\['lr'\] is 0\.1 \(str\), it must be of the kind of",
    ),
    "a NaN rate": (put(float("nan"), "optimizers", 0, "groups", 0, "lr"), r"\['lr'\] is nan"),
    "text for a foreign setting": (put("x", "optimizers", 0, "groups", 0, "more"), r"\['more'\] is x \(str\)"),
    "a renamed slot": (
        lambda s: s["optimizers"][0]["slots"].update(
            {"fc1.bias": {"momentum": s["optimizers"][0]["slots"]["fc1.bias"]["momentum_buffer"]}}
        ),
        r"\['fc1\.bias'\]\['momentum_buffer'\] is None \(NoneType\), it must be torch\.float64",
    ),
    "slots of a stranger": (
        put({}, "optimizers", 0, "slots", "evil"),
        r"must be the state of a parameter that this optimizer",
    ),
}


@pytest.fixture(scope="module")
def other() -> tuple[Grower, dict[str, Any]]:
    return refusing()


@pytest.mark.parametrize("name", BAD)
def test_a_state_that_does_not_fit_changes_nothing(
    name: str, state: dict[str, Any], other: tuple[Grower, dict[str, Any]]
) -> None:
    change, text = BAD[name]
    grower, before = other
    bad = copy.deepcopy(state)
    change(bad)
    with pytest.raises(SavedModelError, match=text):
        grower.load_state_dict(bad)
    assert differences(before, everything(grower)) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, r"got a NoneType; weights alone go into model\.load_state_dict"),
        ([], r"got a list; weights"),
        ({1: 2}, r"got a dict with \['1'\]; weights"),
        (
            nn.Linear(2, 2).state_dict(),
            r"got a dict with \['bias', 'weight'\]; weights alone",
        ),
        ("run/", r"got a str; of a folder, torchgrow\.load_checkpoint\(folder, grower\)"),
        (Path("run"), r"Path; of a folder, torchgrow\.load_checkpoint\(folder, grower\)"),
    ],
)
def test_what_is_no_state_at_all(bad: Any, says: str) -> None:
    with pytest.raises(SavedModelError, match=rf"load_state_dict takes what grower\.state_dict\(\) returned, .*{says}"):
        make().load_state_dict(bad)


def test_a_grower_or_a_dict_around_a_state_is_no_state(state: dict[str, Any]) -> None:
    with pytest.raises(SavedModelError, match=r"got a Grower; of another grower, grower\.load_state_dict\(other"):
        make().load_state_dict(make())  # type: ignore[arg-type]
    with pytest.raises(SavedModelError, match=r"got a dict with \['mine', 'step'\]; which is in it as state\['mine'\]"):
        make().load_state_dict({"step": 3, "mine": state})


@pytest.mark.parametrize("given", [nn.Linear(2, 2), {}, "run"])
def test_a_checkpoint_is_of_a_grower(given: Any, tmp_path: Path) -> None:
    """Of a module, `save_checkpoint` wrote weights as the grower's state, which nothing could load."""
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(TorchgrowError, match=r"a checkpoint is of a Grower, got a .*; call save_checkpoint"):
            call(tmp_path, given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", [adamw, prodigy])
def test_an_optimizer_restored_before_by_a_framework_is_restored_anew(optimizer: Any) -> None:
    """Its state does not fit the seed as yet; and settings that steps have added since go with a state without them."""
    grower, again = make(updates=6, optimizer=optimizer), make(updates=6, optimizer=optimizer)
    fresh = grower.state_dict()
    run(grower, 3)
    own, state = copy.deepcopy(grower.optimizer.state_dict()), grower.state_dict()
    again.optimizer.load_state_dict(own)
    again.load_state_dict(state)
    assert differences(everything(grower), everything(again)) == []
    for one in (grower, again):
        train(one, 6)
        one.update()
    assert differences(everything(grower), everything(again)) == []
    again.load_state_dict(fresh)
    assert again.optimizer.param_groups[0].keys() == make(optimizer=optimizer).optimizer.param_groups[0].keys()


def test_another_optimizer_is_refused(state: dict[str, Any]) -> None:
    """Of the same groups, but with other settings and slots."""
    grower = make("paper", updates=6, optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.05))
    before = everything(grower)
    with pytest.raises(SavedModelError, match=r"no setting 'betas'; build the optimizer as in the saved run"):
        grower.load_state_dict(state)
    assert differences(before, everything(grower)) == []


LOADING = [
    (torchgrow.structure.bank.Change, "into", 1),
    (torchgrow.growth.gates.Fold, "factors", 1),
    *[(torchgrow.exchange, "run", call) for call in (0, 1, 5, 20, 40, -40, -20, -1)],
]


@pytest.mark.parametrize(("owner", "name", "call"), LOADING, ids=lambda p: p if isinstance(p, (str, int)) else "")
@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt()])
def test_a_failed_load_changes_nothing(
    owner: Any,
    name: str,
    call: int,
    error: BaseException,
    state: dict[str, Any],
    other: tuple[Grower, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grower, before = other
    with monkeypatch.context() as patch:
        within = name == "run"
        patch.setattr(owner, name, breaking(call, error) if within else failing(error, call, getattr(owner, name)))
        with pytest.raises(type(error)):
            grower.load_state_dict(state)
    assert differences(before, everything(grower)) == []


def test_an_unfinished_step_has_no_state_but_can_be_replaced(state: dict[str, Any]) -> None:
    grower = run(make("paper", updates=6), 1)
    train(grower, 6, 1)
    interrupted_step(grower.optimizer)
    with pytest.raises(TrainingError, match=r"the last optimizer\.step\(\) did not finish"):
        grower.state_dict()
    interrupted_step(grower.optimizer)
    grower.load_state_dict(state)
    expected = make("paper", updates=6)
    expected.load_state_dict(state)
    assert differences(everything(expected), everything(grower)) == []


def test_settings_that_the_optimizer_would_not_take_are_refused() -> None:
    """A beta of 7 is a number, but its square root in Adam is none."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    grower = torchgrow.Grower(
        model, optimizer, example_inputs=torch.randn(2, 4), budget=torchgrow.Budget(params="60%"), updates=3
    )
    state = grower.state_dict()
    state["optimizers"][0]["groups"][0]["betas"] = (0.9, 7.0)
    with pytest.raises(SavedModelError, match=r"groups'\]\[0\] cannot be set: Invalid beta parameter.*7"):
        grower.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
