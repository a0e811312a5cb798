"""A trained network cut at once: within the budget, computing what it did without the units that went."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import drawn
import torchgrow
import zoo
from growing import batch, differences, sgd
from oracle import SmallResNet
from torchgrow import Budget, BudgetError, OptimizerError, StructureError, TorchgrowError
from torchgrow.policies import Shrink
from torchgrow.structure.cost import CostModel
from torchgrow.structure.record import RECORD

X, LABELS = batch(0)


def trained() -> nn.Module:
    """With statistics, gradients, and weights that all differ."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    for _ in range(3):
        F.cross_entropy(model(X), LABELS).backward()
    return model.eval()


def kept(model: nn.Module, frame: nn.Module) -> Tensor:
    """The units that a cut model has, told by its record."""
    from torchgrow.structure.bank import Bank
    from torchgrow.structure.kept import keep_of
    from torchgrow.structure.record import recorded

    bank = Bank(copy.deepcopy(frame), torchgrow.trace(frame, X))
    return keep_of(bank, recorded(model.named_modules()), [], "it")


@pytest.mark.parametrize(
    "policy",
    [
        None,
        Shrink(importance="taylor"),
        Shrink(importance="l1", allocation="levelled"),
        Shrink(importance="l2", allocation="global", align=2),
        Shrink(importance="bn_scale"),
    ],
    ids=str,
)
@pytest.mark.parametrize("proof", [True, False])
def test_what_is_left_computes_what_it_did_without_the_rest(policy: Shrink | None, proof: bool, tmp_path: Path) -> None:
    model = trained()
    frame = copy.deepcopy(model)
    cost = torchgrow.prune_(model, X, budget=Budget(params="50%"), policy=policy, proof=proof)
    assert cost.params == sum(p.numel() for p in model.parameters())
    space = torchgrow.trace(frame, X)
    keep, costs = kept(model, frame), CostModel(space)
    limit = Budget(params="50%").limits(costs.cost(space.everything())).params
    assert limit is not None
    assert cost.params <= limit
    for unit in torch.nonzero(~keep).flatten().tolist():
        more = keep.clone()
        more[unit] = True
        assert costs.cost(more).params > limit, "no unit still fits"
    torch.testing.assert_close(model(X), drawn.zeroed(frame, space, keep).eval()(X), atol=1e-12, rtol=1e-10)
    torchgrow.save(model, tmp_path)
    again = torchgrow.load(tmp_path, lambda: SmallResNet().double()).eval()
    assert torch.equal(again(X), model(X))


def test_units_without_any_effect_go_first() -> None:
    first, second = nn.Linear(5, 12), nn.Linear(12, 3)
    with torch.no_grad():
        second.weight[:, ::2] = 0.0
        first.weight[::2] *= 1e-3
    for importance in ("taylor", "l1", "l2", "group_norm"):
        model = copy.deepcopy(nn.Sequential(first, nn.Tanh(), second)).double()
        x = torch.randn(8, 5).double()
        before = model(x)
        F.cross_entropy(before, torch.arange(8) % 3).backward()
        torchgrow.prune_(model, x, budget=Budget(params="60%"), policy=Shrink(importance=importance))
        torch.testing.assert_close(model(x), before, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_without_a_proof_labels_are_followed_alike(name: str) -> None:
    """Nothing of the model is touched, and nothing may go that the proof would not try; here none was taken back."""
    model, x = zoo.build(name), zoo.inputs(name)
    before = copy.deepcopy(model.state_dict())
    try:
        space = torchgrow.trace(model, x, proof=False)
    except TorchgrowError as error:  # what reads values, as sparse tensors and boxes
        pytest.skip(str(error)[:100])
    assert not space.proven
    assert not differences(before, model.state_dict())
    proven = zoo.space(name)
    found, wanted = (one.removable & ~alone(one) for one in (space, proven))
    assert torch.equal(found, wanted) or int(found.sum()) <= int(wanted.sum())


def alone(space: torchgrow.Space) -> Tensor:
    """Units alone in their group, which always stay."""
    return torch.bincount(space.group_of, minlength=space.n_groups)[space.group_of] == 1


def test_what_cannot_be_cut_is_told_and_left_alone() -> None:
    broken = SmallResNet()
    nn.init.constant_(broken.fc1.bias, math.inf)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (broken, {}, TorchgrowError, r"fc1.bias holds NaN or infinite numbers, so nothing says which of its units mat"),
        (SmallResNet(), {"budget": Budget(params="1%")}, BudgetError, "but what cannot be removed costs"),
        (SmallResNet(), {"policy": Shrink()}, TorchgrowError, r"reads gradients, and the model has none: call loss"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), {}, StructureError, "nothing can be cut here, because"),
    ]
    for model, more, kind, text in cases:
        before = copy.deepcopy(model.state_dict())
        x = torch.randn(2, 4) if isinstance(model, nn.Sequential) else X.float()
        with pytest.raises(kind, match=text):
            torchgrow.prune_(model, x, **{"budget": Budget(params="50%"), **more})
        assert not differences(before, model.state_dict())
        assert not any(RECORD in vars(module) for module in model.modules())


