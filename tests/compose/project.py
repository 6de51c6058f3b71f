"""docker-compose.yml as one project under a separate name, and the sentences in which the tests
speak of it.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tests.compose.daemon import Docker, run

# Where `make test-compose` unpacks a compose v2 where the machine's own is 1.29.
UNPACKED_V2 = (
    Path(sys.prefix)
    / "compose-v2"
    / "usr"
    / "libexec"
    / "docker"
    / "cli-plugins"
    / "docker-compose"
)
ETCD = ("etcd-0", "etcd-1", "etcd-2")
LEASE_S = 10.0
_BUILD_S = 900


def composes() -> dict[str, list[str]]:
    """The command for each kind of compose that is on this machine: v2, and 1.29."""
    found: dict[str, list[str]] = {}
    for command in (["docker", "compose"], ["docker-compose"], [str(UNPACKED_V2)]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            found.setdefault("v1" if done.stdout.startswith("1.") else "v2", command)
    return found


class Project:
    def __init__(self, docker: Docker, compose: list[str]) -> None:
        self.name = f"engines-test-{uuid.uuid4().hex[:8]}"
        self._docker = docker
        self._command = compose
        self._env = {**docker.env, "COMPOSE_PROJECT_NAME": self.name, "ENGINES_IMAGE": self.name}

    def compose(self, *args: str, timeout_s: float = 120) -> str:
        return run([*self._command, *args], self._env, timeout_s)

    def build(self) -> None:
        self.compose("build", timeout_s=_BUILD_S)

    def up(self) -> None:
        self.compose("up", "-d", timeout_s=300)

    def remove(self) -> None:
        """All that `build` and `up` made."""
        self.compose("down", "--volumes", "--remove-orphans", timeout_s=300)
        self._name_the_stages()
        for image in self._images():
            self._docker("image", "rm", image)

    def _name_the_stages(self) -> None:
        """Without BuildKit the stages of a build stay as images without a name.

        A build that is all cache names them.
        """
        if self._docker.own:
            return  # its images go with it
        for stage in ("wheel", "dependencies"):
            both = ["-f", "docker-compose.yml", "-f", "tests/compose/stages.yml"]
            run(
                [*self._command, *both, "build", "weights"],
                {**self._env, "ENGINES_STAGE": stage},
                _BUILD_S,
            )

    def _images(self) -> list[str]:
        return self._docker(
            "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", self.name
        ).split()

    def leftovers(self) -> list[str]:
        """What docker still has of this project."""
        ours = ("--filter", f"label=com.docker.compose.project={self.name}", "--quiet")
        kinds = (("ps", "--all", *ours), ("network", "ls", *ours), ("volume", "ls", *ours))
        return [
            *(found for kind in kinds for found in self._docker(*kind).split()),
            *self._images(),
        ]

    def container(self, service: str) -> str:
        return self.compose("ps", "-aq", service).strip()

    def stop(self, service: str) -> None:
        self.compose("stop", service)

    def kill(self, service: str) -> None:
        self.compose("kill", service)

    def start(self, service: str) -> None:
        self.compose("start", service)

    def again(self, service: str) -> None:
        """Run one that runs to its end once more."""
        self.compose("up", "-d", service)

    def cut_off(self, service: str) -> None:
        self._docker("network", "disconnect", self._network, self.container(service))

    def connect(self, service: str) -> None:
        self._docker(
            "network", "connect", "--alias", service, self._network, self.container(service)
        )

    @property
    def _network(self) -> str:
        return f"{self.name}_default"

    def is_connected(self, service: str) -> bool:
        return self._network in self._inspect(service)["NetworkSettings"]["Networks"]

    def address_of(self, service: str) -> str:
        return str(
            self._inspect(service)["NetworkSettings"]["Networks"][self._network]["IPAddress"]
        )

    def is_running(self, service: str) -> bool:
        return bool(self._inspect(service)["State"]["Running"])

    def exit_code_of(self, service: str) -> int:
        """Waits for its end."""
        return int(self._docker("wait", self.container(service)))

    def _inspect(self, service: str) -> dict[str, Any]:
        (found,) = json.loads(self._docker("container", "inspect", self.container(service)))
        assert isinstance(found, dict)
        return found

    def log_of(self, service: str) -> str:
        return run(["docker", "logs", self.container(service)], self._env, 60, both=True)

    def engines(self, *args: str) -> str:
        """`engines ARGS` in the watcher's container."""
        return self.compose("exec", "-T", "watcher", "engines", *args)

    def state(self) -> str:
        instances = json.loads(self.engines("list", "--json"))["instances"]
        return next((each["state"] for each in instances if each["instance"] == "testbed"), "gone")

    def ranks(self) -> dict[int, dict[str, Any]]:
        return {
            rank["rank"]: rank
            for rank in json.loads(self.engines("show", "testbed", "--json"))["ranks"]
        }

    def etcdctl(self, member: str, *args: str) -> str:
        return self.compose("exec", "-T", member, "/usr/local/bin/etcdctl", *args)

    def leader(self) -> str:
        """The service that is etcd's leader."""
        status = json.loads(
            self.etcdctl(ETCD[0], "endpoint", "status", "--cluster", "--write-out", "json")
        )
        (endpoint,) = (
            each["Endpoint"]
            for each in status
            if each["Status"]["leader"] == each["Status"]["header"]["member_id"]
        )
        found = re.search(r"etcd-\d", endpoint)
        assert found is not None, endpoint
        return found[0]

    def watching(self) -> Watcher:
        return Watcher(self._docker, self.container("watcher"))


class Said(NamedTuple):
    at: float  # seconds since 1970, by the daemon's clock, which is ours
    text: str


class Watcher:
    """What the container `watcher` says from now on."""

    def __init__(self, docker: Docker, container: str) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._seen: list[str] = []
        self._process = subprocess.Popen(
            [
                "docker",
                "logs",
                "--follow",
                "--timestamps",
                "--since",
                f"{time.time():.6f}",
                container,
            ],
            env=docker.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def says(self, text: str, within_s: float = 30.0) -> Said:
        """The next line that holds `text`; lines before it are passed over."""
        deadline = time.monotonic() + within_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left_s)
            except queue.Empty:
                break
            self._seen.append(line)
            if text in line:
                at, _, said = line.partition(" ")
                return Said(_seconds(at), said.rstrip())
        raise AssertionError(
            f"the watcher did not say {text!r} within {within_s} s, but:\n{''.join(self._seen)}"
        )


def _seconds(stamp: str) -> float:
    """Docker's stamps have nanoseconds, Python's have none."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
