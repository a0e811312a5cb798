"""The commands that train nothing: ``torchgrow report`` and ``torchgrow table`` show what was measured."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from torchgrow import TorchgrowError
from torchgrow.terminal import clean_exit, console


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, results files of `torchgrow compare` (.jsonl), or folders of those."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page; its pictures go into NAME-pictures beside it.")] = Path(
        "report.html"
    ),
) -> None:
    """Make one page of runs: did it work, the paper's figures, all numbers and settings. It needs no network."""
    with clean_exit(Console(stderr=True)):
        if out.suffix.lower() not in (".html", ".htm"):
            raise TorchgrowError(f"--out names the page, such as report.html, not {out}")
        from torchgrow.lab.evidence import page

        absent = page.write(runs, out)
        shown = console()
        if absent:
            shown.print("Not measured in these runs, and what measures it:")
        for line in absent:
            shown.print(f"  {line}", highlight=False, soft_wrap=True)
        shown.print(f"Pictures: {page.pictures_of(out)}", f"Page: {out}", sep="\n", soft_wrap=True)


def table(
    number: Annotated[int, typer.Argument(min=1, max=8, help="Of the paper's tables, 1 to 8.")],
    results: Annotated[Path, typer.Option(help="Folder of results files of `torchgrow compare`.")] = Path(
        "results/compare"
    ),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show one of the paper's tables beside what was measured here; what was not measured stays empty."""
    with clean_exit(Console(stderr=True)):
        from torchgrow.lab.evidence import tables

        found = tables.beside(number, results)
        if markdown:
            typer.echo(found.markdown())
        else:
            console().print(*found.rich(), sep="\n")
