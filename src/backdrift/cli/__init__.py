"""The command line: ``backdrift generate``, ``optimize``, ``invert``, ``ambigram``, ``guide``, ``plan`` and more.

One file per command; each turns its settings into one call of the library and computes nothing itself.
torch and diffusers are imported inside the commands, so that ``--help`` and ``--version`` are quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .._version import __version__
from . import (
    ambigram,
    audit,
    demo,
    doctor,
    expand,
    generate,
    guide,
    info,
    invert,
    optimize,
    plan,
    stylize,
    verify,
)

app = typer.Typer(
    name="backdrift",
    help="Exact, memory-bounded gradients through diffusion and flow sampling.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # errors.py says what there is to say
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"backdrift {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _module in (
    generate,
    optimize,
    invert,
    expand,
    ambigram,
    stylize,
    guide,
    audit,
    plan,
    doctor,
    verify,
    info,
    demo,
):
    _module.add_to(app)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line on ``args`` (default: the process's own) and exit with a code of ``errors.py``."""
    app(args=None if args is None else list(args), prog_name="backdrift")
