"""How commands speak: where results go, and errors without a traceback."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from torchgrow import TorchgrowError


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers of clusters send it: a run ends as after Ctrl-C."""


def _terminate(*_: Any) -> None:
    raise Terminated


@contextmanager
def clean_exit(errors: Console) -> Iterator[None]:
    """Errors that torchgrow means to raise are for the user to read, without a traceback."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # a rank that waits for others would never run a handler
    main = alone and threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # else others do something about it
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except TorchgrowError as error:
        where = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""  # torchrun's
        errors.print(Text.assemble((f"error{where}: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from None
    except (OSError, MemoryError, RuntimeError) as error:
        from torchgrow.lab.devices import out_of_memory

        short = out_of_memory(error)
        if isinstance(error, RuntimeError) and not short:
            raise  # a fault of ours
        what = f"out of memory; a smaller batch or network may fit ({error})" if short else str(error)
        errors.print(Text.assemble(("error: ", "bold red"), what), soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        errors.print("stopped")
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def console() -> Console:
    """Where results go: what goes into a file need not fit a window.

    It is printed as it is: brackets and colons are often part of a path, and mean no style or picture.
    """
    found = Console(markup=False, emoji=False)
    if not found.is_terminal:
        found.width = 160
    return found
