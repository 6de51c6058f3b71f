"""`engines doctor` whose probe is a fork of it: `python -m tests.support.processes.doctor ARGS`.

The probe imports torch, which takes most of the time of a doctor that does so itself. A fork of the
tests' fork server has it. All else is the same: a process in a session by itself, with pipes.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NoReturn
from unittest import mock

from engine_cli.doctor import child, trial
from engine_cli.main import main


class ForkedProbe:
    """What `child.Probe` uses of Popen."""

    def __init__(self, command: Sequence[str], **_: object) -> None:
        their_in, stdin = os.pipe()
        stdout, their_out = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(stdin)
            os.close(stdout)
            _become_the_probe(their_in, their_out)
        os.close(their_in)
        os.close(their_out)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            ended = os.pidfd_open(self.pid)
            try:
                if not select.select([ended], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("probe", timeout or 0.0)
            finally:
                os.close(ended)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def _become_the_probe(stdin: int, stdout: int) -> NoReturn:
    os.setsid()
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number, descriptor in enumerate((stdin, stdout, nothing)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["-c"]
    trial.main()


if __name__ == "__main__":
    with_forks = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedProbe})
    with mock.patch.object(child, "subprocess", with_forks):
        main()
