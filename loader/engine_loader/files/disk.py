"""Fills tensors from safetensors files: several reads at once, straight into their memory, and no
byte that is not wanted.

Used by `starting.start` and `files.weights`. Starts threads, which end with `read_into` and
`DiskRead.run`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from engine_loader.errors import Cancelled, WeightsFileInvalid
from engine_loader.files.folder import Paths, files_of
from engine_loader.files.stored import Files
from engine_loader.planning.boxes import Lines
from engine_loader.planning.reads import Costs, Span
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.regions import describe, devices_of
from engine_loader.tensors.shards import Shard, local_parts
from engine_loader.tensors.writable import check_writable
from engine_loader.transfer.progress import OnProgress, Progress
from engine_loader.transfer.staging import Staging
from engine_registry import Manifest
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)

# they wait for the disk, not for a core: an array of disks, or a server far away, wants to be asked
# much at once
_THREADS = 16
_CHUNK_NBYTES = 8 << 20
# systems read ahead by as much anyway
_COSTS = Costs(read_nbytes=128 << 10, copied=0.3, staged_nbytes=_CHUNK_NBYTES)
_LOOK_S = 0.1  # how soon a cancelled read notices


@dataclass(frozen=True)
class DiskReport:
    files: int
    tensors: int
    nbytes: int  # of the tensors
    read_nbytes: int
    seconds: float


def read_into(
    paths: Paths,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int | None = None,
    shards: Mapping[str, Shard] | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> DiskReport:
    """Fills the tensors from the files, each with all of it or, where `shards` (or a DTensor) says
    so, with its part.

    `paths` and `rank` mean the files that `files.folder.files_of` finds. Raises WeightsFileInvalid
    and WeightsMismatch (every difference in one) before a byte is read; WeightsFileInvalid and
    Cancelled when the tensors may hold a part. Nothing is written to them any more then.
    """
    parts, boxes = local_parts(tensors, shards)
    files = Files(files_of(paths, rank))
    return DiskRead(files, parts, describe(parts, boxes)).read(progress, cancel)


class DiskRead:
    """A read that is known to fit; one use: `read`."""

    def __init__(self, files: Files, tensors: Mapping[str, torch.Tensor], dst: Manifest) -> None:
        """`dst` describes the tensors.

        Raises WeightsMismatch, and TensorsUnusable for those in read-only memory.
        """
        check_writable(tensors, dst)
        self._tensors = tensors
        self._dst = dst
        self._files = files
        self._spans = files.plan(dst, _COSTS)

    def read(
        self, progress: OnProgress | None = None, cancel: threading.Event | None = None
    ) -> DiskReport:
        """As `read_into`."""
        start = time.monotonic()
        devices = devices_of(self._tensors)
        wait_for(devices)
        read_nbytes = _Reading(
            self._files, self._spans, self._tensors, cancel or threading.Event()
        ).read(progress)
        wait_for(devices)
        dst = self._dst
        report = DiskReport(
            len(self._files.paths),
            len(dst.tensors),
            dst.nbytes,
            read_nbytes,
            time.monotonic() - start,
        )
        log.info(
            "read %d bytes of %s in %.3f s",
            report.nbytes,
            self._files.name,
            report.seconds,
            extra=fields(
                "disk_read",
                files=report.files,
                nbytes=report.nbytes,
                seconds=round(report.seconds, 6),
            ),
        )
        return report


class _Reading:
    """One use: `read`."""

    def __init__(
        self,
        files: Files,
        spans: Sequence[Span],
        tensors: Mapping[str, torch.Tensor],
        cancel: threading.Event,
    ) -> None:
        self._files = files
        self._tensors = tensors
        self._cancel = cancel
        self._in_host = all(device.type == "cpu" for device in devices_of(tensors))
        self._todo = deque(chunk for span in spans for chunk in span.cut(_CHUNK_NBYTES))
        self._total = sum(chunk.nbytes for chunk in self._todo)
        self._stop = threading.Event()
        # bytes that came; None: a thread has ended
        self._news: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._descriptors: list[int] = []

    def read(self, on_progress: OnProgress | None) -> int:
        """How many bytes were read."""
        threads = min(_THREADS, len(self._todo))
        with ExitStack() as undo:
            self._open(undo)
            pool = undo.enter_context(ThreadPoolExecutor(max(1, threads), "disk"))
            undo.callback(self._stop.set)  # first of all, also when Ctrl-C ends the wait
            for _ in range(threads):
                pool.submit(self._work)
            return self._follow(threads, on_progress)

    def _open(self, undo: ExitStack) -> None:
        for path in self._files.paths:
            try:
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as exc:
                raise WeightsFileInvalid(
                    f"{path} cannot be opened: {exc.strerror}", path=str(path)
                ) from exc
            undo.callback(os.close, self._descriptors[-1])

    def _follow(self, threads: int, on_progress: OnProgress | None) -> int:
        came = 0
        while threads:
            if self._cancel.is_set():
                raise Cancelled(
                    f"the read of {self._files.name} was cancelled: the tensors hold a part"
                )
            try:
                news = self._news.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if isinstance(news, BaseException):
                raise news
            if news is None:
                threads -= 1
            else:
                came += news
                if on_progress is not None:
                    on_progress(Progress(came, self._total))
        return came

    def _work(self) -> None:
        staging: Staging | None = None
        try:
            while not self._stop.is_set():
                try:
                    chunk = self._todo.popleft()
                except IndexError:
                    break
                if self._in_host and not chunk.lines:
                    self._read(chunk, chunk.dst_addr)
                else:
                    staging = staging or Staging(
                        self._tensors.values(),
                        torch.device("cpu"),
                        1,
                        _CHUNK_NBYTES,
                        not self._in_host,
                    )
                    self._read(chunk, staging.region.addr)
                    staging.copy(
                        staging.region.addr,
                        chunk.lines or (Lines(0, chunk.dst_addr, chunk.nbytes),),
                    )
                self._news.put(chunk.nbytes)
            self._news.put(None)
        except BaseException as exc:  # noqa: BLE001  raised again by the thread that waits
            self._news.put(exc)

    def _read(self, chunk: Span, addr: int) -> None:
        """All of it, to that address in the host's memory."""
        ((_, place),) = chunk.srcs
        number, offset = self._files.place(place)
        path = self._files.paths[number]
        memory = memoryview((ctypes.c_char * chunk.nbytes).from_address(addr)).cast("B")
        came = 0
        while came < chunk.nbytes:
            try:
                nbytes = os.preadv(self._descriptors[number], [memory[came:]], offset + came)
            except OSError as exc:
                raise WeightsFileInvalid(
                    f"{path} cannot be read: {exc.strerror}", path=str(path)
                ) from exc
            if not nbytes:
                raise WeightsFileInvalid(
                    f"{path} has become shorter while it was read",
                    "write files anew, not in place",
                    path=str(path),
                )
            came += nbytes
