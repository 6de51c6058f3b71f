"""`EngineReader`: running ranks as a checkpoint that `torch.distributed.checkpoint.load` reads,
into any layout.

What there is comes from the manifests in etcd, the bytes come through `load`, with its failover and
its checks. Used by every process of the job that loads; each reads what it needs, all in the newest
version that any of them has seen.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError, TornRead, VersionUnavailable
from engine_loader.loading.load import load
from engine_loader.loading.metadata import UnknownMetadata, metadata_of
from engine_loader.loading.report import LoadReport
from engine_loader.loading.targets import Target, once_each, targets_of
from engine_loader.loading.together import load_together
from engine_loader.options import LoadOptions, refuse
from engine_loader.sources.holdings import Holdings, read_holdings
from engine_loader.tensors.state_dict import decode_value
from engine_registry import Registry
from engine_registry.errors import RecordDamaged, RegistryError
from engine_registry.watching.waiting import Wanted

_REFUSED = {
    "version": "leave it out to load the newest version that any process has found, or say "
    "released",
    "contents": "leave it out: all processes load the contents of that version",
    "partial": "leave it out: the source may always have more tensors",
}
_Wanted = tuple[int, tuple[str, ...]]  # a version, and the contents of its ranks


class EngineReader(StorageReader):
    """Reads running ranks as a checkpoint of `torch.distributed.checkpoint.load`.

    All processes of a job load the same version, or all fail. If the source is updated meanwhile,
    a process that is alone loads the newer version, and several get TornRead. Errors of `load`
    arrive, by rank, in the `failures` of torch's CheckpointException.

    Attributes:
        reports: What the loads did.

    Example:
        `dcp.load(state_dict, storage_reader=EngineReader(registry, engine, "qwen-a"))`
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
            options: How to choose, read and check; see LoadOptions. Without `contents` and
                `partial`, and with no `version` but `"released"`.

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
        self._holdings: Holdings | None = None
        self.reports: list[LoadReport] = []

    # -- what there is
    # ----------------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A checkpoint id is the name of an instance, to be read instead of the one before."""
        if checkpoint_id:
            self._source = os.fspath(checkpoint_id)
        self._holdings = None
        self.reports = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch cannot make a reader from the name of an instance alone."""
        return False

    # Takes no keywords: single ranks have no metadata that could be asked for instead.
    def read_metadata(self) -> Metadata:
        """Waits until all ranks are there.

        If there is no metadata, the reason is raised when it is looked at.
        """
        try:
            holdings = read_holdings(
                self._registry,
                self._engine,
                self._source,
                self._rank,
                self._timeout_s,
                self._options,
            )
            metadata = metadata_of(holdings)
        except (RegistryError, LoaderError) as exc:
            return UnknownMetadata(exc)
        self._holdings = holdings
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Raises why there is no metadata."""
        metadata.state_dict_metadata  # noqa: B018  (a property, see UnknownMetadata)

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
    def _known(self) -> Holdings:
        if self._holdings is None:
            raise LoaderError(
                "the metadata have not been read",
                "give the reader to torch.distributed.checkpoint.load",
            )
        return self._holdings

    # -- reading
    # ----------------------------------------------------------------------------------------------

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Done when it returns. Raises what `load` raises."""
        targets = targets_of(plan, planner, self._known)
        self._known.check_rank_known(one.name for one in targets)
        if plan.storage_data is not None:
            self._load_wanted(targets, plan.storage_data)
        else:
            self._load_newest(targets)
        for one in targets:
            if one.buffer is not None:
                # The tensor may have been made in this mode. Torch refuses writes outside of it.
                with torch.inference_mode():
                    one.tensor.copy_(one.buffer)
            for item, part in one.items:
                planner.commit_tensor(item, part)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._saved(item.storage_index.fqn))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _load_wanted(self, targets: Sequence[Target], wanted: _Wanted) -> None:
        try:
            self._load_all(targets, wanted[1], self._timeout_s)
        except VersionUnavailable as exc:
            raise TornRead(
                f"the weights changed after this load had begun ({exc})",
                "load again",
                **exc.details,
            ) from exc

    def _load_newest(self, targets: Sequence[Target]) -> None:
        """Where the source changes or goes meanwhile, all is loaded again, and its values are those
        of that time.
        """
        tries = 0

        def load_all(wait_s: float) -> None:
            nonlocal tries
            tries += 1
            if tries > 1:
                self._holdings = read_holdings(
                    self._registry,
                    self._engine,
                    self._source,
                    self._rank,
                    wait_s,
                    self._options,
                )
            self._load_all(targets, self._known.contents, wait_s)

        load_together(load_all, self._timeout_s, "the metadata and the end of the load")

    def _load_all(self, targets: Sequence[Target], contents: Sequence[str], wait_s: float) -> None:
        self.reports = [self._load(group, contents, wait_s) for group in once_each(targets)]

    def _load(
        self, targets: Sequence[Target], contents: Sequence[str], wait_s: float
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
