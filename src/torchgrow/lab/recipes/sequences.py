"""Recipes for language models, which predict the next word of a text."""

from functools import partial

from torchgrow import Budget, TorchgrowError
from torchgrow.lab.attention import GPT
from torchgrow.lab.names import SIZES
from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.recurrent import LSTM


def lstm_ptb(size: str = "small") -> Recipe:
    """Zaremba's LSTM on words: hidden units grow to half the FLOPs of LSTM and decoder, the embedding stays.

    The paper, large, where its 11.9 % of the FLOPs are the budget: perplexity 82.46 (validation) with 310 and 275
    units, 82.57 dense; saving 5.1.
    Command: ``torchgrow run lstm-ptb --data FOLDER``, with the Penn Treebank or any other text in three files;
    without ``--data``, the manual that comes with Python; with ``--scale full --preset paper`` (or ``--size large``)
    for the paper's. ``--size`` takes small (200 hidden units a layer, 13
    epochs), medium (650, 39 epochs) and large (1500, 55 epochs; the network of the paper that grows it, with its
    two rates of dropout). Sizes and schedules are those of Zaremba et al. (2014, arXiv 1409.2329) and their code,
    whose loss is a sum over the words of a sample: the mean over them, as here, needs a learning rate as many
    times larger, and gradients clipped at a norm as many times smaller.
    Hardware: 2 CPU cores for small; for a try there, leave ``--data`` out and add ``--epochs 2``.
    Here: docs/results.md, Table 8 beside the paper's.

    Raises:
        TorchgrowError: another size.
    """
    if size not in SIZES:
        raise TorchgrowError(f"size is one of {', '.join(SIZES)}, got {size!r}")
    hidden = {"small": 200, "medium": 650, "large": 1500}[size]
    epochs, constant = {"small": (13, 4), "medium": (39, 6), "large": (55, 14)}[size]
    steps = 20 if size == "small" else 35
    build = partial(
        LSTM,
        embedding=hidden,
        hidden=(hidden, hidden),
        dropout={"small": 0.0, "medium": 0.5, "large": 0.65}[size],
        init={"small": 0.1, "medium": 0.05, "large": 0.04}[size],
    )
    return Recipe(
        name="lstm-ptb",
        dataset="text",
        build=build,
        build_grown=partial(build, dropout=0.35) if size == "large" else None,
        budget=Budget(flops="11.9%" if size == "large" else "50%"),
        # The learning rate falls from the fifth epoch on: full-grown in the first, pruned where it falls.
        preset="default:ramp=0.04,peak=2.2,hold=0.3,settle=0.5",
        epochs=epochs,
        updates_per_epoch=4,
        batch_size=20,
        steps=steps,
        lr=1.0 * steps,
        lr_milestones=tuple(epoch / epochs for epoch in range(constant, epochs)),
        lr_factor={"small": 1 / 2, "medium": 0.8, "large": 1 / 1.15}[size],
        momentum=0.0,
        weight_decay=0.0,
        clip=(10.0 if size == "large" else 5.0) / steps,
        freeze=("embedding",),
    )


def gpt_ptb() -> Recipe:
    """A small GPT on words: heads, hidden neurons and layers grow to 60 % of the FLOPs, the residual stream stays.

    Command: ``torchgrow run gpt-ptb --data FOLDER``, with the Penn Treebank or any other text in three files;
    without ``--data``, the manual that comes with Python.
    Hardware: 2 CPU cores; for a try there, leave ``--data`` out and add ``--epochs 2``.
    Here: docs/results.md, under its name.
    """
    return Recipe(
        name="gpt-ptb",
        dataset="text",
        build=partial(GPT, features=256, layers=6, heads=8, head=32, neurons=1024, context=64, dropout=0.2),
        budget=Budget(flops="60%"),
        depth=True,
        preset="default:ramp=0.01,peak=1,layer_lag=1",
        epochs=20,
        updates_per_epoch=39,  # it is grown before the warm-up is over
        batch_size=16,
        steps=64,
        optimizer="adamw",
        lr=1e-3,
        schedule="cosine",
        warmup=0.05,
        weight_decay=0.1,
        clip=1.0,
    )
