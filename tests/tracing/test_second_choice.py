"""Where units of two kinds lie along one axis one kind has to stay: that of which nothing could go anyway."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchgrow import trace, verify


class Experts(nn.Module):
    """Four experts with a hidden layer of 12, by batched weights, mixed by a softmax; einsum lays them side by side."""

    def __init__(self, first: str, second: str, mixed: str) -> None:
        super().__init__()
        self.products = first, second, mixed
        self.inner, self.outer = nn.Parameter(torch.randn(4, 8, 12)), nn.Parameter(torch.randn(4, 12, 8))
        self.enter, self.gate, self.leave = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        hidden = torch.einsum(self.products[0], x, self.inner).relu()
        each = torch.einsum(self.products[1], hidden, self.outer)
        mixed: Tensor = self.leave(x + torch.einsum(self.products[2], self.gate(x).softmax(-1), each))
        return mixed


@pytest.mark.parametrize(
    "products",
    [("bd,edh->beh", "beh,ehd->bed", "be,bed->bd"), ("bd,edh->ebh", "ebh,ehd->ebd", "be,ebd->bd")],
)
def test_the_hidden_units_of_experts_that_all_stay_can_go(products: tuple[str, str, str]) -> None:
    model, x = Experts(*products), torch.randn(6, 5)
    space = trace(model, x)
    assert sorted(space.widths(space.everything()).values()) == [8, 12]
    assert verify(model, x, space=space).ok


class Mixture(nn.Module):
    """Experts whose outputs are added up: they can go as a whole, and come first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.randn(4, 5, 12)), nn.Parameter(torch.randn(4, 12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("beh,ehd->bd", torch.einsum("bd,edh->beh", x, self.inner).relu(), self.outer)


def test_the_first_choice_stays_where_it_can_go() -> None:
    model, x = Mixture(), torch.randn(6, 5)
    space = trace(model, x)
    assert space.widths(space.everything()) == {"inner[0]": 4}
    assert verify(model, x, space=space).ok


def laid_flat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1).unflatten(1, (len(parts), parts[0].shape[1]))


class Interactions(nn.Module):
    """Inner products of all pairs of features, as in recommender systems; pairs are picked by index."""

    def __init__(self, together: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.together = together
        self.words = nn.ModuleList(nn.Embedding(9, 8) for _ in range(3))
        self.numbers, self.top = nn.Linear(5, 8), nn.Linear(8 + 6, 3)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        x = self.numbers(x).relu()
        features = self.together([x, *(words(column) for words, column in zip(self.words, chosen.T, strict=True))])
        products = features @ features.transpose(1, 2)
        rows, columns = torch.tril_indices(4, 4, -1)
        top: Tensor = self.top(torch.cat([x, products[:, rows, columns]], 1))
        return top


@pytest.mark.parametrize("together", [laid_flat, lambda parts: torch.stack(parts, 1)])
def test_what_is_summed_over_can_go_where_the_pairs_cannot(together: Callable[[list[Tensor]], Tensor]) -> None:
    model, example = Interactions(together), (torch.randn(6, 5), torch.randint(9, (6, 3)))
    space = trace(model, example)
    assert list(space.widths(space.everything()).values()) == [8]
    assert len({place for place, units in space.unit_of.items() if bool((units >= 0).any())}) >= 6
    assert verify(model, example, space=space).ok
