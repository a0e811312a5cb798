"""Who may import whom: the packages of the core in one order, the lab and the command line by public names only."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pytest

import torchgrow

ROOT = Path(torchgrow.__file__).parent
LAB = sorted(ROOT.glob("lab/**/*.py"))

# Each may import only what stands before it, and packages what is in themselves.
ORDER = [
    "errors", "default_device", "patience", "exchange", "onednn_guard", "moved", "renamed", "distributed", "adapters",
    "structure", "persistence", "tracing", "policies", "growth", "integrations", "__init__",
]  # fmt: skip
APART = {"tracing": "persistence"}
"""Packages that stand before, and are no business of theirs."""
LAB_ORDER = [
    "__init__", "names", "user_files", "frames", "weights", "devices", "fitted", "processes", "environment", "metrics",
    "models", "segmentation", "recurrent", "attention", "text", "streamed", "images", "folders", "shapes", "data",
    "recipes", "from_recipe", "own_networks", "large_batches", "hooks", "checkpoints", "train", "rises", "trained",
    "baselines", "display", "report", "run_folder", "results", "systems", "compare", "pages", "evidence", "run",
    "search", "sources", "inspect",
]  # fmt: skip
BEYOND = {
    "checkpoints": {"torchgrow.patience"},
    "run_folder": {"torchgrow.patience"},
    "inspect": {"torchgrow.structure.budget", "torchgrow.structure.cost", "torchgrow.patience"},  # and its own counts
    "structure": {"torchgrow.structure.cost"},  # of the compared systems, which look for structures as policies do
}
OUTSIDE = {"__main__", "cli", "options", "terminal", "evidence_commands"}
CORE_NEEDS = {"torch", "safetensors", "numpy"}
FRAMEWORKS = {
    **{f"adapters.{name}": name for name in ("timm", "torchvision", "ultralytics")},  # loaded when a model is met
    **{f"integrations.{name}": name for name in ("lightning", "transformers")},  # loaded by whoever uses them
    "integrations.pretrained": "transformers",
}
COMMANDS = [ROOT / f"{name}.py" for name in sorted(OUTSIDE)]
CORE = sorted(path for path in ROOT.rglob("*.py") if path not in LAB and path not in COMMANDS)


def dotted(path: Path) -> str:
    """The name of a module of ours, as in "growth.grower"; a package's own file is "growth.__init__"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(source: str, module: str = "__init__") -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in a source, wherever it stands; name is None for a plain ``import``.

    Relative imports are taken as from the module of that name (see `dotted`).
    """
    above = ["torchgrow", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(above), "no file lies that deep"
            base = above[: len(above) - node.level + 1] if node.level else []
            found = ".".join(filter(None, [*base, node.module]))
            yield from ((found, alias.name) for alias in node.names)


def inside(module: str, name: str | None) -> list[str]:
    """The parts of an imported name below torchgrow: of "torchgrow.growth", "grower" they are "growth", "grower"."""
    parts = module.split(".")[1:]
    target = ROOT.joinpath(*parts, name or "")
    return [*parts, name] if name and (target.with_suffix(".py").exists() or target.is_dir()) else parts


def wrong_in_core(module: str, source: str) -> list[str]:
    """Imports that a module of the core may not have."""
    own = module.split(".")[0]
    before = {*ORDER[: ORDER.index(own)]} - {APART.get(own)}
    wrong = []
    for target, name in imports(source, module):
        package = target.partition(".")[0]
        if package == "torchgrow":
            parts = inside(target, name)
            if (parts[0] if parts else name) not in before | ({own} if "." in module else set()):
                wrong.append(f"{module} imports {'.'.join(parts)}")
        elif package not in CORE_NEEDS | {*sys.stdlib_module_names} | {FRAMEWORKS.get(module)}:
            wrong.append(f"{module} imports {target}")
    return wrong


def used_by(package: str) -> set[str]:
    """Packages and single modules of the core that a package of the core imports."""
    paths = (ROOT / package).rglob("*.py")
    found = [one for path in paths for one in imports(path.read_text(encoding="utf-8"), dotted(path))]
    return {inside(*one)[0] for one in found if one[0].startswith("torchgrow") and inside(*one)} - {package}


def said(readme: str) -> set[str] | None:
    """What a package may import by its README; None where it says so in other words."""
    line = re.search(r"May import: ((?:`\w+`(?: \([\w ]+\))?(?:,\s+)?)+)\.", readme)
    return {*re.findall(r"`(\w+)`", line[1])} if line else None


def wrong_in_lab(module: str, source: str) -> list[str]:
    """Modules of the lab that one of them may not import."""
    own = module.split(".")[1]
    fine = {*LAB_ORDER[: LAB_ORDER.index(own)]} | ({own} if module.count(".") > 1 else set())
    used = [inside(*one)[:3] for one in imports(source, module) if one[0].startswith("torchgrow.lab")]
    return [f"{module} imports {'.'.join(parts)}" for parts in used if (parts[1:] or ["__init__"])[0] not in fine]


def circles(files: Mapping[str, str]) -> set[str]:
    """Modules that import each other, by whatever way, or themselves; files: sources by dotted name."""
    uses = {
        name: {".".join(inside(*one)) for one in imports(source, name) if one[0].startswith("torchgrow")}
        for name, source in files.items()
    }
    packages = {name.removesuffix(".__init__"): name for name in files}
    uses = {name: {packages.get(one, one) for one in used} & files.keys() for name, used in uses.items()}
    while True:
        free = {name for name, used in uses.items() if not used & uses.keys()}
        if not free:
            return set(uses)
        uses = {name: used for name, used in uses.items() if name not in free}


def wrong_outside(source: str, beyond: AbstractSet[str] = frozenset()) -> list[str]:
    """Names of the core that code beside it uses though they are not public; modules in `beyond` are let through."""
    wrong = []
    for module, name in imports(source):
        if module == "torchgrow" and name not in {None, *torchgrow.__all__, *OUTSIDE, "lab"}:
            wrong.append(str(name))
        elif module.startswith("torchgrow.") and not module.startswith(
            ("torchgrow.lab", *(f"torchgrow.{name}" for name in sorted(OUTSIDE)), *beyond)
        ):
            wrong.append(module)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torchgrow":
            wrong += {node.attr} - {*torchgrow.__all__, "__file__"}
    return wrong


def test_every_core_file_has_its_place_in_the_order() -> None:
    assert {dotted(path).split(".")[0] for path in CORE} <= set(ORDER)


@pytest.mark.parametrize("path", CORE, ids=dotted)
def test_core_imports_only_what_stands_above(path: Any) -> None:
    assert wrong_in_core(dotted(path), path.read_text()) == []


@pytest.mark.parametrize("package", ["adapters", "structure", "persistence", "tracing", "policies"])
def test_the_readme_of_a_package_says_what_it_imports(package: str) -> None:
    assert said((ROOT / package / "README.md").read_text(encoding="utf-8")) == used_by(package)


def test_no_modules_import_each_other() -> None:
    assert circles({dotted(path): path.read_text() for path in [*CORE, *LAB] if dotted(path) != "__init__"}) == set()


@pytest.mark.parametrize("path", [*LAB, *COMMANDS], ids=lambda p: p.stem)
def test_lab_and_command_line_use_public_names(path: Any) -> None:
    assert wrong_outside(path.read_text(), BEYOND.get(path.stem, frozenset())) == []


@pytest.mark.parametrize("path", LAB, ids=dotted)
def test_lab_has_an_order_too(path: Any) -> None:
    assert wrong_in_lab(dotted(path), path.read_text()) == []


def test_the_rules_see_violations() -> None:
    space = "structure.space"
    assert wrong_in_core(space, "from torchgrow.growth.grower import Grower") == [f"{space} imports growth.grower"]
    assert wrong_in_core(space, "from ..growth import gates\nfrom .. import growth") == [
        f"{space} imports growth.gates",
        f"{space} imports growth",
    ]
    assert wrong_in_core(space, "from .store import gather\nfrom ..adapters.torch import F") == []
    assert wrong_in_core("tracing.labels", "from ..persistence.folder import pack") != []
    assert wrong_in_core(space, "def f():\n    import torchvision") == [f"{space} imports torchvision"]
    assert wrong_in_core("adapters.timm", "import timm.layers") == []
    assert wrong_in_core("adapters.timm", "import torchvision") != []
    assert wrong_in_core("growth.grower", "import math, torch\nfrom torchgrow.structure.space import Space") == []
    assert wrong_in_lab("lab.text", "from torchgrow.lab import names\nfrom torchgrow.lab.metrics import METRICS") == []
    assert wrong_in_lab("lab.text", "from torchgrow.lab import recipes, run") == [
        "lab.text imports lab.recipes",
        "lab.text imports lab.run",
    ]
    assert wrong_in_lab("lab.recipes.images", "from torchgrow.lab.recipes.recipe import Recipe") == []
    assert wrong_in_lab("lab.recipes.images", "from torchgrow.lab.train import fit") != []
    assert circles({"a.x": "from .y import f", "a.y": "from . import z", "a.z": "import os"}) == set()
    assert circles({"a.__init__": "from .x import f", "a.x": "from torchgrow.a import f"}) == {"a.__init__", "a.x"}
    assert circles({"structure.space": "from .store import f", "structure.store": "from .space import g"}) == {
        "structure.space",
        "structure.store",
    }
    assert wrong_outside("from torchgrow.structure.space import Space") == ["torchgrow.structure.space"]
    assert wrong_outside("from torchgrow.structure.space import Space", {"torchgrow.structure.cost"}) == [
        "torchgrow.structure.space"
    ]
    assert wrong_outside("import torchgrow\ntorchgrow.no_such_thing()") == ["no_such_thing"]
    assert wrong_outside("from torchgrow import Grower\nfrom torchgrow.lab import data") == []


# Of the version before the packages (commit 358b88a): code that uses them must not break.
EARLIER = {
    "PRESETS", "Bank", "Budget", "BudgetError", "Context", "Cost", "Event", "Frozen", "Grower", "Limits", "Method",
    "OptimizerError", "Report", "SavedModelError", "Space", "StructureError", "TorchgrowError", "TraceError",
    "TrainingError", "adapter", "guard_", "load", "load_checkpoint", "measure", "module_rule", "policies", "rule",
    "save", "save_checkpoint", "shrink_", "trace", "verify",
}  # fmt: skip


def test_names_of_earlier_versions_are_still_public() -> None:
    assert set(torchgrow.__all__) >= EARLIER


def test_public_names_exist() -> None:
    assert [name for name in torchgrow.__all__ if not hasattr(torchgrow, name)] == []


# None in sys.modules is how Python says that a module cannot be had, whoever asks.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys(["torchvision", "typer", "rich", "sklearn", "matplotlib", "pyarrow", "PIL"]))
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, timeout=120)


def test_core_imports_without_the_lab() -> None:
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


def test_the_core_loads_torch_safetensors_numpy_and_nothing_else() -> None:
    """Not even where other packages are there to be had; and not torch's compiler, which takes seconds to load."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] False False\n", done.stdout + done.stderr


