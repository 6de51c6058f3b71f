"""A rank as a separate process: `python -m tests.support.processes.rank INSTANCE RANK WORLD_SIZE
[HOW IT ENDS]`.

Registers, prints `registered KEEPER_PID`, waits for a line on standard input, and ends in the way
that HOW IT ENDS says.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

from tests.support.keepers import pid_of_keeper
from tests.support.ranks import register
from tests.support.registry import connect


def main(instance: str, rank: str, world_size: str, end: str = "return") -> None:
    if end == "in a separate group":
        os.setsid()
        # who runs the tests in the background has it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    registry = connect()
    registration = register(registry, instance, int(rank), int(world_size))
    if (
        end == "with a forked child" and os.fork() == 0
    ):  # it inherits the pipe to the keeper, and outlives the rank
        os.closerange(0, 3)
        time.sleep(10)
        os._exit(0)
    print("registered", pid_of_keeper(registration), flush=True)
    sys.stdin.readline()
    if end == "exception":
        raise RuntimeError("the engine has a bug")
    if end == "os._exit":
        os._exit(3)
    if end == "out of memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
        bytes(1 << 30)
    if end == "withdraw":
        print("withdraws", pid_of_keeper(registration), flush=True)
        registration.withdraw()


if __name__ == "__main__":
    main(*sys.argv[1:])
