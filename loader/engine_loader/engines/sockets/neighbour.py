"""A source on this host, whose memory is read without the network, and without its process.

By process_vm_readv(2). The kernel allows it to a process of the same user that may trace the other
one: see ptrace(2), "Ptrace access mode checking". Each read brings the head of the source's table
twice, before and after the bytes. If both are as they were when the table was read last, the source
offered the bytes all the time.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine_loader.engines.machine import this_host
from engine_loader.engines.sockets.memory import Pieces, pieces_of, read_process
from engine_loader.engines.sockets.offers import (
    ADDRESS,
    AS_IT_WAS,
    CHANGES,
    HEAD_WORDS,
    ID,
    ROWS,
    Held,
    Offered,
    Offers,
    Words,
)

MOST_PIECES = 1022  # of one read: the kernel takes 1,024, of which two are the heads
_TRIES = 100  # while the source takes regions away all the time
_MOST_ROWS = 1 << 24
_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)  # see prctl(2), PR_SET_PTRACER
_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")


class Place(NamedTuple):
    """Where on this host the table of a source is. `host` and `processes` say for whom its pid
    means the same process.
    """

    host: str  # the id of this boot
    processes: int  # the inode of the namespace of process ids
    pid: int
    head: int  # an address in that process
    id: bytes


def place_of(offers: Offers) -> Place:
    """Of a table of this process."""
    return Place(this_host(), _processes(), os.getpid(), offers.head.ctypes.data, offers.id)


def _processes() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def let_processes_of_this_user_read() -> None:
    """Where Yama allows only a parent to trace, this process allows it to all that may otherwise:
    those of the same user.
    """
    with suppress(OSError, ValueError):
        if int(_SCOPE.read_text()) == 1:
            ctypes.CDLL(None).prctl(_SET_PTRACER, _ANY, 0, 0, 0)


class _Seen(NamedTuple):
    as_it_was: bytes
    held: Held


class Neighbour:
    """Any number of threads may read at once."""

    def __init__(self, place: Place) -> None:
        """OSError where it cannot be read from here; that is so if it is on another host."""
        if (place.host, place.processes) != (this_host(), _processes()):
            raise OSError(errno.ESRCH, "it is on another host")
        self._place = place
        self._seen = self._look()

    def read(self, local: Pieces, remote: Pieces) -> Offered:
        """Fills the local pieces, each from the remote one that is as long; at most `MOST_PIECES`.

        Returns of each whether it is offered. The others are left as they are. OSError if the
        process has ended, or its engine is closed.
        """
        wanted = np.arange(len(remote))
        for _ in range(_TRIES):
            seen = self._seen
            offered = seen.held.holds(remote)
            if not offered.all():  # it may have been added meanwhile
                seen = self._seen = self._look()
                offered = seen.held.holds(remote)
            some = wanted[offered]
            if self._copy(seen, local[some], remote[some]):
                return offered
            self._seen = self._look()
        raise OSError(errno.EAGAIN, "its regions change all the time")

    def _copy(self, seen: _Seen, local: Pieces, remote: Pieces) -> bool:
        """Whether they were offered all the time."""
        heads = np.zeros((2, AS_IT_WAS.stop), np.uint64)
        head = self._head(AS_IT_WAS.stop)
        try:
            read_process(
                self._place.pid,
                np.concatenate([pieces_of(heads[0]), local, pieces_of(heads[1])]),
                np.concatenate([head, remote, head]),
            )
        except OSError as exc:
            if exc.errno != errno.EFAULT:
                raise
            if self._look().as_it_was == seen.as_it_was:
                raise OSError(errno.EFAULT, "memory that it offers is gone") from exc
            return False  # it has been taken back and freed
        return all(head.tobytes() == seen.as_it_was for head in heads)

    def _look(self) -> _Seen:
        """The table as it is now."""
        for _ in range(_TRIES):
            before = self._words()
            count = int(before[ROWS])
            if count > _MOST_ROWS:
                raise OSError(errno.EINVAL, "its table is damaged")
            if before[CHANGES] & np.uint64(1):
                continue
            rows = np.empty((count, 2), np.uint64)
            try:
                if count:
                    there = np.array([(int(before[ADDRESS]), rows.nbytes)], np.uint64)
                    read_process(self._place.pid, pieces_of(rows), there)
            except OSError as exc:
                if exc.errno != errno.EFAULT:
                    raise
                continue  # the rows have moved
            if self._words()[AS_IT_WAS].tobytes() == before[AS_IT_WAS].tobytes():
                return _Seen(before[AS_IT_WAS].tobytes(), Held.of(rows))
        raise OSError(errno.EAGAIN, "its regions change all the time")

    def _words(self) -> Words:
        words = np.zeros(HEAD_WORDS, np.uint64)
        read_process(self._place.pid, pieces_of(words), self._head(HEAD_WORDS))
        if words[ID].tobytes() != self._place.id:
            raise OSError(errno.ESRCH, "its engine is closed")
        return words

    def _head(self, words: int) -> Pieces:
        return np.array([(self._place.head, 8 * words)], np.uint64)
