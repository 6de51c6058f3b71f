"""A start of SGLang that reads from a seed which etcd has: SGLang's own transfer does the reading.

The header of the seed is read before and after, over the same transfer engine. So a seed that was
replaced, or whose weights changed meanwhile, does not pass.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from engine_loader.errors import SourceLost, TornRead
from engine_loader.publishing.header import NBYTES, Header, HeaderCell
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.pulls.ticket import PullTicket

log = logging.getLogger(__name__)
Weights = dict[str, tuple[int, int, int]]


class Reading:
    """One seed while SGLang reads from it. A context manager."""

    def __init__(self, registry: Registry, record: RankRecord, library: Any) -> None:
        """`library` is Mooncake's engine. Raises SourceLost, TornRead or RegistryError."""
        self.record = record
        self._library = library
        self.weights = weights_of(registry.manifest(record))
        self._ticket: PullTicket | None = registry.pull(record)
        if self._ticket is None:
            raise SourceLost(f"{record.key} has changed since it was found", key=record.key)
        try:
            self._before = self._header()
        except BaseException:
            self._ticket.close()
            raise

    @property
    def answer(self) -> tuple[str, Weights]:
        """What SGLang asks a seed's server for."""
        return self.record.session_id, self.weights

    def check(self) -> None:
        """Raises TornRead or SourceLost where what was read is not of one content."""
        after = self._header()
        if (after.sequence, after.content) != (self._before.sequence, self._before.content):
            raise TornRead(
                f"the weights of {self.record.key} changed while they were read",
                key=self.record.key,
            )

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ticket is not None:
            self._ticket.close()

    def _header(self) -> Header:
        header = read_header(self._library, self.record)
        if header is None or header.incarnation != self.record.incarnation:
            raise SourceLost(
                f"the process that answers at {self.record.session_id} is not the one that "
                f"registered {self.record.key}",
                key=self.record.key,
            )
        if header.updating:
            raise TornRead(
                f"the weights of {self.record.key} are being changed", key=self.record.key
            )
        return header


def read_header(library: Any, record: RankRecord) -> Header | None:
    """The header of a rank; None where there is none, or where it cannot be read."""
    cell = HeaderCell(torch.device("cpu"))
    addr = cell.region.addr
    if library.register_memory(addr, NBYTES) != 0:
        return None
    try:
        code = library.batch_transfer_sync_read(
            record.session_id, [addr], [record.header_addr], [NBYTES]
        )
        return cell.read() if code == 0 else None
    finally:
        library.unregister_memory(addr)


def weights_of(manifest: Manifest) -> Weights:
    """SGLang's table of a rank's tensors: address, number of elements, bytes of one."""
    table = {}
    for entry in manifest.tensors:
        numel = 1
        for size in entry.shape:
            numel *= size
        table[entry.name] = (entry.addr, numel, entry.nbytes // numel if numel else 1)
    return table
