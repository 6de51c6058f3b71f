"""What is drawn on a terminal again and again: the board of `engines watch`, and the table of
`engines list --watch`. `live.py` draws it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine_cli.render.board import MAX_NEWS, Board, Row
from engine_cli.render.colours import style_of
from engine_cli.render.flows import Flows, percent
from engine_cli.render.listing import Choice, none_text
from engine_cli.render.printable import printable
from engine_cli.render.states import state_of
from engine_cli.render.texts import instance_table
from engine_registry import InstanceStatus, Pull
from engine_registry.schema.printable import count, short

_MIN_BAR, _MAX_BAR = 12, 24
_CUT_FIRST = ("READS FROM", "READ BY", "MODEL", "LABELS", "WHY NOT READY")  # of long columns


class BoardView(Board):
    """The board, as a table of one line for each row."""

    def table(self, width: int, room: int) -> Table | None:
        """None where there is no row."""
        rows = self.rows(room)
        if not rows:
            return None
        table = _table(("INSTANCE", "STATE", "PROGRESS", "READS FROM", "SPEED", "READ BY"))
        for row in rows:
            table.add_row(*_cells_of(row, width))
        return table

    @property
    def nothing(self) -> str:
        return "no instance is registered" if not self.narrowed else "none of them is registered"


class ListView:
    """Show it all instances whenever they have changed. Not thread-safe."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._registered = 0
        self._listed: list[InstanceStatus] = []
        self._flows = Flows((), ())
        self.news: deque[str] = deque(maxlen=MAX_NEWS)

    def see(self, statuses: Sequence[InstanceStatus]) -> None:
        self._registered = len(statuses)
        self._listed = self._choice.of(statuses)

    def note(self, text: str, at: str) -> None:
        self.news.append(f"{at}  {printable(text)}")

    def look(self, pulls: Iterable[Pull], now: float) -> None:
        records = (record for status in self._listed for record in status.records)
        self._flows = Flows(records, pulls)

    def summary(self) -> str:
        counted = _counted(self._listed)
        shown = count(len(self._listed), "instance")
        some = f"{shown} of {self._registered:,}" if len(self._listed) < self._registered else shown
        return f"{some}{f': {counted}' if counted else ''}"

    @property
    def nothing(self) -> str:
        return none_text(self._registered)

    def table(self, width: int, room: int) -> Table | None:
        """At most so many lines, the last of which says what is left out. None where there is no
        instance.
        """
        if not self._listed:
            return None
        shown = self._listed if len(self._listed) <= room else self._listed[: max(0, room - 1)]
        columns, rows = instance_table([(each, self._flows.loaded(each)) for each in shown])
        table = _table(columns)
        for name, state, *rest in rows:
            table.add_row(
                cell(short(name, width // 3)), cell(state, style_of(state)), *map(cell, rest)
            )
        if left := self._listed[len(shown) :]:
            table.add_row(cell(f"… and {len(left):,} more"), cell(_counted(left)))
        return table


def _counted(statuses: Iterable[InstanceStatus]) -> str:
    """How many are in each state."""
    states = Counter(map(state_of, statuses))
    return ", ".join(f"{number:,} {state}" for state, number in sorted(states.items()))


def _table(columns: Sequence[str]) -> Table:
    """Each row is one line."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in columns:
        table.add_column(
            Text(heading, "dim", no_wrap=True, overflow="ellipsis"),
            no_wrap=heading not in _CUT_FIRST,
        )
    return table


def _cells_of(row: Row, width: int) -> list[Table | Text]:
    return [
        cell(short(row.name, width // 3)),
        cell(row.state, style_of(row.state)),
        _bar(row.fraction, width // 6),
        *(cell(row.reads_from), cell(row.speed), cell(row.read_by)),
    ]


def cell(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _bar(fraction: float | None, width: int) -> Table | Text:
    """Without a bar where that would be too short to show anything."""
    if fraction is None:
        return Text("")
    grid = Table.grid(padding=(0, 1, 0, 0))
    text = Text(f"{percent(fraction):>5}")
    if width < _MIN_BAR:
        grid.add_row(text)
    else:
        grid.add_row(ProgressBar(total=1.0, completed=fraction, width=min(width, _MAX_BAR)), text)
    return grid
