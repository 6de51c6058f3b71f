"""A Docker daemon to test on: the one that runs here, or else one of our own that ends with the
tests.

Our own keeps its data in a temporary folder and runs in a network namespace: it leaves no bridge,
no firewall rule and no image behind. From there it reaches no image registry.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

# It ends if these tests are killed.
_IN_A_NAMESPACE = ["setpriv", "--pdeathsig", "TERM", "unshare", "--net", "sh", "-c"]
_DOCKERD = ['ip link set lo up && exec dockerd "$@"', "dockerd"]
INSTALL = "`make test-compose` installs it"


class DockerMissing(Exception):
    """Why these tests cannot run here."""


class Docker:
    """The command `docker`, pointed at one daemon."""

    def __init__(self, env: dict[str, str], *, own: bool) -> None:
        self.env = env
        self.own = own

    def __call__(self, *args: str, timeout_s: float = 120, stdin: int | None = None) -> str:
        """What `docker ARGS` prints; it has to succeed."""
        return run(["docker", *args], self.env, timeout_s, stdin)

    def can(self, *args: str, timeout_s: float = 120) -> bool:
        """Whether `docker ARGS` succeeds."""
        with contextlib.suppress(CommandFailed, subprocess.TimeoutExpired):
            self(*args, timeout_s=timeout_s)
            return True
        return False


class CommandFailed(AssertionError):
    pass


def run(
    command: list[str],
    env: dict[str, str],
    timeout_s: float,
    stdin: int | None = None,
    *,
    both: bool = False,
) -> str:
    """What it prints, to standard output or to `both`; it has to succeed."""
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        stdin=stdin or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{(done.stderr or '')[-4000:]}"
        raise CommandFailed(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


@contextlib.contextmanager
def a_docker(folder: Path) -> Iterator[Docker]:
    """The daemon that the environment leads to, or one of our own with its data in `folder`."""
    if shutil.which("docker") is None:
        raise DockerMissing(f"there is no docker: {INSTALL}")
    there = Docker(dict(os.environ), own=False)
    if there.can("info", timeout_s=20):
        yield there
        return
    if os.geteuid() != 0:
        raise DockerMissing("no docker daemon answers, and only root can start one")
    for program in ("dockerd", "unshare", "setpriv", "ip"):
        if shutil.which(program) is None:
            raise DockerMissing(
                f"no docker daemon answers, and there is no {program} to start one: {INSTALL}"
            )
    with _own_daemon(folder) as docker:
        yield docker


@contextlib.contextmanager
def _own_daemon(folder: Path) -> Iterator[Docker]:
    socket = f"unix://{folder}/docker.sock"
    docker = Docker({**os.environ, "DOCKER_HOST": socket}, own=True)
    places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
    options = [f"--{option}={folder / name}" for option, name in places.items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*_IN_A_NAMESPACE, *_DOCKERD, *options, f"--host={socket}"], stdout=log, stderr=log
        )
    try:
        wait_until(
            lambda: process.poll() is not None or docker.can("info", timeout_s=20), timeout_s=60
        )
        if process.returncode is not None:
            said = (folder / "log").read_text()[-2000:]
            raise DockerMissing(f"dockerd cannot run here: {said}")
        yield docker
    finally:
        process.terminate()
        process.wait(60)
