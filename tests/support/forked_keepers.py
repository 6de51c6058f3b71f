"""Keepers as forks of one process, which has imported what a keeper needs.

Python takes a sixth of a second of a CPU for these imports, and the tests register thousands of
ranks. A forked keeper runs the same code, and is killed, stopped and waited for like one that the
product starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from engine_registry.registration.keeper import process
from tests.support.forkserver import Forked, Forker


class ForkedKeepers:
    """`launch` stands in for `engine_registry.registration.keeper.process.launch`."""

    def __init__(self, server: Forker) -> None:
        self._server = server

    def install(self) -> None:
        """For all ranks of this process."""
        process.launch = self.launch

    def launch(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        stderr: IO[bytes],
        passed: Collection[int],
    ) -> Forked[bytes]:
        isolated, *args = args
        assert isolated == "-I"
        stdin, stdout, reports = self._server.fork(
            args, Path.cwd(), env, stderr.fileno(), passed, True
        )
        return Forked(
            [sys.executable, *args],
            os.fdopen(stdin, "wb", buffering=0),
            os.fdopen(stdout, "rb", buffering=0),
            reports,
        )
