"""Processes that the benchmarks start: a function of a module, which prints a first line when it is
ready and ends when its standard input does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import click

from engine_cli.runtime.children import python


def call(module: str, function: str, *args: str) -> list[str]:
    """The command that runs `module.function(*args)`."""
    return python(f"from {module} import {function} as run; run(*sys.argv[1:])", *args)


@contextmanager
def another_process(
    module: str, function: str, *args: str, within: Callable[..., list[str]] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One that runs `module.function(*args)` until the block ends (it sees the end of its standard
    input), and its first line.

    `within`: the `command` of a Host, to run it there, where Ctrl-C does not reach it.
    """
    command = call(module, function, *args)
    with _process(
        within(*command) if within is not None else command, start_new_session=within is not None
    ) as process:
        yield process, answer(process, f"{module}.{function}")


@contextmanager
def several_processes(
    module: str, function: str, calls: Sequence[Sequence[str]]
) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Started at the same time, one for each list of arguments; the first lines of all of them have
    come.
    """
    with ExitStack() as stack:
        started = [stack.enter_context(_process(call(module, function, *args))) for args in calls]
        yield [(process, answer(process, f"{module}.{function}")) for process in started]


@contextmanager
def _process(
    command: Sequence[str], *, start_new_session: bool = False
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )
    with process:
        try:
            yield process
        finally:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def answer(process: subprocess.Popen[str], name: str) -> str:
    """Its next line."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise click.ClickException(f"{name} has ended: --debug shows what it printed")
    return line.strip()


def order(process: subprocess.Popen[str], line: str) -> None:
    """A line for its standard input."""
    if process.stdin is not None:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def ready(line: object) -> None:
    """Called in such a process: prints its first line, and returns when its standard input ends."""
    click.echo(line)
    sys.stdin.read()
