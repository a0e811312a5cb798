"""What torchgrow can do on one model: facts in a dataclass, and ways to show them: text, JSON and a picture."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchgrow import Budget, BudgetError, Cost, Frozen, Space, TorchgrowError, trace, verify
from torchgrow.lab.display import short
from torchgrow.patience import rename
from torchgrow.structure.budget import check_feasible
from torchgrow.structure.cost import CostModel


@dataclass(frozen=True, kw_only=True)
class Part:
    """A group of units, or a module that no unit touches and that is kept whole.

    Attributes:
        name: of the group, or of the module.
        units: units of the group; 0 for a module that is kept whole.
        removable: how many of them can go, the last one of a group always staying.
        touches: parameters that belong to the units, or to the module; one that two groups share counts for both.
        frees_params: parameters that go if all these units go, and all other groups keep theirs.
        frees_flops: FLOPs of one sample, likewise.
        params_share: `frees_params` as a share of the frame's.
        flops_share: `frees_flops` as a share of the frame's.
    """

    name: str
    units: int
    removable: int
    touches: int
    frees_params: int
    frees_flops: int
    params_share: float
    flops_share: float


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why something can never go.

    Attributes:
        reason: one sentence.
        op: the operation that decided it.
        places: how many axes of tensors are kept by it.
        params: parameters of the tensors concerned.
        where: the modules (or tensors) concerned, with the line of code where one is known.
    """

    reason: str
    op: str
    places: int
    params: int
    where: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What torchgrow can do on a model. FLOPs are 2 x MACs of one sample.

    Attributes:
        model: what was inspected, as it was named.
        inputs: shapes of the tensors it was traced on.
        params: of the frame.
        flops: of the frame.
        least_params: parameters of the smallest network that can be reached.
        least_flops: its FLOPs.
        parts: groups and modules that are kept whole, in the order of the model's parameters.
        frozen: what can never go, and why; what keeps most parameters first.
        exact: whether the second proof came out exact; None if it was left out, or there was nothing to prove.
        proof: the verdict in words.
        budget: the budget asked about, or None.
        feasible: whether it can be met, None without one.
        budget_verdict: the answer in words, "" without one.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    params: int
    flops: int
    least_params: int
    least_flops: int
    parts: tuple[Part, ...]
    frozen: tuple[Reason, ...]
    exact: bool | None
    proof: str
    budget: str | None
    feasible: bool | None
    budget_verdict: str

    @property
    def nothing_can_change(self) -> bool:
        """No group has a unit to spare."""
        return not any(part.removable for part in self.parts)

    @property
    def removable_params(self) -> float:
        """Share of the parameters that can go when every group is at its smallest."""
        return 1 - self.least_params / max(self.params, 1)

    @property
    def removable_flops(self) -> float:
        """Share of the FLOPs that can go, likewise."""
        return 1 - self.least_flops / max(self.flops, 1)

    def as_json(self) -> dict[str, Any]:
        """All facts as JSON can hold them."""
        derived = ("nothing_can_change", "removable_params", "removable_flops")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def inspect(
    model: nn.Module,
    inputs: Any,
    *,
    name: str = "model",
    budget: Budget | None = None,
    proof: bool = True,
    depth: bool = False,
    tell: Callable[[str], None] = lambda stage: None,
) -> Inspection:
    """Trace a model and find out what can go, what cannot, and whether a budget can be met.

    Args:
        model: the frame; it is left as it was. An attribute ``carried`` on it is taken as `torchgrow.trace` takes it.
        inputs: a small batch, as for `torchgrow.trace`.
        name: what to call it.
        budget: to ask about.
        proof: whether to prove exactness once more, on other random weights than tracing did.
        depth: whether layers may be left out as well.
        tell: called with what is being done, before each step.

    Raises:
        TorchgrowError: the model cannot be traced, or its proof cannot be run.
    """
    tell("tracing, and proving what can go")
    carried: Any = getattr(model, "carried", None)  # how a recurrent network says what it hands on to its next call
    space = trace(model, inputs, carried=carried, depth=depth)
    costs = CostModel(space)
    frame, least = Cost(*costs.both(costs.sizes).tolist()), Cost(*costs.both(costs.space.least).tolist())
    parts = _parts(space, costs, frame)
    exact, verdict = None, "nothing to prove"
    if any(part.removable for part in parts):
        verdict = "each group came out exact while tracing (float64); the second proof was left out"
        if proof:
            tell("proving once more, on other random weights")
            report = verify(model, inputs, seed=1, space=space)
            exact = report.ok
            verdict = (
                f"{'exact' if exact else 'NOT EXACT'}: relative error at most {report.max_error:.1e} "
                f"over {report.trials} random subsets (float64)"
            )
    feasible, answer = _feasible(budget, costs, frame) if budget else (None, "")
    return Inspection(
        model=name,
        inputs=tuple(tuple(x.shape) for x in tree_leaves(inputs) if isinstance(x, Tensor)),
        params=frame.params,
        flops=frame.flops,
        least_params=least.params,
        least_flops=least.flops,
        parts=parts,
        frozen=reasons_of(space.frozen, {name: math.prod(space.shapes[name]) for name in space.parameters}),
        exact=exact,
        proof=verdict,
        budget=str(budget) if budget else None,
        feasible=feasible,
        budget_verdict=answer,
    )


