"""Folders of data: who may read them, where they lie, and the limits of what goes into them."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgrow.persistence.folder
from torchgrow import SavedModelError, load, load_checkpoint, save, save_checkpoint
from torchgrow.persistence.folder import DEEPEST, LONGEST, pack, read_folder, unpack, write_folder

NAMES = ("record.json", "tensors.safetensors")


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


# --- places and permissions ---


@pytest.mark.skipif(os.name == "nt", reason="it is as it says there")
def test_windows_opens_no_folder_and_flushes_what_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, original, flushed = dict[int, int](), os.open, list[int]()

    def as_there(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        handle = original(path, flags, *arguments, **more)
        opened[handle] = flags
        return handle

    def flush(handle: int) -> None:
        if not opened[handle] & os.O_RDWR:
            raise OSError(9, "Bad file descriptor")
        flushed.append(handle)

    monkeypatch.setattr(torchgrow.persistence.folder, "sys", SimpleNamespace(platform="win32"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", as_there)
        patch.setattr(os, "fsync", flush)
        save(body(), tmp_path / "net")
        save(body(), tmp_path / "net")
    assert len(flushed) == 4
    assert load(tmp_path / "net", body)


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_folders_and_files_have_the_permissions_of_any_other(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save(body(), tmp_path / "net")
        save_checkpoint(tmp_path / "run")
    finally:
        os.umask(before)
    for folder in (tmp_path / "net", tmp_path / "run", tmp_path / "run" / "checkpoint-000001"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
        assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir() if f.is_file()} <= {0o666 & ~mask}


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing yet"])
def test_a_link_stays_one_and_where_it_leads_is_written(there: bool, tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "net", tmp_path / "net"
    if there:
        save(body(), real)
    link.symlink_to(real, target_is_directory=True)
    model = body()
    save(model, link)
    assert link.is_symlink()
    assert torch.equal(load(real, body).get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert {path.name for path in (*tmp_path.iterdir(), *real.parent.iterdir())} == {"disk", "net"}


@pytest.mark.parametrize("folder", [".", "", "link"])
def test_the_current_folder_cannot_be_exchanged(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "link").symlink_to(here)
    if folder != "link":
        (here / "link").unlink()
    monkeypatch.chdir(here)
    with pytest.raises(SavedModelError, match=r"here is the current folder, which cannot be exchanged; name one insi"):
        save(body(), folder)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    writes: list[Callable[[], object]] = [
        lambda: save(body(), tmp_path / "file"),
        lambda: save(body(), tmp_path / "file" / "net"),
        lambda: save_checkpoint(tmp_path / "file"),
        lambda: save(body(), tmp_path / ("n" * 300)),
    ]
    for write in writes:
        with pytest.raises(SavedModelError, match=r"another folder|cannot be found"):
            write()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]
    for read in (lambda path: load(path, body), load_checkpoint):
        with pytest.raises(SavedModelError, match=r"torchgrow\.save"):
            read(tmp_path / ("n" * 300))


# --- limits ---


def test_what_is_too_large_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchgrow.persistence.folder, "LARGEST_RECORD", 5000)
    save_checkpoint(tmp_path, extra="short")
    with pytest.raises(
        SavedModelError, match=r"a record of [\d,]+ bytes is more than any has; store less in it, or as te"
    ):
        save_checkpoint(tmp_path, extra="x" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_record_that_grows_when_parsed_is_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets take thirty times their size: a small file could fill the memory."""
    write_folder(tmp_path / "whole", {"format": 2, "x": [[]] * 2000}, {}, NAMES)
    monkeypatch.setattr(torchgrow.persistence.folder, "LARGEST_PARSED", 100_000)
    with pytest.raises(SavedModelError, match=r"some [\d,]+ bytes once it is parsed is more than any; store less"):
        write_folder(tmp_path / "new", {"format": 2, "x": [[]] * 2000}, {}, NAMES)
    with pytest.raises(SavedModelError, match=r"record\.json is damaged: a record that takes some [\d,]+ bytes once"):
        read_folder(tmp_path / "whole", NAMES, (2,), "a folder; make one")
    write_folder(tmp_path / "flat", {"format": 2, "x": "[ " * 100}, {}, NAMES)
    assert read_folder(tmp_path / "flat", NAMES, (2,), "a folder; make one")[0]["x"] == "[ " * 100


