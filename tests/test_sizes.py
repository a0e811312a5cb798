"""Limits of size, docstrings included: what is longer is read by nobody, and hides a part that wants a name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests", "benchmarks")
FILE, CLASS, FUNCTION = 500, 250, 60
"""The most lines of each."""


def too_long(source: str) -> Iterator[tuple[str, int]]:
    """(what, lines) of everything in a source beyond its limit; classes and functions by their names, with decorators.

    A function within another one counts twice: by itself, and as lines of the outer one.
    """
    lines = len(source.splitlines())
    if lines > FILE:
        yield "the file", lines
    yield from _too_long(ast.parse(source), "")


def _too_long(node: ast.AST, outer: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{outer}.{child.name}" if outer else child.name
            first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
            lines = (child.end_lineno or first) - first + 1
            if lines > (CLASS if isinstance(child, ast.ClassDef) else FUNCTION):
                yield name, lines
        yield from _too_long(child, name)


SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "saved" not in path.parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_classes_and_functions_are_short(path: Path) -> None:
    found = dict(too_long(path.read_text(encoding="utf-8")))
    assert not found, f"more lines than {FILE}, {CLASS} (class), {FUNCTION} (function): {found}"


CORE = 17_640
"""The most lines of the core, docstrings included; to be lowered, never to be raised."""
BESIDE = {
    "lab",
    "adapters",
    "integrations",
    "cli.py",
    "options.py",
    "terminal.py",
    "__main__.py",
    "evidence_commands.py",
}


def test_the_core_does_not_grow() -> None:
    package = ROOT / "src" / "torchgrow"
    core = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in BESIDE]
    assert CORE - 300 < sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core) <= CORE


def lines_of(count: int, indent: str = "    ") -> str:
    return f"{indent}pass\n" * count


def test_the_limits_are_seen() -> None:
    function = "def f():\n" + lines_of(FUNCTION - 1)
    assert list(too_long(function)) == []
    assert list(too_long(function + lines_of(1))) == [("f", FUNCTION + 1)]
    assert list(too_long("@decorated\nasync " + function)) == [("f", FUNCTION + 1)]
    inner = "class A:\n    def f(self):\n" + lines_of(FUNCTION, " " * 8)
    assert list(too_long(inner + lines_of(CLASS - len(inner.splitlines())))) == [("A.f", FUNCTION + 1)]
    assert list(too_long("class A:\n" + lines_of(CLASS))) == [("A", CLASS + 1)]
    assert list(too_long("if True:\n  class A:\n" + lines_of(CLASS))) == [("A", CLASS + 1)]
    assert list(too_long("pass\n" * FILE)) == []
    assert list(too_long("pass\n" * (FILE + 1))) == [("the file", FILE + 1)]
