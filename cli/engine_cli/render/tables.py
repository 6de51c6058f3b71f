"""How the commands print:

JSON, tables for people, sizes with units. Needs no `registry`, and works where that does not.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import click
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from engine_cli.render.colours import style_of
from engine_cli.render.printable import printable

_WIDE = 100_000
_NARROWEST = 20
_GAP = 2
_INDENT = 2  # of the lines that a folded row goes on with
_READABLE = 30  # sentences that are wrapped get at least so many cells
_STATES = ("STATE", "STATUS")  # columns that are coloured


def print_json(data: Any) -> None:
    """In ASCII: it means the same in every encoding, and holds nothing that a terminal would act
    on.
    """
    click.echo(json.dumps(data, separators=(",", ":")))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Nothing is ever cut.

    A pipe gets one row a line. On a terminal that is too narrow, the further columns of a row go on
    below, moved to the right, and the last column, which may hold sentences, is wrapped.
    """
    RowPrinter().print(columns, rows)


class RowPrinter:
    """A table whose rows come bit by bit: a column may get wider, and never narrower. The heading
    is printed again only where it changes.
    """

    def __init__(self) -> None:
        self.columns: Sequence[str] = ()
        self._widest: list[Text] = []

    def print(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        heading, body = _texts(columns, rows)
        printed = body if columns == self.columns else [heading, *body]
        if columns != self.columns:
            self.columns, self._widest = columns, heading
        console = _console(_WIDE)
        table = _Table(console, [self._widest, *body], _width())
        self._widest = [
            max(column, key=lambda cell: cell.cell_len)
            for column in zip(self._widest, *body, strict=True)
        ]
        console.print(Text("\n").join(table.lines(printed)), soft_wrap=True)


def _texts(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[Text], list[list[Text]]]:
    """The heading and the cells, with their looks."""
    return [Text(name, "bold") for name in columns], [
        [
            Text(shown := printable(cell), style_of(shown) if name in _STATES else "")
            for name, cell in zip(columns, row, strict=True)
        ]
        for row in rows
    ]


class _Table:
    """Rows of cells, in as many lines as a width takes."""

    def __init__(self, console: Console, rows: Sequence[Sequence[Text]], room: int) -> None:
        self._console = console
        self._widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
        self._folds: list[list[int]] = [[]]  # the columns on each line of a row
        left = room
        for number, width in enumerate(self._widths):
            is_last = number == len(self._widths) - 1
            if self._folds[-1] and (min(width, _READABLE) if is_last else width) > left:
                self._folds.append([])
                left = room - _INDENT
            self._folds[-1].append(number)
            self._widths[number] = min(width, left)
            left -= width + _GAP

    def lines(self, rows: Iterable[Sequence[Text]]) -> Iterator[Text]:
        """Of some of the rows: without blank ones, and without blanks at their ends."""
        for row in rows:
            yield from self._lines_of(row)

    def _lines_of(self, row: Sequence[Text]) -> Iterator[Text]:
        for number, fold in enumerate(self._folds):
            cells = [self._wrapped(row[column], self._widths[column]) for column in fold]
            for pieces in itertools.zip_longest(*cells, fillvalue=Text()):
                line = Text(" " * _INDENT if number else "")
                for column, piece in zip(fold, pieces, strict=True):
                    line.append_text(piece)
                    line.append(" " * (self._widths[column] - piece.cell_len + _GAP))
                line.rstrip()
                if line:
                    yield line

    def _wrapped(self, cell: Text, width: int) -> Iterable[Text]:
        if cell.cell_len <= width:
            return [cell]
        return cell.wrap(self._console, width, overflow="fold")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process, with the code of a failure."""
        raise BrokenPipeError


def _console(width: int) -> Console:
    """Where NO_COLOR is set, nothing is bold either."""
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return _Console(width=width, color_system=colours, markup=False, emoji=False, highlight=False)


def _width() -> int:
    """Of the terminal, or what COLUMNS says of it. A pipe takes everything: programs read lines of
    it, and many environments have COLUMNS set.
    """
    if not sys.stdout.isatty():
        return _WIDE
    return max(_NARROWEST, shutil.get_terminal_size().columns)


def print_tree(rows: Sequence[tuple[int, str]]) -> None:
    """Each row with its depth, which the first one has 0 of: drawn on a terminal, elsewhere moved
    to the right.
    """
    console = _console(_width())
    if not console.is_terminal:
        click.echo("\n".join("  " * depth + printable(text) for depth, text in rows))
        return
    root = Tree("", hide_root=True)
    path = [root]
    for depth, text in rows:
        del path[depth + 1 :]
        path.append(path[-1].add(Text(printable(text))))
    console.print(root)


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
