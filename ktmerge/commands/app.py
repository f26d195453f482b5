"""The application that every command registers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

_LONG = 1000
"""Characters of a command's first sentence, at most."""


def meant(words: Sequence[str]) -> list[str]:
    """``eval import`` is a command of its own, though ``eval`` takes models; a folder called so is ``./import``."""
    return ["import-scores", *words[2:]] if list(words[:2]) == ["eval", "import"] else list(words)


class _Group(typer.core.TyperGroup):
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Whole sentences, over as many lines as they take."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_LONG)) for name, one in commands if one is not None])


class _Application(_Group):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, meant(args))


app = typer.Typer(
    cls=_Application,
    name="ktmerge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes take longer to load than all else that help needs
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune fully, blend back with the base, score what was learned and what was kept.",
    epilog="Start with: ktmerge demo",
)
recipes = typer.Typer(
    cls=_Group, no_args_is_help=True, help="Write, check, explain, lock, compare and hand over recipes."
)
app.add_typer(recipes, name="recipe")
deltas = typer.Typer(cls=_Group, no_args_is_help=True, help="Hand a model over as what it is apart from its base.")
app.add_typer(deltas, name="delta")
suites = typer.Typer(cls=_Group, no_args_is_help=True, help="List and show evaluation suites that come with ktmerge.")
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
