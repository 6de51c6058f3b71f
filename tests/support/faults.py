"""Faults with names: a way to etcd that can be cut unnoticed, an etcd without
space, a second version of it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType

from engine_registry.errors import EtcdFull, EtcdUnavailable
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd, find_binary
from engine_registry.etcd.ports import free_port
from engine_registry.schema.address import join
from engine_registry.schema.keyvalue import Put
from tests.support.waiting import wait_until

# Where the set-up unpacks Debian's etcd, so that there is a second version to test on (3.4.23 in
# Debian 12).
DEBIAN_ETCD = Path(sys.prefix) / "debian-etcd" / "usr" / "bin" / "etcd"

# For an etcd with users: each time that one connects, etcd would hash the password for 0.1 s.
QUICK_PASSWORDS = ("--bcrypt-cost", "4")


class Proxy:
    """A way to `target` that forwards, or as a black hole keeps its connections open and passes
    nothing on.

    `delay_s` is what each way takes, as over a long distance.
    """

    def __init__(self, target: str, at: str = "127.0.0.1") -> None:
        host, _, port = target.rpartition(":")
        self.delay_s = 0.0
        self._target = (host, int(port))
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(
            (at, 0), family=socket.AF_INET6 if ":" in at else socket.AF_INET
        )
        self.endpoint = join(at, self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        """What was sent into the black hole is lost, as over a network: its connections break when
        they are used again.
        """
        self.break_connections()
        self._open.set()

    def break_connections(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._open.wait()
        if self._closed:
            return
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        self._sockets.append(far)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                threading.Event().wait(self.delay_s)
                if self._closed or self._refuses(data):
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _refuses(self, data: bytes) -> bool:
        return False

    def close(self) -> None:
        self._closed = True
        self._open.set()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class _PeerProxy(Proxy):
    """The way to a member for the others of its cluster; `outcast` is the id of one that may not
    pass.
    """

    outcast = b""

    def _refuses(self, data: bytes) -> bool:
        return bool(self.outcast) and b"X-Server-From: " + self.outcast in data


class DivisibleCluster:
    """Three members, of which the first can be cut off from the others while clients still reach
    all of them.
    """

    def __init__(self, binary: str) -> None:
        ports = [free_port() for _ in range(3)]
        self._ways = [_PeerProxy(f"127.0.0.1:{port}") for port in ports]
        initial = ",".join(
            f"m{number}=http://{way.endpoint}" for number, way in enumerate(self._ways)
        )
        self.members = [
            LocalEtcd(
                binary=binary,
                name=f"m{number}",
                peer_port=int(way.endpoint.rpartition(":")[2]),
                initial_cluster=initial,
                # the last of two such options holds
                extra_args=[
                    "--listen-peer-urls",
                    f"http://127.0.0.1:{port}",
                ],
            )
            for number, (way, port) in enumerate(zip(self._ways, ports, strict=True))
        ]

    @property
    def endpoints(self) -> str:
        return ",".join(member.endpoint for member in self.members)

    def cut_off_the_first(self) -> None:
        """Returns when it knows that it has no leader."""
        listed = etcdctl(self.members[0].endpoint, "member", "list").splitlines()
        outcast = next(
            line.split(", ")[0] for line in listed if line.split(", ")[2] == "m0"
        ).encode()
        self._ways[0].cut()
        for way in self._ways[1:]:
            way.outcast = outcast
        for way in self._ways:
            way.break_connections()
        with closing(
            Etcd(EtcdConfig(parse_endpoints(self.members[0].endpoint), timeout_s=1.0))
        ) as etcd:
            while True:
                try:
                    etcd.get("/health")
                except EtcdUnavailable:
                    return

    def __enter__(self) -> DivisibleCluster:
        try:
            for member in self.members:
                member.launch()
            with closing(Etcd(EtcdConfig(parse_endpoints(self.endpoints), timeout_s=30.0))) as etcd:
                etcd.get("/health")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for member in self.members:
            member.__exit__(kind, exc, tb)
        for way in self._ways:
            way.close()


@contextmanager
def a_learner(of: LocalEtcd) -> Iterator[LocalEtcd]:
    """A second member of this one's cluster, which has no vote."""
    port = free_port()
    etcdctl(
        of.endpoint,
        "member",
        "add",
        "learner",
        "--learner",
        "--peer-urls",
        f"http://127.0.0.1:{port}",
    )
    learner = LocalEtcd(
        binary=of.binary,
        name="learner",
        peer_port=port,
        initial_cluster=f"{of.initial_cluster},learner=http://127.0.0.1:{port}",
        extra_args=["--initial-cluster-state", "existing"],
    )
    try:
        learner.launch()
        with closing(Etcd(EtcdConfig(parse_endpoints(learner.endpoint), timeout_s=20.0))) as etcd:
            wait_until(lambda: _answers(etcd))
        yield learner
    finally:
        learner.__exit__(None, None, None)


@contextmanager
def a_grpc_proxy(to: LocalEtcd) -> Iterator[str]:
    """etcd's own proxy, of the same version; yields its endpoint."""
    endpoint = f"127.0.0.1:{free_port()}"
    command = [
        to.binary,
        "grpc-proxy",
        "start",
        f"--endpoints={to.endpoint}",
        f"--listen-addr={endpoint}",
    ]
    proxy = subprocess.Popen(
        [*command, f"--advertise-client-url={endpoint}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with closing(Etcd(EtcdConfig(parse_endpoints(endpoint), timeout_s=20.0))) as etcd:
            wait_until(lambda: _answers(etcd))
        yield endpoint
    finally:
        proxy.kill()
        proxy.wait()


def _answers(etcd: Etcd) -> bool:
    try:
        return bool(etcd.status())
    except EtcdUnavailable:
        return False


def etcdctl(endpoint: str, *args: str) -> str:
    """Runs etcdctl of the embedded etcd's version."""
    program = Path(find_binary()).with_name("etcdctl")
    command: Sequence[str] = [str(program), "--endpoints", endpoint, *args]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={"ETCDCTL_API": "3"}
    ).stdout


def fill_until_no_space(etcd: Etcd) -> None:
    """Write until etcd says that it is full; an answer that comes late does not count as one.

    etcd may say so before its alarm stands, which refuses what is small, too.
    """
    for number in range(10_000):
        try:
            etcd.commit([], [Put(f"/fill/{number}", bytes(256 << 10), 0)])
        except EtcdFull:
            wait_until(lambda: bool(etcd.alarms()))
            return
        except EtcdUnavailable:
            pass  # the disk was slow to sync
    raise AssertionError("etcd took everything")
