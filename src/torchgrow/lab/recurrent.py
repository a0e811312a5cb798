"""The word-level language model of Zaremba et al. (2014): a stack of one-layer LSTMs under dropout."""

from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgrow import TorchgrowError
from torchgrow.lab.models import scaled

State = list[tuple[Tensor, Tensor]]
"""h and c of every layer, each ``[1, N, hidden units]``."""


class LSTM(nn.Module):
    """Embedding, LSTM layers one after another, linear decoder; dropout before, between and after the layers.

    Every layer is an `nn.LSTM` of one layer, since the layers of a single `nn.LSTM` share their width and could
    only grow alike. It declares what it carries: its second output is its second argument at the next call.

    Args:
        width: factor on ``hidden``; the embedding keeps its size, as in the paper that grows these networks.
        words: of the vocabulary.
        embedding: numbers a word is embedded in.
        hidden: hidden units of every layer.
        dropout: share that is dropped in training.
        init: weights start uniformly between -init and init.

    Shape: words ``[N, T]`` (int64) and a state, or None for zeros, to scores ``[N, T, words]`` and the new state.

    Raises:
        TorchgrowError: no layer, or one without units; a dropout outside [0, 1).
    """

    carried: ClassVar[dict[int | str, int | str]] = {1: 1}

    def __init__(
        self,
        width: float = 1.0,
        *,
        words: int = 10_000,
        embedding: int = 200,
        hidden: Sequence[int] = (200, 200),
        dropout: float = 0.0,
        init: float = 0.1,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise TorchgrowError(f"hidden are the positive unit counts of one or more layers, got {tuple(hidden)}")
        if not 0 <= dropout < 1:
            raise TorchgrowError(f"dropout is the share that is dropped, at least 0 and below 1, got {dropout}")
        sizes = [embedding, *(scaled(units, width) for units in hidden)]
        self.embedding = nn.Embedding(words, embedding)
        self.layers = nn.ModuleList(nn.LSTM(into, units, batch_first=True) for into, units in pairwise(sizes))
        self.decoder = nn.Linear(sizes[-1], words)
        self.dropout = nn.Dropout(dropout)
        self.init = init
        self.initialise()

    def initialise(self) -> None:
        """All weights and biases uniformly between -init and init."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -self.init, self.init)

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:  # noqa: D102
        x, after = self.dropout(self.embedding(words)), []
        for layer, before in zip(self.layers, state or repeat(None, len(self.layers)), strict=True):
            x, ended = layer(x, before)
            x = self.dropout(x)
            after.append(ended)
        return self.decoder(x), after

    def start(self, batch: int) -> State:
        """The state before the first word, zeros, for the present width of every layer."""
        sizes: list[Any] = [(1, batch, layer.hidden_size) for layer in self.layers]
        like = self.decoder.weight
        return [(torch.zeros(size).to(like), torch.zeros(size).to(like)) for size in sizes]
