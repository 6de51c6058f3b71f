"""Instances, ranks, tensors and events as lines and as rows of tables, for people."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from engine_cli.render.flows import Arrived, Line, name_of, percent, progress_of, source_of
from engine_cli.render.held import left, ranks_held
from engine_cli.render.printable import printable
from engine_cli.render.states import LOADING, UNRESPONSIVE, rank_state_of, state_of, zones_of
from engine_cli.render.tables import size
from engine_registry import (
    Event,
    InstanceCleaned,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    InstanceStatus,
    Manifest,
    Pull,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
    TensorEntry,
    VersionReleased,
)
from engine_registry.schema.keys import ENGINES
from engine_registry.schema.labels import labels_text
from engine_registry.schema.manifest import shape_text
from engine_registry.schema.printable import count
from engine_registry.schema.status import named

if TYPE_CHECKING:
    from engine_loader import Seeded

_MAX_NAMES = 4  # in one cell
_LONG_S = 1.0
_MAX_DEPTH = 32  # of what a line of the tree is moved to the right


def event_text(event: Event | InstanceCleaned) -> str:
    if isinstance(event, InstanceCleaned):
        done = "would evict" if event.dry_run else "evicted"
        ranks = named([record.rank for record in event.evicted])
        return (
            f"{event.instance} cleaned up: {done} {ranks}, as rank {event.lost.rank} did "
            "not come back"
        )
    if isinstance(event, InstanceReady):
        return ready_text(event.status)
    if isinstance(event, InstanceDegraded):
        state = state_of(event.status)
        return f"{event.status.instance} {state}: {printable(event.status.why)}"
    if isinstance(event, InstanceGone):
        held = event.status.held_summary
        return f"{event.status.instance} gone{f': {printable(held)}' if held else ''}"
    if isinstance(event, VersionReleased):
        return _release_text(event)
    record = event.record
    name = f"{record.instance}/{record.rank}"
    if isinstance(event, RankLost):
        return f"{name} lost: {loss(event)} ({record.process})"
    if isinstance(event, RankUpdated):
        if event.previous.unresponsive_since != record.unresponsive_since:
            return f"{name} {answering(record)} ({record.process})"
        return f"{name} updated: {record.state.value}, version {record.version}"
    return (
        f"{name} joined: {record.state.value}, {size(record.manifest.nbytes)}, "
        f"{record.session_id} {record.protocol}"
    )


def loss(event: RankLost) -> str:
    """Why, of an eviction by whom, and how long the memory is held. Watches show when."""
    if event.held_until:
        return f"{event.reason}, held until {event.held_until}"
    if event.eviction is None:
        return event.reason
    why = f": {event.eviction.reason}" if event.eviction.reason else ""
    return f"{event.reason} by {event.eviction.by}{why}"


def _release_text(event: VersionReleased) -> str:
    version, previous = event.version, event.previous
    back = f", back from {previous.version}" if previous and previous.version > version else ""
    return f"{event.instance} released: version {version}{back} ({event.release.by})"


def ready_text(status: InstanceStatus) -> str:
    ranks = count(status.world_size, "rank")
    return f"{status.instance} ready: {ranks}, {size(status.nbytes)}, version {status.version}"


def instance_state(status: InstanceStatus, loaded: float | None) -> str:
    """For people. `loaded` is how much of it is there, if that is known."""
    state = state_of(status)
    return _loading(loaded) if state == LOADING else state


def why_not_ready(status: InstanceStatus, stays: bool = False) -> str:
    """For people, with the ranks that do not answer, and those that are held. If the text `stays`
    for a while, with the time until which they are, and not with what is left of it now.
    """
    held = status.held_summary if stays else ranks_held(status.held)
    silent = f"{named(status.unresponsive)} {UNRESPONSIVE}" if status.unresponsive else ""
    return "; ".join(filter(None, [status.summary, held, silent]))


def answering(record: RankRecord) -> str:
    since = record.unresponsive_since
    return f"has not answered since {since}" if since else "answers again"


def rank_state(record: RankRecord, progress: Arrived | None) -> str:
    if record.held:
        return f"{rank_state_of(record)} ({left(record.held_until)})"
    return (
        _loading(progress.fraction if progress else None)
        if record.state is RankState.LOADING and not record.unresponsive_since
        else rank_state_of(record)
    )


def _loading(fraction: float | None) -> str:
    return LOADING if fraction is None else f"{LOADING} {percent(fraction)}"


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


def instance_table(
    rows: Sequence[tuple[InstanceStatus, float | None]],
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows, of instances and how much of each is loaded. The zones and the labels have
    a column each where an instance has some.
    """
    zones = any(zones_of(status) for status, _ in rows)
    labels = any(status.labels for status, _ in rows)
    some = [*(["ZONES"] if zones else []), *(["LABELS"] if labels else [])]
    return (
        ("INSTANCE", "STATE", "RANKS", "MODEL", "VERSION", "SIZE", *some, "WHY NOT READY"),
        [instance_row(status, loaded, zones, labels) for status, loaded in rows],
    )


