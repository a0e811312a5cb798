"""What several test files of the lab share."""

from pathlib import Path

import pytest

from tiny_cifar import images, write_parquet


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """40 training and 20 test images in two parquet files."""
    folder = tmp_path / "cifar10"
    write_parquet(folder / "train.parquet", *images(40, 0))
    write_parquet(folder / "test.parquet", *images(20, 1))
    return folder
