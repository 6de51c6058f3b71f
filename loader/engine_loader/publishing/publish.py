"""Makes a rank's weights readable: registers their memory, writes the header, and only then the
record.

Leaving goes the other way round: out of the registry first, then the header is erased, then the
memory is given back.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from engine_loader import metrics
from engine_loader.digests.table import DigestCell, algorithm_for
from engine_loader.engines.base import Engine, offer, with_regions
from engine_loader.engines.region_book import Regions
from engine_loader.errors import LoaderError, TensorsUnusable, listed
from engine_loader.options import PublishOptions, refuse
from engine_loader.planning.content import content_of
from engine_loader.publishing.header import Header, HeaderCell
from engine_loader.tensors.cuda import can_be_opened_by_others, to_register, wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.regions import Shard
from engine_loader.tensors.state_dict import encode_values, flatten, whole
from engine_loader.tensors.uses import USES, Use
from engine_registry import (
    ModelIdentity,
    RankRecord,
    RankState,
    Registration,
    RegistrationState,
    Registry,
    new_incarnation,
)
from engine_registry.errors import RegistryError
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.keys import check_rank
from engine_registry.schema.numbers import seconds
from engine_registry.schema.record import check_topology, new_content
from engine_registry.telemetry.logs import fields
from engine_registry.telemetry.metrics import enabled

log = logging.getLogger(__name__)


class Publication:
    """A rank's weights while peers may read them.

    Holds the tensors, so their memory stays as long as it is offered.
    """

    def __init__(
        self,
        registry: Registry,
        registration: Registration,
        header: HeaderCell,
        digests: DigestCell | None,
        weights: Destination,
        regions: Regions,
        use: Use,
        undo: ExitStack,
    ) -> None:
        """`regions`: those of its manifest."""
        self.regions = regions
        self._registry = registry
        self._registration = registration
        self._header = header
        self._digests = digests
        self._weights = weights
        self._use = use
        self._undo = undo
        self._updating = threading.Lock()
        self._closing = threading.Lock()
        self._leaving = False  # `close` has begun
        self._closed = False

    @property
    def record(self) -> RankRecord:
        """The record as the rank wants it in etcd."""
        return self._registration.record

    @property
    def state(self) -> RegistrationState:
        """Whether the rank is registered, and what the caller must do."""
        return self._registration.state

    @property
    def registration(self) -> Registration:
        """The handle on the registration, with the reason of a loss."""
        return self._registration

    @property
    def version(self) -> int:
        """Of the weights as they were last registered: that of `publish`, and one more after each
        `update`.
        """
        return self.record.version

    @property
    def content(self) -> str:
        """What the weights are, as 32 hexadecimal digits: publications and loads with equal
        contents have the same bytes.
        """
        return self.record.content

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.record.state.value
        return (
            f"<Publication {self.record.key}: {state}, version {self.version}, content "
            f"{self.content[:8]}…>"
        )

    @contextmanager
    def update(self) -> Iterator[None]:
        """Change the weights in place inside this block. Readers that overlap with it notice;
        afterwards the version is one more.

        If the block raises, the weights are in doubt: they stay marked as being changed, and nobody
        loads them, until another `update` has ended well. So they do where a tensor was given other
        memory, as by `module.to(…)` or `weight.data = …`: TensorsUnusable names it. An etcd that is
        away does not disturb an update: the header tells readers.

        Raises MemoryInUse where another publication serves the same memory, or a load still fills
        it at the end.
        """
        if self._leaving:
            raise LoaderError(
                f"{self.record.key} is closed: nobody reads it any more, so there is nothing "
                "to update"
            )
        if not self._updating.acquire(blocking=False):
            raise LoaderError(f"{self.record.key} is being updated already: end that update first")
        try:
            before = self.record
            USES.change(self._use)
            self._header.write(Header(before.incarnation, 2 * before.version + 1, before.content))
            self._tell(state=RankState.UPDATING)
            yield
            self._check_in_place()
            wait_for(self._weights.devices)
            USES.keep(self._use)
            content = self._take_digests() or new_content()
            self._header.write(Header(before.incarnation, 2 * (before.version + 1), content))
            self._tell(version=before.version + 1, content=content, state=RankState.READY)
        finally:
            self._updating.release()

    def mark(self, marks: bytes) -> None:
        """Which blocks can be read of weights that are still being loaded.

        They can be from now on.
        """
        self._header.mark(marks)

    def complete(self, *, filled_by: Use, content: str | None = None) -> None:
        """The weights have been loaded: all of them can be read.

        `content` is the source's where it has stated one; else digests prove one, or it is new.
        """
        before = self.record
        self._check_in_place()
        wait_for(self._weights.devices)
        proven = self._take_digests()
        content = content or proven or before.content
        USES.keep(self._use, filled_by)
        self._header.write(Header(before.incarnation, 2 * before.version, content))
        self._tell(content=content, state=RankState.READY)

    def _take_digests(self) -> str:
        """Computes them anew; the content that they prove, or nothing where there are none."""
        if self._digests is None:
            return ""
        return content_of(
            self._weights.manifest,
            self._digests.write(self._weights.parts),
            self._digests.table.algorithm,
        )

    def _check_in_place(self) -> None:
        self._weights.check_in_place(
            f"tensors of {self.record.key} have other memory than the one that peers read, "
            "so the rank stays marked as being "
            "changed: copy into them in place, or close the publication and publish again"
        )

    def _tell(
        self, *, version: int | None = None, content: str | None = None, state: RankState
    ) -> None:
        try:
            self._registration.update(version=version, content=content, state=state)
        except (
            RegistryError
        ) as exc:  # readers go by the header, so the weights are safe whatever the record says
            log.warning(
                "the record of %s could not be changed: %s",
                self.record.key,
                exc,
                extra=fields("record_not_changed", key=self.record.key, error=exc),
            )

    def drain(self, timeout_s: float) -> bool:
        """Leaves without hurting anybody: no new load begins, the running ones may finish, then the
        publication closes.

        Returns False if after `timeout_s` some loads were still running; they lose their source
        then. Closing is not held up by an etcd that is away.
        """
        pulls, timeout_s = 0, seconds("timeout_s", timeout_s)
        try:
            self._registration.update(state=RankState.DRAINING)
            if self.state is RegistrationState.REGISTERED:
                pulls = self._registry.wait_for_no_pulls(
                    self.record.instance, self.record.rank, timeout_s
                )
        except RegistryError as exc:
            log.warning(
                "%s closes without waiting for its readers: %s",
                self.record.key,
                exc,
                extra=fields("drain_skipped", key=self.record.key, error=exc),
            )
        if pulls:
            log.warning(
                "%s closes while %d loads still read from it",
                self.record.key,
                pulls,
                extra=fields("drain_cut_short", key=self.record.key, pulls=pulls),
            )
        self.close()
        return not pulls

    def close(self, reason: str = WITHDRAWN) -> None:
        """Withdraws the rank, then gives its memory back; any number of times, from any thread.
        Watchers are given the reason.

        If it is interrupted, calling it again does the rest.
        """
        self._leaving = True
        with self._closing:
            # These are undone below as well. But an interrupt may fall between taking a step off
            # that list and doing it.
            self._registration.withdraw(reason)
            self._header.retire()
            USES.end(self._use)
            self._undo.close()
            self._closed = True

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(
                f"publication of {self.record.key} was never closed",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


def publish(
    registry: Registry,
    engine: Engine,
    *,
    instance: str,
    rank: int,
    world_size: int,
    tensors: Mapping[str, torch.Tensor],
    model: ModelIdentity,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    options: PublishOptions = PublishOptions(),
) -> Publication:
    """Offers the tensors of a rank to loaders.

    They are offered until the publication is closed or the process ends. DTensors say themselves
    which box of the whole they are, and `shards` says it of other tensors. A tensor without a box
    only loads into the same rank. Nothing stays registered if the call raises, here or in etcd.

    Args:
        registry: Where the rank is registered.
        engine: Serves the memory.
        instance: The name of the instance.
        rank: The world rank of this process in the instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        tensors: The tensors, by name. A `Destination` keeps its inspection of them.
        model: The model that the instance runs.
        shards: Which box of the whole a tensor is, by name.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        options: How to publish; see PublishOptions.

    Returns:
        The publication, which the caller closes.

    Raises:
        TensorsUnusable: Tensors cannot be served, or values cannot be encoded.
        EngineFailed: The engine cannot register the memory.
        MemoryInUse: A load fills the memory.
        InvalidField: An argument is not valid; `details["field"]` names it.
        RankConflict: Another process holds the rank.
        InstanceMismatch: The rank disagrees with its siblings.
        KeeperFailed: The process that holds the lease cannot be started.
        EtcdError: Etcd cannot be reached, or refuses.
    """
    rank, world_size = check_rank(rank, world_size)
    topology = check_topology(topology or {})
    return open_publication(
        registry,
        engine,
        tensors if isinstance(tensors, Destination) else Destination(tensors, shards),
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=model,
        topology=topology,
        options=options,
    )


def open_publication(
    registry: Registry,
    engine: Engine,
    weights: Destination,
    *,
    instance: str,
    rank: int,
    world_size: int,
    model: ModelIdentity,
    topology: Mapping[str, tuple[int, int]] | None,
    options: PublishOptions,
    block_nbytes: int = 0,
    content: str | None = None,
    filled_by: Use | None = None,
) -> Publication:
    """As `publish`. With `filled_by`, the load that fills the weights, the rank is registered as
    loading.

    Nothing of it can be read then but the blocks of `block_nbytes` that are marked, and no digests
    before it is complete. `content` is the one that is being loaded, where its source has stated
    it.
    """
    values = encode_values(options.values or {})
    version = options.version or 0
    tensors = weights.parts
    _check_can_be_served(engine, tensors)
    manifest = replace(weights.manifest, values=values, block_nbytes=block_nbytes)
    device = weights.devices[0]
    table = DigestCell(tensors, device, algorithm_for(device)) if options.digests else None
    incarnation = new_incarnation()
    with ExitStack() as undo:
        use = USES.serve(f"{instance}/{rank}", weights.runs, filled_by)
        undo.callback(USES.end, use)
        manifest = with_regions(manifest, offer(engine, undo, *manifest.regions))
        header = HeaderCell(device, manifest.marks)
        offer(engine, undo, to_register(header.region, device.type))
        proven = None
        if table is not None:
            offer(engine, undo, to_register(table.region, device.type))
            manifest = replace(manifest, digests=table.table)
            if filled_by is None:
                proven = content_of(manifest, table.write(tensors), table.table.algorithm)
        wait_for(weights.devices)  # readers do not know of streams
        content = content or proven or new_content()
        header.write(Header(incarnation, 2 * version, content))
        undo.callback(header.retire)
        registration = registry.register(
            instance=instance,
            rank=rank,
            world_size=world_size,
            model=model,
            manifest=manifest,
            session_id=engine.session_id,
            protocol=engine.protocol,
            fabric=engine.fabric,
            header_addr=header.region.addr,
            incarnation=incarnation,
            generation=options.generation,
            topology=topology,
            version=version,
            content=content,
            state=RankState.READY if filled_by is None else RankState.LOADING,
            device=str(device),
            ttl_s=options.ttl_s,
            on_state=options.on_state,
        )
        undo.callback(registration.withdraw)
        if enabled():  # it costs a watch in etcd
            undo.enter_context(registry.watch_pulls(registration.record, metrics.on_pull))
        return Publication(
            registry, registration, header, table, weights, manifest.regions, use, undo.pop_all()
        )


def _check_can_be_served(engine: Engine, tensors: Mapping[str, torch.Tensor]) -> None:
    if engine.protocol != "nvlink_intra":
        return
    closed = [
        name
        for name, tensor in tensors.items()
        if tensor.numel()
        and not (tensor.is_cuda and can_be_opened_by_others(tensor.untyped_storage().data_ptr()))
    ]
    if closed:
        raise TensorsUnusable(
            f"{len(closed)} tensors cannot be opened by other processes over NVLink, which "
            "takes memory of cudaMalloc, not the "
            f"host's, nor expandable segments (PYTORCH_CUDA_ALLOC_CONF): {listed(closed)}: "
            "move them, or use rdma or tcp",
            problems=closed,
        )


def publish_state_dict(
    registry: Registry,
    engine: Engine,
    state_dict: Mapping[str, Any],
    *,
    instance: str,
    rank: int,
    world_size: int,
    model: ModelIdentity,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    options: PublishOptions = PublishOptions(),
) -> Publication:
    """Publishes a state dict as torch's distributed checkpoint would save it.

    It may be nested, and hold DTensors and values that are no tensors. A plain tensor without a
    shard stands for the whole, as in a distributed checkpoint.

    Args:
        registry: Where the rank is registered.
        engine: Serves the memory.
        state_dict: Tensors and plain data by name, nested as the caller likes.
        instance: The name of the instance.
        rank: The world rank of this process in the instance, from 0.
        world_size: How many ranks the instance has, over all parallel axes.
        model: The model that the instance runs.
        shards: Which box of the whole a tensor is, by its flattened name.
        topology: The place of the rank along each parallel axis: (index, size) by axis.
        options: How to publish; see PublishOptions. Without `values`, which the state dict has.

    Returns:
        The publication, which the caller closes.

    Raises:
        TensorsUnusable: Entries cannot be served, or have the same flattened name.
        LoaderError: What `publish` raises.
        RegistryError: What `publish` raises.
    """
    refuse(options, "publish_state_dict", {"values": "put them into the state dict"})
    tensors, values = flatten(state_dict)
    return publish(
        registry,
        engine,
        instance=instance,
        rank=rank,
        world_size=world_size,
        tensors=tensors,
        model=model,
        shards={**whole(tensors), **(shards or {})},
        topology=topology,
        options=replace(options, values=values),
    )
