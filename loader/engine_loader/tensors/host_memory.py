"""Memory of the host that other processes can map by a descriptor: a memfd. Starts no thread."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import weakref
from contextlib import suppress

import torch

from engine_loader.errors import EngineFailed
from engine_registry.schema.manifest import Region
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_HUGE_NBYTES = 2 << 20  # of a page
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a reader needs all of it


class HostMemory(mmap.mmap):
    """Its tensors keep it, and it is freed with the last reference to it.

    It takes two descriptors. Pages are taken as they are written to, but for huge ones.
    """

    region: Region
    _fd: int

    @classmethod
    def of(cls, nbytes: int) -> HostMemory:
        """So many bytes or some more, of huge pages where the host has so many to spare;
        EngineFailed where it has none.
        """
        try:
            if nbytes >= _HUGE_NBYTES:
                with suppress(OSError):
                    return cls._mapped(-(-nbytes // _HUGE_NBYTES) * _HUGE_NBYTES, os.MFD_HUGETLB)
                log.debug(
                    "an arena of %d bytes has no huge pages: the host has not so many to spare",
                    nbytes,
                    extra=fields("no_huge_pages", nbytes=nbytes),
                )
            return cls._mapped(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, 0)
        except (OSError, ValueError, OverflowError) as exc:
            raise EngineFailed(f"no {nbytes} bytes can be had of the host: {exc}") from exc

    @classmethod
    def _mapped(cls, nbytes: int, flags: int) -> HostMemory:
        fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        try:
            os.ftruncate(fd, nbytes)
            memory = cls(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return memory._with(fd)

    @classmethod
    def adopted(cls, fd: int, nbytes: int) -> HostMemory:
        """That of another process, which has ended: exactly so many bytes. From now on it is like
        one that was made here. The descriptor need not be kept. EngineFailed where it is something
        else.
        """
        _check_sealed(fd, nbytes)
        try:
            fd = os.dup(fd)
            try:
                memory = cls(fd, nbytes)
            except BaseException:
                os.close(fd)
                raise
        except (OSError, ValueError, OverflowError) as exc:
            raise EngineFailed(f"memory of the host cannot be mapped: {exc}") from exc
        return memory._with(fd)

    def _with(self, fd: int) -> HostMemory:
        """It has the descriptor from now on."""
        weakref.finalize(self, os.close, fd).atexit = False
        self._fd = fd
        self.region = Region(ctypes.addressof(ctypes.c_char.from_buffer(self)), len(self))
        _ALL[self.region.addr] = self
        return self

    def have(self, nbytes: int) -> None:
        """The first so many bytes can be used from now on."""

    def descriptor(self) -> int:
        """A new one, which the caller closes; OSError."""
        return os.dup(self._fd)

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes."""
        return torch.frombuffer(self, dtype=torch.uint8, count=nbytes, offset=start)


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_ALL: weakref.WeakValueDictionary[int, HostMemory] = weakref.WeakValueDictionary()  # by address


def map_sealed(fd: int, nbytes: int) -> mmap.mmap:
    """Such memory of another process, mapped here. It does not need the descriptor.

    EngineFailed unless it has exactly so many bytes, and its process can take none of them away: a
    process that reads memory which is gone is killed.
    """
    _check_sealed(fd, nbytes)
    try:
        return mmap.mmap(fd, nbytes)
    except (OSError, ValueError, OverflowError) as exc:
        raise EngineFailed(f"memory of the host cannot be mapped: {exc}") from exc


def _check_sealed(fd: int, nbytes: int) -> None:
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise EngineFailed("memory of the host is offered that can be cut short")
        if (found := os.fstat(fd).st_size) != nbytes:
            raise EngineFailed(f"{nbytes} bytes of the host are offered, in memory of {found}")
    except OSError as exc:
        raise EngineFailed(f"memory of the host cannot be mapped: {exc}") from exc


class ReadOnlyMemory:
    """Memory of another process that still uses it, mapped here for reading alone. Its tensors keep
    it. To write to one of them ends this process by SIGSEGV.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """As `map_sealed`."""
        self._mapped = map_sealed(fd, nbytes)
        self.region = Region(ctypes.addressof(ctypes.c_char.from_buffer(self._mapped)), nbytes)
        # torch warns of a buffer that says that it is read-only, so only the kernel knows
        if _LIBC.mprotect(self.region.addr, nbytes, mmap.PROT_READ):
            raise EngineFailed(f"memory cannot be protected: {os.strerror(ctypes.get_errno())}")

    def tensor(self, start: int, nbytes: int) -> torch.Tensor:
        """Some of its bytes."""
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=nbytes, offset=start)


def memory_at(addr: int) -> HostMemory | None:
    """The one that has the address."""
    for memory in list(_ALL.values()):
        if memory.region.addr <= addr < memory.region.end:
            return memory
    return None
