"""Commands about recipes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ktmerge.commands.app import recipes
from ktmerge.commands.options import (
    BaseOption,
    DeviceOption,
    ExpertOption,
    JsonOption,
    OverwriteOption,
    RehashOption,
    SetOption,
)


@recipes.command("check", epilog="Example: ktmerge recipe check recipe.yaml")
def recipe_check(recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")], set_: SetOption = None,
                 base: BaseOption = None, expert: ExpertOption = None, json_: JsonOption = False) -> None:  # fmt: skip
    """Find every mistake of a recipe, reading only headers."""
    from ktmerge import api, console

    checked = api.check(recipe, overrides=set_ or (), base=base, experts=expert or ())
    console.print_json(checked.to_json()) if json_ else console.print_pairs(checked.pairs())


@recipes.command("new", epilog="Example: ktmerge recipe new spam.yaml --base ./base --expert spam=runs/spam")
def recipe_new(
    out: Annotated[Path, typer.Argument(help="The recipe to write.")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="name=model; several: repeat it, or join by ','.")] = None,
    statistics: Annotated[
        bool | None, typer.Option(help="Data of both sides are at hand to measure on; default: no.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Part expressions that stay the base's, joined by ','.")] = None,
    lean: Annotated[
        str | None, typer.Option(help="What matters most: upstream, balanced (default) or downstream.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Ask a few questions, and write a recipe with comments; what options say is not asked."""
    from ktmerge import api, console
    from ktmerge.api.inputs import refuse_existing

    refuse_existing(out, overwrite)  # before anything is asked
    base = _ask(base, "Base model (folder or hub id)", option="--base")
    experts = expert or [_ask(None, "Fine-tuned models (name=folder, joined by ',')", option="--expert")]
    if statistics is None:
        statistics = sys.stdin.isatty() and typer.confirm("Are data at hand of what to keep and of what was learned")
    keep = _ask(keep, "Parts that should stay the base's (e.g. vision; empty for none)", "")
    lean = _ask(lean, "What matters most: upstream (keep), downstream (learn) or balanced", "balanced")
    written = api.new_recipe(
        out, base=base, experts=_items(experts), statistics=statistics, keep=_items([keep]), lean=lean,
        overwrite=overwrite,
    )  # fmt: skip
    console.print_pairs({"recipe": str(written), "check it": f"ktmerge recipe check {written}"})


def _ask(given: str | None, question: str, default: str | None = None, option: str = "") -> str:
    """What an option says, else an answer, else (where nobody can be asked) the default."""
    if given is not None:
        return given
    if sys.stdin.isatty():
        return str(typer.prompt(question, default=default))
    if default is None:
        raise typer.BadParameter("needed, as there is no terminal to ask at.", param_hint=option)
    return default


def _items(given: Iterable[str]) -> list[str]:
    return [item.strip() for text in given for item in text.split(",") if item.strip()]


@recipes.command("explain", epilog="Example: ktmerge recipe explain recipe.yaml")
def recipe_explain(
    recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")],
    set_: SetOption = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    json_: JsonOption = False,
) -> None:
    """Say in plain words what will happen to each part."""
    from ktmerge import api, console

    found = api.explain(recipe, overrides=set_ or (), base=base, experts=expert or ())
    console.print_json(found.to_json()) if json_ else console.print_markdown(found.text())


