"""A host, and the process there that loads."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click

from benchmarks.fanout import rank
from benchmarks.hosts import Host
from benchmarks.processes import call


class Receiver:
    """A host, and a process there that loads; another one if that has been killed."""

    def __init__(self, host: Host, endpoint: str, nbytes: int) -> None:
        self.name = host.name
        self._host = host
        self._command = call(
            rank.__name__, "receive", endpoint, host.address, host.name, str(nbytes)
        )
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        if self._process is None:
            self._process = self._host.popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        if self._ask() is None:
            raise click.ClickException(f"{self.name} did not start")

    def load(self, source: str | None, die_at: float | None = None) -> float | None:
        """From the instance named, or else in the chain: when it had all, or None where it was to
        die.
        """
        answer = self._ask(source=source, die_at=die_at)
        if answer is None and die_at is None:
            raise click.ClickException(f"{self.name} has ended in the middle of a load")
        return None if answer is None else float(answer["ended"])

    def digest(self) -> str | None:
        """Of what it has; None if it has died."""
        answer = self._ask()
        return None if answer is None else str(answer["digest"])

    def end(self) -> None:
        self._ask()

    def _ask(self, **order: object) -> dict[str, Any] | None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        try:
            process.stdin.write(f"{json.dumps(order)}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process = None
            process.communicate()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """However long it would go on loading."""
        self._host.vanish()
        if self._process is not None:
            self._process.communicate()
