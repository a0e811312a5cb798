"""Rules for attention and recurrent layers: heads, and hidden units with all their gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..labels import Labelled
from .labelled import aligned, first_tensor, freeze_all, harmonize, on_axis, placed, without_axes
from .registry import Context, module_rule, rule


@rule(
    "scaled_dot_product_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", counted=True,
)  # fmt: skip
def attention(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Query [..., L, E], key [..., S, E], value [..., S, V]: heads may go; E may not, as the scale reads it."""
    query, key, value = named["query"], named["key"], named["value"]
    mask, out = named.get("attn_mask", named.get("attn_bias")), first_tensor(out)
    rank, reason = out.dim(), "attends over this axis"
    q = without_axes(ctx, ctx.labelled(query), [rank - 1, rank - 2], reason)
    k = without_axes(ctx, ctx.labelled(key), [rank - 1, rank - 2], reason)
    v = without_axes(ctx, ctx.labelled(value), [rank - 2], reason)
    v = [
        labels if labels.axes == (rank - 1,) else whole
        for labels in v
        for whole in without_axes(ctx, [labels], [rank - 1], reason)
    ]
    several = query.shape[-3] // key.shape[-3] if rank > 2 and key.shape[-3] else 1  # query heads per key/value head
    if several > 1:
        k, v = ([_repeated(labels, rank - 3, several) for labels in labelled] for labelled in (k, v))
    operands = [(query, q), (key, k), (value, v)]
    if mask is not None:
        biases = without_axes(ctx, aligned(ctx.labelled(mask), rank), [rank - 1, rank - 2], reason)
        operands.append((mask, biases))
    batch = range(rank - 2)
    harmonize(ctx, operands, batch, rank, "attends with different or no labels")
    result: list[Labelled] = []
    for labelled in (v, q, k, *(b for _, b in operands[3:])):
        for labels in labelled:
            mate = next((x for x in result if x.axes == labels.axes), None)
            if mate is None:
                result.append(labels if labelled is v else labels.with_zeros(False))
            else:
                ctx.unify(mate, labels)
    ctx.set_labelled(out, result)
    counted: list[Labelled | int] = [on_axis(result, axis) or out.shape[axis] for axis in batch]
    pairs = query.shape[-2] * key.shape[-2]
    ctx.flop(2 * pairs * query.shape[-1], *counted)
    ctx.flop(2 * pairs, *counted, on_axis(result, rank - 1) or value.shape[-1])


