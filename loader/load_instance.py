"""Several ranks into one process, all of one version."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import torch

from loader.engine import Engine
from loader.errors import TornRead, VersionUnavailable
from loader.load import TRIES, Verify, load
from loader.regions import Shard
from loader.report import LoadReport
from loader.transfer import OnProgress
from registry import Registry
from registry.errors import InvalidField
from registry.logs import fields
from registry.waiting import Wanted

log = logging.getLogger(__name__)


def load_instance(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    shards: Mapping[int, Mapping[str, Shard]] | None = None,
    timeout_s: float = 60.0,
    verify: Verify = "header",
    max_sources: int = 4,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> dict[int, LoadReport]:
    """As `load`, for the tensors of several ranks, by rank, one after another: all of one version, or an error.

    Where the source is updated in between all are loaded again.
    """
    for tries_left in reversed(range(TRIES)):
        reports: dict[int, LoadReport] = {}
        version: int | None = None
        try:
            for rank, of_rank in tensors.items():
                reports[rank] = load(
                    registry,
                    engine,
                    source,
                    rank=rank,
                    tensors=of_rank,
                    shards=(shards or {}).get(rank),
                    timeout_s=timeout_s,
                    verify=verify,
                    version=version,
                    max_sources=max_sources,
                    progress=progress,
                    cancel=cancel,
                )
                version = reports[rank].version
            return reports
        except VersionUnavailable as exc:
            if not tries_left:
                raise TornRead(f"the weights changed between one rank and the next, in {TRIES} tries: {exc}") from exc
            log.info("%s; loading all ranks again", exc, extra=fields("instance_retry", tries_left=tries_left))
    raise InvalidField("there are no ranks to load", field="tensors")
