"""Commands about recipes."""

from __future__ import annotations

import sys
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
    base: Annotated[str, typer.Option(prompt="Base model (folder or hub id)", help="Folder or hub id.")],
    expert: Annotated[
        str, typer.Option(prompt="Fine-tuned models (name=folder, joined by ',')", help="name=model, joined by ','.")
    ],
    statistics: Annotated[
        bool,
        typer.Option(
            prompt="Are data at hand of what to keep and of what was learned",
            help="Data of both sides are at hand to measure on.",
        ),
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            prompt="Parts that should stay the base's (e.g. vision; empty for none)",
            help="Part expressions that stay the base's, joined by ','.",
        ),
    ] = "",
    lean: Annotated[
        str,
        typer.Option(
            prompt="What matters most: upstream (keep), downstream (learn) or balanced",
            help="What matters most: upstream, balanced or downstream.",
        ),
    ] = "balanced",
    overwrite: OverwriteOption = False,
) -> None:
    """Ask a few questions, and write a recipe with comments."""
    from ktmerge import api, console

    parts = [part.strip() for part in keep.split(",") if part.strip()]
    models = [model.strip() for model in expert.split(",") if model.strip()]
    written = api.new_recipe(
        out, base=base, experts=models, statistics=statistics, keep=parts, lean=lean, overwrite=overwrite
    )
    console.print_pairs({"recipe": str(written), "check it": f"ktmerge recipe check {written}"})


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
    set_: SetOption = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Pin every input of a recipe by its sha256, and all else that decides the bytes of its blend."""
    from dataclasses import asdict

    from ktmerge import api, console

    given: dict[str, Any] = {"overrides": set_ or (), "base": base, "experts": expert or ()}
    if not check:
        written = {"lock": str(api.lock(recipe, out, overwrite=overwrite, **given))}
        console.print_json(written) if json_ else console.print_pairs(written)
        return
    found = api.check_lock(recipe, out or api.lock_path(recipe), **given)
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
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Prove that a blended model is what its record says; exit code 1 if it is not."""
    from ktmerge import api, console

    found = api.verify(
        out, recipe, base=base, experts=expert or (), rebuild=rebuild, device=device,
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

    if json_:
        console.print_json(api.load_recipe(recipe, overrides=set_ or ()).model_dump(mode="json", by_alias=True))
    else:
        sys.stdout.write(api.show_recipe(recipe, set_ or ()))


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
) -> None:
    """Turn a mergekit YAML into a recipe, and say where the semantics differ."""
    from ktmerge import api, console

    text, differences = api.import_recipe(source, out, overwrite=overwrite)
    if out is None:
        sys.stdout.write(text)
    for difference in differences:
        console.stderr().print(f"note: {difference}", markup=False)
