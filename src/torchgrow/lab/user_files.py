"""What a function in a user's Python file returns, named as ``path/to/file.py:function``."""

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchgrow import TorchgrowError
from torchgrow.lab.names import LIBRARIES


def is_file(name: str) -> bool:
    """Whether a name means a Python file: ``path/to/file.py`` or ``path/to/file.py:function``."""
    return name.endswith(".py") or name.rpartition(":")[0].endswith(".py")


def is_library(name: str) -> bool:
    """Whether a name means a model of a library: ``torchvision:NAME``, ``timm:NAME`` or ``hf:FOLDER``."""
    kind, _, rest = name.partition(":")
    return kind in LIBRARIES and bool(rest) and not is_file(name)


def made_in(name: str, what: str) -> Any:
    """What the function returns, or what stands in the file by that name if it cannot be called.

    Args:
        name: ``path/to/file.py:function``. The file is executed; imports find its neighbours.
        what: what the function is to return, in words.

    Raises:
        TorchgrowError: there is no such file or function, or it fails; the message names the line.
    """
    path, _, function = name.rpartition(":")
    file, function = (Path(path), function) if path.endswith(".py") else (Path(name), "")
    if not file.is_file():
        near = difflib.get_close_matches(file.stem, [p.stem for p in file.parent.glob("*.py")], 3)
        names = " or ".join(str(file.with_name(f"{close}.py")) for close in near)
        begins = "" if file.is_absolute() else f", which begins in {Path.cwd()}"  # where a run is resumed, say
        hint = f"did you mean {names}?" if near else f"check the path{begins}"
        raise TorchgrowError(f"there is no file {file}; {hint}")
    if not function:
        raise TorchgrowError(f"{file} needs the name of a function that returns {what}: {file}:build")
    with explained(f"{file} failed", "run it with python until it passes", str(file.resolve())):
        module = _executed(file)
    made = vars(module).get(function)
    if made is None:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        there = difflib.get_close_matches(function, own, 3) or [key for key in own if callable(vars(module)[key])]
        hint = f"did you mean {' or '.join(f'{file}:{close}' for close in there[:3])}?" if there else "define one there"
        raise TorchgrowError(f"{file} defines no {function!r}; {hint}")
    return made


@contextmanager
def explained(what: str, fix: str, file: str = "") -> Iterator[None]:
    """Turn whatever foreign code raises into one readable error, with the last line reached in `file`."""
    try:
        yield
    except TorchgrowError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        at = f" (line {lines[-1]})" if lines else ""
        raise TorchgrowError(f"{what}{at}: {type(error).__name__}: {error}; {fix}") from error


def _executed(path: Path) -> Any:
    """The module in a file, run as ``python file.py`` would find its neighbours, but not as ``__main__``."""
    name = f"_torchgrow_inspected_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