def _parts(space: Space, costs: CostModel, frame: Cost) -> tuple[Part, ...]:
    """Groups and whole modules, ordered by their first parameter."""
    position: dict[int, int] = {}  # of each group's first parameter
    whole: dict[str, tuple[int, int]] = {}  # module -> its first parameter, and how many it has
    cut: set[str] = set()
    for index, name in enumerate(space.parameters):
        axes = space.cut_axes.get(name, ())
        for axis in axes:
            units = space.unit_of[name, axis]
            for group in space.group_of[units[units >= 0]].unique().tolist():
                position.setdefault(group, index)
        module = name.rpartition(".")[0] or name  # a parameter of the model itself stands for itself
        if name in space.block_of:
            position.setdefault(int(space.group_of[space.block_of[name]]), index)
        if axes:
            cut.add(module)
        first, count = whole.get(module, (index, 0))
        whole[module] = (first, count + math.prod(space.shapes[name]))
    smallest = costs.space.least
    found = [
        (
            first,
            Part(
                name=name,
                touches=count,
                units=0,
                removable=0,
                frees_params=0,
                frees_flops=0,
                params_share=0.0,
                flops_share=0.0,
            ),
        )
        for name, (first, count) in whole.items()
        if name not in cut
    ]
    for group, name in enumerate(space.group_names):
        # One group at a time: all at once would take groups x counts x groups numbers.
        live = costs.sizes.clone()
        live[group] = smallest[group]
        params, flops = costs.both(live).tolist()
        live[group] = 0
        found.append(
            (
                position[group],
                Part(
                    name=name,
                    units=int(costs.sizes[group]),
                    removable=int(costs.sizes[group] - smallest[group]),
                    touches=frame.params - int(costs.both(live)[0]),
                    frees_params=frame.params - params,
                    frees_flops=frame.flops - flops,
                    params_share=(frame.params - params) / max(frame.params, 1),
                    flops_share=(frame.flops - flops) / max(frame.flops, 1),
                ),
            )
        )
    return tuple(part for _, part in sorted(found, key=lambda pair: pair[0]))


def reasons_of(frozen: tuple[Frozen, ...], sizes: Mapping[str, int]) -> tuple[Reason, ...]:
    """Equal reasons as one, what keeps most parameters first; errors of the proof differ in their digits only.

    Args:
        frozen: what can never go.
        sizes: of every parameter.
    """
    alike: dict[tuple[str, str], list[Frozen]] = {}
    for one in frozen:
        alike.setdefault((one.op, re.sub(r"\d\.\de[+-]\d+", "", one.reason)), []).append(one)
    found = []
    for ones in alike.values():
        places = {place for one in ones for place in one.places}
        found.append(
            Reason(
                reason=ones[0].reason,
                op=ones[0].op,
                places=len(places),
                params=sum(sizes.get(name, 0) for name in {name for name, _ in places}),
                where=tuple(dict.fromkeys(_where(one) for one in ones)),
            )
        )
    return tuple(sorted(found, key=lambda reason: (-reason.params, -reason.places)))


