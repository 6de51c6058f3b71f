"""Snapshots: what a publication offers where readers have copies of its tensors.

Each new version goes into a slot that nobody reads. The version before it stays in the slot where
it is, and in the record, so that its readers finish and others may begin; until its slot is needed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import torch

from engine_loader import metrics
from engine_loader.deltas.encode import encode, erase
from engine_loader.deltas.format import capacity_of
from engine_loader.digests.table import THREADS, algorithm_for
from engine_loader.engines.base import Engine, offer
from engine_loader.options import PublishOptions, Snapshots
from engine_loader.planning.content import content_of
from engine_loader.publishing.header import Header
from engine_loader.publishing.offering import Offering, check_can_be_served
from engine_loader.publishing.slots import Layout, Slot, allocate, make_slots
from engine_loader.tensors.cuda import to_register, wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.state_dict import encode_values
from engine_loader.tensors.uses import USES
from engine_registry import Manifest, Region, new_incarnation
from engine_registry.errors import InvalidField
from engine_registry.schema.record import WITHIN_HOST, Retained, new_content
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class SnapshotRing:
    """The slots of a publication, one of which is the present one. One caller at a time."""

    def __init__(
        self,
        weights: Destination,
        options: Snapshots,
        layout: Layout,
        slots: Sequence[Slot],
        incarnation: str,
        deltas: Sequence[torch.Tensor] = (),
    ) -> None:
        """`weights` are the tensors that are copied. The first slot is the present one, once it is
        filled and revealed. `deltas` are buffers, each for what has changed in one snapshot.
        """
        self.weights = weights
        self.retain_s = options.retain_s
        self.present = slots[0]
        self._layout = layout
        self._slots = slots
        self._incarnation = incarnation
        self._deltas = deque(deltas)  # the oldest first
        # A GPU does that in a moment, and the processor would have to look at every byte.
        self._digests_live = weights.devices[0].type == "cuda"
        self._proven: dict[str, bytes] = {}  # digests of what was filled last
        self._changed = options.changed
        self._unfit = False  # there was a delta that did not fit
        self._pool = ThreadPoolExecutor(1, "snapshots")
        self._pending: Future[None] | None = None

    @property
    def nbytes(self) -> int:
        """Of all slots and buffers of deltas."""
        return sum(one.nbytes for one in [*self._deltas, *(slot.memory for slot in self._slots)])

    def copied(self, changed: Iterable[str] | None) -> frozenset[str]:
        """The tensors whose copies bring what has changed. InvalidField names those that are not
        published.
        """
        copied_with = self._layout.copied_with
        if changed is None:
            return frozenset(copied_with.values())
        names = list(changed)
        strange = [name for name in names if name not in self.weights.parts]
        if strange:
            raise InvalidField(
                f"{strange[0]!r} is not among the tensors that are published",
                "name tensors as in `publish`",
                field="changed",
            )
        return frozenset(copied_with[name] for name in names if name in copied_with)

    def next(self, but: int | None = None, read: Collection[str] = ()) -> Slot:
        """The one that is filled next: an empty one, or that of the oldest version. One with a
        content that is `read` only if all others are, and `but` this version if there is another.
        """
        others = [slot for slot in self._slots if slot is not self.present]
        return min(
            others,
            key=lambda slot: (
                but is not None and slot.version == but,
                slot.version is not None and slot.content in read,
                -1 if slot.version is None else slot.version,
            ),
        )

    def retained(self, but: Slot | None = None) -> list[Retained]:
        """What can be read beside the present one, the newest first, without this slot."""
        some = [self._described(slot) for slot in self._slots if slot not in (self.present, but)]
        return sorted(
            [one for one in some if one is not None], key=lambda one: one.version, reverse=True
        )

    def withhold(self, slot: Slot) -> None:
        """Nobody can read it from now on."""
        number = slot.version or 0
        slot.header.write(Header(self._incarnation, 2 * number + 1, slot.content or new_content()))
        slot.version, slot.until = None, None

    def fill(self, slot: Slot, copied: Collection[str]) -> None:
        """From the tensors as they are now, which may change when this returns."""
        for other in self._slots:
            other.age(copied)
        began = time.monotonic()
        wait_for(self.weights.devices)
        nbytes = slot.fill()
        self._proven = slot.digest(self.weights.parts) if self._digests_live else {}
        wait_for([*self.weights.devices, slot.memory.device])
        metrics.SNAPSHOT_NBYTES.inc(amount=nbytes)
        metrics.SNAPSHOT_S.observe(time.monotonic() - began)

    def reveal(self, slot: Slot, version: int, manifest: Manifest) -> Retained:
        """It can be read as this version from now on, and is the present one."""
        content = new_content()
        if slot.digests is not None:
            proven = self._proven or slot.digest(slot.tensors)
            content = content_of(manifest, proven, slot.digests.table.algorithm)
        if self._deltas and content != self.present.content:
            self._write_delta(slot, content, manifest)
        slot.version, slot.content = version, content
        slot.header.write(Header(self._incarnation, 2 * version, content))
        if slot is not self.present:
            self.present.until = time.monotonic()
            self.present = slot
        return Retained(version, content, slot.header.region.addr, self._shift(slot))

    def _write_delta(self, slot: Slot, content: str, manifest: Manifest) -> None:
        """What has changed since the present one, in the place of the oldest delta."""
        present = self.present
        if slot is present or present.version is None:
            return
        began = time.monotonic()
        buffer = self._deltas[0]
        self._deltas.rotate(-1)
        made = encode(
            manifest.tensors,
            present.tensors,
            slot.tensors,
            buffer,
            present.content,
            content,
            threads=THREADS,
        )
        metrics.DELTA_S.observe(time.monotonic() - began)
        if made is None:
            log.log(
                logging.INFO if self._unfit else logging.WARNING,
                "more than %g %% of the elements have changed since version %d, so there is no "
                "delta: its readers read all blocks that differ. Snapshots(changed=…) gives deltas "
                "more memory",
                100 * self._changed,
                present.version,
                extra=fields("delta_unfit", nbytes=buffer.nbytes),
            )
            self._unfit = True
        else:
            metrics.DELTA_NBYTES.inc(amount=made.nbytes)

    def _described(self, slot: Slot) -> Retained | None:
        if slot.version is None:
            return None
        return Retained(slot.version, slot.content, slot.header.region.addr, self._shift(slot))

    def _shift(self, slot: Slot) -> int:
        return slot.start - self._slots[0].start

    # -- what is done while the caller goes on

    def begin(self, work: Callable[[], None]) -> None:
        """Runs it in another thread."""
        self._pending = self._pool.submit(work)

    def finish(self) -> None:
        """Waits for what was begun last, and raises what that did."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Any number of times."""
        self._pool.shutdown()
        for slot in self._slots:
            slot.header.retire()
        for buffer in self._deltas:
            erase(buffer)