def test_nothing_is_stored_unless_wanted() -> None:
    model = trained()
    space = torchgrow.trace(model, X)
    keep = (torch.arange(space.n_units) % 2 > 0) | ~space.removable
    other = copy.deepcopy(model)
    torchgrow.shrink_(other, space, keep)
    bank = torchgrow.shrink_(model, space, keep, store=False)
    assert not differences(other.state_dict(), model.state_dict())
    with pytest.raises(StructureError, match="the bank has been emptied"):
        bank.restore_()
    model = trained()
    optimizer = sgd(model)
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    with pytest.raises(OptimizerError, match=r"the optimizer has stepped, .*call shrink_ without store=False"):
        torchgrow.shrink_(model, space, keep, optimizer, store=False)


@pytest.mark.parametrize("allocation", ["global", "levelled"])
def test_what_is_worth_nothing_goes_before_all_else(allocation: str) -> None:
    """60 of 64 units of one layer, which nothing else has to share with."""
    for share, width in (("80%", 49), ("60%", 35), ("40%", 21)):
        torch.manual_seed(0)
        hidden = [nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
        model = nn.Sequential(*(part for one in hidden for part in (one, nn.ReLU())), nn.Linear(64, 3))
        with torch.no_grad():
            for dead in (hidden[1].weight[:60], hidden[1].bias[:60], hidden[2].weight[:, :60]):
                dead.zero_()
        x = torch.randn(16, 8)
        before = model(x)
        torchgrow.prune_(model, x, budget=Budget(params=share), policy=Shrink(importance="l1", allocation=allocation))
        assert [one.out_features for one in hidden] == [64, width, 64]
        torch.testing.assert_close(model(x), before)


class Heads(nn.Module):
    """Attention whose heads are counted by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.into, self.out = 4, nn.Linear(5, 16), nn.Linear(16, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        q, k, v = (f(y).view(*y.shape[:2], self.h, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(y + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_without_a_proof_what_attributes_may_count_stays() -> None:
    """Whether `h` has to follow is known by trying only."""
    x = torch.randn(2, 6, 5)
    proven, not_proven = (torchgrow.trace(Heads(), x, proof=proof) for proof in (True, False))
    assert ("", "h") in {(attribute.module, attribute.name) for attribute in proven.attributes}
    assert "q" in proven.widths(proven.everything())
    assert "q" not in not_proven.widths(not_proven.everything())
    assert any("h may count these units, which only the proof can tell" in str(f) for f in not_proven.frozen)


@pytest.mark.parametrize(
    ("more", "text"), [({"budget": "50%"}, r"prune_ takes budget=torchgrow\.Budget"), ({"policy": "l1"}, "and 'l1'")]
)
def test_arguments_are_looked_at(more: dict[str, Any], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        torchgrow.prune_(trained(), X, **{"budget": Budget(params="50%"), **more})


class Elsewhere(nn.Module):
    """relu(a(x)) times what a function outside makes of its width, which no label shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y) * len(y[0])


def test_a_cut_that_was_not_proven_is_looked_at() -> None:
    """With a proof the units stay."""
    x = torch.randn(4, 5)
    assert not bool(torchgrow.trace(Elsewhere(), x).removable.any())
    with pytest.raises(
        StructureError, match=r"outputs differ by .* can no longer be used: reload its weights, and leave out"
    ):
        torchgrow.prune_(Elsewhere(), x, budget=Budget(params="50%"), proof=False)