def _where(frozen: Frozen) -> str:
    """The module that ran, or, where the model itself did, the first tensor it is about."""
    at = frozen.module or (frozen.places[0][0] if frozen.places else "model")
    return f"{at} ({frozen.line})" if frozen.line else at


def _feasible(budget: Budget, costs: CostModel, frame: Cost) -> tuple[bool, str]:
    limits = budget.limits(frame)
    try:
        check_feasible(budget, limits, costs)
    except BudgetError as error:
        return False, str(error)
    allowed = [f"{n:,} {name}" for name, n in (("params", limits.params), ("flops", limits.flops)) if n is not None]
    return True, f"feasible: {budget} allows {' and '.join(allowed)}"


# --- text ---


def render(seen: Inspection) -> RenderableType:
    """The whole answer for a terminal."""
    blocks: list[RenderableType] = [_totals(seen), _tree(seen.parts)]
    if seen.frozen:
        blocks.append(_frozen(seen.frozen))
    if seen.nothing_can_change:
        blocks.append(_nothing(seen))
    return Group(*blocks)


def _totals(seen: Inspection) -> Table:
    grid = Table.grid(padding=(0, 2))
    shapes = ", ".join("x".join(map(str, shape)) for shape in seen.inputs)
    grid.add_row("model", Text.assemble((seen.model, "bold"), f" on {shapes}"))
    for label, frame, least, share in (
        ("parameters", seen.params, seen.least_params, seen.removable_params),
        ("FLOPs", seen.flops, seen.least_flops, seen.removable_flops),
    ):
        grid.add_row(label, f"{short(frame)}; {percent(share)} can go, down to {short(least)}")
    grid.add_row("proof", Text(seen.proof, style="bold red" if seen.exact is False else "green" if seen.exact else ""))
    if seen.budget:
        grid.add_row("budget", Text(seen.budget_verdict, style="green" if seen.feasible else "bold red"))
    return grid


def _tree(parts: tuple[Part, ...]) -> Table:
    """Groups by module, in columns; what cannot go is dim."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("group", overflow="fold")
    for column in ("can go\nof units", "alone frees\nof parameters", "alone frees\nof FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, part in branches(parts):
        if part is None:
            table.add_row(Text(label, style="bold"))
        elif part.units:
            cells = (f"{part.removable}/{part.units}", percent(part.params_share), percent(part.flops_share))
            table.add_row(Text(label), *cells, style="" if part.removable else "dim")
        else:
            table.add_row(Text(label), "whole", "-", "-", style="dim")
    return table


def branches(parts: tuple[Part, ...]) -> list[tuple[str, Part | None]]:
    """Lines of a tree by qualified names: label with branches drawn, and the part that stands there."""
    root: dict[str, Any] = {}
    for part in parts:
        node = root
        for piece in part.name.split("."):
            node = node.setdefault(piece, {})
        node[""] = part  # no piece of a name is empty
    lines: list[tuple[str, Part | None]] = []

    def walk(node: dict[str, Any], lead: str) -> None:
        """Append the lines below a node, each behind `lead`."""
        pieces = [piece for piece in node if piece]
        for piece in pieces:
            child, label, last = node[piece], piece, piece == pieces[-1]
            while len(child) == 1 and "" not in child:  # a module with one child needs no line of its own
                ((below, child),) = child.items()
                label = f"{label}.{below}"
            branch, deeper = ("", "") if node is root else ("└─ ", "   ") if last else ("├─ ", "│  ")
            lines.append((lead + branch + label, child.get("")))
            walk(child, lead + deeper)

    walk(root, "")
    return lines


def _frozen(frozen: tuple[Reason, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("kept\naxes", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=3)
    table.add_column("where", overflow="fold", ratio=2)
    for reason in frozen:
        table.add_row(str(reason.places), Text(f"{reason.op}: {reason.reason}"), Text(_some(reason.where)))
    return table


def _nothing(seen: Inspection) -> Panel:
    top = "\n".join(f"· {reason.op}: {reason.reason} [{_some(reason.where)}]" for reason in seen.frozen[:3])
    return Panel(
        Text(f"torchgrow finds no unit that can go: every layer keeps its full width.\n{top}", style="bold red"),
        title="nothing can change",
        border_style="bold red",
    )


def _some(names: tuple[str, ...]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def percent(share: float) -> str:
    """A share as text, never rounded to nothing or to all."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


