"""Pieces of memory as the kernel takes them: an address and a length each, many in one call.

A piece is a row of two 64-bit words, as `struct iovec` of POSIX has them. Nothing is copied into
Python objects, and the GIL is free during the calls.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
import numpy.typing as npt

Pieces = npt.NDArray[np.uint64]  # of shape (number of pieces, 2): addresses and lengths in bytes

_MOST = 1024  # pieces of one call: IOV_MAX of Linux
_WAIT_FOR_ALL, _NO_SIGNAL = 0x100, 0x4000  # MSG_WAITALL, MSG_NOSIGNAL
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Message(ctypes.Structure):
    """`struct msghdr`, see sendmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_nbytes", ctypes.c_uint32),
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_nbytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


for _name, _arguments in {
    "sendmsg": (ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
    "recvmsg": (ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
    "process_vm_readv": (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong),
        *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
    ),
}.items():
    getattr(_LIBC, _name).argtypes = _arguments
    getattr(_LIBC, _name).restype = ctypes.c_ssize_t


def pieces_of(*arrays: npt.NDArray[np.generic]) -> Pieces:
    """Of arrays that stay alive while they are used, each of which is one run of memory."""
    if not all(one.flags.c_contiguous for one in arrays):
        raise ValueError("an array is not one run of memory")
    return np.array([(one.ctypes.data, one.nbytes) for one in arrays], np.uint64).reshape(-1, 2)


def length_of(pieces: Pieces) -> int:
    """Bytes of all of them."""
    return int(pieces[:, 1].sum())


def send(descriptor: int, pieces: Pieces) -> None:
    """Sends all of them, as long as that takes. OSError."""
    _move(_LIBC.sendmsg, descriptor, pieces, _NO_SIGNAL)


def receive(descriptor: int, pieces: Pieces) -> None:
    """Fills all of them, as long as that takes. OSError; ConnectionResetError at the end."""
    _move(_LIBC.recvmsg, descriptor, pieces, _WAIT_FOR_ALL)


def _move(call: ctypes._NamedFuncPointer, descriptor: int, pieces: Pieces, flags: int) -> None:
    # a copy, in which the rest of a piece takes its place
    left = np.ascontiguousarray(pieces[pieces[:, 1] > 0])
    while len(left):
        some = left[:_MOST]
        message = _Message(pieces=some.ctypes.data, count=len(some))
        moved = call(descriptor, ctypes.addressof(message), flags)
        if moved > 0:
            left = _without(left, moved)
        elif moved == 0:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        elif (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _without(pieces: Pieces, moved: int) -> Pieces:
    """What is left of them without the first so many bytes."""
    ends = np.cumsum(pieces[:_MOST, 1])
    whole = int(np.searchsorted(ends, np.uint64(moved), side="right"))
    rest = pieces[whole:]
    if len(rest) and (part := moved - (int(ends[whole - 1]) if whole else 0)):
        rest[0] += np.array([part, -part]).astype(np.uint64)
    return rest


def read_process(pid: int, local: Pieces, remote: Pieces) -> None:
    """Copies memory of another process of this host: the remote pieces into the local ones, which
    are as long together, in their order.

    By process_vm_readv(2): the other process takes no part in it. OSError: the process has ended
    (ESRCH), the kernel does not let us read from it (EPERM), or some of that is no memory (EFAULT).
    """
    local, remote = np.ascontiguousarray(local), np.ascontiguousarray(remote)
    copied = _LIBC.process_vm_readv(
        pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0
    )
    if copied != length_of(remote):
        number = ctypes.get_errno() if copied < 0 else errno.EFAULT
        raise OSError(number, os.strerror(number))


def is_ours(addr: int, nbytes: int) -> bool:
    """Whether the first and the last of these bytes are memory that the processor can read here;
    memory of a GPU is not.
    """
    if not nbytes:
        return True
    ends = np.zeros(2, np.uint8)
    remote = np.array([(addr, 1), (addr + nbytes - 1, 1)], np.uint64)
    try:
        read_process(os.getpid(), pieces_of(ends), remote)
    except OSError as exc:
        return exc.errno != errno.EFAULT
    return True
