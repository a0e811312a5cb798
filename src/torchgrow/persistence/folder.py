"""Folders of data that appear whole or not at all: one JSON record and one safetensors file, sealed with checksums.

Written beside the target, flushed to the disk and renamed; checked when read. Files are data, never code.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import SavedModelError
from ..patience import rename

if sys.platform != "win32":
    import fcntl

LARGEST_RECORD = 64 * 2**20
"""Bytes; a JSON record beyond it is neither written nor read."""

LARGEST_PARSED = 512 * 2**20
"""Bytes that a record may take once it is parsed: up to 30 times its size, for a list of lists."""

DEEPEST = 100
"""Levels of nested data that are stored; Python's own stack ends a few hundred further."""

LONGEST = 4096
"""Bits of an int that is stored: JSON has them in decimal, of which Python reads some thousands of digits."""

LONGEST_WAIT = 600.0
"""Seconds to wait for another process that writes into the same folder."""

SEAL = "sha256"
"""Field of a record with the checksums of the record itself and of the tensors' file."""


# --- folders ---


def write_folder(
    target: Path, record: dict[str, Any], tensors: dict[str, Tensor], names: tuple[str, str], *, alone: bool = False
) -> None:
    """Write a record and tensors as a folder that appears complete or not at all; an existing one is replaced.

    Its parents are made. The record, JSON-able, gets the field `sha256`; tensors are contiguous. `names` are those of
    the two files. `alone`: the caller holds the lock of the folder above; else it is taken at the end.

    Raises:
        SavedModelError: it could not be written (disk full, folder read-only); what stood there still does.
    """
    record_name, tensors_name = names
    parent = made(target.parent)
    staging = parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        with _told(target):
            staging.mkdir()  # as the umask says, and so is what is in it
            save_file(tensors, staging / tensors_name)
            seal = {tensors_name: _digest_of_file(staging / tensors_name), record_name: digest(record)}
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**record, SEAL: seal}.items()]
            text = "{\n" + ",\n".join(lines) + "\n}\n"
            check_size(text.encode(), "; store less in it, or as tensors")
            (staging / record_name).write_text(text, encoding="utf-8")
            (staging / tensors_name).chmod((staging / record_name).stat().st_mode)
            for name in names:
                _flush(staging / name)
            _flush(staging)
            with nullcontext() if alone else locked(parent):
                _swap_in(staging, target)
            _flush(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def made(folder: Path) -> Path:
    """A folder that is there from now on, those above it too; else a `SavedModelError`."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Turn errors of files and their contents into `SavedModelError`."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise SavedModelError(
            f"{target} could not be written ({error}); what was there before is unchanged. "
            "Make room or choose another folder"
        ) from error


def real_folder(folder: str | os.PathLike[str]) -> Path:
    """Where a folder to be written lies, links followed.

    Raises:
        SavedModelError: it is the one this process works in, whose place another cannot take.
    """
    try:
        target, here = Path(os.path.realpath(folder)), Path.cwd()
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{folder} cannot be found from the current folder: {error}") from error
    if target == here:
        raise SavedModelError(f"{target} is the current folder, which cannot be exchanged; name one inside of it")
    return target


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """A lock for one process or thread at a time; without effect on systems that have no file locks.

    With `shared` the folder is to be read: any number of readers, but no writer.

    Raises:
        SavedModelError: another one has been at it for `LONGEST_WAIT`.
    """
    handle = None
    if sys.platform != "win32":
        try:
            handle = os.open(folder, os.O_RDONLY)
            _wait_for(handle, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError:
            pass
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing does not, while a process forked meanwhile has it open
            os.close(handle)


def _wait_for(handle: int, folder: Path, kind: int) -> None:
    end = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise SavedModelError(
                    f"another process has been writing into {folder} for {LONGEST_WAIT:.0f} seconds; is one stuck?"
                ) from None
            time.sleep(0.01)


def check_size(text: bytes, advice: str = "") -> None:
    """Refuse (`ValueError`) a record whose text or contents take more memory than any record's."""
    if len(text) > LARGEST_RECORD:
        raise ValueError(f"a record of {len(text):,} bytes is more than any has{advice}")
    parsed = sum(text.count(mark) * size for mark, size in ((b"[", 88), (b"{", 240), (b",", 40), (b'"', 30)))
    if parsed > LARGEST_PARSED:
        raise ValueError(f"a record that takes some {parsed:,} bytes once it is parsed is more than any{advice}")


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk.

    Windows opens no folders, and flushes only what may be written.
    """
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_in(staging: Path, target: Path) -> None:
    """Put a finished folder in the place of another, which is deleted afterwards."""
    if not target.exists():
        rename(staging, target)
        return
    if exchanged(staging, target):
        shutil.rmtree(staging, ignore_errors=True)  # the old one by now
        return
    old = target.with_name(f"{staging.name}.old")
    rename(target, old)
    try:
        rename(staging, target)
    except BaseException:
        try:
            rename(old, target)
        except OSError as error:
            raise SavedModelError(f"{target} could not be written, and what was there is in {old} ({error})") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that a kill at any moment finds a whole one in each place.

    False where the system or the file system cannot (Linux can, on most).
    """
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange is not None and exchange(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def read_folder(
    source: Path, names: tuple[str, str], formats: Collection[int], what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_folder` wrote, by the same `names`. The record's fields are for the caller to check.

    `formats`: values of its field `format` that can be read; from 2 on folders are sealed. `what`: the folder in words,
    with how to make one, e.g. "a saved model; save one with torchgrow.save".

    Raises:
        SavedModelError: files are missing, damaged or of another format.
    """
    record_name, tensors_name = names
    # Path's own raises where a name is too long.
    absent = [name for name in (tensors_name, record_name) if not os.path.isfile(source / name)]  # noqa: PTH113
    if absent:
        kind, _, advice = what.partition("; ")
        raise SavedModelError(f"{source} is not {kind}: {' and '.join(absent)} not found; {advice}")
    try:
        size = (source / record_name).stat().st_size
        if size > LARGEST_RECORD:
            raise ValueError(f"{size:,} bytes are more than any record has")
        text = (source / record_name).read_bytes()
        check_size(text)
        record = json.loads(text)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise SavedModelError(f"{source / record_name} is damaged: {error or 'it takes too much memory'}") from error
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if type(found) is not int or found not in formats:
        raise SavedModelError(
            f"{source / record_name} has format {found!r}, this version of torchgrow reads "
            f"{' and '.join(map(str, formats))}"
        )
    try:
        if found >= 2:
            seal = record.pop(SEAL, None)
            for name, right in ((record_name, digest(record)), (tensors_name, _digest_of_file(source / tensors_name))):
                if not isinstance(seal, dict) or seal.get(name) != right:
                    raise SavedModelError(f"{source / name} is damaged: its contents do not fit its checksum")
        # Copies: the tensors are views of the mapped file otherwise, and change when it is written to.
        return record, {name: tensor.clone() for name, tensor in load_file(source / tensors_name).items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RecursionError as well
        raise SavedModelError(f"{source / tensors_name} is damaged: {error}") from error


def digest(record: dict[str, Any]) -> str:
    """Checksum of a record, however it is laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            total.update(chunk)
    return total.hexdigest()


# --- nested plain data ---


def pack(value: Any, tensors: dict[str, Tensor], path: str = "", depth: int = 0) -> Any:
    """Nested plain data as JSON, without loss; its tensors go into `tensors`, by their path.

    What JSON lacks is an object with one key that begins with "!": tuples, dicts with other keys than text,
    counters, numbers that are not finite, tensors.

    Raises:
        SavedModelError: something in it is not plain data; the message names it.
    """
    if depth > DEEPEST:
        raise SavedModelError(f"{path[:80]}... is nested more than {DEEPEST} levels deep, or holds itself; flatten it")
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        if value.bit_length() > LONGEST:
            raise SavedModelError(f"{path} is a number of {value.bit_length()} bits; store it as text")
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"!float": str(float(value))}
    if isinstance(value, Tensor):
        return _pack_tensor(value, tensors, path)
    if type(value) in (list, tuple):
        items = [pack(item, tensors, f"{path}/{i}", depth + 1) for i, item in enumerate(value)]
        return items if type(value) is list else {"!tuple": items}
    if isinstance(value, dict):
        if not isinstance(value, Counter) and all(type(key) is str and not key.startswith("!") for key in value):
            return {k: pack(item, tensors, f"{path}/{k}" if path else k, depth + 1) for k, item in value.items()}
        pairs = [
            [pack(k, tensors, f"{path}/key", depth + 1), pack(v, tensors, f"{path}/{k}", depth + 1)]
            for k, v in value.items()
        ]
        return {"!counter" if isinstance(value, Counter) else "!dict": pairs}
    raise SavedModelError(
        f"{path or 'the value'} is of type {type(value).__name__}, which cannot be stored as data; use tensors, "
        "numbers, text, None, and lists, tuples and dicts of them (of an object, say, what its state_dict() returns)"
    )


def _pack_tensor(tensor: Tensor, tensors: dict[str, Tensor], path: str) -> dict[str, Any]:
    name = path.encode(errors="backslashreplace").decode()  # a lone surrogate cannot be encoded
    while name in tensors:
        name += "'"
    tensors[name] = storable(tensor, path)
    # The order in memory decides the last bits of sums over it.
    plain = tensors[name].stride() == tensor.stride() or not _dense(tuple(tensor.shape), tensor.stride())
    return {"!tensor": name} if plain else {"!tensor": name, "stride": list(tensor.stride())}


def storable(tensor: Tensor, name: str) -> Tensor:
    """A contiguous copy of a tensor on the CPU, of a kind that a file can hold.

    Raises:
        SavedModelError: it has no values, or is sparse, quantised, nested, sharded or of an unknown dtype.
    """
    fault = ""
    if is_lazy(tensor):
        fault = "is not initialised yet, so it cannot be stored; run the model on a batch first"
    elif tensor.layout != torch.strided:
        fault = (
            f"is a {tensor.layout} tensor, which cannot be stored; use tensor.to_dense(), or leave it to the frame, "
            "which makes it anew: register_buffer(name, tensor, persistent=False)"
        )
    elif is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__
        fault = f"is a {kind}, which cannot be stored; use a plain tensor, as of full_tensor() or dequantize()"
    elif tensor.is_meta:
        fault = "is on the meta device and has no values to be stored; load or initialise it first"
    elif tensor.is_quantized:
        fault = "is quantised, which cannot be stored; use tensor.dequantize()"
    elif not _can_hold(tensor.dtype):
        fault = f"is of {tensor.dtype}, which safetensors does not hold; use another dtype, or torch.view_as_real"
    if fault:
        raise SavedModelError(f"{name} {fault}")
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", memory_format=torch.contiguous_format, copy=True)


@lru_cache
def _can_hold(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return False
    return True


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether strides reach just as far as the elements do, none of them negative."""
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return math.prod(shape) == reach and min(stride, default=1) >= 1


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; removes the tensors it uses from `tensors`, so that none is used twice.

    Raises:
        SavedModelError: it is not what `pack` makes.
    """
    try:
        return _unpacked(packed, tensors)
    except RecursionError as error:
        raise SavedModelError("a record is nested too deep") from error


def _unpacked(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpacked(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    tags = [key for key in packed if key.startswith("!")]
    if not tags:
        return {key: _unpacked(item, tensors) for key, item in packed.items()}
    tag = tags[0]
    if len(packed) == 1 and tag == "!tuple" and isinstance(packed[tag], list):
        return tuple(_unpacked(item, tensors) for item in packed[tag])
    if len(packed) == 1 and tag == "!float" and packed[tag] in ("inf", "-inf", "nan"):
        return float(packed[tag])
    if len(packed) == 1 and tag in ("!dict", "!counter") and isinstance(packed[tag], list):
        pairs = [_unpacked(pair, tensors) for pair in packed[tag]]
        if all(isinstance(pair, list) and len(pair) == 2 and _hashable(pair[0]) for pair in pairs):
            return dict(pairs) if tag == "!dict" else Counter(dict(pairs))
    if tag == "!tensor" and packed.keys() <= {"!tensor", "stride"}:
        name = packed[tag]
        if type(name) is str and name in tensors:
            tensor = tensors.pop(name)
            return _strided(tensor, packed["stride"]) if "stride" in packed else tensor
    raise SavedModelError(f"a record has {json.dumps(packed)[:80]}, which stands for nothing")


def _hashable(key: Any) -> bool:
    return (
        key is None or isinstance(key, (bool, int, float, str)) or (isinstance(key, tuple) and all(map(_hashable, key)))
    )


def _strided(tensor: Tensor, stride: Any) -> Tensor:
    """A tensor with its elements in the given order in memory."""
    fine = isinstance(stride, list) and len(stride) == tensor.dim() and all(type(s) is int for s in stride)
    if fine and max(stride, default=0) < 2**62 and _dense(tuple(tensor.shape), tuple(stride)):
        try:
            return torch.empty_strided(tuple(tensor.shape), stride, dtype=tensor.dtype).copy_(tensor)
        except RuntimeError:  # elements that lie on each other
            pass
    raise SavedModelError(f"a record has the stride {str(stride)[:80]} for a tensor of shape {tuple(tensor.shape)}")
