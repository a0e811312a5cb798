"""Names of files that something else has open, and text in whatever code page: Windows' rules, on any system."""

import ast
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import torchgrow
from torchgrow import SavedModelError, TorchgrowError, __main__, cli, load_checkpoint, patience, save, save_checkpoint
from torchgrow.lab import run_folder
from torchgrow.lab.run_folder import RunFolder
from torchgrow.persistence import folder

ROOT = Path(torchgrow.__file__).parent


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder in which a file is open takes another name, and there is no fcntl."""
    replace, unlink = Path.replace, Path.unlink

    def held_below(path: Path) -> bool:
        links = list(Path("/proc/self/fd").iterdir())
        return any(str(link.resolve()).startswith(str(path.resolve())) for link in links if link.exists())

    def renamed(self: Path, target: Any) -> Path:
        if held_below(self):
            raise PermissionError(13, "The process cannot access the file", str(self))
        return replace(self, target)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        if self.exists() and held_below(self):
            raise PermissionError(13, "The process cannot access the file", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(Path, "unlink", unlinked)
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(patience, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(run_folder, "fcntl", None)
    locks = SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
    monkeypatch.setattr(run_folder, "msvcrt", locks, raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")
def test_a_run_ends_where_open_files_keep_their_folders_name(windows: None, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        run.write_json("config.json", {"a": 1})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    with pytest.raises(TorchgrowError, match="データ"), RunFolder(tmp_path / "other"):
        raise TorchgrowError("データ/a.png")
    assert "データ" in (tmp_path / "other.partial" / "stopped.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")
def test_a_second_run_is_told_where_locks_are_windows_own(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=denied))
    with pytest.raises(TorchgrowError, match=r"another process is running in .*; wait for it, or stop it first"):
        RunFolder(tmp_path / "run")


def test_a_name_is_tried_again_where_a_scanner_has_the_file(windows: None, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x", encoding="utf-8")
    calls, replace = [], Path.replace

    def busy(self: Path, target: Any) -> Path:
        calls.append(target)
        if len(calls) < 3:
            raise PermissionError(13, "in use")
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", busy)
        patience.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").exists()
    assert len(calls) == 3


def test_where_the_old_network_cannot_be_put_back_it_is_said_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torchgrow.portable_(nn.Linear(2, 2))
    save(model, tmp_path / "net")
    names: list[str] = []

    def failing(source: Path, target: Path) -> None:
        names.append(target.name)
        if len(names) > 1:
            raise PermissionError(13, "in use")
        source.replace(target)

    monkeypatch.setattr(folder, "exchanged", lambda *_: False)
    monkeypatch.setattr(folder, "rename", failing)
    with pytest.raises(SavedModelError, match=r"net could not be written, and what was there is in .*\.net\..*\.old"):
        save(model, tmp_path / "net")
    assert (tmp_path / names[0] / "structure.json").exists()


def test_an_older_checkpoint_that_is_open_goes_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, extra=1, keep=1)
    with monkeypatch.context() as patch:

        def open_elsewhere(self: Path, target: Any) -> Path:
            raise PermissionError(13, "in use")

        patch.setattr(Path, "rename", open_elsewhere)
        save_checkpoint(tmp_path, extra=2, keep=1)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert load_checkpoint(tmp_path) == 2
    save_checkpoint(tmp_path, extra=3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000003"]


def test_a_tree_is_printed_in_a_code_page_without_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(cli, "app", lambda: sys.stdout.write("└─ body ± 1\n"))
    __main__.main()
    sys.stdout.flush()
    assert written.getvalue() == "?? body ± 1\n".encode("cp1252")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_as_utf_8(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if called in ("read_text", "write_text"):
            assert isinstance(node, ast.Call)
            assert "encoding" in {one.arg for one in node.keywords}, f"{path}:{node.lineno}"
