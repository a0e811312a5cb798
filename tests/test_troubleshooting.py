"""Laws of docs/troubleshooting.md: every error and warning text has one entry, and every entry has its text.

The texts are read from the source by `ast`; the package is not imported. A *template* is the first argument of a call
of TorchgrowError, of a class derived from it, or of warnings.warn, with every placeholder written as `…`. A choice (`a
if b else c`, a function of the package that returns texts) gives one template each. Where a template has too few
letters to be searched for, its plain names stand for what they are assigned, or for what callers pass.

An entry is a heading `###` of code spans. A span matches a template that begins with it, each `…` of the span read as
any text: it may leave out detail anywhere, but the words it has are in the message, in this order.
Of several spans that match, the one with most letters owns the template. A span that owns none is stale.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
ANY = "…"
ENOUGH = 5
"""Letters in a text that can be searched for."""


def letters(text: str) -> int:
    return len(re.findall("[A-Za-z]", text))


class Package:
    """The source of a package, and the message templates in it."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.trees = {place: ast.parse(source) for place, source in sources.items()}
        nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        self.functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        self.errors = {"TorchgrowError"}
        for _ in classes:  # as deep as classes derive from each other
            self.errors |= {c.name for c in classes if any(self.last(base) in self.errors for base in c.bases)}

    @staticmethod
    def last(node: ast.expr) -> str:
        """The last name of an expression: "warn" of warnings.warn."""
        return getattr(node, "attr", getattr(node, "id", ""))

    @functools.cached_property
    def templates(self) -> dict[str, str]:
        """Every message, with the place of its first use."""
        found: dict[str, str] = {}
        for place, tree in self.trees.items():
            inside = {id(n): f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and self.last(node.func) in {*self.errors, "warn"}:
                    assert node.args, f"{place}:{node.lineno} has no message"
                    for text in self.texts(node.args[0], inside.get(id(node))):
                        found.setdefault(re.sub(f"{ANY}+", ANY, text), f"{place}:{node.lineno}")
        return found

    def texts(self, node: ast.expr, function: ast.FunctionDef | None, deep: int = 3) -> list[str]:
        """What an expression may be; names are looked up only where there is too little text without."""
        found = self._texts(node, function, 0)
        return self._texts(node, function, deep) if any(letters(text) < ENOUGH for text in found) else found

    def _texts(self, node: ast.expr, function: ast.FunctionDef | None, deep: int) -> list[str]:
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                found = [""]
                for part in parts:
                    value = part.value if isinstance(part, ast.FormattedValue) else part
                    ends = [ANY] if value is not part and not isinstance(value, ast.Name) else None
                    ends = ends or self._texts(value, function, deep)
                    found = [start + end for start in found for end in ends]
                return found
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [a + b for a in self._texts(left, function, deep) for b in self._texts(right, function, deep)]
            case ast.IfExp(body=body, orelse=other):
                return self._texts(body, function, deep) + self._texts(other, function, deep)
            case ast.Call(func=ast.Name(id=name)):
                made = [f for f in self.functions if f.name == name]
                values = [(n.value, f) for f in made for n in ast.walk(f) if isinstance(n, ast.Return) and n.value]
                found = [text for value, f in values for text in self._texts(value, f, deep)]
                return [text for text in found if text] or [ANY]
            case ast.Name(id=name) if deep and function is not None:
                given = [*self._passed(name, function), *((v, function) for v in self._assigned(name, function))]
                found = [text for value, f in given for text in self._texts(value, f, deep - 1)]
                return [text for text in found if letters(text)] or [ANY]
        return [ANY]

    def _passed(self, name: str, function: ast.FunctionDef) -> list[tuple[ast.expr, ast.FunctionDef | None]]:
        """What callers pass for a parameter by position."""
        names = [argument.arg for argument in function.args.args]
        if name not in names:
            return []
        at = names.index(name)
        own = [call for call in self.calls if self.last(call.func) == function.name and len(call.args) > at]
        return [(call.args[at], None) for call in own]

    @staticmethod
    def _assigned(name: str, function: ast.FunctionDef) -> list[ast.expr]:
        nodes = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        return [node.value for node in nodes if any(isinstance(t, ast.Name) and t.id == name for t in node.targets)]


@functools.cache
def package() -> Package:
    sources = sorted((ROOT / "src" / "torchgrow").rglob("*.py"))
    return Package({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources})


def entries(page: str) -> Iterator[tuple[str, list[str], str]]:
    """Heading, code spans and body of every entry."""
    for entry in re.split(r"^### ", page, flags=re.M)[1:]:
        heading, _, body = entry.partition("\n")
        yield heading, re.findall("`([^`]+)`", heading), body.partition("\n## ")[0]


def begins(template: str, span: str) -> bool:
    """Whether a message begins with the words of a span, in their order."""
    first, *others = span.split(ANY)
    at = len(first) if template.startswith(first) else -1
    for words in others:
        found = template.find(words, at) if at >= 0 else -1
        at = found + len(words) if found >= 0 else -1
    return at >= 0


def owners(spans: list[str], template: str) -> list[str]:
    """The most telling of the spans that match."""
    fitting = [span for span in spans if begins(template, span)]
    return [span for span in fitting if letters(span) == max(map(letters, fitting))]


def complaints(templates: dict[str, str], page: str) -> list[str]:
    """Messages without just one entry, and entries without a message."""
    heading_of = {span: heading for heading, spans, _ in entries(page) for span in spans}
    owned = {text: owners(list(heading_of), text) for text in templates}
    found = [
        f"{place}: {text!r} has {owned[text] or 'no entry'}"
        for text, place in templates.items()
        if len({heading_of[span] for span in owned[text]}) != 1
    ]
    stale = set(heading_of) - {span for spans in owned.values() for span in spans}
    return found + [f"no message says {span!r}" for span in heading_of if span in stale]


def test_every_message_has_one_entry_and_every_entry_a_message() -> None:
    found = complaints(package().templates, PAGE.read_text(encoding="utf-8"))
    assert not found, f"docs/troubleshooting.md does not fit the source, in {len(found)} places:\n" + "\n".join(found)


def test_every_message_can_be_searched_for() -> None:
    found = [f"{place}: {text!r}" for text, place in package().templates.items() if letters(text) < ENOUGH]
    assert not found, f"write out at the place of the error what went wrong: {found}"


def test_an_entry_names_its_message_its_cause_and_what_works() -> None:
    seen: list[str] = []
    for heading, spans, body in entries(PAGE.read_text(encoding="utf-8")):
        assert min(map(letters, spans), default=0) >= ENOUGH, f"nothing to search for: {heading}"
        parts = re.fullmatch(r"\s*\*\*Cause\.\*\* (.+?)\n\n\*\*What works\.\*\* (.+?)\s*", body, flags=re.S)
        assert min(map(len, parts.groups() if parts else [""])) > 20, f"Cause or What works is missing: {heading}"
        seen += spans
    assert len(seen) == len(set(seen)), "a text is in two headings"
    assert len(seen) >= 60, "the entries were not found"


SOURCE = """
class OneError(TorchgrowError): ...
class Other(errors.OneError): ...
def made(name, why): return Other(f"{name} {why}")
def text(x): return f"the {x} was converted"
def f(x):
    if x: raise OneError(f"the first {x} is wrong" if x else "nothing at " "all here")
    raise made(x, f"cannot be read from {x}") from None
def g(x):
    warnings.warn("careful with " + f"this {x}", stacklevel=2)
    raise TorchgrowError(text(x))
"""


def test_the_source_is_read_as_told() -> None:
    templates = Package({"a.py": SOURCE}).templates
    assert set(templates) == {
        "the first … is wrong",
        "nothing at all here",
        "… cannot be read from …",
        "careful with this …",
        "the … was converted",
    }
    assert templates["careful with this …"] == "a.py:10"


def test_a_missing_a_double_and_a_stale_entry_are_found() -> None:
    templates = {"the first … is wrong": "a.py:1", "the second … is wrong": "a.py:2"}
    whole = "### `the first … is wrong`\n\n### `the … is wrong`\n"
    assert complaints(templates, whole) == [], "the more telling of two that match has it"
    assert complaints(templates, whole.partition("\n")[0]) == ["a.py:2: 'the second … is wrong' has no entry"]
    assert complaints(templates, whole + "### `the third is wrong`") == ["no message says 'the third is wrong'"]
    double = complaints({"the first is wrong": "a.py:1"}, "### `the firs…`\n### `… is wrong`")
    assert double == ["a.py:1: 'the first is wrong' has ['the firs…', '… is wrong']"]