# --- picture ---


def draw(seen: Inspection, path: Path) -> None:
    """Draw the parts as bars into an SVG file, which appears only once it is whole.

    Raises:
        TorchgrowError: the file cannot be written.
    """
    picture = BytesIO()
    # Text as text: names can be searched, and the file stays small. The salt makes equal pictures equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "torchgrow"}):
        FigureCanvasSVG(_figure(seen)).print_svg(picture, metadata={"Date": None})
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(picture.getvalue())
        rename(partial, path)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise TorchgrowError(f"{path} cannot be written: {error.strerror}; choose another --svg") from error


def _figure(seen: Inspection) -> Figure:
    """Two columns of bars: parameters that a part touches and frees, and FLOPs that it frees."""
    parts = seen.parts
    figure = Figure(figsize=(12, 1.8 + 0.22 * max(len(parts), 3)), layout="constrained")
    by_params, by_flops = figure.subplots(1, 2, sharey=True)
    rows = range(len(parts))
    touched = [100 * part.touches / max(seen.params, 1) for part in parts]
    freed = {
        by_params: [100 * part.params_share for part in parts],
        by_flops: [100 * part.flops_share for part in parts],
    }
    by_params.barh(rows, touched, height=0.72, color=["#9ecae1" if part.removable else "0.75" for part in parts])
    for ax, shares in freed.items():
        ax.barh(rows, shares, height=0.72, color="#2171b5")
        ends = [max(pair) for pair in zip(shares, touched, strict=True)] if ax is by_params else shares
        for row, (part, end) in enumerate(zip(parts, ends, strict=True)):
            share = part.params_share if ax is by_params else part.flops_share
            kept = f"{percent(end / 100)} kept" if ax is by_params else ""
            label = percent(share) if part.removable else kept
            ax.annotate(label, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=8, color="0.3")
        ax.set_xlim(0, 1.12 * max([*ends, 1]))  # room for the last number
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="x", labeltop=len(parts) > 40)  # one screen shows only part of a long picture
    by_params.set_title("parameters, % of the frame's", fontsize=10)
    by_flops.set_title("FLOPs, % of the frame's", fontsize=10)
    by_params.set_ylim(len(parts) - 0.4, -0.6)
    by_params.set_yticks(rows, [part.name for part in parts], fontsize=9)
    for tick, part in zip(by_params.get_yticklabels(), parts, strict=True):
        tick.set_color("black" if part.removable else "0.5")
    units = by_flops.secondary_yaxis("right")
    units.set_yticks(
        rows, [f"{part.removable} of {part.units} units" if part.units else "" for part in parts], fontsize=8
    )
    units.tick_params(length=0)
    units.spines["right"].set_visible(False)
    figure.suptitle(
        f"{seen.model}: {percent(seen.removable_params)} of {short(seen.params)} parameters and "
        f"{percent(seen.removable_flops)} of {short(seen.flops)} FLOPs can go\n"
        "dark: goes if this group alone shrinks to its smallest; light: touched by it, but stays; grey: kept whole",
        fontsize=11,
    )
    return figure
