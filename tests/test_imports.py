"""Who may import whom: the rooms of the core in one order, the lab and the command line by public names only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

import torchgrow

ROOT = Path(torchgrow.__file__).parent
CORE, LAB = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("lab/*.py"))

# Each room may import only rooms named before it.
ORDER = [
    "errors",
    "attributes",
    "exchange",
    "space",
    "store",
    "record",
    "labels",
    "inferring",
    "adapters",
    "adapters_timm",
    "adapters_torchvision",
    "adapters_ultralytics",
    "rules",
    "parts",
    "indexing",
    "contractions",
    "sampling",
    "reductions",
    "sequences",
    "findings",
    "opening",
    "passes",
    "calling",
    "shapes",
    "replay",
    "trial",
    "slots",
    "optimizers",
    "surgery",
    "cost",
    "counting",
    "depth",
    "proof",
    "limits",
    "budget",
    "advice",
    "indicators",
    "policies",
    "fold",
    "guard",
    "watch",
    "distributed",
    "files",
    "wrappers",
    "state",
    "randomness",
    "beside",
    "saved",
    "grower",
    "persist",
    "checkpoint",
    "__init__",
]
LAB_ORDER = [
    "__init__", "names", "user_files", "devices", "processes", "environment", "metrics", "models", "recurrent",
    "attention", "text", "data", "recipes", "checkpoints", "train", "baselines", "display", "report", "run_folder",
    "results", "compare", "pages", "run", "sources", "inspect",
]  # fmt: skip
BEYOND = {"inspect": {"torchgrow.budget", "torchgrow.cost"}}  # it shows the core's own counts and answers
OUTSIDE = {"__main__", "cli"}
CORE_NEEDS = {"torch", "safetensors", "numpy", "torchgrow"}


def imports(source: str, inside: str = "torchgrow") -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in a source, wherever it stands; name is None for a plain ``import``.

    Relative imports are taken as from a file directly in the package `inside`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1 + inside.count("."), "no file lies that deep"
            base = inside.split(".")[: inside.count(".") + 2 - node.level] if node.level else []
            module = ".".join(filter(None, [*base, node.module]))
            yield from ((module, alias.name) for alias in node.names)


def wrong_in_core(room: str, source: str, inside: str = "torchgrow") -> list[str]:
    """Imports that a room of the core may not have."""
    above = ORDER[: ORDER.index(room)]  # adapters_x may import the library x: it is loaded when a model of x is met
    wrong = []
    for module, name in imports(source, inside):
        package, _, rest = module.partition(".")
        if package == "torchgrow":
            target = rest.partition(".")[0] or name
            if target not in (*above, *([room] if "." in inside else [])):
                wrong.append(f"{room} imports {target}")
        elif package not in {*CORE_NEEDS, room.removeprefix("adapters_")} and package not in sys.stdlib_module_names:
            wrong.append(f"{room} imports {module}")
    return wrong


def wrong_outside(source: str, beyond: AbstractSet[str] = frozenset()) -> list[str]:
    """Names of the core that code beside it uses though they are not public; modules in `beyond` are let through."""
    wrong = []
    for module, name in imports(source):
        if module == "torchgrow" and name not in {None, *torchgrow.__all__, "lab"}:
            wrong.append(str(name))
        elif module.startswith("torchgrow.") and not module.startswith(("torchgrow.lab", "torchgrow.cli", *beyond)):
            wrong.append(module)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torchgrow":
            wrong += {node.attr} - {*torchgrow.__all__, "__file__"}
    return wrong


def test_every_core_file_has_its_place_in_the_order():
    assert {path.stem for path in CORE} - OUTSIDE <= set(ORDER)


@pytest.mark.parametrize("path", [p for p in CORE if p.stem not in OUTSIDE], ids=lambda p: p.stem)
def test_core_imports_only_what_stands_above(path):
    assert wrong_in_core(path.stem, path.read_text()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.py")), ids=lambda p: p.stem)
def test_policies_import_only_what_stands_above(path):
    """And each other."""
    assert wrong_in_core("policies", path.read_text(), "torchgrow.policies") == []


@pytest.mark.parametrize("path", [*LAB, *(p for p in CORE if p.stem in OUTSIDE)], ids=lambda p: p.stem)
def test_lab_and_command_line_use_public_names(path):
    assert wrong_outside(path.read_text(), BEYOND.get(path.stem, frozenset())) == []


@pytest.mark.parametrize("path", LAB, ids=lambda p: p.stem)
def test_lab_has_an_order_too(path):
    used = set()
    for module, name in imports(path.read_text()):
        if module.startswith("torchgrow.lab"):
            used.add(module.split(".")[2] if module.count(".") > 1 else name)
    assert used <= set(LAB_ORDER[: LAB_ORDER.index(path.stem)])


def test_the_rules_see_violations():
    assert wrong_in_core("space", "from torchgrow.grower import Grower") == ["space imports grower"]
    assert wrong_in_core("space", "from .grower import Grower\nfrom . import fold") == [
        "space imports grower",
        "space imports fold",
    ]
    assert wrong_in_core("space", "def f():\n    import torchvision") == ["space imports torchvision"]
    assert wrong_in_core("grower", "import math, torch\nfrom torchgrow.space import Space") == []
    assert wrong_outside("from torchgrow.space import Space") == ["torchgrow.space"]
    assert wrong_outside("from torchgrow.space import Space", {"torchgrow.cost"}) == ["torchgrow.space"]
    assert wrong_outside("import torchgrow\ntorchgrow.no_such_thing()") == ["no_such_thing"]
    assert wrong_outside("from torchgrow import Grower\nfrom torchgrow.lab import data") == []


def test_public_names_exist():
    assert [name for name in torchgrow.__all__ if not hasattr(torchgrow, name)] == []


# None in sys.modules is how Python says that a module cannot be had, whoever asks.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys(["torchvision", "typer", "rich", "sklearn", "matplotlib", "pyarrow", "PIL"]))
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, timeout=120)


def test_core_imports_without_the_lab():
    done = run_blocked("import torchgrow; torchgrow.Grower")
    assert done.returncode == 0, done.stderr


LOADED = """
import numpy, safetensors.torch, sys, torch
before = set(sys.modules)
import torchgrow
for name in torchgrow.__all__:
    getattr(torchgrow, name)
beyond = {name.partition(".")[0] for name in set(sys.modules) - before}
beyond -= {"torchgrow", "torch", "numpy", "safetensors", *sys.stdlib_module_names}
print(sorted(beyond), "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""


def test_the_core_loads_torch_safetensors_numpy_and_nothing_else():
    """Not even where other packages are there to be had; and not torch's compiler, which takes seconds to load."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] False False\n", done.stdout + done.stderr


def test_command_line_without_the_lab_says_what_to_install():
    done = run_blocked("from torchgrow.__main__ import main; main()")
    assert done.returncode == 1
    assert "pip install 'torchgrow[lab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_public_name_has_one_home():
    """The three lists of `torchgrow/__init__.py` agree: what is loaded late, what type checkers see, what is public."""
    homes = [name for names in torchgrow._HOMES.values() for name in names]
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for alias in node.names
    ]
    assert sorted(homes) == sorted(seen) == sorted(torchgrow.__all__)
    assert set(torchgrow.__all__) <= set(dir(torchgrow))
    with pytest.raises(AttributeError, match="module 'torchgrow' has no attribute 'Growr'"):
        torchgrow.Growr  # noqa: B018


def test_budgets_and_errors_need_no_pytorch():
    code = "import sys, torchgrow; torchgrow.Budget(params='36%'); torchgrow.BudgetError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
