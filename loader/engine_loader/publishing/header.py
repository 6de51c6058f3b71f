"""The header: 64 bytes in registered memory beside the weights, by which a reader knows over the
data plane which process it reads from.

    offset 0   8 bytes  magic "ENGREG01"
    offset 8   16 bytes incarnation of the registration
    offset 24  u64      sequence, little-endian: twice the version; odd while the weights change
    offset 32  16 bytes content of the weights; zero in headers of older releases, which
                        `implied_content` replaces
    offset 48  16 bytes zero

A reader compares it before and after the bulk read: a port that another process has taken over, a
restarted peer and weights that changed meanwhile all show, whatever etcd says at that time.

Behind it, where the manifest says so, lie the marks of a rank that is a source while it loads: a
byte for each block of its memory (`arrivals.Blocks`), 1 once the block is whole. They only ever
change from 0 to 1 under one incarnation.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import torch

from engine_loader.engines.base import Engine, peer_of, read
from engine_loader.errors import SourceLost
from engine_loader.planning.plan import ReadOp
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.modes import plain_torch
from engine_registry import RankRecord, Region
from engine_registry.schema.record import implied_content

_MAGIC = b"ENGREG01"
_FORMAT = struct.Struct("<8s16sQ16s16x")
NBYTES = _FORMAT.size


@dataclass(frozen=True)
class Header:
    incarnation: str
    sequence: int
    content: str

    @property
    def version(self) -> int:
        return self.sequence // 2

    @property
    def updating(self) -> bool:
        return self.sequence % 2 == 1


@plain_torch()
def decode_header(memory: torch.Tensor) -> Header | None:
    """What the first of these bytes say; None where they are no header."""
    magic, incarnation, sequence, content = _FORMAT.unpack(bytes(memory[:NBYTES].tolist()))
    if magic != _MAGIC:
        return None
    stated = content.hex() if any(content) else implied_content(incarnation.hex(), sequence // 2)
    return Header(incarnation.hex(), sequence, stated)


class HeaderCell:
    """The place in memory of a header with so many marks: the source's own, or a reader's buffer
    for another's.
    """

    @plain_torch()
    def __init__(
        self, device: torch.device, marks: int = 0, memory: torch.Tensor | None = None
    ) -> None:
        """In `memory` if that is given: so many bytes of the device."""
        self.device = device
        self._lock = threading.Lock()
        self._retired = False
        if memory is None:
            memory = torch.empty(NBYTES + marks, dtype=torch.uint8, device=device)
        self._bytes = memory.zero_()
        self.region = Region(self._bytes.data_ptr(), NBYTES + marks)

    def write(self, header: Header) -> None:
        """Visible to peers when this returns, after all that the device was asked to do before.

        Not once it is retired.
        """
        incarnation, content = bytes.fromhex(header.incarnation), bytes.fromhex(header.content)
        packed = _FORMAT.pack(_MAGIC, incarnation, header.sequence, content)
        with self._lock:
            if not self._retired:
                self._put(packed, 0)

    def erase(self) -> None:
        """No reader takes this memory for a source's, until a header is written again."""
        self._put(bytes(NBYTES), 0)

    def retire(self) -> None:
        """Erases it for good: an update of the weights that ends later must not make them readable
        again.
        """
        with self._lock:
            self._retired = True
            self.erase()

    def mark(self, marks: bytes) -> None:
        """As `write`: what they are the marks of can be seen before they can."""
        self._put(marks, NBYTES)

    @plain_torch()
    def _put(self, packed: bytes, at: int) -> None:
        if packed:
            wait_for([self.device])
            self._bytes[at : at + len(packed)].copy_(
                torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            )
            wait_for([self.device])

    @plain_torch()
    def read(self) -> Header | None:
        """None where the bytes are no header."""
        return decode_header(self._bytes)

    @plain_torch()
    def read_marks(self) -> bytes:
        return bytes(self._bytes[NBYTES:].cpu().numpy())


def peer_of_record(record: RankRecord) -> str:
    return peer_of(record.session_id, record.incarnation)


def fetch_header(engine: Engine, record: RankRecord, cell: HeaderCell) -> Header:
    """The source's header now, and as many of its marks, into the registered `cell`.

    The engine is connected to the source already, unless an address is enough for it.

    SourceLost if what answers is not the process of the record.
    """
    cell.erase()
    wait_for([cell.device])  # what was read before has arrived when the header is read
    read(
        engine,
        peer_of_record(record),
        ReadOp(record.key, record.header_addr, cell.region.addr, cell.region.nbytes),
    )
    header = cell.read()
    if header is None or header.incarnation != record.incarnation:
        raise SourceLost(
            f"the process that answers at {record.session_id} is not the process that registered "
            f"{record.key}, which has ended",
            key=record.key,
        )
    return header