def test_data_goes_so_deep_and_no_deeper(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    assert unpack(pack(nested(DEEPEST), tensors, "x"), tensors) == nested(DEEPEST)
    itself: dict[str, Any] = {}
    itself["again"] = itself
    for deep in (nested(DEEPEST + 1), nested(5000), itself):
        with pytest.raises(
            SavedModelError, match=r"^x/.* is nested more than 100 levels deep, or holds itself; flatten"
        ):
            pack(deep, {}, "x")
    with pytest.raises(SavedModelError, match=r"a record is nested too deep"):
        unpack(nested(5000), {})
    (tmp_path / NAMES[0]).write_text("[" * 100_000)
    (tmp_path / NAMES[1]).write_bytes(b"")
    with pytest.raises(SavedModelError, match=r"record\.json is damaged"):
        read_folder(tmp_path, NAMES, (2,), "a folder; make one")


def test_whole_numbers_come_back_or_are_refused(tmp_path: Path) -> None:
    """Beyond some thousand digits Python does not read what it wrote."""
    largest = 2**LONGEST - 1
    write_folder(tmp_path / "x", {"format": 2, "n": pack([largest, -largest], {})}, {}, NAMES)
    assert read_folder(tmp_path / "x", NAMES, (2,), "a folder; make one")[0]["n"] == [largest, -largest]
    with pytest.raises(SavedModelError, match=r"^extra/n is a number of 4097 bits; store it as text"):
        pack({"n": largest + 1}, {}, "extra")


# --- tensors ---

ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.empty(3, device="meta"), r"is on the meta device and has no values .*; load or initialise"),
    "lazy": (lambda: nn.LazyLinear(3).weight, r"is not initialised yet, .*; run the model on a batch first"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"is a torch\.sparse_coo tensor, .*; use tensor\.to_dense\(\)"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"is a torch\.jagged tensor, which cannot be stored",
    ),
    "complex128": (lambda: torch.ones(3, dtype=torch.complex128), r"is of torch\.complex128, .* torch\.view_as_real"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_no_file_holds_is_refused_by_name(kind: str) -> None:
    build, message = ODD[kind]
    with pytest.raises(SavedModelError, match=rf"^extra/a/1 {message}"):
        pack({"a": [0, build()]}, {}, "extra")


SEEN_OTHERWISE: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "complex64": lambda: torch.tensor([1 + 2j]),
    "float8": lambda: torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.tensor([1, 65535], dtype=torch.uint16),
    "a part of another": lambda: torch.arange(9.0)[2:8:2],
    "needs a gradient": lambda: torch.ones(2, requires_grad=True) * 2,
    "no dimension": lambda: torch.tensor(3),
    "no element": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("kind", SEEN_OTHERWISE)
def test_a_tensor_comes_back_as_it_was_seen(kind: str, tmp_path: Path) -> None:
    tensor = SEEN_OTHERWISE[kind]()
    tensors: dict[str, Tensor] = {}
    write_folder(tmp_path / "x", {"format": 2, "x": pack(tensor, tensors, "x")}, tensors, NAMES)
    record, read = read_folder(tmp_path / "x", NAMES, (2,), "a folder; make one")
    again = unpack(record["x"], read)
    assert (again.dtype, again.shape, again.tolist()) == (tensor.dtype, tensor.shape, tensor.tolist())
    assert not again.requires_grad


def test_no_tensor_is_had_twice_and_none_is_larger_than_its_file() -> None:
    """What a file can make of the memory: one tensor named many times, or spread out by its strides."""
    with pytest.raises(SavedModelError, match=r"a record has .*x.*, which stands for nothing"):
        unpack([{"!tensor": "x"}] * 2, {"x": torch.zeros(2)})
    for stride in ([2**40, 1], [1, 2**40], [4, 2], [1, 1], [0, 1]):
        with pytest.raises(SavedModelError, match=r"a record has the stride .* for a tensor of shape \(2, 2\)"):
            unpack({"!tensor": "x", "stride": stride}, {"x": torch.zeros(2, 2)})
    shared = torch.ones(2)
    tensors: dict[str, Tensor] = {}
    one, other = unpack(pack([shared, shared], tensors), tensors)
    assert one.data_ptr() != other.data_ptr()
