"""Mooncake's own engine as the loader calls it. The only place that imports mooncake.

Whatever the library raises becomes an error of ours here: C++'s exceptions, such as those about a
peer that answers nonsense, and arguments that do not fit, come out of pybind11 as Python's own.
"""

from __future__ import annotations

import re
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine_loader.errors import EngineFailed, EngineUnavailable, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry.schema.manifest import Region

_RAISED = (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, MemoryError)
_NO_BATCH = (0, 2**64 - 1)  # what releases of Mooncake return where they refuse
_PENDING, _DONE, _TIMED_OUT = 0, 1, -2
# A class's name, as C++ keeps it for exceptions and casts.
_TRANSPORT = re.compile(rb"N8mooncake\d+([A-Z][A-Za-z]*)TransportE")
_NO_WAYS = {"Multi"}  # it chooses among the others


class Binding:
    """One engine of the library. Not used any more once it has ended."""

    def __init__(self, library: Any, host: str, protocol: str, device: str) -> None:
        """EngineUnavailable with nothing but the library's own words where it does not start."""
        try:
            self._engine: Any = library.TransferEngine()
            code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device)
            self.port = int(self._engine.get_rpc_port()) if code == 0 else 0
        except _RAISED as exc:
            self.end()
            raise EngineUnavailable(_said(exc)) from exc
        if code != 0:
            self.end()
            raise EngineUnavailable(f"code {code}")

    def end(self) -> None:
        """Destroys the engine and all its reads, unless another thread is in a call to it."""
        self._engine = _Ended()

    def meet(self, session_id: str) -> bool:
        """Makes the first contact with a peer; False where nobody answers.

        Lasts as long as the peer takes, minutes where it sends a byte now and then; meanwhile no
        other call about a peer comes back. An empty batch opens the peer's segment and no more.
        """
        try:
            return self._engine.batch_transfer_async_read(session_id, [], [], []) not in _NO_BATCH
        except _RAISED as exc:
            raise ReadFailed(
                f"cannot read from {session_id}: what answers there is no transfer engine "
                f"({_said(exc)})",
                session_id=session_id,
            ) from exc

    def first_address(self, session_id: str) -> int | None:
        """Of what a peer that was met had registered by then; None where that was nothing."""
        try:
            return int(self._engine.get_first_buffer_address(session_id)) or None
        except _RAISED:
            return None

    def begin(self, session_id: str, op: ReadOp) -> int | None:
        """A batch of one read; None where it is refused."""
        try:
            batch = int(
                self._engine.batch_transfer_async_read(
                    session_id, [op.dst_addr], [op.src_addr], [op.nbytes]
                )
            )
        except _RAISED as exc:
            raise _failed(session_id, exc) from exc
        return batch if batch not in _NO_BATCH else None

    def arrived(self, session_id: str, batch: int) -> bool | None:
        """Whether it has brought its bytes; None: not yet, and what has timed out may still write.

        Any other answer is the last: asking again ends the process.
        """
        try:
            status = self._engine.transfer_check_status(batch)
        except _RAISED as exc:
            raise _failed(session_id, exc) from exc
        return None if status in (_PENDING, _TIMED_OUT) else bool(status == _DONE)

    def register(self, region: Region) -> None:
        try:
            code = self._engine.register_memory(region.addr, region.nbytes)
        except _RAISED as exc:
            raise _refused(region, _said(exc)) from exc
        if code != 0:
            raise _refused(region, f"code {code}")

    def unregister(self, region: Region) -> None:
        try:
            self._engine.unregister_memory(region.addr)
        except _RAISED as exc:
            raise EngineFailed(
                f"the transfer engine cannot unregister {region.nbytes} bytes at "
                f"{region.addr:#x} ({_said(exc)})",
                "close it",
            ) from exc


class _Ended:
    """In the place of an engine."""

    def __getattr__(self, name: str) -> Any:
        raise EngineFailed("the transfer engine is closed")


def built_transports() -> tuple[str, ...]:
    """Ways of reading that the installed Mooncake was built with, as its classes are called.

    EngineUnavailable if there is none. It is not imported, as it reads its settings when it is.
    """
    parent = find_spec("mooncake")
    places = parent.submodule_search_locations if parent is not None else None
    engine = PathFinder.find_spec("mooncake.engine", places) if places else None
    if engine is None or engine.origin is None:
        raise EngineUnavailable(*_what_to_install("No module named 'mooncake.engine'"))
    names = {name.decode() for name in _TRANSPORT.findall(Path(engine.origin).read_bytes())}
    return tuple(sorted(names - _NO_WAYS))


def _failed(session_id: str, exc: Exception) -> ReadFailed:
    return ReadFailed(
        f"cannot read from {session_id}: the transfer engine says {_said(exc)}",
        session_id=session_id,
    )


def _refused(region: Region, why: str) -> EngineFailed:
    return EngineFailed(
        f"the transfer engine cannot register {region.nbytes} bytes at {region.addr:#x} ({why})",
        "check the limit on locked memory (ulimit -l)",
    )


def _said(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__


def import_library() -> Any:
    try:
        import mooncake.engine
    except (ImportError, OSError) as exc:
        raise EngineUnavailable(*_what_to_install(str(exc))) from exc
    return mooncake.engine


def _what_to_install(complaint: str) -> tuple[str, str]:
    """What is missing, and what to do."""
    if "libibverbs" in complaint:
        what = "the transfer engine needs the system's libibverbs.so.1"
        return what, "apt-get install libibverbs1 (rdma-core on other systems)"
    if "libcudart" in complaint or "libcuda" in complaint:
        what = f"this transfer engine is built for CUDA, which is not here ({complaint})"
        return what, "pip install 'engine-registry[cpu]' instead"
    if "No module named" in complaint:
        what = "the transfer engine is not installed"
        return what, "pip install 'engine-registry[cpu]' (or [cuda12], [cuda13] on GPU machines)"
    remedy = "raise ulimit -n" if "Too many open files" in complaint else ""
    return f"the transfer engine cannot be imported: {complaint}", remedy
