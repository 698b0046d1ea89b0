"""The `peft` command. `main` is its entry point; the commands are in `app.py`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from peft.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit(f"The peft command needs {error.name}, which is not installed. Get it with: pip install typer rich")
    app()
