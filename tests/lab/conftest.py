"""What several test files of the lab share."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tiny_cifar import images, write_parquet


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """40 training and 20 test images in two parquet files."""
    folder = tmp_path / "cifar10"
    write_parquet(folder / "train.parquet", *images(40, 0))
    write_parquet(folder / "test.parquet", *images(20, 1))
    return folder


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not rendered, which is most of their time: but where a test is marked `rendered`."""
    if not request.node.get_closest_marker("rendered"):
        monkeypatch.setattr(FigureCanvasAgg, "print_png", _blank)


def _blank(canvas: FigureCanvasAgg, path: Any, **_: Any) -> None:
    Path(path).write_bytes(b"\x89PNG")
