"""What a side of a candidate is given, and what it makes of it. In .venv and in .peers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.sets import Tensors

# What a side says about itself, as JSON, so that the next side finds it.
Facts = dict[str, Any]


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Work:
    """For one side.

    Attributes:
        variant: Of the candidate, such as a protocol.
        host: The address of this side.
        folder: An empty folder for this side, in memory.
        facts: Of the service and, for the reader, of the source.
        sizes: Of the tensors, in bytes.
        joined: Whether they lie side by side in one storage.
    """

    variant: str
    host: str
    folder: str
    facts: Facts
    sizes: Sequence[int]
    joined: bool = False


@dataclass(frozen=True)
class Load:
    """A reader that is ready: `run` fills the tensors and is timed, `prepare` comes before it."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


class LoadFailed(Exception):
    """A product says by a code or a state, and not by an error, that it has failed."""


# Each gives what the next side must know, or how to load, and ends what it started.
Service = Callable[[Work], AbstractContextManager[Facts]]
Source = Callable[[Work, Tensors], AbstractContextManager[Facts]]
Reader = Callable[[Work, Tensors], AbstractContextManager[Load]]


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port
