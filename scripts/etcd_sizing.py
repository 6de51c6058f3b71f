"""What ranks cost in etcd, measured with the embedded one: the figures of
docs/explanation/etcd-sizing.md.

python scripts/etcd_sizing.py sizes          records and manifests: bytes as stored
python scripts/etcd_sizing.py store N [N …]  registers N ranks of a dense model: time, database,
                                             renewals, a watcher's bytes
python scripts/etcd_sizing.py store-moe N    the same for ranks of 60,000 tensors

Each rank has a lease, as in life, but no process: one client writes them all, and is the slower
side.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from subprocess import run

from engine_registry import Manifest, ModelIdentity, RankState, Region, Registry, TensorEntry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.writes import amend, claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema import record_format as records
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import ManifestRef, RankRecord

THREADS = 8
TP = 8
INSTANCE_RANKS = 1_000
QUOTA_NBYTES = 8 << 30
RENEWALS = 5_000
TTL_S = 3_600  # nothing here renews in the background


def dense_rank() -> Manifest:
    """One of 8 ranks of a model of 70 billion parameters: 80 layers, bfloat16."""
    hidden, ffn, kv = 8192, 28672, 1024
    layer = {
        "self_attn.q_proj": ((hidden, hidden), 0),
        "self_attn.k_proj": ((kv, hidden), 0),
        "self_attn.v_proj": ((kv, hidden), 0),
        "self_attn.o_proj": ((hidden, hidden), 1),
        "mlp.gate_proj": ((ffn, hidden), 0),
        "mlp.up_proj": ((ffn, hidden), 0),
        "mlp.down_proj": ((hidden, ffn), 1),
        "input_layernorm": ((hidden,), None),
        "post_attention_layernorm": ((hidden,), None),
    }
    tensors: dict[str, tuple[tuple[int, ...], int | None]] = {
        "model.embed_tokens.weight": ((128256, hidden), 0),
        "model.norm.weight": ((hidden,), None),
        "lm_head.weight": ((128256, hidden), 0),
    }
    for number in range(80):
        tensors |= {f"model.layers.{number}.{name}.weight": cut for name, cut in layer.items()}
    return _laid_out(tensors)


def moe_rank() -> Manifest:
    """A rank that holds every expert of 62 layers as a quantised tensor each: some 60,000."""
    tensors: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for layer in range(62):
        for expert in range(160):
            for name in ("gate_proj", "up_proj", "down_proj"):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                tensors |= {prefix: ((2048, 7168), 0), f"{prefix}_scale_inv": ((16, 56), 0)}
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = ((7168, 2048), 0)
    return _laid_out(tensors)


def _laid_out(tensors: dict[str, tuple[tuple[int, ...], int | None]]) -> Manifest:
    """In an order of chance, which compresses worst; aligned to 512 bytes, large ones to 2 MiB; in
    regions of a GiB at most.
    """
    addr = start = 0x7F3A_4000_0000
    entries, regions = [], []
    names = sorted(tensors)
    random.Random(0).shuffle(names)  # noqa: S311  the same every time
    for name in names:
        whole, dim = tensors[name]
        shape = tuple(size // TP if axis == dim else size for axis, size in enumerate(whole))
        offsets = tuple(3 * size if axis == dim else 0 for axis, size in enumerate(shape))
        nbytes = 2 * prod(shape)
        if addr + nbytes > start + (1 << 30):
            regions.append(Region(start, addr - start))
            start = addr
        entries.append(
            TensorEntry(name, "bfloat16", shape, addr, nbytes, whole, offsets, opaque=False)
        )
        align = 2 << 20 if nbytes > 1 << 20 else 512
        addr += -(-nbytes // align) * align
    regions.append(Region(start, addr - start))
    entries.sort(key=lambda entry: entry.name)
    return Manifest(tuple(entries), tuple(regions))


def a_record(rank: int, ranks: int, ref: ManifestRef) -> RankRecord:
    number, place = divmod(rank, INSTANCE_RANKS)
    node, gpu = divmod(rank, TP)
    return RankRecord(
        incarnation=f"{rank:032x}",
        generation="a1b2c3d4e5f64718",
        instance=f"llama-3-70b-prod-{number:03}",
        rank=place,
        world_size=min(INSTANCE_RANKS, ranks - number * INSTANCE_RANKS),
        topology={"tp": (gpu, TP), "pp": (0, 1), "dp": (node, 1 << 20)},
        model=ModelIdentity(
            "meta-llama/Llama-3.1-70B-Instruct",
            "1605565b47bb9346c5515c34102e054115b4f98b",
            "bfloat16",
            "none",
        ),
        session_id=f"10.{rank >> 16}.{rank >> 8 & 255}.{rank & 255}:15000",
        protocol="rdma",
        fabric="rail-3",
        device=f"cuda:{gpu}",
        manifest=ref,
        header_addr=0x7F3A_4000_0000,
        registered_at="2026-01-01T00:00:00.000+00:00",
        version=12,
        writer="0.1.0",
        host=f"gpu-node-{node:05}",
        pid=41_000 + gpu,
    )


def sizes() -> None:
    for title, manifest in (("dense, 70B at tp=8", dense_rank()), ("MoE", moe_rank())):
        ref, parts = manifests.encode(manifest)
        record = a_record(1234, 10_000, ref)
        tell(
            f"{title}: {ref.tensors:,} tensors; record {len(records.encode(record)):,} B "
            f"under a key of {len(record.key)} B; "
            f"manifest {sum(map(len, parts)):,} B in {len(parts)} part(s)"
        )


def store(ranks: int, manifest: Manifest) -> None:
    ref, parts = manifests.encode(manifest)
    with LocalEtcd(
        extra_args=[f"--quota-backend-bytes={QUOTA_NBYTES}", "--snapshot-count=10000"]
    ) as server:
        with (
            closing(Etcd(EtcdConfig(parse_endpoints(server.endpoint), timeout_s=30.0))) as etcd,
            counted_watch(server) as wire,
        ):
            start = time.perf_counter()
            with ThreadPoolExecutor(THREADS) as pool:
                written = list(
                    pool.map(
                        lambda rank: register(etcd, a_record(rank, ranks, ref), parts), range(ranks)
                    )
                )
            took_s = time.perf_counter() - start
            wire.wait_until_quiet(ranks)
            tell(
                f"\n{ranks:,} ranks of {ref.tensors:,} tensors: registered in {took_s:.1f} "
                f"s, {database(server)}"
            )
            tell(
                f"  a watcher received {wire.nbytes:,} B for {ranks:,} joins: "
                f"{wire.nbytes / ranks:,.0f} B each"
            )
            renewals(etcd, server, [held.lease_id for _, held in written])
            updates(etcd, server, written)
            reading(server)
            tell(f"  etcd's memory: {memory(server.pid) / 1e6:,.0f} MB")


def register(etcd: Etcd, record: RankRecord, parts: Sequence[bytes]) -> tuple[RankRecord, KeyValue]:
    return record, claim(etcd, record, parts, etcd.grant(TTL_S))


def renewals(etcd: Etcd, server: LocalEtcd, leases: Sequence[int]) -> None:
    """As a keeper renews: the lease, and a look at the key."""
    chosen = [leases[number % len(leases)] for number in range(RENEWALS)]

    def renew(lease_id: int) -> None:
        etcd.keep_alive(lease_id)
        etcd.get("/engines/llama-3-70b-prod-000/0")

    before, start = cpu_s(server.pid), time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(renew, chosen))
    took_s = time.perf_counter() - start
    each_s = (cpu_s(server.pid) - before) / RENEWALS
    tell(
        f"  renewals: {RENEWALS / took_s:,.0f} a second from one client; etcd's CPU "
        f"{each_s * 1e6:,.0f} µs each"
    )


def updates(etcd: Etcd, server: LocalEtcd, written: Sequence[tuple[RankRecord, KeyValue]]) -> None:
    """Each rank changes its state once, as for one update of the weights: what history is left
    until compaction.
    """

    def change(record: RankRecord, held: KeyValue) -> None:
        amend(etcd, replace(record, state=RankState.UPDATING), held)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(change, *zip(*written, strict=True)))
    tell(f"  after one more write of every record: {database(server)}")


def reading(server: LocalEtcd) -> None:
    with Registry.connect(server.endpoint, timeout_s=60.0) as registry:
        start = time.perf_counter()
        found = registry.instances()
        tell(f"  list: {len(found)} instances in {time.perf_counter() - start:.2f} s")


def database(server: LocalEtcd) -> str:
    etcdctl = Path(server.binary).with_name("etcdctl")
    command = [
        str(etcdctl),
        f"--endpoints={server.endpoint}",
        "endpoint",
        "status",
        "--write-out=json",
    ]
    (status,) = json.loads(
        run(command, capture_output=True, check=True, env={"ETCDCTL_API": "3"}).stdout
    )
    found = status["Status"]
    return (
        f"database {found['dbSize'] / 1e6:,.1f} MB, of which in use "
        f"{found['dbSizeInUse'] / 1e6:,.1f} MB"
    )


def cpu_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Wire:
    """A way to etcd that counts what comes back over it, gRPC and HTTP/2 included."""

    def __init__(self, server: LocalEtcd) -> None:
        self.nbytes = 0
        self.seen = 0
        self.all_seen = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = server
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server.port))
                threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.nbytes += len(data) * counted
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def one_more(self) -> None:
        with self.all_seen:
            self.seen += 1
            self.all_seen.notify_all()

    def wait_until_quiet(self, events: int) -> None:
        with self.all_seen:
            self.all_seen.wait_for(lambda: self.seen >= events, 60)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def counted_watch(server: LocalEtcd) -> Iterator[Wire]:
    """One watcher of all instances, as `engines watch` is one."""
    with (
        closing(Wire(server)) as wire,
        Registry.connect(wire.endpoint) as registry,
        registry.watch() as watch,
    ):

        def read() -> None:
            for event in watch:
                if type(event).__name__ == "RankJoined":
                    wire.one_more()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield wire
        finally:
            watch.stop()
            reader.join()


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    match sys.argv[1:]:
        case ["sizes"]:
            sizes()
        case ["store", *counts] if counts:
            for count in counts:
                store(int(count), dense_rank())
        case ["store-moe", count]:
            store(int(count), moe_rank())
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
