"""The application that every command registers with."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="ktmerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune fully, blend back with the base, score what was learned and what was kept.",
    epilog="Start with: ktmerge demo",
)
recipes = typer.Typer(no_args_is_help=True, help="Check, show, list and import recipes.")
app.add_typer(recipes, name="recipe")
suites = typer.Typer(no_args_is_help=True, help="List and show evaluation suites that come with ktmerge.")
app.add_typer(suites, name="suite")


def _version(wanted: bool) -> None:
    if wanted:
        from ktmerge import __version__

        typer.echo(f"ktmerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
