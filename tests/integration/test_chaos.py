"""Hundreds of small loads while sources are killed, stopped, updated and evicted and etcd is restarted: seeded, bounded in time.

Each load ends in the bytes of one version, or in an error of ours; none hangs, and nothing is left over.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from loader import LoaderError, MooncakeEngine, Pace, load
from registry import Registry, RegistryError
from registry.local import LocalEtcd
from registry.waiting import Wanted
from tests.integration.conftest import Processes, line_of
from tests.integration.source_process import MODEL, content, empty
from tests.waiting import wait_until

NBYTES = 2 << 20
SEED = int(os.environ.get("CHAOS_SEED", "1"))
LOADS = int(os.environ.get("CHAOS_LOADS", "300"))
SECONDS = 60.0
PACE = Pace(64 << 10, 4, stall_s=0.3, patience_s=1.0)


class Monkey:
    """Three sources to which something happens every now and then; what has died is started again."""

    def __init__(self, processes: Processes, etcd: LocalEtcd, registry: Registry, seed: int) -> None:
        self._processes = processes
        self._etcd = etcd
        self._registry = registry
        self._random = random.Random(seed)
        self._sources: dict[str, subprocess.Popen[str]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.done: Counter[str] = Counter()

    def __enter__(self) -> Monkey:
        for name in "abc":
            self._start(name)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        for process in self._sources.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def _start(self, name: str) -> None:
        """Its rank may be taken until the lease of the one before has expired: then it ends, and is started again next time."""
        self._sources[name] = self._processes.start("-m", "tests.integration.source_process", name, str(NBYTES))
        with suppress(AssertionError):
            line_of(self._sources[name])

    def _run(self) -> None:
        faults = [self._kill, self._stop, self._update, self._update, self._evict, self._restart_etcd]
        weights = [4, 4, 4, 4, 3, 1]
        while not self._over.wait(self._random.uniform(0.0, 0.4)):
            for name, process in self._sources.items():
                if process.poll() is not None:
                    self._start(name)
            fault = self._random.choices(faults, weights)[0]
            with suppress(RegistryError):
                fault(self._random.choice("abc"))
            self.done[fault.__name__] += 1

    def _kill(self, name: str) -> None:
        self._sources[name].kill()
        self._sources[name].wait()

    def _stop(self, name: str) -> None:
        self._sources[name].send_signal(signal.SIGSTOP)
        self._over.wait(self._random.uniform(0.0, 1.5))
        self._sources[name].send_signal(signal.SIGCONT)

    def _update(self, name: str) -> None:
        process = self._sources[name]
        if process.stdin is None or process.poll() is not None:
            return
        with suppress(OSError, AssertionError):
            process.stdin.write("\n")
            process.stdin.flush()
            line_of(process)

    def _evict(self, name: str) -> None:
        for record in self._registry.ranks(name):
            self._registry.evict(record)
        self._kill(name)

    def _restart_etcd(self, _: str) -> None:
        self._etcd.kill()
        self._etcd.start()


def held() -> Counter[str]:
    """This process's threads, and what its descriptors lead to, without the numbers that tell one from another."""
    names = [f"thread {thread.name}" for thread in threading.enumerate()]
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{name}"))
    return Counter(name.partition("[")[0] for name in names)


def left_over(before: Counter[str]) -> list[str]:
    return sorted((held() - before).elements())


@pytest.mark.timeout(300)
def test_every_load_ends_in_one_version_or_a_typed_error_and_leaves_nothing_behind(own_etcd: LocalEtcd, namespace: str) -> None:
    processes = Processes({**os.environ, "ENGINES_ETCD": own_etcd.endpoint, "TEST_NAMESPACE": namespace})
    outcomes: Counter[str] = Counter()
    choose = random.Random(SEED)
    some: list[Wanted] = [MODEL, ["a", "b"], ["c", "a", "b"], "a"]
    with MooncakeEngine("127.0.0.1"):
        pass  # what the library opens once a process, and keeps
    before = held()
    with (
        Registry.connect(own_etcd.endpoint, namespace=namespace, timeout_s=5) as registry,
        MooncakeEngine("127.0.0.1") as engine,
    ):
        with Monkey(processes, own_etcd, registry, SEED) as monkey:
            give_up = time.monotonic() + SECONDS
            while sum(outcomes.values()) < LOADS and time.monotonic() < give_up:
                wanted = choose.choice(some)
                tensors = empty(NBYTES)
                try:
                    with hang_guard(wanted):
                        report = load(registry, engine, wanted, rank=0, tensors=tensors, pace=PACE, timeout_s=1.0)
                except (LoaderError, RegistryError) as exc:
                    outcomes[type(exc).__name__] += 1
                else:
                    outcomes["loaded"] += 1
                    right = content(report.version, NBYTES)
                    assert all(torch.equal(tensors[name], right[name]) for name in right), report
        print(f"seed {SEED}: {dict(outcomes)} under {dict(monkey.done)}")
        assert outcomes["loaded"] > 0
        assert sum(monkey.done.values()) > 3
        assert not [*engine._served, *engine._lent]
        wait_until(lambda: not registry._etcd.snapshot("/pulls/").items, 40)  # those that could not be given back expire
    processes.end()
    with suppress(TimeoutError):
        wait_until(lambda: not left_over(before), 20)
    assert left_over(before) == []


@contextmanager
def hang_guard(wanted: Wanted) -> Iterator[None]:
    """Far longer than anything is waited for: an etcd that is away, a silent source, tries of a torn read."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 45, wanted