@rule("_pack_padded_sequence")
def pack(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """[T, N, F] (or [N, T, F]) to one row per valid step."""
    labelled = without_axes(ctx, ctx.labelled(named["input"]), [0, 1], "packs sequences along this axis")
    ctx.set_labelled(out[0], [Labelled(labels.packed[0], labels.sources) for labels in labelled])


@rule("_pad_packed_sequence")
def unpack(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """And back, with padding for the other steps."""
    filled = named["padding_value"] != 0
    labelled = without_axes(ctx, ctx.labelled(named["data"]), [0], "packs sequences along this axis")
    spread = [Labelled(labels.packed[None], labels.sources) for labels in labelled]
    ctx.set_labelled(out[0], [labels.with_zeros(False) if filled else labels for labels in spread])


def _repeated(labels: Labelled, axis: int, times: int) -> Labelled:
    """Every key/value head stands for `times` query heads."""
    return Labelled(labels.packed.repeat_interleave(times, axis), labels.sources) if axis in labels.axes else labels


@module_rule(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(ctx: Context, module: nn.RNNBase, named: dict[str, Any], output: Any) -> None:
    """Hidden unit j is row j of every gate, its biases, and column j of all that reads it.

    The module has one `hidden_size`, so layers and directions share their units. Gates of a unit belong on the
    columns that read it, since no scale on the rows passes through the sigmoids; a projection's own rows are linear.
    """
    x = named["input"]
    data = x.data if isinstance(x, PackedSequence) else x
    last = data.dim() - 1
    entering = on_axis(
        without_axes(ctx, ctx.labelled(data), range(last), "is fed to a recurrent layer step by step"), last
    )
    tokens, directions = math.prod(data.shape[:-1]), 2 if module.bidirectional else 1
    cells: list[Tensor] = []  # symbols of the hidden units of every layer and direction
    shown: list[Labelled] = []  # what each of them puts out: the same, or its projection
    for layer in range(module.num_layers):
        for suffix in ("", "_reverse")[:directions]:
            weights = {key: getattr(module, f"{key}_l{layer}{suffix}", None) for key in PARTS}
            found = one_direction(ctx, weights, entering, tokens)
            if found is None:
                for tensor in weights.values():
                    reason = "belongs to a recurrent layer of one unit, or one with frozen weights"
                    freeze_all(ctx, ctx.labelled(tensor), reason)
                freeze_all(ctx, [entering], "enters a recurrent layer that cannot be cut")
                continue
            cells.append(found[0])
            shown.append(found[1])
        here = shown[len(shown) - directions :]
        if len(shown) != directions * (layer + 1):
            entering = None
            continue
        entering = Labelled(
            torch.cat([part.packed.flatten() for part in here]), here[0].sources.union(*(p.sources for p in here))
        )
    if len(shown) != directions * module.num_layers:
        for symbols in [*cells, *(part.symbols for part in shown)]:
            of_layer = Labelled(symbols.flatten() << 1)
            ctx.freeze(of_layer, "shares its size with a recurrent layer that cannot be cut")
        return
    for symbols in cells[1:]:
        ctx.tie(cells[0], symbols)
    for part in shown[1:]:
        ctx.tie(shown[0].symbols.flatten(), part.symbols.flatten())
    first = module.weight_ih_l0
    assert isinstance(first, Tensor)
    ctx.count(first, "hidden_size", cells[0])
    if module.proj_size:
        ctx.count(first, "proj_size", shown[0].symbols.flatten())
    columns = on_axis(ctx.labelled(first), 1)
    if columns is not None:
        ctx.count(first, "input_size", columns.symbols.flatten())
    assert entering is not None
    _put_out(ctx, named, output, entering, shown[0], Labelled(cells[0] << 1))


def _put_out(
    ctx: Context, named: dict[str, Any], output: Any, sequence: Labelled, shown: Labelled, cell: Labelled
) -> None:
    """Label the outputs of a recurrent layer: the sequence and the last states, which tie to given initial states."""
    given = named.get("hx")
    given = given if isinstance(given, (tuple, list)) else [given]
    out, ends = output
    put_out = out.data if isinstance(out, PackedSequence) else out
    ctx.set_labelled(put_out, [placed(sequence, put_out.dim(), put_out.dim() - 1)])
    for i, end in enumerate(ends if isinstance(ends, tuple) else [ends]):
        mine = placed(cell if i else shown, end.dim(), end.dim() - 1)
        ctx.set_labelled(end, [mine])
        start = given[i] if i < len(given) else None
        if start is not None:
            carried(ctx, start, mine)


PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def one_direction(
    ctx: Context, weights: dict[str, Tensor | None], entering: Labelled | None, tokens: int
) -> tuple[Tensor, Labelled] | None:
    """Tie the tensors of one layer in one direction; returns its hidden units and what it puts out."""
    into, again, projection = weights["weight_ih"], weights["weight_hh"], weights["weight_hr"]
    assert into is not None
    assert again is not None
    size = projection.shape[1] if projection is not None else again.shape[1]
    rows, columns = on_axis(ctx.labelled(into), 0), on_axis(ctx.labelled(into), 1)
    back_rows, back = on_axis(ctx.labelled(again), 0), on_axis(ctx.labelled(again), 1)
    biases = [on_axis(ctx.labelled(weights[key]), 0) for key in ("bias_ih", "bias_hh") if weights[key] is not None]
    if rows is None or back_rows is None or back is None or any(bias is None for bias in biases):
        return None
    cell = rows.symbols.reshape(-1, size)[0]
    for other in (rows, back_rows, *biases):
        assert other is not None
        ctx.tie(other.symbols.reshape(-1, size), cell[None])
    shown = Labelled(cell << 1)
    if projection is not None:
        down, across = on_axis(ctx.labelled(projection), 0), on_axis(ctx.labelled(projection), 1)
        if down is None or across is None:
            return None
        ctx.tie(cell, across.symbols.flatten())
        ctx.freeze(across, "hidden_size must stay above proj_size, so only the projection can be narrowed")
        ctx.read(shown, across)
        ctx.flop(2 * tokens, down, across)
        shown = Labelled(down.packed.flatten(), down.sources)
    ctx.tie(shown.symbols, back.symbols.flatten())
    ctx.read(shown, back)
    if entering is not None and columns is not None:
        ctx.tie(entering.symbols.flatten(), columns.symbols.flatten())
        ctx.read(entering, columns)
    elif columns is not None:
        ctx.freeze(columns, "reads values that cannot be removed")
    elif entering is not None:
        ctx.freeze(entering, "is read by columns that cannot be removed")
    ctx.flop(2 * tokens, rows, columns or into.shape[1])
    ctx.flop(2 * tokens, back_rows, back)
    return cell, shown


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def fused_cell(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """The gates of a step, [N, 4 H] or [N, 3 H], to its states [N, H]: what a cell is on other devices than the CPU."""
    state = named["cx"] if "cx" in named else named["hx"]
    reason = "is fed to a recurrent cell"
    sums = [
        on_axis(without_axes(ctx, ctx.labelled(named[key]), [0], reason), 1) for key in ("input_gates", "hidden_gates")
    ]
    biases = [named[key] for key in ("input_bias", "hidden_bias") if named.get(key) is not None]
    gates = [*sums, *(on_axis(ctx.labelled(bias), 0) for bias in biases)]
    found = [gate for gate in gates if gate is not None]
    if len(found) < len(gates):
        freeze_all(ctx, (*found, *ctx.labelled(state)), "belongs to a recurrent cell with frozen weights")
        return
    cell = found[0].symbols.reshape(-1, state.shape[1])[0]
    for gate in found:
        ctx.tie(gate.symbols.reshape(-1, len(cell)), cell[None])
    unit = Labelled(cell << 1)
    carried(ctx, state, unit)
    for new in out[:-1]:  # the last is kept for the backward pass
        ctx.set_labelled(new, [placed(unit, 2, 1)])


def carried(ctx: Context, start: Tensor, units: Labelled) -> None:
    """An initial state: cut along with the units if it is computed inside the model, and labelled or constant."""
    axis = start.dim() - 1
    labelled = without_axes(ctx, ctx.labelled(start), range(axis), "is the initial state of a recurrent layer")
    own = on_axis(labelled, axis)
    if own is not None:
        ctx.tie(own.symbols.flatten(), units.symbols.flatten())
    elif ctx.depends_on_input(start) or not ctx.constant_along(start, axis):
        ctx.freeze(units, "starts from a state given from outside; if the model put it out before, declare carried=...")
