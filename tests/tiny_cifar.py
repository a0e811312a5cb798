"""Tiny CIFAR-10 folders in the formats that real ones come in."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def images(n: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Noise of [n, 32, 32, 3] uint8, and labels 0 to 9 in turn."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return pixels, [i % 10 for i in range(n)]


def write_parquet(path: Path, pixels: np.ndarray, labels: list[int], column: str = "img") -> None:
    """A file as Hugging Face writes them: encoded images (PNG here) in a struct, and labels."""
    cells = []
    for array in pixels:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: cells, "label": labels}), path)


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote, as the real files are: bytes and text both as its one kind of string."""

    def save_string(self, value: bytes | str) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}


def write_batches(folder: Path) -> dict[str, np.ndarray]:
    """torchvision's cifar-10-batches-py with 4 images a training batch and 6 test images; NHWC pixels by split."""
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        split = "test" if name == "test_batch" else "train"
        array, labels = images(6 if split == "test" else 4, seed)
        pixels[split].append(array)
        batch = {"data": array.transpose(0, 3, 1, 2).reshape(len(array), -1), "labels": labels, "batch_label": name}
        with (folder / "cifar-10-batches-py" / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(batch)
    return {split: np.concatenate(arrays) for split, arrays in pixels.items()}
