"""Commands that hand recipes over, and take them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ktmerge.commands.app import recipes
from ktmerge.commands.options import BaseOption, ExpertOption, JsonOption, OutOption, OverwriteOption, SetOption

ScoresOption = Annotated[
    list[Path] | None, typer.Option("--scores", help="A score file of 'ktmerge eval' to put in. Repeatable.")
]
BlendedOption = Annotated[
    Path | None, typer.Option("--blended", help="What 'ktmerge blend' made of it: its digests and card are put in.")
]
DeltasOption = Annotated[
    bool, typer.Option("--with-deltas", help="Put in the blended model, as what it is apart from the base.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Go on without asking.")]


@recipes.command("pack", epilog="Example: ktmerge recipe pack recipe.yaml -o recipe.ktr --scores results/scores.json")
def recipe_pack(
    recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle, NAME.ktr.")],
    scores: ScoresOption = None,
    blended: BlendedOption = None,
    with_deltas: DeltasOption = False,
    set_: SetOption = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Put a recipe, its lock, the suite it names, scores and a card into one file; no weights unless asked for."""
    from ktmerge import api, console

    offer = api.pack(
        recipe, out, overrides=set_ or (), base=base, experts=expert or (), scores=scores or (), blended=blended,
        with_deltas=with_deltas, overwrite=overwrite, progress=console.TerminalProgress(),
    )  # fmt: skip
    console.print_json(offer.to_json()) if json_ else _show(offer)


@recipes.command("unpack", epilog="Example: ktmerge recipe unpack recipe.ktr --out theirs")
def recipe_unpack(
    bundle: Annotated[Path, typer.Argument(help="A file that 'ktmerge recipe pack' wrote.")],
    out: OutOption,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Check a bundle, show what is in it, and write its files into a folder; nothing in it is run or trusted."""
    from ktmerge import api, console

    offer = api.look(bundle)
    if not json_:
        _show(offer)
    done = api.unpack(offer, out, overwrite=overwrite, progress=console.TerminalProgress())
    console.print_json(done.to_json()) if json_ else console.print_pairs(done.pairs())


@recipes.command("push", epilog="Example: ktmerge recipe push recipe.ktr me/my-recipe")
def recipe_push(
    recipe: Annotated[str, typer.Argument(help="A bundle, or a recipe, which is packed first.")],
    repository: Annotated[
        str | None, typer.Argument(help="org/name on the hub, a folder (./name), or an https address to PUT to.")
    ] = None,
    into: Annotated[
        str | None, typer.Option("--into", help="Instead: put it as a folder into this model's repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only its owner sees.")] = False,
    scores: ScoresOption = None,
    blended: BlendedOption = None,
    with_deltas: DeltasOption = False,
    set_: SetOption = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Hand a recipe over: to a repository of the hub, a folder, or an address that takes files."""
    from ktmerge import api, console

    given: dict[str, Any] = {"overrides": set_ or (), "base": base, "experts": expert or ()}
    pushed = api.push(
        recipe, repository, into=into, scores=scores or (), blended=blended, with_deltas=with_deltas, private=private,
        overwrite=overwrite, progress=console.TerminalProgress(), **given,
    )  # fmt: skip
    console.print_json(pushed.to_json()) if json_ else console.print_pairs(pushed.pairs())


@recipes.command("pull", epilog="Example: ktmerge recipe pull someone/their-recipe --out theirs")
def recipe_pull(
    repository: Annotated[
        str | None, typer.Argument(help="org/name[@revision] on the hub, a folder, a .ktr file, or its https address.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where it goes; default: a folder named as the recipe.")
    ] = None,
    into: Annotated[
        str | None, typer.Option("--into", help="Instead: from the folder of a model's repository on the hub.")
    ] = None,
    yes: YesOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Show what a recipe of somebody else holds and names, ask, fetch it, and check all of it."""
    from ktmerge import api, console
    from ktmerge.errors import UsageError

    offer = api.look(repository or "", into=into)
    if not json_:
        _show(offer)
    elif not yes:
        console.print_json(offer.to_json())
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was fetched: this is no terminal to ask at; add --yes to go on without asking.")
        if not typer.confirm("Fetch it?", err=True):
            raise UsageError("nothing was fetched.")
    done = api.unpack(offer, out or api.default_folder(offer), overwrite=overwrite, progress=console.TerminalProgress())
    console.print_json(done.to_json()) if json_ else console.print_pairs(done.pairs())


def _show(offer: Any) -> None:
    """Files, models and what would be downloaded."""
    from ktmerge import console

    console.print_pairs(offer.pairs())
    for columns, rows in (offer.files(), offer.models(), offer.digests()):
        if rows:
            console.print_table(columns, rows)
    if offer.downloads():
        console.print_pairs({"then": offer.downloads()})
