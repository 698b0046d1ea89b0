"""The commands. Each imports what it needs when it runs, so that `peft --help` is quick."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="peft",
    help="Parameter-efficient fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from peft.version import __version__

        typer.echo(f"peft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the picture and the numbers.")] = Path(
        "quickstart-out"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How often to train; more than one gives a mean and a spread.")] = 1,
) -> None:
    """Teach a real model to find complaints with LoRA: 50 examples, about a minute."""
    _require("transformers", "matplotlib")
    from peft.quickstart.data import QuickstartError
    from peft.quickstart.run import run

    try:
        run(out, seeds=seeds)
    except QuickstartError as error:
        fail(str(error))


def fail(message: str) -> None:
    """Say in plain words what is wrong, and stop with status 1."""
    typer.secho(message, fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = " ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        fail(
            f"This command needs {' and '.join(missing)}, which {verb} not installed. Get it with: pip install {names}"
        )
