"""Reads the digests that ranks publish, over the transfer engine: 16 bytes for each tensor, and no
weights.

Used by `comparing.compare`. Reads several ranks at once, in threads that end with the call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from engine_loader.comparing.holding import HeldRank, Holding
from engine_loader.digests.table import DigestCell
from engine_loader.engines.base import Engine, lend, read
from engine_loader.engines.protocols import device_for
from engine_loader.errors import ReadFailed, SourceLost, TornRead
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import HeaderCell, fetch_header, peer_of_record
from engine_loader.sources.manifests import fetch_manifests
from engine_loader.sources.reach import reachable
from engine_loader.tensors.cuda import on_default_stream, to_register
from engine_registry import Manifest, Place, RankRecord, Registry
from engine_registry.schema.manifest import DigestTable

_AT_ONCE = 8  # ranks that are read
_SILENT_S = 10.0  # longer than a peer takes that is there


def read_holding(registry: Registry, engine: Engine, records: Sequence[RankRecord]) -> Holding:
    """What the ranks of an instance hold, as they are registered now.

    Raises SourceUnreachable, SourceLost, TornRead (a rank was updated meanwhile), and what
    `Registry.manifest` raises.
    """
    fetched = fetch_manifests(registry, records)
    manifests = {record.key: each for record, each in zip(records, fetched, strict=True)}
    publishing = [record for record in records if manifests[record.key].digests is not None]
    if publishing:
        reachable(engine, [publishing], ())
    with ThreadPoolExecutor(min(_AT_ONCE, len(records))) as pool:
        held = list(pool.map(lambda one: _read_rank(engine, one, manifests[one.key]), records))
    return Holding(records[0].instance, held)


def _read_rank(engine: Engine, record: RankRecord, manifest: Manifest) -> HeldRank:
    table = manifest.digests
    name, place = f"{record.instance}/{record.rank}", Place.of(record)
    if table is None:
        return HeldRank(name, place, manifest, None)
    try:
        with _ended_when_silent(engine, record):
            digests = _read_table(engine, record, manifest, table)
    except ReadFailed as exc:
        raise SourceLost(
            f"the digests of {record.key} cannot be read: {exc.what}",
            "see whether its process runs and can be reached",
            key=record.key,
        ) from exc
    return HeldRank(name, place, manifest, digests, table.algorithm)


def _read_table(
    engine: Engine, record: RankRecord, manifest: Manifest, table: DigestTable
) -> Mapping[str, bytes]:
    """The header before and after says that they are of the content of the record."""
    device = device_for(engine.protocol)
    engine.connect(peer_of_record(record), manifest.exports)
    with ExitStack() as undo:
        undo.enter_context(on_default_stream(device))
        names = [entry.name for entry in manifest.tensors]
        header, cell = HeaderCell(device), DigestCell(names, device, table.algorithm)
        for owner in (header, cell):
            lend(engine, undo, to_register(owner.region, device.type), owner=owner)
        _check_header(engine, record, header)
        place = ReadOp(record.key, table.addr, cell.region.addr, cell.region.nbytes)
        read(engine, peer_of_record(record), place)
        _check_header(engine, record, header)
        return cell.read()


def _check_header(engine: Engine, record: RankRecord, cell: HeaderCell) -> None:
    header = fetch_header(engine, record, cell)
    if header.updating or (header.version, header.content) != (record.version, record.content):
        raise TornRead(
            f"the weights of {record.key} changed while their digests were read",
            "compare again",
            key=record.key,
        )


@contextmanager
def _ended_when_silent(engine: Engine, record: RankRecord) -> Iterator[None]:
    """Reads from a peer that stands still would last for ever."""
    peer = peer_of_record(record)
    timer = threading.Timer(_SILENT_S, engine.abandon, [peer])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
