"""Tests ask the package by its public names: a private one may go or change its meaning without notice."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "src" / "torchgrow"
SOURCES = sorted(path for path in TESTS.rglob("*.py") if "saved" not in path.relative_to(TESTS).parts)
TORCHS = {*dir(Tensor), *dir(nn.Module), *vars(nn.Module()), *dir(torch.optim.Optimizer)}
"""PyTorch's own names, by which the package and tests alike look into tensors, modules and optimizers."""


def is_private(name: str) -> bool:
    return re.fullmatch(r"_(?!_)\w+", name) is not None


def defined(tree: ast.AST) -> Iterator[str]:
    """The private names that a source defines: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found = node.id if isinstance(node, ast.Name) else node.attr
        else:
            continue
        if is_private(found):
            yield found


def touched(source: str, private: set[str]) -> Iterator[str]:
    """Private names of the package that a source imports, reaches for, or names in a text (as for `setattr`).

    What an object asks of itself is its own, if the source defines it.
    """
    tree = ast.parse(source)
    own = set(defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchgrow"):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and node.attr in private:
            itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not itself or node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.findall(r"(?:^|\.|import )(_\w+)", node.value)
            yield from (name for name in found if name in private)


PRIVATE = {name for path in PACKAGE.rglob("*.py") for name in defined(ast.parse(path.read_text("utf-8")))} - TORCHS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_touches_what_is_private(path: Path) -> None:
    assert sorted(touched(path.read_text("utf-8"), PRIVATE)) == []


def test_private_names_are_seen() -> None:
    assert len(PRIVATE) > 500
    assert "_hidden_part" not in PRIVATE
    assert not {"_version", "_parameters", "_optimizer_step_pre_hooks"} & PRIVATE
    seen = {
        "from torchgrow.growth.run import _new_part": ["_new_part"],
        "from torch import _C": [],
        "grower.run._hidden_part(1)": ["_hidden_part"],
        "tensor._other_part": [],
        "patch.setattr('torchgrow.growth.run._hidden_part', f)": ["_hidden_part"],
        "patch.setattr(run, '_hidden_part', f)": ["_hidden_part"],
        "code = 'import torchgrow\\ntorchgrow.run._hidden_part()'": ["_hidden_part"],
        "class A:\n    def _hidden_part(self): self._hidden_part()": [],
        "class A(Known):\n    def f(self): self._hidden_part()": ["_hidden_part"],
        "class A:\n    def _hidden_part(self): other._hidden_part()": ["_hidden_part"],
    }
    assert {source: list(touched(source, {"_hidden_part"})) for source in seen} == seen
