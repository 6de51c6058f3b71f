"""The live tables of `engines watch` and `engines list --watch`. `views.py` says what is in them.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine_cli.render.views import cell
from engine_cli.wording import in_options, said
from engine_registry import Pull
from engine_registry.schema.moment import utc

_FRAMES_S = (0.1, 0.5)  # from one to the next: at least, and at most where nothing happens
_REST = 5  # times as long as it takes to draw, so that very many ranks do not cost a core
_JOIN_S = 2.0
_MAX_NEWS = 8
_LEAVE = b"\x1b[?1049l\x1b[?25h"  # back to the first screen, with a cursor


class Pulls(Protocol):
    @property
    def unseen(self) -> str | None: ...

    def now(self) -> tuple[Pull, ...]: ...


class Watched(Protocol):
    @property
    def away(self) -> Exception | None: ...

    def stop(self) -> None: ...


class View(Protocol):
    """What is drawn. The screen calls it from one thread at a time."""

    @property
    def news(self) -> Iterable[str]: ...

    @property
    def nothing(self) -> str: ...

    def note(self, text: str, at: str) -> None: ...

    def look(self, pulls: Iterable[Pull], now: float) -> None: ...

    def summary(self) -> str: ...

    def table(self, width: int, room: int) -> Table | None: ...


def fits() -> bool:
    """Whether there is a terminal that can show it."""
    return (
        sys.stdout.isatty() and not Console(file=sys.stdout, force_terminal=True).is_dumb_terminal
    )


class Screen:
    """Draws the view, from its block on. Stops the watch where the terminal is gone."""

    def __init__(self, watch: Watched, pulls: Pulls, view: View) -> None:
        self._watch = watch
        self._pulls = pulls
        self._lock = threading.Lock()  # guards the view
        self._view = view
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

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block the view may be changed. It is drawn soon after."""
        with self._lock:
            yield
        self._wake.set()

    def note(self, text: str) -> None:
        with self.changing():
            self._view.note(text, utc())

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
            self._view.look(self._pulls.now(), time.monotonic())
            head.insert(0, cell(f"{utc()}  {self._view.summary()}", "bold"))
            news = list(self._view.news)[-min(_MAX_NEWS, max(1, height // 4)) :]
            # the table's heading, two empty lines
            table = self._view.table(width, max(1, height - len(head) - len(news) - 3))
            body = table or cell(self._view.nothing)
        return Group(*head, Text(""), body, Text(""), *map(cell, news))

    def _head(self) -> list[Text]:
        """What is not as it should be."""
        away, unseen = self._watch.away, self._pulls.unseen
        self._away_since = (self._away_since or utc()) if away else None
        head = []
        if away and self._away_since is not None:
            head.append(
                cell(
                    f"etcd is away since {self._away_since}, and this is how it "
                    f"was then: {said(away)}",
                    "bold red",
                )
            )
        if unseen:
            head.append(cell(f"who reads from whom is not known: {in_options(unseen)}", "yellow"))
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


def _size() -> tuple[int, int]:
    """Of the terminal, as it is now; of one that does not know, what terminals had of old."""
    with suppress(OSError):
        width, height = os.get_terminal_size(sys.stdout.fileno())
        if width and height:
            return width, height
    return 80, 24
