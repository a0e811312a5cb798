"""docs/integrations.md: every block runs as it stands and ends on the budget."""

import re
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from borrowed import on_budget, same

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SECTIONS = dict(re.findall(r"^## (.*)\n(?:.*\n)*?```python\n((?:.*\n)*?)```", PAGE.read_text(), re.MULTILINE))
NEEDS = {
    "Plain PyTorch": "torch",
    "Lightning": "lightning.pytorch",
    "Trainer of transformers": "transformers",
    "accelerate": "accelerate",
    "timm": "timm",
}


def test_every_section_has_a_block() -> None:
    assert SECTIONS.keys() == NEEDS.keys()
    assert PAGE.read_text().count("```python") == len(SECTIONS)


@pytest.mark.parametrize("section", NEEDS)
def test_the_page_runs_as_it_stands(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in (NEEDS[section], "accelerate" if section == "Trainer of transformers" else "torch"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        exec(compile(SECTIONS[section], section, "exec"), names)
    grower: Any = names["grower"] if "grower" in names else names["grow"].grower if "grow" in names else None
    assert on_budget(grower)
    small: Any = names.get("small", names.get("frame"))
    if section in ("Plain PyTorch", "Trainer of transformers"):
        assert same(small, grower.model)