def instance_row(
    status: InstanceStatus, loaded: float | None = None, zones: bool = False, labels: bool = False
) -> list[str]:
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
        *([some_of(zones_of(status))] if zones else []),
        *([labels_text(status.labels) or "-"] if labels else []),
        why_not_ready(status),
    ]


_RANK_COLUMNS = (
    "RANK",
    "STATE",
    "VERSION",
    "PROCESS",
    "LOCATION",
    "DEVICE",
    "SESSION",
    "PROTOCOL",
    "TENSORS",
    "SIZE",
    "SINCE",
)
TENSOR_COLUMNS = ("TENSOR", "DTYPE", "SHAPE", "SIZE", "BOX")
FLOW_COLUMNS = ("READS FROM", "READ BY")


def rank_table(
    rows: Sequence[tuple[RankRecord, Arrived | None]],
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows, of ranks and how far each is. The location has a column where one is
    known.
    """
    known = any(record.location for record, _ in rows)
    left_out = "" if known else "LOCATION"
    return (
        tuple(name for name in _RANK_COLUMNS if name != left_out),
        [
            [
                cell
                for name, cell in zip(_RANK_COLUMNS, rank_row(*row), strict=True)
                if name != left_out
            ]
            for row in rows
        ],
    )


def rank_row(record: RankRecord, progress: Arrived | None = None) -> list[str]:
    return [
        str(record.rank),
        rank_state(record, progress),
        str(record.version),
        f"{record.host}:{record.pid or '-'}",
        str(record.location) or "-",
        record.device,
        record.session_id,
        _way(record),
        f"{record.manifest.tensors:,}",
        size(record.manifest.nbytes),
        record.registered_at,
    ]


def _way(record: RankRecord) -> str:
    """The protocol, and the network cards that it goes over."""
    return f"{record.protocol} {some_of(record.rails)}" if record.rails else record.protocol


def registration(seconds: float) -> str:
    """What the transfer engine took to register memory, where it is worth a word."""
    return f", {seconds:.1f} s to register memory" if seconds >= _LONG_S else ""


def origin(seeded: Seeded | None) -> str:
    """Where the weights of a rank that starts from peers have come from."""
    if seeded is None:
        return ""
    if seeded.adopted is not None:
        return f", adopted from {seeded.adopted.record.key.removeprefix(ENGINES)}"
    if seeded.report is None:
        return ", read from the files"
    sources = [share.name.removeprefix(ENGINES) for share in seeded.report.shares if share.nbytes]
    return f", copied from {' and '.join(sources)}"


def tensor_rows(manifest: Manifest) -> list[list[str]]:
    return [
        [entry.name, entry.dtype, shape_text(entry.shape), size(entry.nbytes), _box(entry)]
        for entry in manifest.tensors
    ]


def _box(entry: TensorEntry) -> str:
    """Which part of the whole it is, along each dimension from where up to where."""
    if entry.opaque:
        return "-"
    if entry.slices is None and entry.shape == entry.global_shape:
        return "whole"
    along = ("+".join(f"{start}:{stop}" for start, stop in some) for some in entry.along)
    return f"[{', '.join(along)}] of {shape_text(entry.global_shape)}"
