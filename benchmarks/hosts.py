"""Several hosts on one machine: network namespaces behind links of limited speed, for `python -m
benchmarks.fanout`, `benchmarks.peers`, `benchmarks.updates` and tests.

A host is a shell that holds a namespace, of the network and of the host's name. Nothing has a name
or an address outside of these namespaces, so the kernel takes it all away when their last process
ends; and the shell ends the processes of its host, itself last, when its standard input closes,
however we end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks import delays
from benchmarks.processes import another_process, ready
from engine_registry.etcd.local import LocalEtcd

# What is killed may have started another meanwhile, so it looks until it finds nobody.
_HOLD = """
echo "$1" >/proc/sys/kernel/hostname
ip link set lo up && echo ready
read -r _
found=yes
while [ $found ]; do
    found=
    for process in /proc/[0-9]*; do
        if [ $process/ns/net -ef /proc/$$/ns/net ] && [ $process != /proc/$$ ]; then
            kill -9 ${process#/proc/} && found=yes
        fi
    done
done 2>/dev/null
"""
_PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
_QUEUE_MS = 20  # of data in front of a link, beyond which it drops
_BURST_NBYTES = 128 << 10  # a packet as the kernel passes it on has up to 64 KiB
_SUBNET = "10.83.0"
_MOST = 200
_BITS = 24
_LINK = "eth0"
_BRIDGE = "bridge"


class HostsUnavailable(Exception):
    """Why this machine cannot have hosts within it, and what to do."""


class Host:
    """One host of a `Network`: a name, an address, a link, and the processes that are started in
    it.
    """

    def __init__(self, name: str, address: str, switch: _Namespace, port: str) -> None:
        self.name = name
        self.address = address
        self._namespace = _Namespace(name)
        self._switch = switch
        self._port = port
        self._cable = ExitStack()

    def command(self, *argv: str) -> list[str]:
        """What runs `argv` in here: one process, whose id is that of `argv` itself."""
        return self._namespace.command(*argv)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """`options` are Popen's.

        Out of reach of the terminal's Ctrl-C: the process that made the host ends what is in it.
        """
        return subprocess.Popen(self.command(*argv), text=True, start_new_session=True, **options)

    def run(self, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        """What it prints; it has to succeed."""
        return _run(self.command(*argv), timeout_s=timeout_s)

    def limit(self, mbit: float) -> None:
        """Of what it sends, and of what it receives, in Mbit/s."""
        rate = f"{int(mbit * 1e6)}bit burst {_BURST_NBYTES} latency {_QUEUE_MS}ms"
        for namespace, device in ((self._namespace, _LINK), (self._switch, self._port)):
            namespace.tc(f"qdisc replace dev {device} root tbf rate {rate}")

    def cut(self) -> None:
        """What it sends and what is sent to it is lost from now on, without an error: a cable
        pulled behind the next switch.
        """
        self._switch.ip(f"link set {self._port} nomaster")

    def mend(self) -> None:
        self._switch.ip(f"link set {self._port} master {_BRIDGE}")

    def vanish(self) -> None:
        """As if its power were cut: no link any more, and none of its processes."""
        self.cut()
        self._namespace.kill_all()

    @property
    def sent_nbytes(self) -> int:
        """By its link, headers of all layers included, since it was made."""
        return self._namespace.counters(_LINK)[8]

    def _connect(self, delay_ms: float) -> None:
        if delay_ms:
            ends = (str(self._namespace.pid), _LINK, str(self._switch.pid), self._port)
            carrying = (*ends, str(delay_ms / 2e3))
            self._cable.enter_context(
                another_process(delays.__name__, "carry", *carrying, within=self._switch.command)
            )
        else:
            self._switch.ip(
                f"link add name {self._port} type veth peer name {_LINK} netns "
                f"{self._namespace.pid}"
            )
        self._switch.ip(f"link set {self._port} master {_BRIDGE} up")
        self._namespace.ip(f"address add {self.address}/{_BITS} dev {_LINK}\nlink set {_LINK} up")

    def _close(self) -> None:
        self._cable.close()
        self._namespace.close()


class Network:
    """A switch, and the hosts that are connected to it; all of it goes at the end of the block,
    with every process in it.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._hosts = 0

    def __enter__(self) -> Network:
        """HostsUnavailable where that is not possible here."""
        why = missing()
        if why is not None:
            raise HostsUnavailable(why)
        with ExitStack() as undo:
            self._switch = _Namespace("switch")
            undo.callback(self._switch.close)
            self._switch.ip(f"link add name {_BRIDGE} type bridge\nlink set {_BRIDGE} up")
            self._undo = undo.pop_all()
        return self

    def host(self, name: str, mbit: float | None = None, delay_ms: float = 0.0) -> Host:
        """One more, with a link of that speed in either direction, or one without limit. `delay_ms`
        is what it adds to the way there and back; a process that takes CPU carries it then.
        """
        if self._hosts == _MOST:
            raise ValueError(f"a network has {_MOST} hosts at most")
        self._hosts += 1
        host = Host(name, f"{_SUBNET}.{self._hosts}", self._switch, f"port{self._hosts}")
        self._undo.callback(host._close)
        host._connect(delay_ms)
        if mbit is not None:
            host.limit(mbit)
        return host

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._undo.close()


@contextmanager
def etcd_on(host: Host) -> Iterator[str]:
    """An etcd that runs there: its endpoint."""
    with another_process(__name__, "serve_etcd", host.address, within=host.command) as (
        _,
        endpoint,
    ):
        yield endpoint


def serve_etcd(address: str) -> None:
    with LocalEtcd(host=address) as etcd:
        ready(etcd.endpoint)


def missing() -> str | None:
    """What is not there that a network takes; None where nothing is.

    Tries it, in a namespace that is gone at once.
    """
    absent = [
        f"{program} ({package})"
        for program, package in _PROGRAMS.items()
        if shutil.which(program) is None
    ]
    if absent:
        return f"hosts on one machine need the program {', '.join(absent)}: install it"
    if os.geteuid() != 0:
        return (
            "hosts on one machine are network namespaces, which only root may make: run it as root"
        )
    attempt = (
        "ip link add name switch0 type bridge && ip link add name port0 type veth peer name "
        "port1 && "
        f"tc qdisc add dev port0 root tbf rate 1mbit burst {_BURST_NBYTES} latency 1ms"
    )
    done = subprocess.run(
        ["unshare", "--net", "--uts", "sh", "-c", attempt],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        return (
            f"network namespaces, veth, bridge and tbf are not all to be had here ({said}): use "
            "another machine, or its host"
        )
    return None


class _Namespace:
    """Of the network and of the host's name; there for as long as a process is in it."""

    def __init__(self, name: str) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "sh", "-c", _HOLD, "host", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.pid = self._holder.pid
        try:
            if _stream(self._holder.stdout).readline() != "ready\n":
                raise HostsUnavailable(
                    f"no namespace for the host {name}: look whether `unshare --net --uts "
                    "true` works"
                )
        except BaseException:
            self.close()
            raise

    def command(self, *argv: str) -> list[str]:
        return [
            "nsenter",
            f"--net=/proc/{self.pid}/ns/net",
            f"--uts=/proc/{self.pid}/ns/uts",
            *argv,
        ]

    def ip(self, lines: str) -> None:
        _run(self.command("ip", "-batch", "-"), lines)

    def tc(self, lines: str) -> None:
        _run(self.command("tc", "-batch", "-"), lines)

    def counters(self, device: str) -> list[int]:
        """As /proc/net/dev has them: eight of what came, bytes first, then eight of what went."""
        lines = (
            line.partition(":")
            for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        )
        return next(
            [int(number) for number in numbers.split()]
            for name, _, numbers in lines
            if name.strip() == device
        )

    def kill_all(self) -> None:
        """But for the one that holds it. HostsUnavailable if that has ended: its id may by now be
        that of any process of this machine.
        """
        here = os.stat(f"/proc/{self.pid}/ns/net").st_ino
        if self._holder.poll() is not None or here == os.stat("/proc/self/ns/net").st_ino:
            raise HostsUnavailable("the namespace of a host has ended before its processes")
        found = True
        while found:
            found = False
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if (process / "ns/net").stat().st_ino == here and process.name != str(self.pid):
                        os.kill(int(process.name), signal.SIGKILL)
                        found = True

    def close(self) -> None:
        _stream(self._holder.stdin).close()
        self._holder.wait()
        _stream(self._holder.stdout).close()


def _run(command: list[str], stdin: str = "", timeout_s: float = 10.0) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise HostsUnavailable(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _stream(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise HostsUnavailable("the shell of a host was started without pipes")
    return pipe
