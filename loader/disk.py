"""Fills tensors from safetensors files: several reads at once, straight into their memory, and no byte that is not wanted.

To the planner the files are one source, whose addresses are places in them. Used by `loader.start`. Starts threads, which end
with `read_into`.
"""

from __future__ import annotations

import bisect
import ctypes
import json
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loader.boxes import Lines
from loader.cuda import wait_for
from loader.errors import Cancelled, WeightsFileInvalid
from loader.files import find_files
from loader.offers import Origin
from loader.plan import plan
from loader.reads import Costs, Span
from loader.regions import Shard, describe, devices_of, local_parts
from loader.staging import Staging
from loader.transfer import OnProgress, Progress
from loader.whole import INDEX
from registry import Manifest, Region, TensorEntry
from registry.logs import fields

log = logging.getLogger(__name__)
Paths = str | Path | Sequence[str | Path]

_THREADS = 16  # they wait for the disk, not for a core: an array of disks, or a server far away, wants to be asked much at once
_CHUNK_NBYTES = 8 << 20
_COSTS = Costs(read_nbytes=128 << 10, copied=0.3, staged_nbytes=_CHUNK_NBYTES)  # systems read ahead by as much anyway
_LOOK_S = 0.1  # how soon a cancelled read notices

# https://github.com/huggingface/safetensors names them; torch's own names stand in manifests.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64",
    "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip


@dataclass(frozen=True)
class DiskReport:
    files: int
    tensors: int
    nbytes: int  # of the tensors
    read_nbytes: int
    seconds: float


def files_of(paths: Paths, rank: int | None = None) -> list[Path]:
    """The files that `paths` mean: of a folder, the one of this rank as `engines load` writes it, else those of the whole model.

    WeightsFileInvalid where there are none.
    """
    files: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        own, whole, index = path / f"rank-{rank}.safetensors", path / "model.safetensors", path / INDEX
        if path.is_dir() and (rank is not None and own.exists()):
            files.append(own)
        elif path.is_dir() and whole.exists():
            files.append(whole)
        elif path.is_dir() and index.exists():
            files += _named_by(index)
        else:
            files += find_files([path])
    return list(dict.fromkeys(files))


