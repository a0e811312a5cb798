"""Data: every format that is accepted, every folder that is not, and what a batch is."""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tiny_cifar import images, write_batches, write_parquet
from torchgrow import TorchgrowError
from torchgrow.lab import data


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_nchw(pixels: Any) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


# --- what needs no folder


@pytest.mark.parametrize(
    ("dataset", "told"), [("digits", "the digits come with scikit-learn"), ("shapes", "the pictures are drawn")]
)
def test_what_is_read_from_no_folder_takes_none(dataset: str, told: str, tmp_path: Path) -> None:
    for word, places in {"--data": {"folder": tmp_path}, "--download": {"download": True}}.items():
        with pytest.raises(TorchgrowError, match=f"{told}, so no folder is read; leave {word} out, or take a recipe"):
            data.load(dataset, **places)  # type: ignore[arg-type]


# --- digits


def test_digits_have_a_fixed_split() -> None:
    first, second = data.load_images("digits"), data.load_images("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.pixels.shape == (1437, 1, 8, 8)
    assert first.train.pixels.dtype == torch.uint8
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert first.train.labels.bincount().tolist() == second.train.labels.bincount().tolist()
    assert first.test.labels.bincount().min() >= 25  # of 36: every class is tested


def test_digits_are_normalised_by_the_training_images() -> None:
    digits = data.load_images("digits")
    x = digits.normalise(digits.train.pixels)
    assert abs(x.mean().item()) < 1e-4
    assert abs(x.std().item() - 1) < 1e-4


# --- subsets


def test_a_subset_is_the_same_draw_every_time_and_cuts_no_test_images() -> None:
    full, part, smaller = (data.load_images("digits", subset=subset) for subset in (None, 100, 50))
    assert (len(part.train), len(part.test)) == (100, len(full.test))
    assert torch.equal(part.train.pixels, data.load_images("digits", subset=100).train.pixels)
    assert torch.equal(part.train.pixels[:50], smaller.train.pixels)


@pytest.mark.parametrize("subset", [0, -1, 1438])
def test_a_subset_out_of_range_is_refused(subset: int | None) -> None:
    with pytest.raises(TorchgrowError, match="1 to 1437 of the training images of digits"):
        data.load_images("digits", subset=subset)


def test_unknown_data_set() -> None:
    with pytest.raises(TorchgrowError, match="no data set 'mnist'; there are digits, cifar10"):
        data.load("mnist")


# --- CIFAR-10 from files


def test_parquet(cifar_folder: Path) -> None:
    loaded = data.load_images("cifar10", folder=cifar_folder)
    pixels, labels = images(40, 0)
    assert torch.equal(loaded.train.pixels, as_nchw(pixels))
    assert loaded.train.labels.tolist() == labels
    assert loaded.train.pixels.is_contiguous()
    assert len(loaded.test) == 20


@pytest.mark.parametrize("inner", [".", "data", "plain_text"])
def test_sharded_parquet_with_hugging_face_names(tmp_path: Path, inner: str) -> None:
    pixels, labels = images(30, 0)
    for shard in range(3):
        part = slice(10 * shard, 10 * shard + 10)
        path = tmp_path / inner / f"train-0000{shard}-of-00003.parquet"
        write_parquet(path, pixels[part], labels[part], column="image")
    write_parquet(tmp_path / inner / "test-00000-of-00001.parquet", *images(10, 1), column="image")
    loaded = data.load_images("cifar10", folder=tmp_path)
    assert torch.equal(loaded.train.pixels, as_nchw(pixels))
    assert loaded.train.labels.tolist() == labels


@pytest.mark.parametrize("inner", [".", "cifar-10-batches-py"])
def test_torchvision_batches(tmp_path: Path, inner: str) -> None:
    written = write_batches(tmp_path)
    loaded = data.load_images("cifar10", folder=tmp_path / inner)
    assert torch.equal(loaded.train.pixels, as_nchw(written["train"]))
    assert torch.equal(loaded.test.pixels, as_nchw(written["test"]))
    assert loaded.test.labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_batch_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_batches(tmp_path)
    trap = b"cos\nsystem\n(S'touch pwned'\ntR."
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(trap)
    with pytest.raises(TorchgrowError, match=r"test_batch is not a batch of CIFAR-10: it refers to os\.system"):
        data.load_images("cifar10", folder=tmp_path)
    assert not Path("pwned").exists()


# --- folders that do not work; each message names what was found and what works

WORKS = r"What works: .*cifar-10-batches-py.*parquet.*--download"


def refused(folder: Path, text: str) -> None:
    with pytest.raises(TorchgrowError, match=text) as caught:
        data.load_images("cifar10", folder=folder)
    assert str(folder) in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", rf"the folder does not exist\. {WORKS}")


def test_no_folder_given_names_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TorchgrowError, match="no CIFAR-10 in data/cifar10"):
        data.load_images("cifar10")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, rf"the folder is empty\. {WORKS}")


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "it is a file, not a folder")


