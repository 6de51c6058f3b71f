"""The memory of snapshots: slots that are laid out alike, each with copies of all tensors of a
rank, a header, and a table of digests.

A slot is one block of memory. So the manifest of one is that of any other, shifted by the distance
of the two blocks.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from engine_loader.digests.table import BLOCK_NBYTES, DigestCell, digests_of, table_nbytes
from engine_loader.errors import SnapshotsUnfit
from engine_loader.options import Snapshots
from engine_loader.publishing import header
from engine_loader.publishing.copies import copy
from engine_loader.publishing.header import HeaderCell
from engine_loader.tensors.available import available_nbytes
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.uses import runs_of
from engine_registry import Manifest, Region
from engine_registry.errors import InvalidField

_ALIGNED_NBYTES = 512  # as torch's allocators align


@dataclass(frozen=True)
class Layout:
    """Where things lie in a slot, in bytes from its beginning.

    Attributes:
        places: Of each tensor that has bytes, by name. What shares memory shares it here, too.
        copied_with: The tensor whose copy brings it, for each of them.
        header: Of the header.
        digests: Of the table of digests, which is the last.
        nbytes: Of a slot.
    """

    places: Mapping[str, int]
    copied_with: Mapping[str, str]
    header: int
    digests: int
    nbytes: int


def layout_of(manifest: Manifest) -> Layout:
    """Of a slot with copies of these tensors. Pure."""
    entries = sorted(
        [entry for entry in manifest.tensors if entry.nbytes],
        key=lambda entry: (entry.addr, -entry.nbytes),
    )
    runs = runs_of(entries)
    starts: list[int] = []  # of each run, in the slot
    at = 0
    for start, end in runs:
        starts.append(_aligned(at) + start % _ALIGNED_NBYTES)
        at = starts[-1] + end - start
    firsts = [start for start, _ in runs]
    places: dict[str, int] = {}
    copied_with: dict[str, str] = {}
    longest, last = "", 0
    for entry in entries:
        number = bisect.bisect_right(firsts, entry.addr) - 1
        places[entry.name] = starts[number] + entry.addr - firsts[number]
        if entry.addr + entry.nbytes > last:
            longest, last = entry.name, entry.addr + entry.nbytes
        copied_with[entry.name] = longest
    at_header = _aligned(at)
    at_digests = at_header + _aligned(header.NBYTES)
    sizes = [entry.nbytes for entry in manifest.tensors]
    nbytes = _aligned(at_digests + table_nbytes(len(sizes), sizes, min(BLOCK_NBYTES.values())))
    return Layout(places, copied_with, at_header, at_digests, nbytes)


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED_NBYTES) * _ALIGNED_NBYTES


class Slot:
    """One copy of the tensors. `version` is None until there is one."""

    @plain_torch()
    def __init__(
        self, memory: torch.Tensor, layout: Layout, weights: Destination, algorithm: str | None
    ) -> None:
        """`memory` is as long as the layout says. With an algorithm there are digests."""
        self.memory = memory
        self.tensors: dict[str, torch.Tensor] = {}  # all names
        self._copies: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # as bytes: from, to
        for name, part in weights.parts.items():
            if name not in layout.places:
                self.tensors[name] = part.detach()  # it has no bytes
                continue
            at = layout.places[name]
            some = memory[at : at + part.nbytes]
            typed = some.view(part.dtype)
            self.tensors[name] = typed.as_strided(part.shape, part.stride(), typed.storage_offset())
            if layout.copied_with[name] == name:
                flat = part.detach().as_strided((part.numel(),), (1,)).view(torch.uint8)
                self._copies[name] = flat, some
        self._copied_with = layout.copied_with
        self._stale = set(self._copies)
        self._undigested = set(self.tensors)
        self._digests: dict[str, bytes] = {}  # each with those of its blocks
        self.header = HeaderCell(
            memory.device, memory=memory[layout.header : layout.header + header.NBYTES]
        )
        self.digests = None
        if algorithm is not None:
            sizes = [part.nbytes for part in weights.parts.values()]
            nbytes = table_nbytes(len(sizes), sizes, BLOCK_NBYTES[algorithm])
            self.digests = DigestCell.with_blocks(
                weights.parts,
                memory.device,
                algorithm,
                memory[layout.digests : layout.digests + nbytes],
            )
        self.version: int | None = None
        self.content = ""
        self.until: float | None = None  # by the monotonic clock: when another became the newest

    @property
    def start(self) -> int:
        """Its address."""
        return self.memory.data_ptr()

    @property
    def region(self) -> Region:
        return Region(self.start, self.memory.nbytes)

    def age(self, changed: Collection[str]) -> None:
        """These tensors, of those that are copied, have changed since."""
        self._stale.update(changed)

    def fill(self) -> int:
        """Copies what has changed since it was filled; how many bytes that were. The copies on
        GPUs may go on when this returns.
        """
        pairs = [self._copies[name] for name in self._stale]
        copy(pairs)
        self._undigested |= {
            name for name, other in self._copied_with.items() if other in self._stale
        }
        self._stale.clear()
        return sum(to.nbytes for _, to in pairs)

    def digest(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
        """Brings the table up to date, and returns the digest of each tensor; nothing where there
        is no table. What has been copied since is the same in `tensors`.
        """
        if self.digests is None:
            return {}
        new = {name: tensors[name] for name in self._undigested}
        self._digests |= digests_of(new, self.digests.table.algorithm, blocks=True)
        self._undigested.clear()
        return self.digests.put(self._digests)


def make_slots(
    weights: Destination, options: Snapshots, device: torch.device, algorithm: str | None
) -> tuple[Layout, list[Slot]]:
    """SnapshotsUnfit where there is no memory for them; InvalidField where what the caller lends
    will not do.
    """
    layout = layout_of(weights.manifest)
    if options.buffers is not None:
        blocks = [_lent(buffer, layout.nbytes, device) for buffer in options.buffers]
    else:
        blocks = allocate(options.count, layout.nbytes, device, weights)
    return layout, [Slot(block, layout, weights, algorithm) for block in blocks]


@plain_torch()
def allocate(
    count: int, nbytes: int, device: torch.device, weights: Destination, what: str = "snapshots"
) -> list[torch.Tensor]:
    """So many blocks of memory for copies of the weights, or what is made of them. SnapshotsUnfit
    where there is no memory for them.
    """
    free = available_nbytes(device)
    if free is not None and count * nbytes > free:
        raise _unfit(what, count, nbytes, device, f"{free / 1e9:.1f} GB are free")
    pinned = device.type == "cpu" and any(one.type == "cuda" for one in weights.devices)
    try:
        return [
            torch.zeros(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
            for _ in range(count)
        ]
    except RuntimeError as exc:  # as torch's OutOfMemoryError is
        raise _unfit(what, count, nbytes, device, " ".join(str(exc).split())[:200]) from exc


def _unfit(what: str, count: int, nbytes: int, device: torch.device, why: str) -> SnapshotsUnfit:
    return SnapshotsUnfit(
        f"{count} {what} of {nbytes / 1e9:.1f} GB do not fit into the memory of {device}: {why}",
        "say another `device`, publish fewer tensors a process, or update in place",
        nbytes=count * nbytes,
        device=str(device),
    )


def _lent(buffer: object, nbytes: int, device: torch.device) -> torch.Tensor:
    good = (
        isinstance(buffer, torch.Tensor)
        and buffer.dtype is torch.uint8
        and buffer.device == device
        and buffer.dim() == 1
        and buffer.is_contiguous()
        and buffer.numel() >= nbytes
        and buffer.data_ptr() % _ALIGNED_NBYTES == 0
    )
    if not good or not isinstance(buffer, torch.Tensor):
        raise InvalidField(
            f"a buffer for snapshots will not do: it is a contiguous tensor of uint8 with {nbytes} "
            f"elements at least on {device}, whose address is a multiple of {_ALIGNED_NBYTES}",
            "see `snapshot_nbytes`",
            field="buffers",
        )
    return buffer.detach()[:nbytes]


def snapshot_nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many bytes each snapshot of the tensors takes.

    Args:
        tensors: The tensors, by name.

    Returns:
        The bytes of one; `Snapshots.count` of them are allocated.

    Raises:
        TensorsUnusable: Tensors cannot be published as they are.
    """
    return layout_of(Destination.of(tensors, None).manifest).nbytes