@recipes.command("lock", epilog="Example: ktmerge recipe lock recipe.yaml")
def recipe_lock(
    recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The lock; default: beside the recipe.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Hold the lock that is there against the inputs as they are now.")
    ] = False,
    rehash: RehashOption = False,
    set_: SetOption = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Pin every input of a recipe by its sha256, and all else that decides the bytes of its blend."""
    from dataclasses import asdict

    from ktmerge import api, console
    from ktmerge.errors import UsageError

    given: dict[str, Any] = {"overrides": set_ or (), "base": base, "experts": expert or ()}
    if rehash and not check:
        raise UsageError("--rehash goes with --check.")
    if not check:
        written = {"lock": str(api.lock(recipe, out, overwrite=overwrite, **given))}
        console.print_json(written) if json_ else console.print_pairs(written)
        return
    found = api.check_lock(recipe, out or api.lock_path(recipe), rehash=rehash, **given)
    if json_:
        console.print_json([asdict(one) for one in found])
    elif found:
        rows = [["yes" if one.decides else "perhaps", one.what, one.told] for one in found]
        console.print_table(("other bytes", "what", "found"), rows)
    else:
        console.print_pairs({"lock": "everything is as it was locked"})
    if any(one.decides for one in found):
        raise typer.Exit(1)


@recipes.command("verify", epilog="Example: ktmerge recipe verify blended --recipe recipe.yaml --rebuild")
def recipe_verify(
    out: Annotated[Path, typer.Argument(help="A folder that 'ktmerge blend' wrote.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="What it was made by; else the recipe in its record.")
    ] = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Blend again beside it, and compare byte for byte.")
    ] = False,
    rehash: RehashOption = False,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Prove that a blended model is what its record says; exit code 1 if it is not."""
    from ktmerge import api, console

    found = api.verify(
        out, recipe, base=base, experts=expert or (), rebuild=rebuild, rehash=rehash, device=device,
        progress=console.TerminalProgress(),
    )  # fmt: skip
    console.print_json(found.to_json()) if json_ else console.print_table(*found.table())
    if not found.holds:
        raise typer.Exit(1)


@recipes.command("diff", epilog="Example: ktmerge recipe diff mine.yaml theirs.lock.yaml")
def recipe_diff(
    first: Annotated[str, typer.Argument(help="A recipe, a lock, or the folder of a blend.")],
    second: Annotated[str, typer.Argument(help="Likewise.")],
    json_: JsonOption = False,
) -> None:
    """Say in what two differ, and whether that changes the weights that are written."""
    from ktmerge import api, console

    found = api.diff(first, second)
    if json_:
        console.print_json(found.to_json())
    elif found.differences:
        console.print_table(*found.table())
    else:
        console.print_pairs({"same": found.table()[2]})


@recipes.command("show", epilog="Example: ktmerge recipe show ties")
def recipe_show(recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")], set_: SetOption = None,
                json_: JsonOption = False) -> None:  # fmt: skip
    """Print a recipe; with --set or --json as ktmerge understands it, defaults written out."""
    from ktmerge import api, console
    from ktmerge.errors import printable_lines

    if json_:
        console.print_json(api.load_recipe(recipe, overrides=set_ or ()).model_dump(mode="json", by_alias=True))
    else:
        text = api.show_recipe(recipe, set_ or ())
        sys.stdout.write(printable_lines(text) if sys.stdout.isatty() else text)


@recipes.command("list", epilog="Example: ktmerge recipe list")
def recipe_list(json_: JsonOption = False) -> None:
    """List the recipes that come with ktmerge, when to use each, and what each has to measure on data before."""
    from ktmerge import api, console

    listed = [vars(recipe) for recipe in api.list_recipes()]
    if json_:
        console.print_json(listed)
    else:
        columns = ("name", "when", "method", "data")
        console.print_table(columns, [[row[column] for column in columns] for row in listed])


@recipes.command("schema", epilog="Example: ktmerge recipe schema > recipe.schema.json")
def recipe_schema(kind: Annotated[str, typer.Argument(help="recipe or suite.")] = "recipe") -> None:
    """Print the JSON Schema by which editors complete and check recipes."""
    from ktmerge import api

    sys.stdout.write(api.schema_text(kind))


@recipes.command("import", epilog="Example: ktmerge recipe import mergekit.yaml --out recipe.yaml")
def recipe_import(
    source: Annotated[Path, typer.Argument(help="A mergekit YAML file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the recipe here; else print it.")] = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Turn a mergekit YAML into a recipe, and say where the semantics differ."""
    from ktmerge import api, console

    text, differences = api.import_recipe(source, out, overwrite=overwrite)
    if json_:
        console.print_json({"recipe": text, "out": None if out is None else str(out), "notes": list(differences)})
        return
    if out is None:
        sys.stdout.write(text)
    for difference in differences:
        console.TerminalProgress().note(f"note: {difference}")
