"""Commands `engines …` that `engines demo` runs as a user would, each in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from engine_cli.demo.failure import DemoFailed
from engine_cli.runtime.children import python

INSTANCE = "demo"
RANKS = 2
_ENGINES = "from engine_cli.main import main; main()"
_LINK = "from engine_cli.demo.link import main; main()"
_END_S = 5.0  # how long a process may take to end once it is asked to


class Engines:
    """Runs `engines` commands as a user would, each in a separate process."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._env = {**os.environ, "ENGINES_ETCD": endpoint}

    @contextmanager
    def _running(
        self, *args: str, code: str = _ENGINES, **pipes: int
    ) -> Iterator[subprocess.Popen[str]]:
        """The process, which ends at the end of the block at the latest.

        A terminal's Ctrl-C does not reach one that serves until its input ends: it would be the
        first of two signals, of which the second one is to end at once.
        """
        serves = "stdin" in pipes
        with subprocess.Popen(  # type: ignore[call-overload]
            python(code, *args), env=self._env, text=True, start_new_session=serves, **pipes
        ) as process:
            try:
                yield process
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
                process.kill()

    def rank(self, rank: int, stage: Path) -> AbstractContextManager[subprocess.Popen[str]]:
        """A rank that ends also when this process dies."""
        return self._running(
            "register",
            INSTANCE,
            "--rank",
            str(rank),
            "--world-size",
            str(RANKS),
            "--weights",
            str(stage),
            "--topology",
            f"pp={rank}/{RANKS}",
            "--host",
            "127.0.0.1",
            "--until-eof",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def copy(self, name: str, rank: int) -> AbstractContextManager[subprocess.Popen[str]]:
        """A process that loads the rank and serves it as the same rank of `name`."""
        return self._running(
            "load",
            INSTANCE,
            "--rank",
            str(rank),
            "--serve",
            name,
            "--host",
            "127.0.0.1",
            "--until-eof",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def link(self, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """A process that loads the ranks again and again, slowly, as those of `name`."""
        return self._running(name, self._endpoint, code=_LINK, stdin=subprocess.PIPE)

    def show(self, *args: str) -> None:
        click.echo(f"\n$ engines {' '.join(args)}")
        with self._running(*args) as process:
            process.wait()
        if process.returncode:
            raise DemoFailed(f"engines {' '.join(args)} ended with code {process.returncode}")

    def load_all(self, folder: Path) -> list[dict[str, Any]]:
        reports = []
        with ExitStack() as stack:
            loaders = [
                stack.enter_context(
                    self._running(
                        "load",
                        INSTANCE,
                        "--rank",
                        str(rank),
                        "--out",
                        str(folder / "loaded"),
                        "--host",
                        "127.0.0.1",
                        "--json",
                        stdout=subprocess.PIPE,
                    )
                )
                for rank in range(RANKS)
            ]
            for rank, process in enumerate(loaders):
                output, _ = process.communicate()
                if process.returncode:
                    raise DemoFailed(f"loading rank {rank} ended with code {process.returncode}")
                reports.append(json.loads(output))
        return reports


def say(text: str) -> None:
    click.echo(f"\n# {text}")


def next_line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline() if process.stdout else ""
