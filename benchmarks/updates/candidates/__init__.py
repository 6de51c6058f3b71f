"""The ways to bring a step to a reader, each with a side at the trainer and one at the reader."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from benchmarks.updates.weights import Tensors

DELTA, FULL, GLOO, HTTP, XOR = "delta", "full", "gloo", "http", "xor"
TITLES = {
    DELTA: "`load` with `base`, from a delta",
    FULL: "`load` of everything",
    GLOO: "gloo, broadcast of a flat copy",
    HTTP: "safetensors over HTTP",
    XOR: "XOR, compressed, over HTTP",
}
Facts = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """For one side.

    Attributes:
        host: The address of this side.
        folder: An empty folder in memory.
        endpoint: Of etcd.
        share: Of the elements, that change in a step.
        facts: What the trainer's side has said.
    """

    host: str
    folder: str
    endpoint: str
    share: float
    facts: Facts


@dataclass(frozen=True)
class Sending:
    """`send` is called after each step, with its number. `facts` are for the reader's side."""

    facts: Facts
    send: Callable[[int], object]


@dataclass(frozen=True)
class Receiving:
    """`receive` waits for the step with that number, and returns when the tensors have it: what
    there is to say of it, `nbytes` of what came at least. `keeps`: it needs the step before.
    """

    receive: Callable[[int], Facts]
    keeps: bool = False


Sender = Callable[[Work, Tensors], AbstractContextManager[Sending]]
Receiver = Callable[[Work, Tensors], AbstractContextManager[Receiving]]