def test_wrong_folder_names_what_is_there(tmp_path: Path) -> None:
    for name in "abcdefg":
        (tmp_path / f"{name}.txt").touch()
    (tmp_path / "0").mkdir()
    refused(tmp_path, rf"found 0/, a\.txt, b\.txt, c\.txt, d\.txt and 3 more\. {WORKS}")


def test_missing_split(cifar_folder: Path) -> None:
    (cifar_folder / "test.parquet").unlink()
    refused(cifar_folder, r"has no test\*\.parquet: found train\.parquet")


def test_missing_shard(cifar_folder: Path) -> None:
    (cifar_folder / "train.parquet").rename(cifar_folder / "train-00001-of-00002.parquet")
    refused(cifar_folder, "has 1 of the 2 shards of train; copy the missing files there")


def test_missing_batch(tmp_path: Path) -> None:
    write_batches(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    refused(tmp_path, "lacks data_batch_3")


def test_wrong_columns(cifar_folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), cifar_folder / "train.parquet")
    refused(cifar_folder, r"train\.parquet has the columns text, label, not img or image, and label")


def test_truncated_parquet(cifar_folder: Path) -> None:
    path = cifar_folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    refused(cifar_folder, r"train\.parquet cannot be read as images")


def test_cells_that_are_no_images(cifar_folder: Path) -> None:
    table = pa.table({"img": [{"bytes": b"no image", "path": None}], "label": [1]})
    pq.write_table(table, cifar_folder / "train.parquet")
    refused(cifar_folder, r"train\.parquet cannot be read as images: cannot identify image file")


def test_images_of_another_size(cifar_folder: Path) -> None:
    write_parquet(cifar_folder / "train.parquet", images(4, 0)[0][:, :28, :28], [0, 1, 2, 3])
    refused(cifar_folder, r"holds train images of \[\(28, 28, 3\)\], CIFAR-10's are 32 x 32")


def test_labels_of_another_set(cifar_folder: Path) -> None:
    write_parquet(cifar_folder / "train.parquet", images(4, 0)[0], [0, 1, 2, 99])
    refused(cifar_folder, "holds labels 0 to 99, CIFAR-10's are 0 to 9")


def test_damaged_batch(tmp_path: Path) -> None:
    write_batches(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({"data": 1}))
    refused(tmp_path, "data_batch_2 is not a batch of CIFAR-10")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "it has no images"),
        ({"data": np.zeros((4, 3072), np.float64)}, "its data is float64, not uint8"),
        ({"data": np.zeros((4, 3072), np.int8)}, "its data is int8, not uint8"),
    ],
)
def test_a_batch_of_something_else(tmp_path: Path, changed: dict[str, Any], text: str) -> None:
    write_batches(tmp_path)
    for name in ("test_batch", "data_batch_2"):
        path = tmp_path / "cifar-10-batches-py" / name
        whole = pickle.loads(path.read_bytes(), encoding="latin1")
        path.write_bytes(pickle.dumps({**whole, **changed}))
        refused(tmp_path, f"{name} is not a batch of CIFAR-10: {text}")


def test_parquet_without_rows(cifar_folder: Path) -> None:
    whole = pq.read_table(cifar_folder / "test.parquet")
    pq.write_table(whole.slice(0, 0), cifar_folder / "test.parquet")
    refused(cifar_folder, rf"holds no test images. {WORKS}")


