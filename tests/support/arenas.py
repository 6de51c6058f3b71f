"""Ranks whose weights lie in arenas: see `processes.arena`."""

from __future__ import annotations

import ctypes
import os
import subprocess

import torch


class Rank:
    """The process, and its keeper's pid."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.keeper = int(self._says())

    def _says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def do(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self._says() == f"{command}\n"


def arenas_of(pid: int) -> int:
    """How many descriptors of arenas the process has."""
    return sum(
        "memfd:arena" in os.path.realpath(f"/proc/{pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{pid}/fd")
    )


def bytes_of(tensor: torch.Tensor) -> bytes:
    """In the order of its memory."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
