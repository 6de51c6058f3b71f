"""Processes that the benchmarks kill, and the weights that they leave with their keepers."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from benchmarks.processes import another_process
from engine_registry.registration.held import Kept, keepers_here


@contextmanager
def killed(module: str, function: str, *args: str) -> Iterator[str]:
    """The first line of a process that runs `module.function(*args)`. It is killed at the end of
    the block.
    """
    with another_process(module, function, *args) as (process, line):
        try:
            yield line
        finally:
            process.kill()


@contextmanager
def keepers_end(key: str) -> Iterator[None]:
    """Those of the rank with this key are ended at the end of the block."""
    try:
        yield
    finally:
        for kept in _kept(key):
            with contextlib.suppress(ProcessLookupError):
                os.kill(kept.pid, signal.SIGKILL)


def wait_until_held(key: str) -> None:
    limit = time.monotonic() + 30
    while not any(kept.held for kept in _kept(key)):
        if time.monotonic() > limit:
            raise click.ClickException("the keeper does not hold the weights")
        time.sleep(0.01)


def _kept(key: str) -> list[Kept]:
    return [kept for kept in keepers_here() if kept.key == key]