def test_parquet_of_more_than_8_bits_a_colour(cifar_folder: Path) -> None:
    file = io.BytesIO()
    Image.new("I;16", (32, 32), 40_000).save(file, "PNG")
    pq.write_table(
        pa.table({"img": [{"bytes": file.getvalue(), "path": None}], "label": [1]}), cifar_folder / "test.parquet"
    )
    refused(cifar_folder, r"test\.parquet: row 1 is a picture of mode I;16.*save it with 8 bits a colour")


def test_parquet_of_pictures_too_large_for_pillow(cifar_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(cifar_folder, r"train\.parquet cannot be read as images: Image size \(1024 pixels\) exceeds limit")


def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    with pytest.raises(TorchgrowError, match=r"could not be downloaded into .*: no network"):
        data.load_images("cifar10", folder=tmp_path / "new", download=True)


def test_download_fills_the_folder_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda root, download: write_batches(Path(root)))
    with pytest.raises(TorchgrowError):
        data.load_images("cifar10", folder=tmp_path / "new")
    assert len(data.load_images("cifar10", folder=tmp_path / "new", download=True).test) == 6


# --- batches


def test_train_batches_are_full_contiguous_and_repeatable() -> None:
    digits = data.load_images("digits", subset=100)
    draw: dict[str, Any] = {"batch_size": 32, "shift": 1, "mirror": True}
    first = list(digits.train_batches(**draw, generator=generator()))
    second = list(digits.train_batches(**draw, generator=generator()))
    assert [len(labels) for _, labels in first] == [32, 32, 32]
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x, _ in first)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_cifar_batches_are_channels_last_only_where_that_is_asked_for(cifar_folder: Path) -> None:
    def batches(loaded: Any) -> Any:
        drawn = loaded.train_batches(batch_size=8, shift=4, mirror=True, generator=generator())
        return [x for x, _ in (*drawn, *loaded.test_batches())]

    loaded = data.load_images("cifar10", folder=cifar_folder)
    for x, other in zip(batches(loaded), batches(replace(loaded, channels_last=True)), strict=True):
        assert x.is_contiguous()
        assert not x.is_contiguous(memory_format=torch.channels_last)
        assert other.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, other)


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    digits = data.load_images("digits", subset=10)
    batches = digits.train_batches(batch_size=64, shift=0, mirror=False, generator=generator())
    assert [len(labels) for _, labels in batches] == [10]
    assert data.train_steps(10, 64) == 1


def test_plain_batches_hold_every_image_once() -> None:
    digits = data.load_images("digits", subset=64)
    batches = digits.train_batches(batch_size=16, shift=0, mirror=False, generator=generator())
    x = torch.cat([x for x, _ in batches])
    expected = digits.normalise(digits.train.pixels)
    assert torch.allclose(x.sum(0), expected.sum(0), atol=1e-4)


def test_test_batches_keep_the_order() -> None:
    digits = data.load_images("digits")
    batches = list(digits.test_batches(batch_size=100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([y for _, y in batches]), digits.test.labels)


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    """A single lit pixel at (3, 2) must land at (3 + dy, 2 + dx) or, mirrored, at (3 + dy, 5 + dx)."""
    pixels = torch.zeros(400, 2, 8, 8, dtype=torch.uint8)
    pixels[:, :, 3, 2] = 200
    out = data.augment(pixels, shift=2, mirror=True, generator=generator())
    assert out.shape == pixels.shape
    assert out.is_contiguous()
    assert torch.equal(out[:, 0], out[:, 1])  # channels move together
    places = {tuple(place[1:].tolist()) for place in out[:, 0].nonzero()}
    assert len(out[:, 0].nonzero()) == 400
    assert places == {(3 + dy, column + dx) for dy in range(-2, 3) for dx in range(-2, 3) for column in (2, 5)}


def test_no_augmentation_is_the_identity() -> None:
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator())
    assert torch.equal(data.augment(pixels, shift=0, mirror=False, generator=generator()), pixels)
