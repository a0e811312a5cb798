"""Functions of other libraries with the sizes of their views inferred, compiled once more from the installed source.

Attention often takes the sizes of its heads from the width of its input, as in
`self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)` and later `x.reshape(B, N, C)`, which holds only
while all heads are there. A copy of such a forward would have to follow every release of its library. With -1 in
place of the size computed from `C` the function is the same at full width, which the proof checks, and right below it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from textwrap import dedent
from typing import Any


class _Infer(ast.NodeTransformer):
    """In `reshape` and `view`, -1 for the one size that is computed from a name, unless another is inferred."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Call(self, node: ast.Call) -> ast.Call:
        """Edit one call."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("reshape", "view"):
            wide = [k for k, size in enumerate(node.args) if any(ast.unparse(x) == self.name for x in ast.walk(size))]
            if len(wide) == 1 and all(ast.unparse(size) != "-1" for size in node.args):
                node.args[wide[0]] = ast.parse("-1", mode="eval").body
        return node


def inferring(
    function: Callable[..., Any], edits: Mapping[str, str] | None = None, width: str = "C"
) -> Callable[..., Any]:
    """A function with the sizes of its views inferred, its lines and globals kept; itself if nothing changes.

    Args:
        function: one whose source is at hand.
        edits: pieces of the source that are replaced first.
        width: what the function calls the width of its input.
    """
    lines, start = inspect.getsourcelines(function)
    source = dedent("".join(lines))
    before = ast.dump(ast.parse(source))
    for old, new in (edits or {}).items():
        source = source.replace(old, new)
    tree = _Infer(width).visit(ast.parse(source))
    if ast.dump(tree) == before:
        return function
    made: dict[str, Any] = {}
    tree = ast.increment_lineno(ast.fix_missing_locations(tree), start - 1)
    exec(compile(tree, inspect.getfile(function), "exec"), function.__globals__, made)
    return made[function.__name__]