def offer_snapshots(
    engine: Engine,
    weights: Destination,
    undo: ExitStack,
    *,
    owner: str,
    options: PublishOptions,
    snapshots: Snapshots,
    version: int,
) -> tuple[Offering, SnapshotRing]:
    """As `offer_weights`, of copies of the weights; the first one is made."""
    device = _device_of(engine, weights, snapshots)
    # readers are where the trainer is: on GPUs, which have a quick one, or on the host
    algorithm = algorithm_for(weights.devices[0])
    wanted = engine.tallies == algorithm if options.digests is None else options.digests
    wanted = wanted or snapshots.deltas > 0
    layout, slots = make_slots(weights, snapshots, device, algorithm if wanted else None)
    first = slots[0]
    check_can_be_served(engine, first.tensors)
    memory = undo.enter_context(ExitStack())
    use = USES.serve(owner, sorted((slot.region.addr, slot.region.end) for slot in slots))
    memory.callback(USES.end, use)
    began = time.monotonic()
    nbytes = capacity_of(weights.manifest.tensors, snapshots.changed)
    deltas = allocate(snapshots.deltas, nbytes, device, weights, "deltas")
    delta_regions = tuple(Region(one.data_ptr(), one.nbytes) for one in deltas)
    regions = [*(slot.region for slot in slots), *delta_regions]
    for region in regions:
        offer(engine, memory, to_register(region, device.type))
    register_s = time.monotonic() - began
    metrics.REGISTER_S.observe(register_s)
    manifest = Manifest(
        tuple(
            replace(entry, addr=first.start + layout.places[entry.name]) if entry.nbytes else entry
            for entry in weights.manifest.tensors
        ),
        (first.region,),
        digests=first.digests.table if first.digests is not None else None,
        values=encode_values(options.values or {}),
        exports=engine.exports(regions),
        deltas=delta_regions,
    )
    incarnation = new_incarnation()
    ring = SnapshotRing(weights, snapshots, layout, slots, incarnation, deltas)
    undo.callback(ring.close)
    ring.fill(first, ring.copied(None))
    made = ring.reveal(first, version, manifest)
    log.info(
        "the snapshots of %s take %d bytes, in %d copies on %s",
        owner,
        ring.nbytes,
        len(slots),
        device,
        extra=fields("snapshots_allocated", nbytes=ring.nbytes, device=str(device)),
    )
    return (
        Offering(
            incarnation,
            made.content,
            manifest,
            first.header,
            first.digests,
            weights,
            use,
            memory,
            undo,
            register_s,
        ),
        ring,
    )


def _device_of(engine: Engine, weights: Destination, snapshots: Snapshots) -> torch.device:
    if snapshots.buffers is not None:
        return torch.device(getattr(snapshots.buffers[0], "device", "cpu"))
    if snapshots.device is not None:
        try:
            return torch.device(snapshots.device)
        except RuntimeError as exc:
            raise InvalidField(
                f"`device` {snapshots.device!r} is not valid: torch knows no such device",
                "say cpu, or cuda",
                field="device",
            ) from exc
    return weights.devices[0] if engine.protocol in WITHIN_HOST else torch.device("cpu")
