"""Small transformers, of text and of images, written so that heads and hidden neurons can be cut.

A head's width does not follow from the width of the residual stream, and no ``forward`` names a number of heads:
torchvision's and PyTorch's own layers tie the two, so that a network of fewer heads is none of theirs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow.lab.models import scaled


class Transformer(nn.Module):
    """A transformer that knows how its weights begin."""

    blocks: nn.Sequential

    def initialise(self) -> None:
        """GPT-2's (weights normal with standard deviation 0.02, biases 0), but every block hands its input on at first.

        So the last weights of a residual branch are 0, and layer norms keep PyTorch's defaults. At 0.02 too, what six
        blocks add is many times as large as the embedding, and the wider they are the more of it they bury.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "attention.out.weight", "down.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)


class Attention(nn.Module):
    """Self-attention of several heads.

    Args:
        features: width of what comes in and goes out.
        heads: how many there are.
        head: features a head.
        causal: whether a place sees only what stands before it, and itself.
        dropout: share of the output that is dropped in training.

    Shape: ``[N, T, features] -> [N, T, features]``.
    """

    def __init__(self, features: int, heads: int, head: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.head, self.causal = head, causal
        self.query, self.key, self.value = (nn.Linear(features, heads * head) for _ in range(3))
        self.out, self.dropout = nn.Linear(heads * head, features), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention, then two linear layers with GELU between, each behind a layer norm and beside a residual sum."""

    def __init__(self, features: int, heads: int, head: int, neurons: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(features), Attention(features, heads, head, causal, dropout)
        self.norm2, self.up, self.down = (
            nn.LayerNorm(features),
            nn.Linear(features, neurons),
            nn.Linear(neurons, features),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(Transformer):
    """A GPT-style language model: pre-norm causal blocks, learned positions, the decoder tied to the embedding.

    Args:
        width: factor on ``heads`` and ``neurons``; the residual stream keeps its width, as it does when grown.
        words: of the vocabulary.
        features: width of the residual stream.
        layers: number of blocks.
        heads: heads a block.
        head: features a head.
        neurons: hidden neurons a block.
        context: the most words it can be given at once.
        dropout: share that is dropped in training.

    Shape: words ``[N, T]`` (int64), T at most ``context``, to scores ``[N, T, words]``.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        words: int = 10_000,
        features: int = 256,
        layers: int = 6,
        heads: int = 8,
        head: int = 32,
        neurons: int = 1024,
        context: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, features)
        self.positions = nn.Parameter(torch.empty(context, features))
        self.blocks = nn.Sequential(
            *(Block(features, scaled(heads, width), head, scaled(neurons, width), True, dropout) for _ in range(layers))
        )
        self.norm, self.decoder = nn.LayerNorm(features), nn.Linear(features, words, bias=False)
        self.decoder.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    def forward(self, words: Tensor) -> Tensor:  # noqa: D102
        x = self.dropout(self.embedding(words) + self.positions[: words.shape[1]])
        return self.decoder(self.norm(self.blocks(x)))


class ViT(Transformer):
    """A vision transformer: square patches, learned positions, pre-norm blocks, the mean over places, one linear layer.

    Args:
        width: factor on ``heads`` and ``neurons``; the residual stream keeps its width, as it does when grown.
        size: pixels along either side of an image.
        patch: pixels along either side of a patch.
        features: width of the residual stream.
        layers: number of blocks.
        heads: heads a block.
        head: features a head.
        neurons: hidden neurons a block.
        dropout: share that is dropped in training.
        in_channels: 3 for colour images, 1 for grey ones.
        classes: number of outputs.

    Shape: ``[N, in_channels, size, size] -> [N, classes]``.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        size: int = 32,
        patch: int = 4,
        features: int = 128,
        layers: int = 6,
        heads: int = 4,
        head: int = 32,
        neurons: int = 512,
        dropout: float = 0.0,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, features, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty((size // patch) ** 2, features))
        self.blocks = nn.Sequential(
            *(
                Block(features, scaled(heads, width), head, scaled(neurons, width), False, dropout)
                for _ in range(layers)
            )
        )
        self.norm, self.fc = nn.LayerNorm(features), nn.Linear(features, classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(x)).mean(1))
