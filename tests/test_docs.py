"""Every block of code in README and docs runs as it stands."""

import io
import os
import re
import shlex
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from torchgrow.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {
    "distributed.md": "growth/test_distributed.py",
    "extending.md": "tracing/test_extending.py",
    "integrations.md": "integrations/test_page.py",
}
"""Pages with tests of their own: blocks that need several processes or frameworks, or that checks are woven into."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace; what a `text` block after them shows is what they print."""
    if page.name in RUN_ELSEWHERE:
        assert page.name in (ROOT / "tests" / RUN_ELSEWHERE[page.name]).read_text()
        return
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)
    for shown in blocks(page, "text"):
        assert shown in printed.getvalue()


def commands() -> list[tuple[str, str]]:
    found = [(p, line) for p in PAGES for block in blocks(p, "bash") for line in block.splitlines() if line.strip()]
    return [(page.name, line.partition("   #")[0].strip()) for page, line in found]


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda x: x)
def test_commands_are_read(page: Path, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options and recipes of every command exist; what it would train is not trained here."""
    words = shlex.split(line, comments=True)
    if words[0] in ("./demo", "./check"):
        assert os.access(ROOT / words[0], os.X_OK)
        return
    if words[0] in ("pip", "torchrun", "python"):
        named = [w for w in words if w.endswith(".py") and w != "train.py"]  # train.py: the page shows it
        assert all((ROOT / name).exists() for name in named)
        extra = re.search(r"\[(\w+)\]", line)
        assert not extra or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
        return
    assert words[0] == "torchgrow", f"{page}: who runs {line!r}?"
    calls: list[str] = []
    trainings = ("run.run", "run.resume", "search.search", "search.resume", "compare.compare")
    for name in (f"torchgrow.lab.{training}" for training in trainings):
        monkeypatch.setattr(name, lambda *_, **__: calls.append("trained"))

    def write(*_: object) -> list[str]:
        calls.append("written")
        return []

    monkeypatch.setattr("torchgrow.lab.evidence.page.write", write)
    (tmp_path / "my_recipe.py").write_text(
        "from dataclasses import replace\nfrom torchgrow.lab.recipes import get\n"
        "def recipe():\n    return replace(get('digits'), name='mine')\n"
    )
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "file.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))\n"
    )
    for split in ("train", "val"):
        (tmp_path / "PICTURES" / split).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if "torchvision:resnet50" in words:
        words[words.index("torchvision:resnet50")] = "torchvision:resnet18"  # as good here, and a third of the time
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert calls or words[1] in ("list", "inspect", "table")
