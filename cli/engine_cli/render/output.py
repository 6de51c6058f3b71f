"""What the commands print of instances, ranks, tensors and events: rows of tables, and JSON objects
that stay stable.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from engine_cli.render.flows import Arrived, Flows, Line, name_of, percent, progress_of, source_of
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json as print_json
from engine_cli.render.tables import print_table as print_table
from engine_cli.render.tables import print_tree as print_tree
from engine_cli.render.tables import size as size
from engine_registry import (
    Event,
    InstanceCleaned,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    InstanceStatus,
    Manifest,
    Pull,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
    TensorEntry,
)
from engine_registry.schema.status import spans

_MAX_NAMES = 4  # in one cell
_MAX_DEPTH = 32  # of what a line of the tree is moved to the right


def instance_json(status: InstanceStatus) -> dict[str, Any]:
    return {
        "instance": status.instance,
        "state": status.state.value,
        "world_size": status.world_size,
        "present": [record.rank for record in status.records],
        "missing": list(status.missing),
        "problems": list(status.problems),
        "model": model_json(status.records[0]) if status.records else None,
        "generation": status.records[0].generation if status.records else None,
        "version": status.version,
        "nbytes": status.nbytes,
    }


def model_json(record: RankRecord) -> dict[str, Any]:
    model = record.model
    return {
        "name": model.name,
        "revision": model.revision,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "extra": dict(model.extra),
    }


def rank_json(record: RankRecord) -> dict[str, Any]:
    return {
        "instance": record.instance,
        "rank": record.rank,
        "world_size": record.world_size,
        "state": record.state.value,
        "version": record.version,
        "content": record.content,
        "generation": record.generation,
        "topology": {axis: list(place) for axis, place in record.topology.items()},
        "model": model_json(record),
        "host": record.host,
        "pid": record.pid,
        "device": record.device,
        "session_id": record.session_id,
        "protocol": record.protocol,
        "fabric": record.fabric,
        "tensors": record.manifest.tensors,
        "nbytes": record.manifest.nbytes,
        "registered_at": record.registered_at,
        "kept_by": record.kept_by,
        "incarnation": record.incarnation,
    }


def tensors_json(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "nbytes": entry.nbytes,
            "addr": entry.addr,
            "global_shape": None if entry.opaque else list(entry.global_shape),
            "offsets": None if entry.opaque else list(entry.offsets),
        }
        for entry in manifest.tensors
    ]


def pull_json(pull: Pull) -> dict[str, Any]:
    source = {"instance": pull.instance, "rank": pull.rank, "incarnation": pull.incarnation}
    reader = pull.reader
    return {
        "source": source,
        "reader": reader
        and {"instance": reader.instance, "rank": reader.rank, "incarnation": reader.incarnation},
        "host": pull.host,
        "pid": pull.pid,
        "nbytes": pull.nbytes,
        "total_nbytes": pull.total_nbytes,
        "began_at": pull.began_at,
    }


def progress_json(progress: Arrived | None) -> dict[str, int] | None:
    return {"nbytes": progress.nbytes, "total_nbytes": progress.total_nbytes} if progress else None


def loading_json(status: InstanceStatus, flows: Flows) -> list[dict[str, Any]]:
    loading = (record for record in status.records if record.state is RankState.LOADING)
    return [
        {"rank": record.rank, "progress": progress_json(flows.progress(record))}
        for record in loading
    ]


_RANK_EVENTS = {RankJoined: "rank_joined", RankUpdated: "rank_updated", RankLost: "rank_lost"}
_INSTANCE_EVENTS = {
    InstanceReady: "instance_ready",
    InstanceDegraded: "instance_degraded",
    InstanceGone: "instance_gone",
}


def event_json(event: Event | InstanceCleaned) -> dict[str, Any]:
    if isinstance(event, InstanceCleaned):
        return {
            "event": "instance_cleaned",
            "instance": event.instance,
            "lost": rank_json(event.lost),
            "evicted": [record.rank for record in event.evicted],
            "dry_run": event.dry_run,
        }
    if isinstance(event, InstanceReady | InstanceDegraded | InstanceGone):
        return {"event": _INSTANCE_EVENTS[type(event)], **instance_json(event.status)}
    reason = {"reason": event.reason} if isinstance(event, RankLost) else {}
    return {"event": _RANK_EVENTS[type(event)], **reason, **rank_json(event.record)}


def event_text(event: Event | InstanceCleaned) -> str:
    if isinstance(event, InstanceCleaned):
        done = "would evict" if event.dry_run else "evicted"
        ranks = spans([record.rank for record in event.evicted])
        return (
            f"{event.instance} cleaned up: {done} rank {ranks}, as rank {event.lost.rank} did "
            "not come back"
        )
    if isinstance(event, InstanceReady):
        status = event.status
        return (
            f"{status.instance} ready: {status.world_size} ranks, {size(status.nbytes)}, version "
            f"{status.version}"
        )
    if isinstance(event, InstanceDegraded):
        return f"{event.status.instance} degraded: {printable(event.status.summary)}"
    if isinstance(event, InstanceGone):
        return f"{event.status.instance} gone"
    record = event.record
    name = f"{record.instance}/{record.rank}"
    if isinstance(event, RankLost):
        return f"{name} lost: {event.reason} ({record.process})"
    if isinstance(event, RankUpdated):
        return f"{name} updated: {record.state.value}, version {record.version}"
    return (
        f"{name} joined: {record.state.value}, {size(record.manifest.nbytes)}, "
        f"{record.session_id} {record.protocol}"
    )


def instance_state(status: InstanceStatus, loaded: float | None) -> str:
    """For people: an instance is loading while one of its ranks is.

    `loaded` is how much of it is there, if that is known.
    """
    loading = any(record.state is RankState.LOADING for record in status.records)
    return _loading(loaded) if loading else status.state.value


def rank_state(record: RankRecord, progress: Arrived | None) -> str:
    return (
        _loading(progress.fraction if progress else None)
        if record.state is RankState.LOADING
        else record.state.value
    )


def _loading(fraction: float | None) -> str:
    return "loading" if fraction is None else f"loading {percent(fraction)}"


def reads_from(pulls: Iterable[Pull]) -> str:
    return some_of(dict.fromkeys(map(source_of, pulls)))


def read_by(pulls: Iterable[Pull]) -> str:
    """With how far each is."""
    by_name: dict[str, list[Pull]] = {}
    for pull in pulls:
        by_name.setdefault(name_of(pull), []).append(pull)
    progress = {name: progress_of(some) for name, some in by_name.items()}
    return some_of(
        [
            f"{name} {percent(each.fraction)}" if (each := progress[name]) else name
            for name in sorted(by_name)
        ]
    )


def some_of(names: Collection[str]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(itertools.islice(names, _MAX_NAMES))
    return (
        f"{shown} and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else shown or "-"
    )


def tree_rows(lines: Iterable[Line]) -> list[tuple[int, str]]:
    """How far each is moved to the right, and what it says."""
    return [(min(line.depth, _MAX_DEPTH), _tree_text(line)) for line in lines]


def _tree_text(line: Line) -> str:
    progress = percent(line.progress.fraction) if line.progress else ""
    state = rank_state(line.record, line.progress) if line.record else progress
    below = f"from {line.parent}" if line.depth > _MAX_DEPTH else ""
    again = "(what reads from it stands elsewhere)" if line.again else ""
    return "  ".join(filter(None, [line.name, state, below, again]))


def instance_row(status: InstanceStatus, loaded: float | None = None) -> list[str]:
    version = (
        "differs"
        if status.records and status.version is None
        else "-"
        if status.version is None
        else str(status.version)
    )
    return [
        status.instance,
        instance_state(status, loaded),
        f"{len(status.records)}/{status.world_size or '?'}",
        str(status.model or "-"),
        version,
        size(status.nbytes),
        status.summary,
    ]


INSTANCE_COLUMNS = ("INSTANCE", "STATE", "RANKS", "MODEL", "VERSION", "SIZE", "WHY NOT READY")
RANK_COLUMNS = (
    "RANK",
    "STATE",
    "VERSION",
    "PROCESS",
    "DEVICE",
    "SESSION",
    "PROTOCOL",
    "TENSORS",
    "SIZE",
    "SINCE",
)
TENSOR_COLUMNS = ("TENSOR", "DTYPE", "SHAPE", "SIZE", "BOX")


FLOW_COLUMNS = ("READS FROM", "READ BY")


def rank_row(record: RankRecord, progress: Arrived | None = None) -> list[str]:
    return [
        str(record.rank),
        rank_state(record, progress),
        str(record.version),
        f"{record.host}:{record.pid or '-'}",
        record.device,
        record.session_id,
        record.protocol,
        f"{record.manifest.tensors:,}",
        size(record.manifest.nbytes),
        f"{record.registered_at[:19].replace('T', ' ')}Z",
    ]


def tensor_rows(manifest: Manifest) -> list[list[str]]:
    return [
        [entry.name, entry.dtype, _shape(entry.shape), size(entry.nbytes), _box(entry)]
        for entry in manifest.tensors
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def _box(entry: TensorEntry) -> str:
    """Which part of the whole it is, along each dimension from where up to where."""
    if entry.opaque:
        return "-"
    if entry.shape == entry.global_shape:
        return "whole"
    along = (
        f"{offset}:{offset + length}"
        for offset, length in zip(entry.offsets, entry.shape, strict=True)
    )
    return f"[{', '.join(along)}] of {_shape(entry.global_shape)}"


__all__ = [
    "FLOW_COLUMNS",
    "INSTANCE_COLUMNS",
    "RANK_COLUMNS",
    "TENSOR_COLUMNS",
    "event_json",
    "event_text",
    "instance_json",
    "instance_row",
    "instance_state",
    "loading_json",
    "print_json",
    "print_table",
    "print_tree",
    "progress_json",
    "pull_json",
    "rank_json",
    "rank_row",
    "rank_state",
    "read_by",
    "reads_from",
    "size",
    "some_of",
    "spans",
    "tensor_rows",
    "tensors_json",
    "tree_rows",
]
