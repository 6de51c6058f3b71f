"""One side of a candidate, as a process that calls `main`.

It takes orders in lines of JSON on standard input and answers each with one. The first order is its
work. What the product prints goes to standard error. In .venv and in .peers.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.peers.sets import TensorSet, poison, wrong
from benchmarks.peers.work import LoadFailed, Work

SERVICE, SOURCE, READER = "service", "source", "reader"
NO_TYPE = "a code, no exception"


def main(role: str, module: str) -> None:
    """Ends when standard input does."""
    sides = {SERVICE: _serve, SOURCE: _serve, READER: _read}
    channel = _Channel()
    try:
        torch.set_num_threads(1)
        candidate = importlib.import_module(module)
        channel.say(torch=torch.__version__)
        sides[role](channel, getattr(candidate, role), role)
    except Exception as exc:  # noqa: BLE001  whatever a product raises is a line of the report
        traceback.print_exc()
        channel.say(error=said(exc))
    sys.stderr.flush()
    os._exit(0)  # threads of products may never end


def said(exc: BaseException) -> dict[str, str]:
    kind = type(exc)
    if kind is LoadFailed:
        return {"type": NO_TYPE, "message": str(exc)}
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    return {"type": name, "message": " ".join(str(exc).split())}


class _Channel:
    """The lines of the driver, out of reach of what the product prints and of what it starts."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        self.orders: Iterator[str] = os.fdopen(os.dup(0))
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)

    def say(self, **what: object) -> None:
        self._answers.write(f"{json.dumps(what)}\n")
        self._answers.flush()

    def work(self) -> tuple[Work, TensorSet]:
        work = Work(**json.loads(next(self.orders)))
        return work, TensorSet(work.sizes, work.joined)


def _serve(channel: _Channel, side: Callable[..., Any], role: str) -> None:
    work, tensors = channel.work()
    with side(work) if role == SERVICE else side(work, tensors.filled()) as facts:
        channel.say(facts=facts)
        for _ in channel.orders:
            pass


def _read(channel: _Channel, side: Callable[..., Any], _: str) -> None:
    """Three orders for each load: prepare, load, check."""
    work, tensor_set = channel.work()
    tensors = tensor_set.allocate()
    with side(work, tensors) as load:
        channel.say(ready=True)
        for _ in channel.orders:
            load.prepare()
            poison(tensors)
            channel.say(prepared=True)
            next(channel.orders)
            start = time.perf_counter()
            load.run()
            channel.say(seconds=time.perf_counter() - start)
            next(channel.orders)
            channel.say(wrong=len(wrong(tensors)))
