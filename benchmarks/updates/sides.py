"""The processes: a trainer, a reader, and readers that follow without an order. They take orders in
lines of JSON on standard input and answer each with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import processes
from benchmarks.figures import memory_nbytes, seconds
from benchmarks.updates import weights
from benchmarks.updates.candidates import (
    DELTA,
    FULL,
    GLOO,
    HTTP,
    XOR,
    Receiver,
    Sender,
    Work,
    files,
    gloo,
    ours,
    xor,
)

_SENDERS: dict[str, Sender] = {
    DELTA: ours.send_delta,
    FULL: ours.send_full,
    GLOO: gloo.send,
    HTTP: files.send,
    XOR: xor.send,
}
_RECEIVERS: dict[str, Receiver] = {
    DELTA: ours.receive_delta,
    FULL: ours.receive_full,
    GLOO: gloo.receive,
    HTTP: files.receive,
    XOR: xor.receive,
}


class Side:
    """Such a process, as the one that gives the orders has it."""

    def __init__(self, process: subprocess.Popen[str], first: str, name: str) -> None:
        self.facts: Any = json.loads(first)
        self._process = process
        self._name = name

    def order(self, what: str, **more: object) -> None:
        processes.order(self._process, json.dumps({"do": what, **more}))

    def answer(self) -> Any:
        return json.loads(processes.answer(self._process, self._name))

    def ask(self, what: str, **more: object) -> Any:
        self.order(what, **more)
        return self.answer()


@contextmanager
def side(
    function: Callable[..., None],
    settings: dict[str, Any],
    within: Callable[..., list[str]] | None = None,
) -> Iterator[Side]:
    """One that runs this function of this module, in a host if `within` is its `command`."""
    name = function.__name__
    with processes.another_process(__name__, name, json.dumps(settings), within=within) as started:
        yield Side(*started, name)


def _say(what: object) -> None:
    click.echo(json.dumps(what))


def _orders() -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in sys.stdin)


def _work(settings: dict[str, Any]) -> Work:
    names = ("host", "folder", "endpoint", "share", "facts")
    return Work(**{name: settings.get(name, {}) for name in names})


def train(text: str) -> None:
    """Steps and sends. What it says first are the facts of all candidates."""
    settings = json.loads(text)
    share, work = settings["share"], _work(settings)
    tensors = weights.weights(settings["gib"])
    block = torch.ones(weights.nbytes_of(tensors), dtype=torch.uint8)
    other = block.clone()
    resident = 0
    with ExitStack() as stack:
        senders = {
            name: stack.enter_context(_SENDERS[name](work, tensors))
            for name in settings["candidates"]
        }
        _say({name: one.facts for name, one in senders.items()})
        for order in _orders():
            if order["do"] == "step":
                weights.step(tensors, order["number"], share)
                _say({})
            elif order["do"] == "send":
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
                resident = memory_nbytes(os.getpid())
                memcpy_s = seconds(lambda: other.copy_(block))
                began = time.monotonic()
                senders[order["name"]].send(order["number"])
                took_s = time.monotonic() - began
                _say({"began": began, "took_s": took_s, "memcpy_s": memcpy_s})
            else:
                _say({"peak_nbytes": memory_nbytes(os.getpid(), "VmHWM") - resident})


def read(text: str) -> None:
    """Receives, and compares after each time."""
    settings = json.loads(text)
    work, share, gib = _work(settings), settings["share"], settings["gib"]
    expected = weights.weights(gib)
    tensors = {name: weights.copied(expected) for name in settings["candidates"]}
    with ExitStack() as stack:
        receivers = {
            name: stack.enter_context(
                _RECEIVERS[name](replace(work, facts=work.facts[name]), tensors[name])
            )
            for name in settings["candidates"]
        }
        _say({})
        for order in _orders():
            if order["do"] == "step":
                weights.step(expected, order["number"], share)
                _say({})
                continue
            name = order["name"]
            if not receivers[name].keeps:
                weights.poison(tensors[name])
            _say({})
            facts = receivers[name].receive(order["number"])
            ended = time.monotonic()
            _say({**facts, "ended": ended, "wrong": weights.wrong(tensors[name], expected)})


def follow(text: str) -> None:
    """Loads deltas again and again, until an order comes, and once after it. Compares each time."""
    settings = json.loads(text)
    over = threading.Event()
    gib, share = settings["gib"], settings["share"]
    expected, reached = weights.weights(gib), 0
    tensors = weights.copied(expected)
    loads = retries = wrong = nbytes = 0
    with ours.following(_work(settings), tensors) as load:
        _say({})

        def wait() -> None:
            sys.stdin.readline()
            over.set()

        threading.Thread(target=wait, daemon=True).start()
        last = False
        while not last:
            last = over.is_set()
            report = load()
            while reached < report.version:
                reached += 1
                weights.step(expected, reached, share)
            loads, retries = loads + 1, retries + report.retries
            wrong += weights.wrong(tensors, expected)
            nbytes += report.delta_nbytes
        _say(
            {
                "loads": loads,
                "retries": retries,
                "wrong": wrong,
                "version": reached,
                "delta_nbytes": nbytes,
            }
        )
