"""`load`: tensors are filled with the weights of running ranks.

A load finds sources, chooses among them, and makes an `Attempt`, which plans, transfers and
verifies. Where that fails, it makes another one, with what has come so far.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch

from engine_loader import metrics
from engine_loader.engines.base import Engine, lend, with_regions
from engine_loader.errors import Cancelled, SourceLost, TornRead
from engine_loader.loading.attempts import Attempts
from engine_loader.loading.finder import Finder
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.loading.released import load_released
from engine_loader.loading.report import LoadReport
from engine_loader.options import RELEASED, LoadOptions, number_of
from engine_loader.planning.plan import Planner
from engine_loader.publishing.replica import Replica, Republication, as_replica
from engine_loader.sources.entrance import Entrance
from engine_loader.sources.search import Search
from engine_loader.tensors.cuda import on_default_stream, wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard
from engine_loader.tensors.uses import USES
from engine_loader.transfer.pace import pace_for, pace_in_chain
from engine_loader.transfer.progress import Progress
from engine_loader.transfer.received import Received
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.errors import InvalidField
from engine_registry.schema.numbers import seconds
from engine_registry.telemetry.logs import fields
from engine_registry.watching.waiting import Wanted

log = logging.getLogger(__name__)


def load(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    tensors: Mapping[str, torch.Tensor],
    rank: int | None = None,
    shards: Mapping[str, Shard] | None = None,
    timeout_s: float = 60.0,
    world_size: int | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    publish: bool | str | Replica = False,
    options: LoadOptions = LoadOptions(),
) -> LoadReport:
    """Fills tensors in place with the weights of running ranks.

    The tensors are those of `rank`, or any parts of the whole. They come from up to
    `options.max_sources` ranks with the same content of the same model, at once. Sources have the
    same content where digests prove it, or where one has loaded from the other.

    DTensors, and tensors with a shard, say which box of the whole they are. If all do, ranks of
    another layout may be sources, and the source may have more tensors. `rank` is then only a hint
    which rank may hold the same.

    For a ModelIdentity and a `rank`, that rank is enough, of any instance of the model, whatever
    else of it is there. A rank that is still loading is also a source then, for the parts that it
    has by then, unless `options.pipelined` is False or digests are verified. With `publish`, the
    rank that is filled becomes such a source itself. So many ranks that load at once, each from
    the one before it, take little longer than one.

    With `options.reuse`, blocks that the tensors hold already are not read. With `options.base`,
    only changes are read where sources keep them. With `options.also_from`, ranks with other
    contents bring blocks that they hold as well.

    Nobody else may fill the tensors meanwhile. Published tensors are filled only inside their
    publication's `update()`. Nothing stays published if the load raises.

    Args:
        registry: Finds the sources.
        engine: Reads their memory.
        source: The name of an instance, several names, or a ModelIdentity, which stands for any
            instance that serves it.
        tensors: The tensors to fill, by name. A `Destination` saves the inspection of tensors that
            are filled again and again.
        rank: The rank of the source whose tensors these are. It may be None if every tensor says
            which box of the whole it is.
        shards: Which part of the whole a tensor is, by name.
        timeout_s: How many seconds to wait until a source is ready. From then on the load takes as
            long as bytes keep coming (see `Pace`).
        world_size: How many ranks the instance has that `rank` is counted in. Only for tensors that
            do not say which box they are.
        topology: The place of `rank` along each parallel axis: (index, size) by axis. Only for
            tensors that do not say which box they are.
        publish: Publishes the rank that is filled: the name of an instance, a Replica, or True for
            a name that follows from the source's. The report's `publication` is the caller's to
            close.
        options: How to choose, read and check; see LoadOptions.

    Returns:
        What the load did.

    Raises:
        WeightsMismatch: Source and destination differ. No byte has moved.
        DigestsMissing: Digests were to be verified, and the source has none. No byte has moved.
        SourceLost: Every source went away. The tensors may hold a part; `details["complete"]` names
            those that are whole.
        Stalled: The last source is there, and nothing comes from it. As SourceLost.
        TornRead: The weights changed in every try. As SourceLost.
        Cancelled: `options.cancel` was set. As SourceLost.
        DigestMismatch: Tensors are not what their source published.
        VersionUnavailable: The version or the contents are not served, or no version is released.
        SourceUnreachable: There are sources, and this engine can read none of them.
        MemoryInUse: The memory is published, or another load fills it.
        TensorsUnusable: Tensors cannot be filled, or were given other memory meanwhile.
        InvalidField: An argument is not valid; `details["field"]` names it.
        RegistryError: What `Registry.resolve` raises; with `publish`, what `publish` raises.
    """
    timeout_s = seconds("timeout_s", timeout_s)
    if options.version == RELEASED:
        return load_released(
            registry,
            source,
            options,
            timeout_s,
            lambda pinned, wait_s: load(
                registry,
                engine,
                source,
                tensors=tensors,
                rank=rank,
                shards=shards,
                timeout_s=wait_s,
                world_size=world_size,
                topology=topology,
                publish=publish,
                options=pinned,
            ),
        )
    place = _place(rank, world_size, topology)
    destination = Destination.of(tensors, shards)
    destination.check_writable()
    if not destination.manifest.tensors:
        raise InvalidField(
            "there are no tensors to fill", "name one at least in `tensors`", field="tensors"
        )
    if not source:
        raise InvalidField("no instance to load from", "name one in `source`", field="source")
    if place is None and not destination.has_boxes:
        first = next(entry.name for entry in destination.manifest.tensors if entry.opaque)
        raise InvalidField(
            f"{first} does not say which part of the whole it is",
            "say it in `shards`, or say from which `rank` it comes",
            field="rank",
        )
    replica = as_replica(publish, source)
    pace = options.pace or pace_for(engine.protocol)
    costs = replace(pace.costs, strided=engine.strides, scattered=engine.scatters)
    pace = replace(pace, costs=costs)
    if replica is not None:
        pace = pace_in_chain(pace, destination.manifest.nbytes)
    job = Job(
        registry=registry,
        engine=engine,
        destination=destination,
        rank=place.rank if place is not None else None,
        verify=options.verify,
        pace=pace,
        on_progress=options.progress or _ignore,
        cancel=options.cancel or threading.Event(),
        reuse=options.reuse or options.base is not None,
        base=options.base or (),
        also_from=options.also_from,
        max_sources=options.max_sources,
    )
    destination.check_in_place(
        "tensors have other memory than when their Destination was made", "make a new one"
    )
    with ExitStack() as undo:
        filling = undo.enter_context(USES.fill(f"a load of {_name_of(source)}", destination.runs))
        dst = destination.manifest
        began = time.monotonic()
        dst = with_regions(dst, lend(engine, undo, *dst.regions, owner=destination))
        register_s = time.monotonic() - began
        metrics.REGISTER_S.observe(register_s)
        undo.enter_context(on_default_stream(job.device))
        # Nothing is on its way to the tensors at the end, nor at the beginning.
        undo.callback(wait_for, destination.devices)
        wait_for(destination.devices)
        republication = None
        if replica is not None:
            republication = Republication(
                registry, engine, replica, job.rank, destination, pace.chunk_nbytes, filling
            )
        lost = LostSources()
        entrance = Entrance(registry)
        undo.callback(entrance.close)
        report = _fill(
            Attempts(
                job=job,
                deadline=time.monotonic() + timeout_s,
                finder=Finder(
                    job, _search(job, source, place, options), lost, republication is not None
                ),
                entrance=entrance,
                lost=lost,
                planner=Planner(dst, pace.costs, destination.has_boxes or options.partial),
                received=Received("", dst),
                republication=republication,
            )
        )
        return replace(report, register_s=register_s)


def _place(
    rank: int | None, world_size: int | None, topology: Mapping[str, tuple[int, int]] | None
) -> Place | None:
    if rank is not None:
        return Place(rank, world_size, topology or {})
    for name, value in {"world_size": world_size, "topology": topology}.items():
        if value is not None:
            raise InvalidField(
                f"`{name}` is given without the rank that it is about",
                f"say `rank` as well, or leave `{name}` out",
                field=name,
            )
    return None


def _search(job: Job, source: Wanted, place: Place | None, options: LoadOptions) -> Search:
    dst = job.destination.manifest
    by_rank = isinstance(source, ModelIdentity) and place is not None
    hop_nbytes = max(8 * job.pace.chunk_nbytes, job.pace.hop_nbytes)
    return Search(
        job.registry,
        job.engine,
        source,
        place,
        dst,
        job.destination.has_boxes,
        number_of(options),
        options.contents,
        options.max_sources,
        by_rank,
        pipelined=by_rank and options.pipelined and options.verify != "digest",
        hop=hop_nbytes / max(dst.nbytes, 1),
        cancel=options.cancel,
    )


def _fill(attempts: Attempts) -> LoadReport:
    """Makes the attempts, and counts the load however it ends."""
    try:
        report = attempts.until_filled()
    except BaseException as exc:
        metrics.LOADS.inc(metrics.outcome_of(exc))
        if isinstance(exc, SourceLost | TornRead | Cancelled):
            exc.details.setdefault("complete", [])
        if attempts.republication is not None:
            attempts.republication.close()
        raise
    metrics.count_loaded(report.nbytes, report.seconds, report.skipped_nbytes, report.lent_nbytes)
    log.info(
        "loaded %d bytes of %s version %d in %.3f s",
        report.nbytes,
        report.instance,
        report.version,
        report.seconds,
        extra=fields("loaded", **report.facts()),
    )
    return report


def _name_of(source: Wanted) -> str:
    return (
        source
        if isinstance(source, str)
        else str(source)
        if isinstance(source, ModelIdentity)
        else " or ".join(source)
    )


def _ignore(_: Progress) -> None:
    pass
