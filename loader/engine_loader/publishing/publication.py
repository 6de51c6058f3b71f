"""`Publication`: the weights of a rank while peers may read them.

Leaving goes the other way round than publishing: out of the registry first, then the header is
erased, then the memory is given back.

Longer than other modules: more than half of it documents one public class for its users. The work
is done in `publishing.served`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from engine_loader.engines.region_book import Regions
from engine_loader.errors import LoaderError
from engine_loader.publishing.header import HeaderCell
from engine_loader.publishing.offering import check_can_be_served
from engine_loader.publishing.served import Served
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard
from engine_loader.tensors.uses import USES, Use
from engine_registry import (
    RankRecord,
    Registration,
    RegistrationState,
    Release,
)
from engine_registry.lifetime import Closable
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.numbers import seconds
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class Publication(Closable):
    """A rank's weights while peers may read them. A context manager that closes itself.

    It holds the tensors, so their memory stays as long as it is offered: not while it is paused.
    """

    def __init__(self, served: Served) -> None:
        """Takes over what is served, with its registration, and closes both."""
        self._served = served
        self._mark_open()

    @property
    def record(self) -> RankRecord:
        """The record as the rank wants it in etcd."""
        return self._served.registration.record

    @property
    def state(self) -> RegistrationState:
        """Whether the rank is registered, and what the caller must do."""
        return self._served.registration.state

    @property
    def registration(self) -> Registration:
        """The handle on the registration, with the reason of a loss."""
        return self._served.registration

    @property
    def version(self) -> int:
        """The version of the weights: that of `publish`, and a greater one after each `update` or
        `replace`.
        """
        return self.record.version

    @property
    def content(self) -> str:
        """The content of the weights, as 32 hexadecimal digits.

        Publications and loads with equal contents have the same bytes.
        """
        return self.record.content

    @property
    def paused(self) -> bool:
        """Whether the memory has been given back, from `pause` to `resume` or `replace`."""
        return self._served.paused is not None

    @property
    def regions(self) -> Regions:
        """Those of its manifest."""
        return self._served.offering("read").manifest.regions

    @property
    def register_s(self) -> float:
        """Seconds that the registration of `regions` with the transfer engine took."""
        return self._served.offering("read").register_s

    @property
    def _header(self) -> HeaderCell:
        return self._served.header

    def __repr__(self) -> str:
        state = self.record.state.value if self._is_open else "closed"
        if self._is_open and self.paused:
            state = "paused"
        return (
            f"<Publication {self.record.key}: {state}, version {self.version}, content "
            f"{self.content[:8]}…>"
        )

    @contextmanager
    def update(
        self, values: Mapping[str, Any] | None = None, *, version: int | None = None
    ) -> Iterator[None]:
        """Changes the weights in place, inside the block.

        Readers that overlap with the block notice, and read again. After the block the version and
        the content are new.

        If the block raises, the weights are in doubt. They stay marked as being changed, and no
        load reads them until another `update` has ended well. An etcd that is away does not disturb
        an update, because readers go by the header.

        Args:
            values: New values of what is no tensor, such as the step of a trainer, by the names of
                `publish_state_dict`: paths joined by dots. They are read at the end of the block.
                The others stay. The memory is offered anew then, as by `replace`.
            version: The new version, as that of the source of a load in the block. None: one more
                than the present one.

        Yields:
            Nothing.

        Raises:
            TensorsUnusable: A tensor was given other memory, as by `module.to(…)` or
                `weight.data = …`. The weights stay marked as being changed. Or, before the block,
                a value cannot be encoded.
            MemoryInUse: Another publication serves the same memory, or a load still fills it at the
                end of the block.
            InvalidField: The version is not newer.
            LoaderError: The publication is closed or paused, or is being updated already.
            RegistrationLost: With `values`: the rank was evicted, or another took its place.
        """
        with self._served.alone("update"), self._served.changing(values, version):
            yield

    def snapshot(
        self,
        version: int | None = None,
        *,
        changed: Iterable[str] | None = None,
        wait: bool = True,
    ) -> int:
        """Makes a new version of what the tensors hold now, for a publication with snapshots.

        The tensors are copied to memory that nobody reads. Readers of the version before go on
        reading it, and `load(version=…)` finds it, until a later snapshot needs its memory. That
        takes the oldest that nobody reads. If all are read, it waits for the readers of the oldest,
        for `Snapshots.retain_s` at most. Readers that are slower notice, and read the newest
        version instead.

        Args:
            version: The new version. None: one more than the present one.
            changed: The names of all tensors that have changed since the last snapshot: only these
                are copied. None: any may have.
            wait: Whether to wait until readers can have the new version. Otherwise it returns when
                the tensors are copied and may change again. The next call waits for the rest, and
                raises what that has raised.

        Returns:
            The new version.

        Raises:
            TensorsUnusable: A tensor was given other memory.
            NoFreeSnapshot: The only place is that of the released version, and no other is released
                within `Snapshots.retain_s`.
            InvalidField: The version is not newer, or a name is not published.
            LoaderError: The publication has no snapshots, is closed, drains, or another call is
                making a snapshot.
            RegistrationLost: The rank was evicted, or another took its place.
        """
        with self._served.alone("snapshot"):
            return self._served.snapshot(version, changed, wait)

    def release(self, version: int | None = None, *, timeout_s: float = 60.0) -> Release:
        """Says in etcd that a version is released: that every rank of the instance holds it.

        Readers who load the version `"released"` load this one from now on, and watches give
        `VersionReleased`. Any rank may call it, and several may: one writes it, the others find it
        done. Versions only move forward; see `rollback`.

        The version stays released until another one is, or this rank leaves. With snapshots, its
        memory is not given to another version meanwhile. Without, the next `update` ends it, and
        readers get VersionUnavailable until the next release.

        Args:
            version: The version. None: the present one, which the last `snapshot` has made.
            timeout_s: How many seconds to wait until all ranks hold it.

        Returns:
            The release.

        Raises:
            ReleaseIncomplete: Not all ranks hold the version; `details["ranks"]` says which, and
                what they hold instead.
            InvalidField: A newer version is released, or an argument is not valid.
            LoaderError: The publication is closed, or without `version` is being updated.
            RegistrationLost: The rank was evicted, or another took its place.
            EtcdError: Etcd cannot be reached, or refuses.
        """
        return self._served.release(version, seconds("timeout_s", timeout_s))

    def rollback(self, version: int, *, timeout_s: float = 60.0) -> Release:
        """Releases a version that may be older than the released one, if all ranks retain it.

        Args:
            version: The version.
            timeout_s: How many seconds to wait until all ranks hold it.

        Returns:
            The release.

        Raises:
            ReleaseIncomplete: As `release`, which raises the others, too.
        """
        return self._served.release(version, seconds("timeout_s", timeout_s), back=True)

    @property
    def snapshots_nbytes(self) -> int:
        """The bytes of all snapshots together; 0 where readers have the tensors themselves."""
        return self._served.ring.nbytes if self._served.ring is not None else 0

    @property
    def deltas_nbytes(self) -> int:
        """The bytes of the memory for deltas; 0 where there are none, and during a pause.

        With snapshots, they are part of `snapshots_nbytes`.
        """
        if self.paused:
            return 0
        return sum(region.nbytes for region in self._served.offering("read").manifest.deltas)

    @property
    def retained(self) -> tuple[int, ...]:
        """Versions before the present one that can still be read, the newest first."""
        return tuple(one.version for one in self.record.retained)

    def pause(self) -> None:
        """Gives the memory of the weights back, so that it may be freed, moved or written to.

        The rank stays registered, as one that is being updated. Loads that read from it notice, and
        wait for `resume` or `replace`, or go on with another source. Nothing of the publication
        keeps the tensors' memory, or touches it, until then. If the call is interrupted, another
        one does the rest.

        Over nvlink_intra the engine of a reader keeps its mapping of the memory for its next load.
        So a GPU has that memory back only when such engines are closed.

        Raises:
            EngineFailed: The transfer engine cannot give the memory back.
            LoaderError: The publication is closed or paused already, is being updated, still loads
                or drains.
        """
        with self._served.alone("pause"):
            self._served.check_in_place_served("pause")
            self._served.check_settled("pause")
            self._served.pause()

    def resume(self) -> None:
        """Offers the same tensors again, which have the same bytes at the same addresses as when
        they were paused: the version and the content stay.

        The caller vouches for the bytes; where there are digests, these prove them. If the call
        raises, the rank stays paused. While etcd is away, readers learn of it later.

        Raises:
            TensorsUnusable: A tensor is gone, or has other memory: `replace` it.
            DigestMismatch: A tensor has other bytes than before.
            MemoryInUse: A load fills the memory.
            EngineFailed: The engine cannot register the memory.
            LoaderError: The publication is not paused, or is closed; or its weights are in doubt,
                because the `update` before the pause has failed.
            RegistrationLost: The rank was evicted meanwhile, or another took its place.
        """
        with self._served.alone("resume"):
            paused = self._served.paused
            if paused is None:
                raise LoaderError(
                    f"{self.record.key} is not paused, so there is nothing to resume",
                    "say `pause` first",
                )
            if paused.in_doubt:
                raise LoaderError(
                    f"the weights of {self.record.key} are in doubt, because their last update "
                    "failed, so they cannot be resumed",
                    "say `replace` with tensors that are whole",
                )
            record = self.record
            self._served.offer(
                paused.tensors.recall(), record.version, record.content, paused.digests
            )

    def replace(
        self, tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None = None
    ) -> None:
        """Offers other tensors as the next version, with a new content: of a rank that is paused,
        or that offers its former ones until now.

        They may have other memory, names, shapes and boxes. Tensors that cannot be published are
        refused, and nothing has changed then. If the call raises later, the rank is paused.

        Args:
            tensors: The tensors, by name. A `Destination` keeps its inspection of them.
            shards: Which part of the whole a tensor is, by name.

        Raises:
            TensorsUnusable: Tensors cannot be served.
            MemoryInUse: A load fills the memory.
            EngineFailed: The engine cannot register the memory.
            InvalidField: An argument is not valid; `details["field"]` names it.
            KeeperFailed: The keeper cannot hold the descriptors of the memory.
            LoaderError: The publication is closed, is being updated, still loads or drains.
            RegistrationLost: The rank was evicted, or another took its place.
        """
        weights = Destination.of(tensors, shards)
        check_can_be_served(self._served.engine, weights.parts, self._served.held)
        with self._served.alone("replace"):
            self._served.check_in_place_served("replace")
            self._served.check_settled("replace")
            self._served.check_registered()
            if self._served.paused is None:
                self._served.pause()
            self._served.offer(weights, self.record.version + 1)

    def mark(self, marks: bytes) -> None:
        """Lets readers have blocks of weights that are still being loaded.

        Args:
            marks: One byte for each block of the memory: 1 where the block is whole, else 0.
        """
        self._header.mark(marks)

    def complete(self, *, filled_by: Use, content: str | None = None) -> None:
        """Lets readers have all weights, which have been loaded by now.

        Args:
            filled_by: The load's use of the memory.
            content: The content of the weights, if their source has stated one. Else digests prove
                it, or it stays as it was registered.

        Raises:
            TensorsUnusable: A tensor was given other memory.
            MemoryInUse: Another load fills the memory.
        """
        before, offering = self.record, self._served.offering("complete")
        offering.check_in_place(before.key)
        wait_for(offering.weights.devices)
        proven = offering.compute_digests()
        content = content or proven or before.content
        USES.keep(offering.use, filled_by)
        self._served.vouch(before.version, content)

    def drain(self, timeout_s: float) -> bool:
        """Closes when the running loads have finished; no new load begins.

        An etcd that is away does not hold up the closing.

        Args:
            timeout_s: How many seconds the running loads may take.

        Returns:
            False if some loads were still running after that. They lose their source.
        """
        pulls = self._served.let_finish(seconds("timeout_s", timeout_s))
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
        """Withdraws the rank, then gives its memory back.

        It may be called any number of times, from any thread. If a call is interrupted, another one
        does the rest.

        Args:
            reason: Why the rank leaves, for watchers.
        """
        with self._served.closing():
            self._served.registration.withdraw(reason)
            self._served.close()
            self._mark_closed()

    def _label(self) -> str:
        return f"of {self.record.key}"
