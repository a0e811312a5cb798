"""``python -m torchgrow`` and the ``torchgrow`` command."""

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line, or say what to install if its dependencies are not there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # a branch of a tree is no reason to end, in a code page without it
    try:
        from torchgrow.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "torchgrow":
            raise
        sys.exit(f"torchgrow: the command line needs {error.name}; install it with: pip install 'torchgrow[lab]'")
    app()


if __name__ == "__main__":
    main()
