"""The programs of the tests on the hosts: sources and loads over RDMA."""

from __future__ import annotations

import json
from typing import Any

from tests.rdma.guest import PATIENCE_S, Guest, Program

LOAD_S = 600.0  # a load of a few MiB under emulation, with what it may wait for
TTL_S = "60"
NBYTES = 4 << 20
RDMA = {"TEST_PROTOCOL": "rdma"}


def source(
    guest: Guest,
    instance: str,
    nbytes: int = NBYTES,
    *,
    launch: int = 0,
    count: int = 16,
    kind: str = "source",
) -> Program:
    """When it serves."""
    more = [str(count)] if kind == "source" else []
    program = guest.start(
        f"tests.support.processes.{kind}",
        *(instance, str(nbytes), guest.address, TTL_S, str(launch), *more),
        env=RDMA,
    )
    program.wait_for("version 0")
    return program


class Load:
    """A program that loads, and what became of each of its loads."""

    def __init__(self, guest: Guest, instances: str, nbytes: int = NBYTES, *options: str) -> None:
        self.program = guest.start(
            "tests.rdma.programs.load",
            *(guest.address, instances, "--nbytes", str(nbytes), *options),
            env=RDMA,
        )
        self._seen = 0

    def wait_for_pause(self) -> None:
        self.program.wait_for("paused", LOAD_S)

    def go_on(self) -> None:
        self.program.say("")

    def outcome(self, timeout_s: float = LOAD_S) -> dict[str, Any]:
        """Of the next load that ends."""
        line = self.program.wait_for("{", timeout_s, after=self._seen)
        self._seen += 1
        found: dict[str, Any] = json.loads(line)
        return found


def finish(*programs: Program) -> None:
    """Ends their input; they must end by themselves and well."""
    for program in programs:
        program.end_input()
    for program in programs:
        out, err = program.finish(PATIENCE_S)
        assert program.returncode == 0, out + err
