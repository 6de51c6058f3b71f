"""Presses Ctrl-C at seeded moments of a rank's life: `python -m tests.support.processes.interrupt
KIND FIRST_SEED SEEDS`.

KIND is what is interrupted: a registration or a publication. Each of its steps is interrupted up to
three times; then a handle, if there is one, is closed in peace. Prints a line for each seed: what
became of the steps, and what is left of the rank.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_registry import Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from tests.support.ranks import register

INTERRUPTS = 3  # a step
TTL_S = 60.0
GONE_S = 20.0  # less than the lease, so that a key which goes only with its lease is left


def interrupted(call: Callable[[], object], waits_s: Sequence[float]) -> bool:
    """Makes the call, and sends SIGINT after each wait for as long as the call takes.

    A byte in a pipe says that it is over: an Event that is interrupted while it is set keeps its
    lock for ever.
    """
    ended, over = os.pipe()

    def send() -> None:
        for wait_s in waits_s:
            if select.select([ended], [], [], wait_s)[0]:
                return
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    was = False
    try:
        try:
            sender.start()
            call()
        finally:
            os.write(over, b".")
    except KeyboardInterrupt:
        was = True
    while True:
        try:
            os.write(over, b".")
            sender.join()
            break
        except KeyboardInterrupt:
            was = True
    os.close(ended)
    os.close(over)
    return was


class Life:
    """Of one rank."""

    def __init__(self, begin: Callable[[], Any], change: Callable[[Any], None]) -> None:
        self.handle: Any = None
        self._begin = begin
        self._change = change

    def begin(self) -> None:
        self.handle = self._begin()

    def change(self) -> None:
        self._change(self.handle)

    def close(self) -> None:
        self.handle.close()


def a_life(kind: str, registry: Registry, instance: str) -> Life:
    if kind == "registration":
        return Life(
            lambda: register(registry, instance, ttl_s=TTL_S),
            lambda handle: handle.update(version=handle.record.version + 1),
        )
    import torch

    from engine_loader import InProcessEngine, PublishOptions, publish
    from engine_registry import ModelIdentity

    tensors = {"w": torch.zeros(16)}

    def begin() -> Any:
        return publish(
            registry,
            InProcessEngine(),
            instance=instance,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity("m"),
            options=PublishOptions(ttl_s=TTL_S),
        )

    def change(handle: Any) -> None:
        with handle.update():
            tensors["w"].add_(1)

    return Life(begin, change)


def live_through(life: Life, moments: random.Random) -> list[str]:
    steps = []
    for name, lasts_s in (("begin", 0.4), ("change", 0.02), ("close", 0.05), ("close", 0.05)):
        if life.handle is None and name != "begin":
            break
        # Most of the steps that matter are short, and lie at the beginning or follow an interrupt.
        waits_s = [lasts_s * moments.random() ** 3 / (1 + number) for number in range(INTERRUPTS)]
        if name == "begin" and moments.random() < 0.5:  # or few would come any further
            waits_s = []
        steps.append(
            f"{name} {'interrupted' if interrupted(getattr(life, name), waits_s) else 'done'}"
        )
    if life.handle is not None:
        life.handle.close()
    life.handle = None
    gc.collect()
    return steps


def left(etcd: Etcd, instance: str) -> list[str]:
    """Keys and keeper processes of the instance that stay."""
    deadline = time.monotonic() + GONE_S
    while True:
        there = [item.key for item in etcd.snapshot("/").items if f"/{instance}/" in item.key]
        there += keepers(instance)
        if not there or time.monotonic() > deadline:
            return there
        time.sleep(0.01)


def keepers(instance: str) -> list[str]:
    mark = f"\0engine-registry-keeper\0/engines/{instance}/".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "cmdline").read_bytes():
                found.append(f"keeper {process.name}")
    return found


def main(kind: str, first: str, seeds: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    endpoint, namespace = os.environ["ENGINES_ETCD"], os.environ["TEST_NAMESPACE"]
    with Registry.connect(endpoint, namespace=namespace) as registry:
        a_life(kind, registry, "warm-up")
        etcd = Etcd(EtcdConfig(parse_endpoints(endpoint), namespace))
        for seed in range(int(first), int(first) + int(seeds)):
            instance = f"seed{seed}-{os.getpid()}"  # keepers are found in the whole machine
            steps = live_through(a_life(kind, registry, instance), random.Random(seed))
            print(f"{seed} {', '.join(steps)}: {left(etcd, instance)}", flush=True)
        etcd.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
