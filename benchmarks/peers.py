"""The oracle of the conformance run, for any library that cuts networks: is the compact one the frame with zeros?

A peer gives no list of what it cut. So its network is given numbers that tell where they come from (every entry of
every tensor is its own index), is cut, and what is left says which positions were kept. Then both networks get random
weights, the frame zeros at all other positions, and their outputs are compared, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from drawn_training import Still, tensors
from torchgrow import Space, TorchgrowError, shrink_
from torchgrow.tracing.model_call import call
from torchgrow.tracing.tracer import replay

TOLERANCE, IN_TRAINING = 1e-9, 1e-6
"""Largest relative errors that count as equal; batch statistics of two small pictures blow rounding up."""

ZERO = 1e-100
"""Zero, as good as nothing to a sum; but a row of it can be normalised, where true zeros give 0 / 0."""

SHARE = 0.3
"""What the peers are asked to cut of every layer."""

Kept = dict[str, list[Tensor]]
"""For every tensor the positions kept, by axis."""


def double(value: Any) -> Any:
    """Floating-point tensors in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and buffers, under all their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return ((name, tensor) for name, tensor in named if tensor.is_floating_point())


def randomize_(model: nn.Module, seed: int = 0) -> None:
    """Weights neither large nor small, scales around 1, statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise * max(1, p[0].numel()) ** -0.5 if p.dim() > 1 else 1 + noise / 4)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                draw = torch.rand(2, module.num_features, generator=generator, dtype=torch.float64)
                module.running_mean.copy_(draw[0] - 0.5)
                module.running_var.copy_(draw[1] + 0.5)


def still_(model: nn.Module) -> None:
    """Nothing is dropped any more."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(module).__name__)):
                setattr(module, name, 0.0)


def outputs(model: nn.Module, example: Any, training: bool) -> list[Tensor]:
    """Everything the network puts out in one mode, without noise."""
    model.train(training)
    with torch.no_grad(), Still():
        torch.manual_seed(0)
        found = tensors(call(model, example))
    return [torch.view_as_real(x) if x.is_complex() else x for x in found]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error; infinite if shapes differ or there is a NaN."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.numel():
            error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12))
            worst = max(worst, error if error == error else float("inf"))
    return worst


def compare(compact: nn.Module, full: nn.Module, example: Any) -> dict[str, Any]:
    """Errors in both modes; in training a text where the frame itself cannot be run on this example."""
    for model in (compact, full):
        still_(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it puts zeros where padding is skipped
    try:
        found: dict[str, Any] = {"evaluation": gap(outputs(compact, example, False), outputs(full, example, False))}
        try:
            expected = outputs(full, example, True)
        except Exception as error:
            return {**found, "training": f"the frame fails: {type(error).__name__}: {error}"[:200]}
        return {**found, "training": gap(outputs(compact, example, True), expected)}
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def compare_cut(model: nn.Module, example: Any, space: Space, keep: Tensor) -> dict[str, Any]:
    """`compare` for a structure of ours; the model, in float64, gets random weights and zeros among them."""
    randomize_(model)
    compact = copy.deepcopy(model)  # the only copy: the largest models fill the memory twice
    shrink_(compact, space, keep)
    with torch.no_grad():
        for name in space.parameters:
            for axis in range(model.get_parameter(name).dim()):
                units = space.unit_of.get((name, axis), torch.empty(0, dtype=torch.int64))
                gone = torch.nonzero((units >= 0) & ~keep[units.clamp(min=0)]).flatten()
                model.get_parameter(name).index_fill_(axis, gone, ZERO)
    return compare(compact, model, example)


def code_(model: nn.Module) -> None:
    """Every entry of every floating-point tensor becomes its own index."""
    with torch.no_grad():
        for _, tensor in floating(model):
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape))