def test_command_line_without_the_lab_says_what_to_install() -> None:
    done = run_blocked("from torchgrow.__main__ import main; main()")
    assert done.returncode == 1
    assert "pip install 'torchgrow[lab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_public_name_has_one_home() -> None:
    """The three lists of `torchgrow/__init__.py` agree: what is loaded late, what type checkers see, what is public."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (late,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    homes = [name for names in ast.literal_eval(late).values() for name in names]
    seen = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and node.module != "moved"
        for alias in node.names
    ]
    assert sorted(homes) == sorted(seen) == sorted(torchgrow.__all__)
    assert set(torchgrow.__all__) <= set(dir(torchgrow))
    with pytest.raises(AttributeError, match="module 'torchgrow' has no attribute 'Growr'"):
        torchgrow.Growr  # noqa: B018


def test_budgets_and_errors_need_no_pytorch() -> None:
    code = "import sys, torchgrow; torchgrow.Budget(params='36%'); torchgrow.BudgetError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("folder", sorted(p.parent for p in ROOT.rglob("README.md") if p.parent.name != "lab"), ids=str)
def test_the_readme_of_a_package_lists_its_modules(folder: Path) -> None:
    rows = [line.split("|")[1] for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]
    listed = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    inside = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    assert listed == inside - {"__init__"}
