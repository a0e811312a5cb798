"""docs/line-by-line.md: everything it names exists, and it names everything; so do the laws of CONTRIBUTING.md."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from torchgrow.cli import app
from torchgrow.lab.evidence.pictures import PICTURES
from torchgrow.lab.names import FIXED, RECIPES, SYSTEMS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "line-by-line.md"


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def wrong(text: str) -> list[str]:
    """Files, tests, commands, recipes and places in pages that are named and not there."""
    found = []
    for span in spans(text):
        path, _, test = span.partition("::")
        if span.startswith("torchgrow "):
            found += [span] * (not is_read(span))
        elif "/" in span:
            there = (ROOT / path).exists() and (not test or test in functions(ROOT / path))
            found += [span] * (not there)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)", text):
        page = PAGE.parent / target
        headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE) if page.exists() else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        found += [f"{target}#{anchor}"] * (not page.exists() or (bool(anchor) and anchor not in slugs))
    return found


def is_read(command: str) -> bool:
    """Whether the command line takes it: its options, its recipe and its methods."""
    words = shlex.split(command)[1:]
    if words in (["table", "N"], ["report", "RUN..."]):
        return True
    try:
        context = get_command(app).commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
    except Exception:  # of click, whose copy typer may carry
        return False
    methods = {name.partition(":")[0] for name in (context.params.get("methods") or "").split()}
    known = methods <= {*FIXED, *SYSTEMS, "default", "paper", "global", "nas", "random", "late"}
    return known and context.params.get("recipe", "digits") in RECIPES


def test_everything_named_is_there() -> None:
    assert wrong(PAGE.read_text()) == []
    assert len(spans(PAGE.read_text())) > 60


def test_every_law_has_its_test() -> None:
    rows = re.findall(
        r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == [*range(1, 12)]
    assert [span for _, tests in rows for span in spans(tests) if "::test_" not in span or wrong(f"`{span}`")] == []


@pytest.mark.parametrize(
    "text",
    [
        "`tests/growth/test_gates.py::test_no_such`",
        "`src/torchgrow/no_such.py`",
        "`torchgrow compare digits --no-such`",
        '`torchgrow compare digits --methods "no-such"`',
        "`torchgrow compare no-such`",
        "`torchgrow no-such`",
        "[x](results.md#no-such)",
        "[x](no-such.md)",
    ],
)
def test_what_is_not_there_is_seen(text: str) -> None:
    assert len(wrong(text)) == 1


def test_every_equation_table_and_figure_is_named() -> None:
    text = PAGE.read_text()
    equations, tables, figures = text.partition("## Tables")[0], *text.partition("## Tables")[2].split("## Figures")
    assert [n for n in range(1, 10) if not re.search(rf"\| [\w.]+, Eq {n} \|", equations)] == []
    assert "Algorithm 1" in equations
    assert re.findall(r"^\| Table (\d)", tables, re.MULTILINE) == [str(n) for n in range(1, 9)]
    named = re.findall(r"^\| Figures? ([^|]*) \|", figures, re.MULTILINE)
    numbers = {int(n) for cell in named for n in re.findall(r"\d+", cell)} | {8, 9}
    assert "7 to 10" in named
    assert numbers == set(range(1, 15))


def test_every_picture_of_the_report_is_on_the_page() -> None:
    assert [one.command for one in PICTURES if f"`{one.command}`" not in PAGE.read_text()] == []