def decoded(coded: nn.Module, full: nn.Module) -> Kept:
    """Which positions of the full network's tensors a cut network still has.

    Raises:
        ValueError: a tensor is not what is left of one after positions of its axes have gone.
    """
    whole, kept = dict(floating(full)), {}
    for name, tensor in floating(coded):
        if name not in whole:
            raise ValueError(f"{name} is not in the frame")
        shape = whole[name].shape
        if tensor.dim() != len(shape) or (tensor.detach() % 1).any():
            raise ValueError(f"{name} does not hold entries of the frame's")
        at = torch.unravel_index(tensor.detach().long(), shape)
        kept[name] = [at[axis].movedim(axis, 0).reshape(tensor.shape[axis], -1)[:, 0] for axis in range(len(shape))]
        grid = torch.meshgrid(*kept[name], indexing="ij") if shape else ()
        if not all(torch.equal(a, b) for a, b in zip(at, grid, strict=True)):
            raise ValueError(f"{name} does not hold whole rows of the frame's")
    return kept


def fill_(compact: nn.Module, full: nn.Module, kept: Kept) -> None:
    """Give the compact network the frame's values, and the frame zeros where parameters were cut."""
    whole, parameters = dict(floating(full)), dict(full.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in floating(compact):
            if tensor.dim():
                tensor.copy_(whole[name][torch.meshgrid(*kept[name], indexing="ij")])
            else:
                tensor.copy_(whole[name])
        for name in kept:
            for axis, positions in enumerate(kept[name] if name in parameters else []):
                gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
                gone[positions] = False
                parameters[name].index_fill_(axis, torch.nonzero(gone).flatten(), ZERO)


def torch_pruning(model: nn.Module, example: Any) -> nn.Module:
    """Torch-Pruning: a magnitude step; layers that give the outputs are spared, as its users are told to."""
    import torch_pruning as tp

    inputs = example if not isinstance(example, tuple) else list(example)
    spared: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    spared = spared[-1:]
    try:
        given = [place[0] for f in replay(model, example).frozen if f.op == "output" for place in f.places]
        spared += [model.get_submodule(name.rpartition(".")[0]) for name in given]
    except TorchgrowError:
        pass  # then the last linear layer alone
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=SHARE, ignored_layers=spared)
    pruner.step()
    return model


def kirigami(model: nn.Module, example: Any) -> nn.Module:
    """torch-kirigami: of every weight that its analysis lets go alone the first rows, all in one plan.

    Its automatic selection looks at every channel by itself, which takes minutes for a SqueezeNet.
    """
    from torch_kirigami import AxisRef, DependencyGraph
    from torch_kirigami.pruning import Pruner

    args = example if isinstance(example, tuple) else (example,)
    given: dict[str, Any] = {"kwargs": example} if isinstance(example, dict) else {"args": args}
    graph = DependencyGraph.build(model, **given)
    pruner = Pruner(model, graph=graph)
    chosen = []
    for name, parameter in model.named_parameters():
        rows = int(SHARE * parameter.shape[0]) if parameter.dim() > 1 else 0
        if rows:
            selection = AxisRef(graph.parameter(name), 0).select(range(rows))
            if graph.propagate(remove=(selection,), constraints=pruner.constraints).status == "resolved":
                chosen.append(selection)
    return pruner.apply(pruner.plan_remove(chosen))[0]


PEERS = {"torch_pruning": torch_pruning, "kirigami": kirigami}


def peer(name: str, model: nn.Module, example: Any) -> dict[str, Any]:
    """What came of a peer: whether a step ran and the network runs after it, what is left, and whether it is exact."""
    model, example = model.double().eval(), tree_map(double, example)
    before = sum(p.numel() for p in model.parameters())
    coded = copy.deepcopy(model)
    code_(coded)
    try:
        compact = PEERS[name](coded, example)
        after = sum(p.numel() for p in compact.parameters())
        call(compact.eval(), example)
    except Exception as error:
        return {"runs": False, "exact": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    row = {"runs": after < before, "params_left": after / before, "exact": False}
    randomize_(model)
    try:
        fill_(compact, model, decoded(compact, model))
        errors = compare(compact, model, example)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {**row, "exact": row["runs"] and errors["evaluation"] <= TOLERANCE, **errors}
