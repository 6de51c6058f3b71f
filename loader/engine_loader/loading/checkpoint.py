"""`EngineReader`: running ranks as a checkpoint that `torch.distributed.checkpoint.load` reads,
into any layout.

What there is comes from the manifests in etcd, the bytes come through `load`, with its failover and
its checks. Used by every process of the job that loads; each reads what it needs, all in the newest
version that any of them has seen.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError, TornRead, VersionUnavailable
from engine_loader.loading.load import load
from engine_loader.loading.report import LoadReport
from engine_loader.loading.together import load_together
from engine_loader.options import LoadOptions, refuse
from engine_loader.planning.boxes import Box
from engine_loader.planning.matching import entry_box
from engine_loader.sources.catalogue import Catalogue, read_catalogue
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.regions import Shard, dtype_named, strides_of
from engine_loader.tensors.state_dict import decode_value
from engine_loader.tensors.usable import is_dense
from engine_registry import Registry, TensorEntry
from engine_registry.errors import RecordDamaged, RegistryError
from engine_registry.watching.waiting import Wanted

_REFUSED = {
    "version": "leave it out: all processes load the newest version that any has found",
    "contents": "leave it out: all processes load the contents of that version",
    "partial": "leave it out: the source may always have more tensors",
}
_Wanted = tuple[int, tuple[str, ...]]  # a version, and the contents of its ranks


@dataclass
class _Target:
    """One tensor that is filled, by way of `buffer` if there is one.

    `items` are what the planner calls its parts.
    """

    name: str
    tensor: torch.Tensor
    shard: Shard | None
    items: list[tuple[ReadItem, torch.Tensor]]
    buffer: torch.Tensor | None = None


class _Unknown(Metadata):
    """Stands for metadata that could not be read. Torch would log an error of `read_metadata` with
    its traceback as if nothing had happened, and raise another one without its type.
    """

    def __init__(self, why: Exception) -> None:
        self._why = why

    @property
    def state_dict_metadata(self) -> dict[str, STORAGE_TYPES]:  # type: ignore[override]
        raise self._why


class EngineReader(StorageReader):
    """`dcp.load(state_dict, storage_reader=EngineReader(registry, engine, "qwen-a"))`.

    `source` is as in `load`. Tensors without a box, see `publish`, are taken from the source's rank
    `rank`: by default that of this process in its job, if that has as many as the source. `reports`
    has what the loads did.

    What `load` raises arrives, by rank, in the `failures` of torch's CheckpointException. All
    processes load the same version, or all fail: where the source is updated meanwhile, one that is
    alone loads the newer version, and several get TornRead.
    """

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        source: Wanted,
        *,
        rank: int | None = None,
        timeout_s: float = 60.0,
        options: LoadOptions = LoadOptions(),
    ) -> None:
        """Reads nothing yet.

        Args:
            registry: Finds the sources.
            engine: Reads their memory.
            source: As for `load`.
            rank: The source's rank that tensors without a box are taken from. By default that of
                this process in its job, if the job has as many ranks as the source.
            timeout_s: How many seconds to wait until a source is ready.
            options: How to choose, read and check; see LoadOptions. Without `version`, `contents`
                and `partial`.

        Raises:
            InvalidField: An option cannot be honoured.
        """
        refuse(options, "EngineReader", _REFUSED)
        self._registry = registry
        self._engine = engine
        self._source = source
        self._rank = rank
        self._timeout_s = timeout_s
        self._options = options
        self._catalogue: Catalogue | None = None
        self.reports: list[LoadReport] = []

    # -- what there is
    # ----------------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A checkpoint id is the name of an instance, to be read instead of the one before."""
        if checkpoint_id:
            self._source = os.fspath(checkpoint_id)
        self._catalogue = None
        self.reports = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch cannot make a reader from the name of an instance alone."""
        return False

    def read_metadata(
        self,
    ) -> (
        Metadata
    ):  # without keywords: there is no metadata of single ranks that could be asked for instead
        """Waits until all ranks are there.

        Why there is no metadata is raised when it is looked at.
        """
        try:
            catalogue = read_catalogue(
                self._registry, self._engine, self._source, self._rank, self._timeout_s
            )
            described: dict[str, STORAGE_TYPES] = {
                name: BytesStorageMetadata() for name in catalogue.values
            }
            described.update(
                {name: _metadata_of(entries) for name, entries in catalogue.tensors.items()}
            )
        except (RegistryError, LoaderError) as exc:
            return _Unknown(exc)
        self._catalogue = catalogue
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Raises why there is no metadata."""
        metadata.state_dict_metadata  # noqa: B018  (a property, see _Unknown)

    # -- one version for all processes
    # -------------------------------------------------------------------------------------------

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Puts into the plan which version and contents this process has found, so that all of a
        job load the same.
        """
        return replace(plan, storage_data=(self._known.version, self._known.contents))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The contents of the newest version that any of them has seen.

        A process that is alone may read newer ones.
        """
        newest: _Wanted | None = (
            max(plan.storage_data for plan in plans) if len(plans) > 1 else None
        )
        return [replace(plan, storage_data=newest) for plan in plans]

    @property
    def _known(self) -> Catalogue:
        if self._catalogue is None:
            raise LoaderError(
                "the metadata have not been read: give the reader to "
                "torch.distributed.checkpoint.load"
            )
        return self._catalogue

    # -- reading
    # ----------------------------------------------------------------------------------------------

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Done when it returns. Raises what `load` raises."""
        targets = self._targets(plan, planner)
        self._known.check_rank_known(one.name for one in targets)
        if plan.storage_data is not None:
            self._load_wanted(targets, plan.storage_data)
        else:
            self._load_newest(targets)
        for one in targets:
            if one.buffer is not None:
                with (
                    torch.inference_mode()
                ):  # it may have been made in this mode: torch refuses such writes outside of it
                    one.tensor.copy_(one.buffer)
            for item, part in one.items:
                planner.commit_tensor(item, part)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._saved(item.storage_index.fqn))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _load_wanted(self, targets: Sequence[_Target], wanted: _Wanted) -> None:
        try:
            self._load_all(targets, wanted[1], self._timeout_s)
        except VersionUnavailable as exc:
            raise TornRead(
                f"the weights changed after this load had begun ({exc}): load again", **exc.details
            ) from exc

    def _load_newest(self, targets: Sequence[_Target]) -> None:
        """Where the source changes or goes meanwhile, all is loaded again, and its values are those
        of that time.
        """
        tries = 0

        def load_all(wait_s: float) -> None:
            nonlocal tries
            tries += 1
            if tries > 1:
                self._catalogue = read_catalogue(
                    self._registry, self._engine, self._source, self._rank, wait_s
                )
            self._load_all(targets, self._known.contents, wait_s)

        load_together(load_all, self._timeout_s, "the metadata and the end of the load")

    def _load_all(self, targets: Sequence[_Target], contents: Sequence[str], wait_s: float) -> None:
        self.reports = [self._load(group, contents, wait_s) for group in _once_each(targets)]

    def _load(
        self, targets: Sequence[_Target], contents: Sequence[str], wait_s: float
    ) -> LoadReport:
        return load(
            self._registry,
            self._engine,
            self._source,
            rank=self._known.rank,
            tensors={one.name: one.tensor if one.buffer is None else one.buffer for one in targets},
            shards={one.name: one.shard for one in targets if one.shard is not None},
            timeout_s=wait_s,
            options=replace(self._options, contents=contents, partial=True),
        )

    def _saved(self, name: str) -> io.BytesIO:
        """What planners expect of a value: as torch saves it."""
        try:
            value = decode_value(self._known.values[name])
        except ValueError as exc:
            raise RecordDamaged(
                f"the value {name!r} of {self._known.instance} cannot be read: {exc}", name=name
            ) from exc
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        return stream

    def _targets(self, plan: LoadPlan, planner: LoadPlanner) -> list[_Target]:
        """The local tensors whose parts the plan names; where the planner has put something else in
        their place, those.
        """
        parts: defaultdict[tuple[str, tuple[int, ...]], list[tuple[ReadItem, torch.Tensor]]] = (
            defaultdict(list)
        )
        for item in plan.items:
            if item.type is LoadItemType.TENSOR:
                where = item.dest_index.fqn, tuple(item.dest_index.offset or ())
                parts[where].append((item, planner.resolve_tensor(item).detach()))
        targets: list[_Target] = []
        for (name, offsets), items in parts.items():
            entry = self._known.tensors[name][0]
            local = _local_tensor(planner, items)
            if local is not None:
                targets.append(_target(name, local, entry, offsets, items))
                continue
            for item, part in items:
                at = tuple(
                    start + ahead for start, ahead in zip(offsets, item.dest_offsets, strict=True)
                )
                targets.append(_target(name, part, entry, at, [(item, part)]))
        return targets


def _metadata_of(entries: Sequence[TensorEntry]) -> TensorStorageMetadata:
    """Tensors without a box are what they are on the first rank that has them. What no rank holds
    is listed as if one did: planners would leave it out without a word, `load` says that it is
    missing.
    """
    first = entries[0]
    some = [first] if first.opaque else [entry for entry in entries if not entry.opaque]
    boxes = dict.fromkeys(
        entry_box(entry) for entry in some if entry.global_shape == first.global_shape
    )
    missing = [Box((0,) * len(first.global_shape), first.global_shape)]
    for box in boxes:
        missing = [rest for part in missing for rest in part.minus(box)]
    boxes.update(dict.fromkeys(missing))
    chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape)) for box in boxes]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype_named(first.dtype)), torch.Size(first.global_shape), chunks
    )


def _local_tensor(
    planner: LoadPlanner, items: Sequence[tuple[ReadItem, torch.Tensor]]
) -> torch.Tensor | None:
    """The tensor that all of the items are parts of, and nothing else; None if there is none."""
    look_up = getattr(planner, "lookup_tensor", None)
    if look_up is None:
        return None
    local: torch.Tensor = look_up(items[0][0].dest_index).detach()
    for item, part in items:
        expected = local
        for axis, (start, size) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            expected = expected.narrow(axis, start, size)
        if (part.data_ptr(), part.shape, part.stride()) != (
            expected.data_ptr(),
            expected.shape,
            expected.stride(),
        ):
            return None
    return local if sum(part.numel() for _, part in items) >= local.numel() else None


def _target(
    name: str,
    tensor: torch.Tensor,
    entry: TensorEntry,
    offsets: tuple[int, ...],
    items: list[tuple[ReadItem, torch.Tensor]],
) -> _Target:
    shard = None if entry.opaque else Shard(entry.global_shape, offsets or (0,) * tensor.ndim)
    return _Target(name, tensor, shard, items, _buffer_for(tensor, entry))


@plain_torch()
def _buffer_for(tensor: torch.Tensor, entry: TensorEntry) -> torch.Tensor | None:
    """Memory in which the tensor lies as at its source; None where it lies so itself."""
    strides = entry.strides if entry.shape == tuple(tensor.shape) else None
    if is_dense(tensor) and strides_of(tensor) == strides:
        return None
    if strides is None:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def _once_each(targets: Sequence[_Target]) -> list[list[_Target]]:
    """In groups in which no name comes twice; those without a box in groups of their own, as they
    come from one rank only.
    """
    groups: dict[tuple[bool, int], list[_Target]] = {}
    seen: defaultdict[str, int] = defaultdict(int)
    for one in targets:
        groups.setdefault((one.shard is None, seen[one.name]), []).append(one)
        seen[one.name] += 1
    return list(groups.values())
