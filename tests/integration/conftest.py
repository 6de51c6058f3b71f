"""A real etcd for the whole run, a fresh namespace for each test, and real processes that end with
their test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.hosts import Host
from engine_loader import Engine, InProcessEngine, MooncakeEngine, SocketEngine
from engine_registry import Event, Registry, Watch
from engine_registry.etcd import ports
from engine_registry.etcd.local import LocalEtcd, find_binary
from engine_registry.registration.keeper import process as keeper_process
from tests.support import servers
from tests.support.checkout import ROOT
from tests.support.faults import DEBIAN_ETCD
from tests.support.forked_keepers import ForkedKeepers
from tests.support.offers import Offers

_LAUNCH = keeper_process.launch
_COMM = 15  # characters of a name that the system keeps


@pytest.fixture(scope="session", autouse=True)
def _no_keeper_is_left() -> Iterator[None]:
    """A keeper whose rank ended while its etcd was away for good goes on trying for minutes.

    Those that tests left are recognised by a mark in their environment, which processes inherit.
    """
    mark = os.environ["TEST_RUN"] = uuid.uuid4().hex
    yield
    del os.environ["TEST_RUN"]
    for pid in _with_mark("TEST_RUN", mark):
        with contextlib.suppress(OSError):
            if b"engine-registry-keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def _keepers_are_forked(_no_keeper_is_left: None) -> Iterator[None]:
    """Those of the ranks that tests register in their own process. `Processes` has those of
    programs forked.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper_process, "launch", ForkedKeepers(servers.keepers()).launch)
        yield


@pytest.fixture
def product_keepers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers start as they do for users, also those of programs."""
    monkeypatch.setattr(keeper_process, "launch", _LAUNCH)


def _with_mark(variable: str, mark: str) -> list[int]:
    """The processes that were started with it in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (
                f"{variable}={mark}".encode() in (process / "environ").read_bytes()
                # what the fork server has started
                or (process / "comm").read_text().strip() == mark[:_COMM]
            ):
                found.append(int(process.name))
    return found


