"""The memory that a publication offers under one incarnation: registered with the transfer engine,
described by a manifest, and headed by a header. Made by `opening` and by `Publication`.

What a peer has learnt of a process's memory holds for one incarnation. So memory that was taken
back and is offered again has another one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from engine_loader import metrics
from engine_loader.digests.table import DigestCell, algorithm_for, nbytes_for
from engine_loader.engines.base import Engine, offer, with_regions
from engine_loader.errors import DigestMismatch, TensorsUnusable, listed
from engine_loader.options import PublishOptions
from engine_loader.planning.content import content_of
from engine_loader.publishing.delta_shelf import offer_shelf
from engine_loader.publishing.header import NBYTES, Header, HeaderCell
from engine_loader.publishing.holding import check_can_be_held, exports_of
from engine_loader.tensors.arena import bytes_in_arena
from engine_loader.tensors.cuda import to_register, wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.remembered import RememberedTensors
from engine_loader.tensors.state_dict import encode_values
from engine_loader.tensors.uses import USES, Use
from engine_registry import Manifest, RankRecord, Registry, new_incarnation
from engine_registry.schema.record import WITHIN_HOST, new_content
from engine_registry.telemetry.metrics import enabled


@dataclass
class Paused:
    """An offering that holds no memory of weights any more.

    `in_doubt`: they were being changed, and nobody has said that the change is whole.
    """

    header: HeaderCell
    tensors: RememberedTensors
    digests: Mapping[str, bytes] | None
    in_doubt: bool
    undo: ExitStack

    def close(self) -> None:
        """Any number of times."""
        self.header.retire()
        self.undo.close()


@dataclass
class Offering:
    """Memory that peers may read. It holds the tensors."""

    incarnation: str
    content: str
    manifest: Manifest
    header: HeaderCell
    digests: DigestCell | None
    weights: Destination
    use: Use
    memory: ExitStack  # gives back that of the weights; a part of `undo`
    undo: ExitStack
    register_s: float  # seconds that the memory of the weights took to be registered

    @property
    def device(self) -> torch.device:
        return self.header.device

    def compute_digests(self) -> str:
        """Anew; the content that they prove, or nothing where there are none."""
        if self.digests is None:
            return ""
        found = self.digests.write(self.weights.parts)
        return content_of(self.weights.manifest, found, self.digests.table.algorithm)

    def check_in_place(self, key: str) -> None:
        self.weights.check_in_place(
            f"tensors of {key} have other memory than the one that peers read, "
            "so the rank stays marked as being changed",
            "copy into them in place, or say `replace` with the tensors that there are now",
        )

    def pause(self, in_doubt: bool) -> Paused:
        """Gives the weights' memory back. The header, which must say by now that it is no time to
        read, stays readable. If it is interrupted, it can be done again.
        """
        self.memory.close()
        digests = self.digests.read() if self.digests is not None else None
        return Paused(self.header, RememberedTensors(self.weights), digests, in_doubt, self.undo)

    def close(self) -> None:
        """Any number of times."""
        self.header.retire()
        USES.end(self.use)
        self.undo.close()


def offer_weights(
    engine: Engine,
    weights: Destination,
    undo: ExitStack,
    *,
    owner: str,
    options: PublishOptions,
    version: int,
    block_nbytes: int = 0,
    content: str | None = None,
    filled_by: Use | None = None,
    expected: Mapping[str, bytes] | None = None,
) -> Offering:
    """Offers them until `undo` is closed. Nobody knows of them before they are registered.

    With `filled_by`, the load that fills them, there are no digests before it is complete.
    `content` is theirs where it is known. DigestMismatch names those whose digests are not the
    `expected` ones.
    """
    held = options.hold_s > 0
    check_can_be_served(engine, weights.parts, held)
    values = encode_values(options.values or {})
    manifest = replace(weights.manifest, values=values, block_nbytes=block_nbytes)
    device = weights.devices[0]
    algorithm = algorithm_for(device)
    wanted = held or engine.tallies == algorithm if options.digests is None else options.digests
    wanted = wanted or options.deltas > 0
    regions = manifest.regions

    def room(nbytes: int) -> torch.Tensor | None:
        if held:
            return bytes_in_arena(device, nbytes)
        return engine.memory_beside(regions[0], device, nbytes) if regions and nbytes else None

    digests = None
    if wanted:
        cell = room(nbytes_for(weights.parts, algorithm))
        digests = DigestCell.with_blocks(weights.parts, device, algorithm, cell)
    memory = undo.enter_context(ExitStack())
    use = USES.serve(owner, weights.runs, filled_by, held)
    memory.callback(USES.end, use)
    began = time.monotonic()
    manifest = with_regions(manifest, offer(engine, memory, *manifest.regions))
    register_s = time.monotonic() - began
    metrics.REGISTER_S.observe(register_s)
    shelf = offer_shelf(engine, weights, memory, owner, options)
    if shelf is not None:
        manifest = replace(manifest, deltas=shelf.regions)
    header = HeaderCell(device, manifest.marks, room(NBYTES + manifest.marks))
    offer(engine, undo, to_register(header.region, device.type))
    proven = None
    if digests is not None:
        offer(engine, undo, to_register(digests.region, device.type))
        manifest = replace(manifest, digests=digests.table)
        if filled_by is None:
            found = digests.write(weights.parts)
            _check_digests(owner, found, expected)
            proven = content_of(manifest, found, algorithm)
    cells = [header.region] if digests is None else [header.region, digests.region]
    kept = [*manifest.regions, *cells]
    exports = exports_of(engine, [*kept, *manifest.deltas], kept if held else ())
    manifest = replace(manifest, exports=tuple(exports))
    wait_for(weights.devices)  # readers do not know of streams
    incarnation, content = new_incarnation(), content or proven or new_content()
    header.write(Header(incarnation, 2 * version, content))
    undo.callback(header.retire)
    return Offering(
        incarnation, content, manifest, header, digests, weights, use, memory, undo, register_s
    )


def meter_pulls(registry: Registry, record: RankRecord, undo: ExitStack) -> None:
    """Counts the loads that read from it, where metrics are on."""
    if enabled():  # it costs a watch in etcd
        undo.enter_context(registry.watch_pulls(record, metrics.on_pull))


def _check_digests(
    owner: str, found: Mapping[str, bytes], expected: Mapping[str, bytes] | None
) -> None:
    if expected is None:
        return
    differing = sorted(name for name in found if found[name] != expected[name])
    if differing:
        raise DigestMismatch(
            f"{len(differing)} tensors of {owner} have other bytes than when they were offered "
            f"before: {listed(differing)}",
            "offer them as another version: say `replace`, or `publish`",
            tensors=differing,
        )


def _check_on_host(tensors: Mapping[str, torch.Tensor]) -> None:
    on_gpus = [name for name, tensor in tensors.items() if tensor.is_cuda and tensor.numel()]
    if on_gpus:
        raise TensorsUnusable(
            f"{len(on_gpus)} tensors are in memory of GPUs, which the protocol socket does not "
            f"reach: {listed(on_gpus)}",
            "use cuda_ipc within a host, rdma or tcp between hosts, or move them to the host",
            problems=on_gpus,
        )


_TAKEN = {  # by protocol, with the remedy for other memory
    "cuda_ipc": (
        "memory of GPUs, and arenas on the host, not of memory pools",
        "move those on the host into an arena (arena_of), or use rdma or tcp",
    ),
    "nvlink_intra": (
        "memory of cudaMalloc, not the host's, nor expandable segments (PYTORCH_CUDA_ALLOC_CONF)",
        "move them, or use rdma or tcp",
    ),
}


def check_can_be_served(
    engine: Engine, tensors: Mapping[str, torch.Tensor], held: bool = False
) -> None:
    """TensorsUnusable names those that are not in memory which peers can open, or, with `held`,
    which outlives this process.
    """
    if held:
        check_can_be_held(tensors)
    if engine.protocol == "socket":
        _check_on_host(tensors)
    if engine.protocol not in WITHIN_HOST:
        return
    closed = [
        name for name, tensor in tensors.items() if tensor.numel() and not engine.can_share(tensor)
    ]
    if closed:
        taken, remedy = _TAKEN[engine.protocol]
        raise TensorsUnusable(
            f"{len(closed)} tensors cannot be opened by other processes over {engine.protocol}, "
            f"which takes {taken}: {listed(closed)}",
            remedy,
            problems=closed,
        )
