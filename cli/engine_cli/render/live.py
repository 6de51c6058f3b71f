"""The live table of `engines watch` on a terminal. `board.py` says what is in it.

One thread draws, on the terminal's other screen, so that it may be resized and what was there
before comes back. A terminal that takes nothing holds up that thread and nobody else.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine_cli.render.board import Board, Row
from engine_cli.render.colours import style_of
from engine_cli.render.flows import percent
from engine_cli.render.printable import printable
from engine_cli.wording import in_options, said
from engine_registry import Event, InstanceCleaned, Pull
from engine_registry.schema.moment import utc
from engine_registry.schema.printable import short

_FRAMES_S = (0.1, 0.5)  # from one to the next: at least, and at most where nothing happens
_REST = 5  # times as long as it takes to draw, so that very many ranks do not cost a core
_JOIN_S = 2.0
_MAX_NEWS = 8
_MIN_BAR, _MAX_BAR = 12, 24
_LEAVE = b"\x1b[?1049l\x1b[?25h"  # back to the first screen, with a cursor


class Pulls(Protocol):
    @property
    def unseen(self) -> str | None: ...

    def now(self) -> tuple[Pull, ...]: ...


class Watched(Protocol):
    @property
    def away(self) -> Exception | None: ...

    def stop(self) -> None: ...


def fits() -> bool:
    """Whether there is a terminal that can show it."""
    return (
        sys.stdout.isatty() and not Console(file=sys.stdout, force_terminal=True).is_dumb_terminal
    )


class Screen:
    """Show it every event of the watch, which it stops where the terminal is gone."""

    def __init__(self, watch: Watched, pulls: Pulls, narrowed: bool) -> None:
        self._watch = watch
        self._pulls = pulls
        self._lock = threading.Lock()  # guards the board
        self._board = Board(narrowed)
        self._away_since: str | None = None
        self._ended = False
        self._wake = threading.Event()
        self._failure: BaseException | None = None
        self._console = Console(
            file=sys.stdout, force_terminal=True, markup=False, emoji=False, highlight=False
        )
        self._live = Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._logs = _Logs(self.note)
        self._thread = threading.Thread(target=self._draw, name="screen", daemon=True)

    def see(self, event: Event | InstanceCleaned, at: str) -> None:
        with self._lock:
            self._board.see(event, at)
        self._wake.set()

    def note(self, text: str) -> None:
        with self._lock:
            self._board.note(text, utc())
        self._wake.set()

    def _draw(self) -> None:
        try:
            with self._live:
                while not self._ended:
                    start = time.monotonic()
                    self._live.update(self._frame(), refresh=True)
                    self._rest(time.monotonic() - start)
            self._console.print(self._frame())  # stays
        except BaseException as exc:  # noqa: BLE001  raised again by the thread that the watch belongs to
            if (
                not isinstance(exc, OSError) or exc.errno != errno.EIO
            ):  # that is a terminal which is gone: as if asked to end
                self._failure = exc
            self._watch.stop()

    def _rest(self, took_s: float) -> None:
        """Until the next frame."""
        rest_s = max(_FRAMES_S[0], _REST * took_s)
        until = time.monotonic() + rest_s
        while not self._ended and time.monotonic() < until:
            time.sleep(min(_FRAMES_S[0], rest_s))
        self._wake.wait(max(0.0, _FRAMES_S[1] - rest_s))
        self._wake.clear()

    def _frame(self) -> Group:
        width, height = _size()
        self._console.size = width, height
        head = self._head()
        with self._lock:
            self._board.look(self._pulls.now(), time.monotonic())
            head.insert(
                0,
                _cell(f"{utc()}  {self._board.summary()}", "bold"),
            )
            news = list(self._board.news)[-min(_MAX_NEWS, max(1, height // 4)) :]
            # the table's heading, two empty lines
            rows = self._board.rows(max(1, height - len(head) - len(news) - 3))
        body = [_table(rows, width)] if rows else [Text("no instance is registered")]
        return Group(*head, Text(""), *body, Text(""), *map(_cell, news))

    def _head(self) -> list[Text]:
        """What is not as it should be."""
        away, unseen = self._watch.away, self._pulls.unseen
        self._away_since = (self._away_since or utc()) if away else None
        head = []
        if away and self._away_since is not None:
            head.append(
                _cell(
                    f"etcd is away since {self._away_since}, and this is how it "
                    f"was then: {said(away)}",
                    "bold red",
                )
            )
        if unseen:
            head.append(_cell(f"who reads from whom is not known: {in_options(unseen)}", "yellow"))
        return head

    def restore(self) -> None:
        """For a process that ends without leaving: the terminal as it was.

        Waits for nothing, whatever the terminal does.
        """
        with suppress(OSError):
            terminal = os.open(
                os.ttyname(sys.stdout.fileno()), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            )
            os.write(terminal, _LEAVE)

    def __enter__(self) -> Screen:
        self._logs.take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=_JOIN_S)
        if self._thread.is_alive():  # the terminal takes nothing
            self.restore()
        self._logs.give_back()
        if self._failure is not None and exc is None:
            raise self._failure


class _Logs(logging.Handler):
    """What would be logged on the terminal is shown below the table."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note
        self._taken: list[logging.Handler] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._note(f"{record.levelname.lower()}: {in_options(record.getMessage())}")

    def take(self) -> None:
        root = logging.getLogger()
        self._taken = [
            each
            for each in root.handlers
            if isinstance(each, logging.StreamHandler) and each.stream.isatty()
        ]
        for handler in self._taken:
            root.removeHandler(handler)
        if self._taken:
            root.addHandler(self)

    def give_back(self) -> None:
        root = logging.getLogger()
        root.removeHandler(self)
        for handler in self._taken:
            root.addHandler(handler)
        self._taken = []


def _table(rows: list[Row], width: int) -> Table:
    """Each row is one line.

    Where they are too long, its sources and its readers are cut first.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("INSTANCE", "STATE", "PROGRESS", "READS FROM", "SPEED", "READ BY"):
        table.add_column(
            Text(heading, "dim", no_wrap=True, overflow="ellipsis"),
            no_wrap=not heading.startswith("READ"),
        )
    for row in rows:
        rest = (_cell(row.reads_from), _cell(row.speed), _cell(row.read_by))
        table.add_row(
            _cell(short(row.name, width // 3)),
            _cell(row.state, style_of(row.state)),
            _bar(row.fraction, width // 6),
            *rest,
        )
    return table


def _cell(text: str, style: str = "") -> Text:
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


def _size() -> tuple[int, int]:
    """Of the terminal, as it is now; of one that does not know, what terminals had of old."""
    with suppress(OSError):
        width, height = os.get_terminal_size(sys.stdout.fileno())
        if width and height:
            return width, height
    return 80, 24
