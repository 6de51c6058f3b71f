"""How the commands print: JSON, tables for people, sizes with units. Needs no `registry`, and works where that does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.text import printable

_WIDE = 100_000


def print_json(data: Any) -> None:
    """In ASCII: it means the same in every encoding, and holds nothing that a terminal would act on."""
    click.echo(json.dumps(data, separators=(",", ":")))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False) -> None:
    """As wide as it is: a terminal wraps it, a pipe gets one row a line, and nothing is ever cut.

    With `prose` the last column holds sentences: on a terminal they are wrapped within it, and elsewhere not padded.
    """
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(width=_WIDE, markup=False, emoji=False, highlight=False)
    if not prose:
        console.print(table, soft_wrap=True)
    elif console.is_terminal:
        Console(markup=False, emoji=False, highlight=False).print(table)
    else:
        with console.capture() as captured:
            console.print(table, soft_wrap=True)
        click.echo("\n".join(map(str.rstrip, captured.get().splitlines())))


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
