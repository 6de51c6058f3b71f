"""Two hosts with RDMA in software for the whole run, an etcd on this machine, and a namespace for
each test.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from tests.rdma.emulator import Emulator, saved_guest
from tests.rdma.guest import Guest, environment
from tests.rdma.switch import Switch

HOSTS = 2
Say = Callable[[str], None]


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Prints a line at once, though the output of tests is captured."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    captured = request.config.pluginmanager.get_plugin("capturemanager")
    assert terminal is not None
    assert captured is not None

    def say(line: str) -> None:
        with captured.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"rdma: {line}")

    return say


@pytest.fixture(scope="session")
def etcd() -> Iterator[LocalEtcd]:
    with LocalEtcd() as etcd:
        yield etcd


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path, as those of sockets may not be long."""
    return tmp_path_factory.mktemp("h")


@pytest.fixture(scope="session")
def switch(folder: Path) -> Iterator[Switch]:
    switch = Switch(folder, [str(number) for number in range(1, HOSTS + 1)])
    yield switch
    switch.close()


@pytest.fixture(scope="session")
def hosts(say: Say, folder: Path, switch: Switch) -> Iterator[list[Guest]]:
    state, accelerator = saved_guest(folder / "boot", free_port(), say)
    start = time.monotonic()
    with ExitStack() as stack:
        guests = []
        for number in range(1, HOSTS + 1):
            emulator = Emulator(
                folder / str(number),
                accelerator,
                free_port(),
                switch.wire(str(number)),
                state,
            )
            stack.callback(emulator.close)
            guests.append(Guest(emulator, number))
        with ThreadPoolExecutor() as pool:
            list(pool.map(Guest.prepare, guests))
        kernel = guests[0].shell("uname -sr").strip()
        say(f"{HOSTS} hosts with {kernel} ({accelerator}) in {time.monotonic() - start:.0f} s")
        yield guests


@pytest.fixture
def namespace() -> str:
    return f"/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def registry(etcd: LocalEtcd, namespace: str) -> Iterator[Registry]:
    with Registry.connect(etcd.endpoint, namespace=namespace, timeout_s=60) as registry:
        yield registry


@pytest.fixture
def guests(
    hosts: list[Guest], switch: Switch, etcd: LocalEtcd, namespace: str
) -> Iterator[list[Guest]]:
    """The hosts, without programs and with all cables."""
    for guest in hosts:
        guest.env = environment(etcd.endpoint, namespace)
    yield hosts
    for name in switch.names:
        switch.mend(name)
    for guest in hosts:
        guest.end_programs()
