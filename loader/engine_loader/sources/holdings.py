"""What the ranks of a source hold, as their manifests in etcd say: for loads that go by what the
source states of each tensor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from engine_loader.engines.base import Engine
from engine_loader.errors import WeightsMismatch, listed
from engine_loader.options import LoadOptions, number_of
from engine_loader.sources.manifests import fetch_manifests
from engine_loader.sources.released import pinned
from engine_loader.sources.search import Search
from engine_registry import Manifest, Place, RankRecord, Registry, TensorEntry
from engine_registry.schema.numbers import seconds, whole_or_none
from engine_registry.watching.waiting import Wanted


@dataclass(frozen=True)
class Holdings:
    """`rank` is the one that this process stands for, if that is known; what it has comes first."""

    instance: str
    world_size: int
    version: int
    contents: tuple[str, ...]  # by rank, see `load`
    rank: int | None
    tensors: Mapping[str, Sequence[TensorEntry]]
    values: Mapping[str, Any]

    def states_box_of(self, name: str) -> bool:
        """Whether the ranks that have it say which part of the whole that is.

        True where nobody has it.
        """
        return not any(entry.opaque for entry in self.tensors.get(name, ())[:1])

    def check_rank_known(self, names: Iterable[str]) -> None:
        """WeightsMismatch if any of these is without a box, so that only the same rank has it, and
        we do not know which that is.
        """
        opaque = [name for name in names if not self.states_box_of(name)]
        if opaque and self.rank is None:
            raise WeightsMismatch(
                f"{len(opaque)} tensors of {self.instance} do not say which part of the whole they "
                "are, so they only load into the same rank, and this is not a job of "
                f"{self.world_size} ranks as the source is: {listed(opaque)}",
                "say `rank`, or publish them with `shards` or publish_state_dict",
                source=self.instance,
                problems=opaque,
            )


def read_holdings(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    rank: int | None,
    timeout_s: float,
    options: LoadOptions,
) -> Holdings:
    """Waits until all ranks of the source are there. Without `rank` this process stands for its
    rank in its job, if that has as many as the source. Of `options`, the version, the contents and
    `cancel` count. Raises what `load` does before it compares.
    """
    rank, deadline = whole_or_none("rank", rank), time.monotonic() + seconds("timeout_s", timeout_s)
    own, size = (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )
    like = own if rank is None else rank
    options = pinned(registry, source, options, max(0.0, deadline - time.monotonic()))
    records = ranks_of_best(registry, engine, source, like, deadline, options)
    first = records[0]
    if rank is None and size == first.world_size:
        rank = own
    tensors: defaultdict[str, list[TensorEntry]] = defaultdict(list)
    values: dict[str, Any] = {}
    ordered = sorted(records, key=lambda record: record.rank != rank)
    for manifest in fetch_manifests(registry, ordered):
        for entry in manifest.tensors:
            tensors[entry.name].append(entry)
        values = {**manifest.values, **values}
    contents = tuple(record.content for record in records)
    return Holdings(
        first.instance, first.world_size, first.version, contents, rank, dict(tensors), values
    )


def ranks_of_best(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    rank: int,
    deadline: float,
    options: LoadOptions,
) -> Sequence[RankRecord]:
    """All ranks of the instance that is best to read from, by rank. Waits until `deadline`; raises
    what `load` does.

    Ranks that cannot be reached from here may do no harm, as long as `rank` can: tensors without a
    box come from one rank.
    """
    version, contents = number_of(options), options.contents
    search = Search(
        registry,
        engine,
        source,
        Place(rank),
        Manifest((), ()),
        boxes=True,
        version=version,
        contents=contents,
        cancel=options.cancel,
    )
    found = search.find(deadline)
    if found.instances:
        return found.instances[0].teams[0]
    name = found.alike[0].teams[0][0].instance
    return registry.instance(name).as_of(version, contents).records
