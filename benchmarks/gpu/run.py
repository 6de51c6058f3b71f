"""`python -m benchmarks.gpu`: the measurements, and their GPUs.

Sources and first loads are separate processes, with a separate etcd. Every time is of
bytes that were all looked at where they arrived; every figure is a median of several, after a round
that opens connections and does not count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu import host, kills, layouts, loads, scenarios, turns, updates
from benchmarks.gpu.loads import Place
from benchmarks.gpu.nccl import nccl
from benchmarks.gpu.report import Results
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sets import SETS
from benchmarks.processes import several_processes
from engine_loader.engines.protocols import usable_protocols
from engine_loader.errors import EngineUnavailable
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.record import WITHIN_HOST

BY_MOONCAKE = ("nvlink_intra", "tcp")
PARTS = (
    *SETS,
    "nccl",
    host.GROUP,
    "failover",
    "fan-out",
    layouts.GROUP,
    kills.GROUP,
    updates.GROUP,
)
_MANY = 10_000  # tensors, of which each look at all of them takes a second
_OF_MIXED = 0.5  # what kills and updates take of the mixed set: 4.3 GB


@dataclass(frozen=True)
class Devices:
    """Where sources and destinations are, with their numbers; `backend` is torch.distributed's.

    Goals are about the first of the protocols.
    """

    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    protocols: tuple[str, ...]
    backend: str = "nccl"
    gpus: int = 0


@dataclass(frozen=True)
class Extent:
    """How much is measured: which parts (none: all), how many of the tensors, how often; how many
    sources are killed, and how many loads there are beside updates.
    """

    only: Collection[str] = ()
    scale: float = 1.0
    rounds: int = 7
    kills: int = 50
    loads: int = 200
    profiled: bool = False

    def has(self, part: str) -> bool:
        return not self.only or part in self.only


def gpus() -> Devices:
    """EngineUnavailable if it cannot be measured here."""
    count = torch.cuda.device_count()
    if count < 2:
        raise EngineUnavailable(
            f"this measures from GPU to GPU, and {count} CUDA GPUs can be used here: run it "
            "on a host with two "
            "(`python -m benchmarks.load` needs none)"
        )
    if not torch.cuda.can_device_access_peer(1, 0):
        raise EngineUnavailable(
            "GPU 1 cannot read the memory of GPU 0: see nvidia-smi topo -p2p r, and `engines "
            "doctor`"
        )
    protocols = tuple(one for one in usable_protocols() if one in WITHIN_HOST)
    if not protocols:
        raise EngineUnavailable(
            f"neither of {' and '.join(WITHIN_HOST)} can be used here: install triton, or "
            "'engine-registry[cuda12]' or [cuda13]"
        )
    if count < 4:
        return Devices(("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), protocols, gpus=count)
    return Devices(("cuda:0", "cuda:2"), ("cuda:1", "cuda:2", "cuda:3"), protocols, gpus=count)


def measure(results: Results, devices: Devices, extent: Extent, say: Callable[[str], None]) -> None:
    """Adds to the results as they come: what was measured before something failed is there."""
    results.protocol = devices.protocols[0]
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        run = _Run(results, devices, extent, say, local.endpoint, registry)
        for name in SETS:
            if extent.has(name):
                run.one_set(name)
        if extent.has(host.GROUP):
            run.from_host()
        for protocol in devices.protocols:
            run.several(protocol)
        if extent.has(layouts.GROUP):
            run.other_layouts()
        run.faults(devices.protocols[0])
    if 0 < devices.gpus < 4:
        why = f"not run: {devices.gpus} GPUs"
        missing = {
            "failover": "2 sources on 2 GPUs → 1 GPU",
            "fan-out": "1 source → 3 destinations on 3 GPUs",
        }
        results.rows += [
            Row(part, what, note=why) for part, what in missing.items() if extent.has(part)
        ]


@dataclass(frozen=True)
class _Run:
    results: Results
    devices: Devices
    extent: Extent
    say: Callable[[str], None]
    endpoint: str
    registry: Registry

    def one_set(self, name: str) -> None:
        self.say(f"the set {name}")
        rounds, profiled = self.extent.rounds, self.extent.profiled
        sources = [self._src(name, protocol) for protocol in self.devices.protocols]
        destinations = [self._dst(name, protocol) for protocol in self.devices.protocols]
        src, dst = sources[0], destinations[0]
        some = rounds if len(src.layout) < _MANY else max(1, rounds // 2)
        naive = next((one for one in self.devices.protocols if one in BY_MOONCAKE), None)
        calls = [(self.endpoint, one.instance, *one.args) for one in sources]
        with several_processes(loads.MODULE, "serve", calls):
            # first, so that kernels are compiled once for all processes
            found = turns.in_this_process(self.registry, src, destinations, naive, some, profiled)
            self._add(found.rows)
            self.results.steps |= {f"{name}, {load}": took for load, took in found.steps.items()}
            self.results.functions |= {
                f"{name}, {protocol}": lines for protocol, lines in found.functions.items()
            }
            _free()
            processes = rounds // 2 + 1 if name == "mixed" else 1
            self._add(loads.cold_and_warm(self.endpoint, destinations, processes, some))
        if self.extent.has("nccl"):
            self._add(nccl(src, dst, self.devices.backend, some))

    def from_host(self) -> None:
        self.say("the host's memory")
        dst = self._dst("mixed", self.devices.protocols[0])
        self._add(host.from_host(self.endpoint, dst, self.extent.rounds))
        _free()

    def several(self, protocol: str) -> None:
        """More than two processes."""
        sources, destinations = (
            [replace(self._src("mixed", protocol), device=device) for device in some]
            for some in (self.devices.sources, self.devices.destinations)
        )
        rounds = self.extent.rounds
        if self.extent.has("failover"):
            self.say(f"two sources, and one that is killed, over {protocol}")
            some = max(1, rounds // 2)
            self._add(
                scenarios.failover(self.endpoint, self.registry, sources, destinations[0], some)
            )
            _free()
        if self.extent.has("fan-out"):
            self.say(f"several destinations, over {protocol}")
            self._add(scenarios.fan_out(self.endpoint, sources[0], destinations, rounds))

    def other_layouts(self) -> None:
        self.say("other layouts")
        src, dst = (one("mixed", self.devices.protocols[0]) for one in (self._src, self._dst))
        self._add(
            layouts.reshard(
                self.endpoint,
                self.registry,
                src,
                dst,
                self.devices.protocols,
                self.extent.rounds,
            )
        )
        _free()

    def faults(self, protocol: str) -> None:
        """What happens while loads run; everything that they bring is looked at."""
        src, dst = (
            replace(one("mixed", protocol), scale=_OF_MIXED * self.extent.scale)
            for one in (self._src, self._dst)
        )
        if self.extent.has(kills.GROUP):
            self.say(f"{self.extent.kills} sources that are killed within a load")
            kills.kills(
                self.endpoint,
                self.registry,
                src,
                dst,
                self.extent.kills,
                lambda rows, counts: self._add(rows, kills.GROUP, counts),
            )
            _free()
        if self.extent.has(updates.GROUP):
            self.say(f"{self.extent.loads} loads beside a source that updates")
            updates.updates(
                self.endpoint,
                self.registry,
                src,
                dst,
                self.extent.loads,
                lambda rows, counts: self._add(rows, updates.GROUP, counts),
            )
            _free()

    def _src(self, tensor_set: str, protocol: str) -> Place:
        return Place(tensor_set, self.extent.scale, self.devices.sources[0], protocol)

    def _dst(self, tensor_set: str, protocol: str) -> Place:
        return Place(tensor_set, self.extent.scale, self.devices.destinations[0], protocol)

    def _add(
        self, rows: list[Row], part: str = "", counts: Mapping[str, int] | None = None
    ) -> None:
        self.results.rows += rows
        for row in rows:
            self.say("  ".join(filter(None, row.cells())))
        if counts is not None:
            self.results.counts[part] = dict(counts)
            for what, count in counts.items():
                self.say(f"{part}  {what}: {count}")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
