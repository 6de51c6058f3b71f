"""Reads from the ranks of an instance, in the probe process: headers, and weights for the speed.

A thread for each rank, and one that measures.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from engine_cli.doctor.finding import failure

_LOOKS = 3
_READ_NBYTES = 4 << 20  # of each read of a rank's weights
_READS = 4  # at a time
_SPEED_NBYTES = 512 << 20  # of them together, at most
_SPEED_S = 1.0


def read_ranks(
    engine: Any, ranks: Callable[[], list[dict[str, Any]]], report: Callable[..., None]
) -> None:
    from engine_registry.schema.manifest import Export
    from engine_registry.schema.record_format import decode

    while True:
        for task in ranks():
            key, _, value = task["rank"].partition(" ")
            record = decode(key, value.encode())
            exports = [
                Export(addr, nbytes, bytes.fromhex(handle))
                for addr, nbytes, handle in task["exports"]
            ]
            threading.Thread(
                target=_read_header, args=(engine, record, exports, report), daemon=True
            ).start()


def _read_header(engine: Any, record: Any, exports: Any, report: Callable[..., None]) -> None:
    from engine_loader.engines.protocols import device_for
    from engine_loader.publishing.header import HeaderCell, fetch_header, peer_of_record

    try:
        cell = HeaderCell(device_for(engine.protocol))
        engine.lend(cell.region)
        began = time.monotonic()
        engine.connect(peer_of_record(record), exports)
        contact_s = time.monotonic() - began
        seconds = []
        for _ in range(_LOOKS):
            began = time.monotonic()
            header = fetch_header(engine, record, cell)
            seconds.append(time.monotonic() - began)
        report(
            "rank",
            key=record.key,
            error="",
            contact_s=contact_s,
            read_s=min(seconds),
            version=header.version,
            updating=header.updating,
            way=_way(engine, record),
        )
    except Exception as exc:  # noqa: BLE001  described
        report("rank", key=record.key, **failure(exc), lost=type(exc).__name__ == "SourceLost")


def _way(engine: Any, record: Any) -> str:
    """How the rank is read over socket, and if it is over a connection, why. Else empty."""
    from engine_loader.engines.sockets.contact import meet
    from engine_loader.engines.sockets.credentials import SocketCredentials
    from engine_loader.engines.sockets.neighbour import Neighbour
    from engine_loader.publishing.header import peer_of_record

    if engine.protocol != "socket":
        return ""
    if engine.reads_within_host(peer_of_record(record)):
        return "within this host, without the network"
    credentials = SocketCredentials.from_environment()
    stream, place = meet(record.session_id, credentials, lambda: False, lambda _: None)
    stream.close()
    why = "it lets nobody read its memory"
    if place is not None:
        try:
            Neighbour(place)
        except OSError as exc:
            why = exc.strerror or str(exc)
    return f"over a connection, because {why[:1].lower()}{why[1:]}"


def read_weights(
    engine: Any, speeds: Callable[[], dict[str, Any]], report: Callable[..., None]
) -> None:
    """Reads the bytes that are named, again and again, into a few places."""
    import torch

    from engine_loader.engines.base import peer_of
    from engine_loader.engines.protocols import device_for
    from engine_loader.planning.plan import ReadOp
    from engine_registry import Region
    from engine_registry.schema.record_format import decode

    while True:  # so that the memory stays, whatever still writes to it
        wanted = speeds()
        try:
            key, _, value = wanted["rank"].partition(" ")
            record = decode(key, value.encode())
            peer = peer_of(record.session_id, record.incarnation)
            nbytes = min(_READ_NBYTES, wanted["nbytes"])
            device = device_for(engine.protocol)
            memory = torch.zeros(_READS * nbytes, dtype=torch.uint8, device=device)
            engine.lend(Region(memory.data_ptr(), memory.nbytes))
            offsets = itertools.cycle(range(0, wanted["nbytes"] - nbytes + 1, nbytes))
            free = [memory.data_ptr() + nbytes * number for number in range(_READS)]
            running: dict[int, int] = {}
            read_nbytes, began = 0, time.monotonic()
            engine.connect(peer)
            while running or free:
                more = read_nbytes < _SPEED_NBYTES and time.monotonic() - began < _SPEED_S
                while free and more:
                    place = free.pop()
                    op = ReadOp("speed", wanted["addr"] + next(offsets), place, nbytes)
                    running[engine.start(peer, op)] = place
                for number in [number for number in running if engine.done(number)]:
                    place = running.pop(number)
                    read_nbytes += nbytes
                    if more:
                        free.append(place)
                if not more and not running:
                    break
                time.sleep(5e-5)
            seconds = time.monotonic() - began
            report("speed", error="", nbytes=read_nbytes, seconds=seconds)
        except Exception as exc:  # noqa: BLE001  described
            report("speed", **failure(exc))
