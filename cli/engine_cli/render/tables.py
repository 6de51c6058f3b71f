"""How the commands print:

JSON, tables for people, sizes with units. Needs no `registry`, and works where that does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from engine_cli.render.printable import printable

_WIDE = 100_000


def print_json(data: Any) -> None:
    """In ASCII: it means the same in every encoding, and holds nothing that a terminal would act
    on.
    """
    click.echo(json.dumps(data, separators=(",", ":")))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False
) -> None:
    """As wide as it is: a terminal wraps it, a pipe gets one row a line, and nothing is ever cut.

    With `prose` the last column holds sentences: on a terminal they are wrapped within it, and
    elsewhere not padded.
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


def print_tree(rows: Sequence[tuple[int, str]]) -> None:
    """Each row with its depth, which the first one has 0 of: drawn on a terminal, elsewhere moved
    to the right.
    """
    console = Console(width=_WIDE, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        click.echo("\n".join("  " * depth + printable(text) for depth, text in rows))
        return
    root = Tree("", hide_root=True)
    path = [root]
    for depth, text in rows:
        del path[depth + 1 :]
        path.append(path[-1].add(Text(printable(text))))
    console.print(root, soft_wrap=True)


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