def _named_by(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return find_files([index.parent / name for name in sorted(names)])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise WeightsFileInvalid(f"{index} is no index of safetensors files: {exc}", path=str(index)) from exc


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, at a place that counts through all files."""

    dtype: str
    shape: tuple[int, ...]
    place: int
    nbytes: int


class Files:
    """What safetensors files hold. Their headers are read and checked at once, all else when it is wanted."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """WeightsFileInvalid says which file is at fault."""
        self.paths = list(paths)
        self._starts: list[int] = []  # of each file's tensors, counted through all files
        self._ahead: list[int] = []  # bytes of each file before its tensors
        self._regions: list[Region] = []
        self._stored: dict[str, _Stored] = {}
        origins: dict[str, Path] = {}
        start = 0
        for path in self.paths:
            ahead, header = _header_of(path)
            twice = next((name for name in header if name in origins), None)
            if twice is not None:
                raise WeightsFileInvalid(f"tensor {twice!r} is in {origins[twice]} and in {path}: name one of them", path=str(path))
            for name, (dtype, shape, begin, end) in header.items():
                self._stored[name] = _Stored(_DTYPES.get(dtype, dtype.lower()), shape, start + begin, end - begin)
            origins.update(dict.fromkeys(header, path))
            nbytes = max((end for _, _, _, end in header.values()), default=0)
            self._starts.append(start)
            self._ahead.append(ahead)
            self._regions.append(Region(start, nbytes))
            start += nbytes + 1  # so that no read goes from one into the next

    @property
    def name(self) -> str:
        """For a message."""
        folders = {path.parent for path in self.paths}
        return str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} files in {', '.join(map(str, sorted(folders)))}"

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each tensor."""
        return {name: (stored.dtype, stored.shape) for name, stored in self._stored.items()}

    def place(self, addr: int) -> tuple[int, int]:
        """The number of the file, and where in it."""
        number = bisect.bisect_right(self._starts, addr) - 1
        return number, self._ahead[number] + addr - self._starts[number]

    def plan(self, dst: Manifest) -> tuple[Span, ...]:
        """What to read to fill all of `dst`, in the order in which it lies in the files. They may hold more.

        A tensor in the files is the whole one, or just the part of it that is wanted. WeightsMismatch names every difference.
        """
        held = {entry.addr for entry in dst.tensors if entry.name in self._stored and entry.nbytes}
        # Of tensors that share their memory safetensors stores one.
        wanted = replace(dst, tensors=tuple(e for e in dst.tensors if e.name in self._stored or e.addr not in held or not e.nbytes))
        entries = [self._entry(entry) for entry in wanted.tensors if entry.name in self._stored]
        origin = Origin(self.name, Manifest(tuple(entries), tuple(self._regions)))
        return tuple(sorted(plan([origin], wanted, _COSTS, partial=True), key=lambda span: span.srcs[0][1]))

    def _entry(self, wanted: TensorEntry) -> TensorEntry:
        stored = self._stored[wanted.name]
        box = Shard(stored.shape, (0,) * len(stored.shape))
        if stored.shape != wanted.global_shape and stored.shape == wanted.shape:
            box = Shard(wanted.global_shape, wanted.offsets)
        return TensorEntry(
            wanted.name, stored.dtype, stored.shape, stored.place, stored.nbytes, box.global_shape, box.offsets, wanted.opaque
        )


def _header_of(path: Path) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """How many bytes come before the tensors; and of each: dtype, shape, where it begins and ends behind those.

    safetensors checks all of it against the file's length, but does not tell where tensors lie.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(nbytes))
        header.pop("__metadata__", None)
        return 8 + nbytes, {name: (told["dtype"], tuple(told["shape"]), *told["data_offsets"]) for name, told in header.items()}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise WeightsFileInvalid(f"{path} cannot be read as safetensors: {exc}", path=str(path)) from exc


def read_into(
    paths: Paths,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int | None = None,
    shards: Mapping[str, Shard] | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> DiskReport:
    """Fills the tensors from the files, each with all of it or, where `shards` (or a DTensor) says so, with its part.

    Raises WeightsFileInvalid and WeightsMismatch (every difference in one) before a byte is read; WeightsFileInvalid and Cancelled
    when the tensors may hold a part. Nothing is written to them any more then.
    """
    parts, boxes = local_parts(tensors, shards)
    return DiskRead(files_of(paths, rank), parts, describe(parts, boxes)).run(progress, cancel)


class DiskRead:
    """A read that is known to fit; one use: `run`."""

    def __init__(self, paths: Sequence[Path], tensors: Mapping[str, torch.Tensor], dst: Manifest) -> None:
        """`dst` describes the tensors. Raises WeightsFileInvalid and WeightsMismatch."""
        self._tensors = tensors
        self._dst = dst
        self._files = Files(paths)
        self._spans = self._files.plan(dst)

    def run(self, progress: OnProgress | None = None, cancel: threading.Event | None = None) -> DiskReport:
        """As `read_into`."""
        start = time.monotonic()
        devices = devices_of(self._tensors)
        wait_for(devices)
        read_nbytes = _Reading(self._files, self._spans, self._tensors, cancel or threading.Event()).run(progress)
        wait_for(devices)
        dst = self._dst
        report = DiskReport(len(self._files.paths), len(dst.tensors), dst.nbytes, read_nbytes, time.monotonic() - start)
        log.info(
            "read %d bytes of %s in %.3f s",
            report.nbytes,
            self._files.name,
            report.seconds,
            extra=fields("disk_read", files=report.files, nbytes=report.nbytes, seconds=round(report.seconds, 6)),
        )
        return report


class _Reading:
    """One use: `run`."""

    def __init__(self, files: Files, spans: Sequence[Span], tensors: Mapping[str, torch.Tensor], cancel: threading.Event) -> None:
        self._files = files
        self._tensors = tensors
        self._cancel = cancel
        self._in_host = all(device.type == "cpu" for device in devices_of(tensors))
        self._todo = deque(chunk for span in spans for chunk in span.cut(_CHUNK_NBYTES))
        self._total = sum(chunk.nbytes for chunk in self._todo)
        self._stop = threading.Event()
        self._news: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()  # bytes that came; None: a thread has ended
        self._descriptors: list[int] = []

    def run(self, on_progress: OnProgress | None) -> int:
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
                raise WeightsFileInvalid(f"{path} cannot be opened: {exc.strerror}", path=str(path)) from exc
            undo.callback(os.close, self._descriptors[-1])

    def _follow(self, threads: int, on_progress: OnProgress | None) -> int:
        came = 0
        while threads:
            if self._cancel.is_set():
                raise Cancelled(f"the read of {self._files.name} was cancelled: the tensors hold a part")
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
                    staging = staging or Staging(self._tensors.values(), torch.device("cpu"), 1, _CHUNK_NBYTES, not self._in_host)
                    self._read(chunk, staging.region.addr)
                    staging.copy(staging.region.addr, chunk.lines or (Lines(0, chunk.dst_addr, chunk.nbytes),))
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
                raise WeightsFileInvalid(f"{path} cannot be read: {exc.strerror}", path=str(path)) from exc
            if not nbytes:
                raise WeightsFileInvalid(
                    f"{path} has become shorter while it was read: write files anew, not in place", path=str(path)
                )
            came += nbytes
