"""Old names: they work for one version more, warn at the user's own line, and say the new name."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchgrow
from torchgrow.policies import Paper, named
from torchgrow.renamed import renamed_arguments


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.ones(2, 4)
LEFT = {"2": 8}
"""Groups of the model whose first layer keeps its width."""


def test_freeze_is_an_old_name_of_protect() -> None:
    with pytest.warns(DeprecationWarning, match="the name 'freeze' is deprecated .* write 'protect'") as seen:
        space = torchgrow.trace(model(), X, freeze=["0"])  # type: ignore[call-arg]
    assert [Path(one.filename) for one in seen] == [Path(__file__)]
    assert space.widths(space.everything()) == LEFT == torchgrow.verify(model(), X, protect=["0"]).groups
    with pytest.warns(DeprecationWarning, match="'freeze'"):
        assert torchgrow.verify(model(), X, freeze=["0"]).groups == LEFT  # type: ignore[call-arg]
    grown = model()
    budget = torchgrow.Budget(params="80%")
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    with pytest.warns(DeprecationWarning, match="'freeze'") as seen:
        grower = torchgrow.Grower(  # type: ignore[call-arg]
            grown, optimizer, example_inputs=X, budget=budget, updates=2, freeze=["0"]
        )
    assert [Path(one.filename) for one in seen] == [Path(__file__)]
    assert grower.full_widths() == LEFT


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match="'freeze' is the old name of the argument 'protect'; give protect= alone"):
        torchgrow.trace(model(), X, freeze=["0"], protect=["2"])  # type: ignore[call-arg]


def test_slots_are_an_old_name_of_blocks() -> None:
    class Residual(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    net = nn.Sequential(nn.Linear(4, 8), Residual(8, 8), Residual(8, 8), nn.Linear(8, 2))
    space = torchgrow.trace(net, X, depth=["1", "2"])
    assert [block.modules for block in space.blocks] == [("1",), ("2",)]
    with pytest.warns(DeprecationWarning, match="the name 'slots' is deprecated .* write 'blocks'"):
        assert space.slots is space.blocks
    with pytest.warns(DeprecationWarning, match="the name 'slot_of' is deprecated .* write 'block_of'"):
        assert space.slot_of is space.block_of


def test_layers_are_an_old_name_of_what_is_labelled() -> None:
    """A rule as users have written it: it finds the labels of its argument, and passes them on."""

    @torch.library.custom_op("old::wave", mutates_args=())
    def wave(x: torch.Tensor) -> torch.Tensor:
        return x + x.sin()

    @torchgrow.rule("wave")
    def wave_rule(context: Any, func: Any, named: dict[str, Any], out: torch.Tensor) -> None:
        layers = context.layers(named["x"])
        context.set_layers(out, [layer.with_silence(True, layer.sources) for layer in layers])

    class Waved(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self[1](wave(self[0](x))))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        space = torchgrow.trace(Waved(nn.Linear(4, 8), nn.Linear(8, 2)), X)
    assert space.widths(space.everything()) == {"0": 8}
    said = "".join(str(one.message) for one in seen)
    for old, new in (("layers", "labelled"), ("set_layers", "set_labelled"), ("with_silence", "with_zeros")):
        assert f"the name {old!r} is deprecated and goes with the next version; write {new!r}" in said


@pytest.mark.parametrize("preset", ["paper:heat=7", "paper:final_inverse_temperature=7"])
def test_presets_as_rows_have_recorded_them_are_read(preset: str) -> None:
    policy = named(preset)
    assert isinstance(policy, Paper)
    assert policy.settings() == Paper(lambda_base=0.5, final_inverse_temperature=7.0).settings()


def test_a_state_holds_the_setting_by_the_name_it_always_had() -> None:
    grown = model()
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    grower = torchgrow.Grower(
        grown, optimizer, example_inputs=X, budget=torchgrow.Budget(params="50%"), updates=2, preset="paper:heat=7"
    )
    settings = grower.state_dict()["settings"]
    assert settings["policy.heat"] == 7.0
    assert "policy.final_inverse_temperature" not in settings


def test_new_names_go_through_as_they_are() -> None:
    @renamed_arguments(old="new")
    def double(number: int, *, new: int = 1) -> int:
        """Twice."""
        return 2 * number * new

    assert (double(1, new=3), double(2), double.__doc__) == (6, 4, "Twice.")
