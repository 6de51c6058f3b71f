"""Reads on their way into launches of the kernel, and the launches until they are over."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from contextlib import suppress

from engine_loader.engines.cuda_ipc.gpus import Gpus
from engine_loader.engines.cuda_ipc.launch import Launch
from engine_loader.engines.cuda_ipc.sources import Source
from engine_loader.engines.cuda_ipc.table import Copy
from engine_loader.engines.cuda_ipc.tallies import Tallies
from engine_loader.engines.dial import failed
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp

# Of one launch. The first one is short, so that the GPU begins; each that follows takes as long as
# the next one takes to be made ready; and after the longest ones, of 3 ms, what has come is seen.
_FIRST_NBYTES = 256 << 20
_LAUNCH_NBYTES = 1 << 30


class _Read:
    """`launch` is None until it is launched."""

    __slots__ = ("failure", "gpu", "launch", "op", "source")

    def __init__(self, source: Source, gpu: int | None, op: ReadOp) -> None:
        self.source = source
        self.gpu = gpu
        self.op = op
        self.launch: Launch | None = None
        self.failure: ReadFailed | None = None


class _Waiting:
    """Reads from one source into one GPU that are not launched yet."""

    def __init__(self) -> None:
        self.reads: list[_Read] = []
        self.nbytes = 0


class Launches:
    """All reads of an engine that have begun. From any thread."""

    def __init__(self, gpus: Gpus, tallies: Tallies) -> None:
        self._gpus = gpus
        self._tallies = tallies
        self._launching = threading.Lock()  # held while reads become a launch; taken first
        self._lock = threading.Lock()  # of what follows
        self._reads: dict[int, _Read] = {}
        self._waiting: defaultdict[tuple[Source, int | None], _Waiting] = defaultdict(_Waiting)
        self._enough: dict[tuple[Source, int | None], int] = {}  # bytes of the next launch
        self._numbers = itertools.count(1)

    def start(self, source: Source, gpu: int | None, op: ReadOp) -> int:
        """The number of the read, which waits for others unless there is enough for a launch."""
        read = _Read(source, gpu, op)
        with self._lock:
            number = next(self._numbers)
            self._reads[number] = read
            waiting = self._waiting[source, gpu]
            waiting.reads.append(read)
            waiting.nbytes += op.nbytes
            enough = waiting.nbytes >= self._enough.get((source, gpu), _FIRST_NBYTES)
        if enough:
            self._launch(source, gpu)
        return number

    def over(self, number: int) -> tuple[Source, ReadFailed | None] | None:
        """The source of a read that is over, and why it has failed, if it has. None while it goes
        on. KeyError once it has been said.
        """
        read = self._reads[number]
        if read.launch is None and read.failure is None:
            self._launch_waiting(read)
        if read.failure is None and (read.launch is None or not read.launch.done()):
            return None
        with self._lock:
            del self._reads[number]
            if not self._reads:
                self._enough.clear()
        return read.source, read.failure

    def _launch_waiting(self, asked: _Read) -> None:
        """What waits for the GPUs: all of the source's, as nobody begins more before it asks. What
        goes to the host, such as headers, is somebody else's.
        """
        with self._lock:
            keys = [key for key in self._waiting if key[0] is asked.source and key[1] is not None]
        for source, gpu in keys if asked.gpu is not None else [(asked.source, None)]:
            self._launch(source, gpu)

    def _launch(self, source: Source, gpu: int | None) -> None:
        """All that waits for it; what cannot be read has failed."""
        with self._launching:
            with self._lock:
                waiting = self._waiting.pop((source, gpu), _Waiting())
                nbytes = min(2 * max(waiting.nbytes, _FIRST_NBYTES), _LAUNCH_NBYTES)
                self._enough[source, gpu] = nbytes
            reads, copies = [], []
            for read in waiting.reads:
                op = read.op
                try:
                    src = source.address(op, gpu)
                except ReadFailed as exc:
                    read.failure = exc
                    continue
                reads.append(read)
                copies.append(Copy(src, op.dst_addr, op.src_addr, op.nbytes, op.lines))
            if not copies:
                return
            try:
                launch = self._gpus.launch(gpu, copies, self._tallies.of(source.peer, gpu))
            except EngineFailed as exc:
                for read in reads:
                    read.failure = failed(source.session_id, exc.what)
                raise
            for read in reads:
                read.launch = launch

    def abandon(self, peer: str) -> None:
        """Its reads have failed, and write nothing more. Waits for the GPU, and for nobody else."""
        with self._launching, self._lock:
            for read in self._reads.values():
                if read.source.peer != peer:
                    continue
                if read.launch is None:
                    self._waiting.pop((read.source, read.gpu), None)
                else:
                    with suppress(EngineFailed):  # a GPU that has failed writes nothing more
                        read.launch.wait()
                read.failure = read.failure or failed(read.source.session_id, "it was abandoned")
