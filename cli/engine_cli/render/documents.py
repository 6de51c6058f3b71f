"""The JSON objects of `--json`. Their names are stable; docs/reference/json.md lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_cli.render.flows import Arrived, Flows
from engine_cli.render.states import HELD, state_of, zones_of
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
    Release,
    VersionReleased,
)

if TYPE_CHECKING:
    from engine_loader import Comparison, LoadReport


def instance_json(status: InstanceStatus) -> dict[str, Any]:
    first = next(iter([*status.records[:1], *status.held]), None)
    return {
        "instance": status.instance,
        "state": state_of(status),
        "world_size": status.world_size,
        "present": [record.rank for record in status.records],
        "missing": list(status.missing),
        "unresponsive": list(status.unresponsive),
        "held": [held_json(record) for record in status.held],
        "problems": list(status.problems),
        "model": model_json(first) if first else None,
        "generation": first.generation if first else None,
        "version": status.version,
        "labels": dict(status.labels),
        "zones": list(zones_of(status)),
        "nbytes": status.nbytes,
    }


def held_json(record: RankRecord) -> dict[str, Any]:
    return {
        "rank": record.rank,
        "held_until": record.held_until,
        "nbytes": record.manifest.nbytes,
        "host": record.host,
        "device": record.device,
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
        "state": HELD if record.held else record.state.value,
        "version": record.version,
        "content": record.content,
        "retained": [one.version for one in record.retained],
        "labels": dict(record.labels),
        "generation": record.generation,
        "topology": {axis: list(place) for axis, place in record.topology.items()},
        "model": model_json(record),
        "host": record.host,
        "pid": record.pid,
        "device": record.device,
        "session_id": record.session_id,
        "protocol": record.protocol,
        "fabric": record.fabric,
        "rails": dict(record.rails),
        "location": str(record.location),
        "tensors": record.manifest.tensors,
        "nbytes": record.manifest.nbytes,
        "registered_at": record.registered_at,
        "kept_by": record.kept_by,
        "unresponsive_since": record.unresponsive_since or None,
        "held_until": record.held_until or None,
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
            "slices": None
            if entry.slices is None
            else [[list(some) for some in each] for each in entry.slices],
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


def listed_json(status: InstanceStatus, flows: Flows) -> dict[str, Any]:
    return {**instance_json(status), "loading": loading_json(status, flows)}


def release_json(release: Release) -> dict[str, Any]:
    return {
        "instance": release.instance,
        "version": release.version,
        "digest": release.digest,
        "released_at": release.released_at,
        "by": release.by,
    }


EVENTS: dict[type[Event | InstanceCleaned], str] = {
    RankJoined: "rank_joined",
    RankUpdated: "rank_updated",
    RankLost: "rank_lost",
    InstanceReady: "instance_ready",
    InstanceDegraded: "instance_degraded",
    InstanceGone: "instance_gone",
    VersionReleased: "version_released",
    InstanceCleaned: "instance_cleaned",
}


def event_json(event: Event | InstanceCleaned) -> dict[str, Any]:
    if isinstance(event, InstanceCleaned):
        return {
            "event": EVENTS[type(event)],
            "instance": event.instance,
            "lost": rank_json(event.lost),
            "evicted": [record.rank for record in event.evicted],
            "dry_run": event.dry_run,
        }
    if isinstance(event, InstanceReady | InstanceDegraded | InstanceGone):
        return {"event": EVENTS[type(event)], **instance_json(event.status)}
    if isinstance(event, VersionReleased):
        return {
            "event": EVENTS[type(event)],
            **release_json(event.release),
            "previous": event.previous and event.previous.version,
        }
    lost = (
        {
            "held_until": event.held_until or None,
            "reason": event.reason,
            "eviction": event.eviction and dataclasses.asdict(event.eviction),
        }
        if isinstance(event, RankLost)
        else {}
    )
    return {"event": EVENTS[type(event)], **rank_json(event.record), **lost}


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "sides": list(comparison.sides),
        "same": comparison.same,
        "tensors": comparison.tensors,
        "compared": comparison.compared,
        "differences": [
            {
                "tensor": each.tensor,
                "aspect": each.aspect.value,
                "values": {side: value or None for side, value in each.values.items()},
            }
            for each in comparison.differences
        ],
        "unproven": [
            {"tensor": tensor, "obstacle": obstacle.value}
            for tensor, obstacle in comparison.unproven.items()
        ],
        "without_digests": list(comparison.without_digests),
    }


def loaded_json(report: LoadReport, paths: Sequence[Path]) -> dict[str, Any]:
    return {
        "instance": report.instance,
        "rank": report.rank,
        "version": report.version,
        "content": report.content,
        "protocol": report.protocol,
        "tensors": report.tensors,
        "nbytes": report.nbytes,
        "read_nbytes": report.read_nbytes,
        "skipped_nbytes": report.skipped_nbytes,
        "delta_nbytes": report.delta_nbytes,
        "lent": dict(report.lent),
        "reads": report.reads,
        "retries": report.retries,
        "seconds": round(report.seconds, 6),
        "transfer_s": round(report.transfer_s, 6),
        "digest_s": round(report.digest_s, 6),
        "regions": report.regions,
        "register_s": round(report.register_s, 6),
        "verified": report.verified,
        "outlived": list(report.outlived),
        "within_host": list(report.within_host),
        "sources": [
            {
                "key": share.name,
                "nbytes": share.nbytes,
                "near": share.near.value,
                "lost": str(share.error) if share.error else None,
            }
            for share in report.shares
        ],
        "file": str(paths[0]) if len(paths) == 1 else None,
        "files": list(map(str, paths)),
    }
