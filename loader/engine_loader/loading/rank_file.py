"""One rank's weights, copied as they are there, into memory and into a file. Used by `fetch` and by
the command `engines load`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError
from engine_loader.files.disk import read_into
from engine_loader.files.folder import files_of
from engine_loader.files.format import check_storable
from engine_loader.files.memory import allocate_like, shards_like
from engine_loader.files.stored import Files
from engine_loader.files.weights import write_weights
from engine_loader.files.writing import room_for
from engine_loader.loading.load import load
from engine_loader.loading.report import LoadReport
from engine_loader.options import LoadOptions
from engine_loader.publishing.replica import Replica
from engine_loader.tensors.dtypes import dtype_name
from engine_registry import RankRecord, Registry
from engine_registry.telemetry.logs import fields
from engine_registry.watching.waiting import Wanted

log = logging.getLogger(__name__)


def copy_rank(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    records: Sequence[RankRecord],
    rank: int,
    path: Path | None,
    *,
    timeout_s: float,
    publish: Replica | None = None,
    options: LoadOptions,
) -> LoadReport:
    """Loads one of the `records` from `source` into new memory, and writes it to `path`.

    With `options.reuse`, what an older file at `path` holds is not loaded. With `publish`, from any
    rank with the contents of the records, and it is served on. Raises what `load` raises, and
    WeightsFileInvalid if the file cannot be written: before a byte moves, where that is known then.
    """
    record = records[rank]
    manifest = registry.manifest(record)
    if path is not None:
        check_storable(path, {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors})
    with room_for(path, manifest.nbytes) if path is not None else nullcontext():
        tensors = allocate_like(manifest)
        if options.reuse and path is not None and path.exists():
            _fill_from_file(tensors, path)
        report = load(
            registry,
            engine,
            source if publish is None else record.model,
            rank=rank,
            tensors=tensors,
            shards=shards_like(manifest),
            timeout_s=timeout_s,
            world_size=record.world_size,
            topology=record.topology,
            publish=publish or False,
            options=options
            if publish is None
            else replace(options, contents=[one.content for one in records]),
        )
        if path is not None:
            try:
                write_weights(tensors, path)
            except BaseException:
                if report.publication is not None:
                    report.publication.close()
                raise
    return report


def _fill_from_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """What the file has of the same names, dtypes and shapes. A file that cannot be read is no
    error, as it is to be replaced.
    """
    try:
        (layout,) = Files(files_of(path)).layouts()
        some = {
            name: tensor
            for name, tensor in tensors.items()
            if layout.get(name) == (dtype_name(tensor.dtype), tuple(tensor.shape))
        }
        read_into(path, some)
    except LoaderError as exc:
        log.info("nothing of %s is used: %s", path, exc, extra=fields("file_unused", error=exc))