@pytest.fixture(scope="session", autouse=True)
def _ports_of_this_worker() -> Iterator[None]:
    """A server of another worker cannot take a port between its choice and its use."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ours = ports._ports()[worker::workers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "_ports", lambda: ours)
        yield


@pytest.fixture
def dead_address() -> Iterator[str]:
    """HOST:PORT that refuses connections: it is bound and does not listen, so no server can take
    it, as it could take a port that is merely free.
    """
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[LocalEtcd]:
    with LocalEtcd() as etcd:
        yield etcd


@pytest.fixture
def own_etcd() -> Iterator[LocalEtcd]:
    """For tests that break it."""
    with LocalEtcd() as etcd:
        yield etcd


@pytest.fixture
def namespace() -> str:
    return f"/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def registry(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Registry]:
    with Registry.connect(shared_etcd.endpoint, namespace=namespace, timeout_s=60) as registry:
        yield registry


@pytest.fixture(params=["embedded", pytest.param("debian", marks=pytest.mark.slow)])
def binary(request: pytest.FixtureRequest) -> str:
    """Of etcd, in each version that there is to test on."""
    if request.param == "embedded":
        return find_binary()
    if not DEBIAN_ETCD.exists():
        pytest.skip(f"no etcd at {DEBIAN_ETCD}: the set-up could not unpack Debian's etcd-server")
    return str(DEBIAN_ETCD)


@pytest.fixture(params=["in process", "mooncake", "sockets"])
def new_engine(request: pytest.FixtureRequest) -> Iterator[Callable[[], Engine]]:
    """Makes engines that are closed in the end."""
    with ExitStack() as stack:

        def make() -> Engine:
            if request.param == "in process":
                return stack.enter_context(InProcessEngine())
            if request.param == "sockets":
                return stack.enter_context(SocketEngine("127.0.0.1"))
            return stack.enter_context(MooncakeEngine("127.0.0.1", protocol="tcp"))

        yield make


def _only_ours(env: Mapping[str, str]) -> bool:
    """Nothing that Python or a library reads when it is imported differs from this process.

    The transfer engine reads MC_*, but the server does not import it. Coverage is such a thing: it
    measures programs that start on their own.
    """
    differ = {name for name in {*env, *os.environ} if env.get(name) != os.environ.get(name)}
    return "COVERAGE_PROCESS_CONFIG" not in env and all(
        name.startswith(("ENGINES_", "MC_", "PYTEST_", "TEST_")) for name in differ
    )


class Processes:
    """Starts programs of ours; whatever still runs at the end of the test is killed, with what
    they have started.
    """

    def __init__(self, env: dict[str, str], host: Host | None = None) -> None:
        self._env = {"TEST_PROCESSES": uuid.uuid4().hex, **env}
        if keeper_process.launch is not _LAUNCH:
            self._env["TEST_FORKED_KEEPERS"] = "1"
        self._host = host
        self._started: list[subprocess.Popen[str]] = []

    def on(self, host: Host) -> Processes:
        """The same, for programs that run there."""
        there = Processes(self._env, host)
        there._started = self._started
        return there

    def start(self, *args: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        """`python ARGS`; a fork of this run's server, if that makes no difference to it."""
        whole_env = {**self._env, **env}
        if self._host is not None or args[0] != "-m" or not _only_ours(whole_env):
            return self.start_anew(*args, cwd=cwd, **env)
        process = servers.programs().start(args, cwd, whole_env)
        self._started.append(process)
        return process

    def start_anew(self, *args: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        """`python ARGS`, which imports all by itself."""
        command = [sys.executable, *args]
        process = subprocess.Popen(
            command if self._host is None else self._host.command(*command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**self._env, **env},
        )
        self._started.append(process)
        return process

    def engines(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return self.start("-m", "engine_cli", *args, cwd=ROOT, **env)

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`engines ARGS` to its end."""
        process = self.engines(*args, **env)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def rank(self, instance: str, rank: int, world_size: int, *args: str) -> subprocess.Popen[str]:
        """A process that registers and then does what `args` say (see `processes.rank`); returns
        when it is registered.
        """
        process = self.start(
            "-m", "tests.support.processes.rank", instance, str(rank), str(world_size), *args
        )
        assert line_of(process).startswith("registered")
        return process

    def end(self) -> None:
        for process in self._started:
            process.kill()
        # A mark names their children: they hold the same pipes, whose end is waited for here.
        for pid in _with_mark("TEST_PROCESSES", self._env["TEST_PROCESSES"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.communicate(timeout=100)


def children_of(pid: int) -> list[int]:
    """The processes that any of its threads has started."""
    children: list[int] = []
    for each in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            children += map(int, each.read_text().split())
    return children


def keepers_of(pid: int) -> list[int]:
    """Of the ranks of that process."""
    return [
        child
        for child in children_of(pid)
        if b"engine-registry-keeper" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(
            f"the process ended with {process.wait()}: {process.stderr and process.stderr.read()}"
        )
    return line


@pytest.fixture
def processes(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Processes]:
    started = Processes(
        {**os.environ, "ENGINES_ETCD": shared_etcd.endpoint, "TEST_NAMESPACE": namespace}
    )
    yield started
    started.end()


def events_until(
    watch: Watch, last: Callable[[Event], bool], timeout_s: float = 60.0
) -> list[Event]:
    """The events up to the one for which `last` holds."""
    seen: list[Event] = []
    limit = threading.Timer(timeout_s, watch.stop)
    limit.start()
    try:
        for event in watch:
            seen.append(event)
            if last(event):
                return seen
    finally:
        limit.cancel()
    raise AssertionError(f"not seen within {timeout_s} s; seen: {seen}")


@pytest.fixture
def offers(registry: Registry, new_engine: Callable[[], Engine], stack: ExitStack) -> Offers:
    return Offers(registry, new_engine, stack)


@pytest.fixture
def here(registry: Registry, stack: ExitStack) -> Offers:
    """With engines of this process."""
    return Offers(registry, lambda: stack.enter_context(InProcessEngine()), stack)
