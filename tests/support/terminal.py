"""A program on its own terminal, which may be resized and closed, and its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

_JOIN_S = 60.0
_HOME = "\x1b[H"  # where each frame begins
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
OTHER_SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
NO_CURSOR, CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """`said` is all that has been written to it.

    Starts one thread, which reads unless `reads` is cleared.
    """

    def __init__(self, columns: int = 130, rows: int = 30) -> None:
        self._ours, self._theirs = pty.openpty()
        self.resize(columns, rows)
        self._said = bytearray()
        self.reads = threading.Event()
        self.reads.set()
        self.process: subprocess.Popen[bytes]
        self._reader: threading.Thread

    def start(self, args: Sequence[str], env: Mapping[str, str]) -> None:
        """`engines ARGS`, with this as its controlling terminal."""
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import os; os.setsid(); os.close(os.open(os.ttyname(0), os.O_RDWR)); "
                "import sys; os.execv(sys.executable, [sys.executable, '-m', 'engine_cli', "
                "*sys.argv[1:]])",
                *args,
            ],
            cwd=ROOT,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={**os.environ, "TERM": "xterm", **env},
        )
        os.close(self._theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def join(self) -> None:
        """Until nobody has it open any more, and all of it has been read."""
        self._reader.join(_JOIN_S)

    def _read(self) -> None:
        try:
            while self.reads.wait() and (piece := os.read(self._ours, 65536)):
                self._said.extend(piece)
        except OSError:  # nobody writes to it any more, or it is closed
            return

    @property
    def said(self) -> str:
        return bytes(self._said).decode(errors="replace").replace("\r\n", "\n")

    def frame(self) -> str:
        """The last one that is complete; empty before there is any."""
        frames = self.said.split(_HOME)
        return frames[-2] if len(frames) > 2 else ""

    def screen(self) -> list[str]:
        """The lines of the last frame that is complete, without what they look like."""
        return [_SEQUENCE.sub("", line).rstrip() for line in self.frame().splitlines()]

    def line(self, name: str) -> str:
        """Of the row that begins so."""
        return next((line for line in self.screen() if line.strip().startswith(name)), "")

    def wait_for(self, *words: str) -> None:
        """Until the screen has a line with all of them."""
        try:
            wait_until(lambda: any(all(word in line for word in words) for line in self.screen()))
        except TimeoutError:
            raise AssertionError(f"{words} are not on the screen: {self.said[-5_000:]!r}") from None

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        os.close(self._ours)
        self._ours = -1


@contextmanager
def on_terminal(
    *args: str, env: Mapping[str, str], columns: int = 130, rows: int = 30
) -> Iterator[Terminal]:
    terminal = Terminal(columns, rows)
    try:
        terminal.start(args, env)
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        if terminal._ours >= 0:
            terminal.close()
