"""Commands about suites."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ktmerge.commands.app import suites
from ktmerge.commands.options import JsonOption


@suites.command("list", epilog="Example: ktmerge suite list")
def suite_list(json_: JsonOption = False) -> None:
    """List the suites that come with ktmerge and the public data they ask for."""
    from ktmerge import api, console

    listed = [vars(suite) for suite in api.list_suites()]
    if json_:
        console.print_json(listed)
    else:
        columns = ("name", "upstream", "downstream", "data")
        rows = [[", ".join(row[column]) if column != "name" else row[column] for column in columns] for row in listed]
        console.print_table(columns, rows)


@suites.command("show", epilog="Example: ktmerge suite show upstream-vlm > mine.yaml")
def suite_show(suite: Annotated[str, typer.Argument(help="Suite file or name of a ready suite.")]) -> None:
    """Print a suite, to copy and change."""
    from ktmerge import api

    sys.stdout.write(api.show_suite(suite))
