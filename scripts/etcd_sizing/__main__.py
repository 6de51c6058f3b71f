"""What ranks cost in etcd, measured with the embedded one: the figures of
docs/explanation/etcd-sizing.md.

python -m scripts.etcd_sizing sizes          records and manifests: bytes as stored
python -m scripts.etcd_sizing store N [N …]  registers N ranks of a dense model: time, database,
                                             renewals, a watcher's bytes
python -m scripts.etcd_sizing store-moe N    the same for ranks of 60,000 tensors
python -m scripts.etcd_sizing connections N  etcd's memory for each of N connections (at most 500),
                                             and of what is open over it
python -m scripts.etcd_sizing rates N [N …]  three members renew for N ranks at the pace of life
python -m scripts.etcd_sizing hosts N        N hosts of eight ranks: with a process for each keeper,
                                             and with one for all
python -m scripts.etcd_sizing expiry N       N leases expire together: how many a second

Each rank has a lease, as in life, but no process: one client writes them all, and is the slower
side.
"""

from __future__ import annotations

import sys

import click

from engine_registry.schema import manifest_format as manifests
from engine_registry.schema import record_format as records
from scripts.etcd_sizing.connections import connections
from scripts.etcd_sizing.expiry import expiry
from scripts.etcd_sizing.hosts import hosts
from scripts.etcd_sizing.ranks import a_record, dense_rank, moe_rank
from scripts.etcd_sizing.rates import rates
from scripts.etcd_sizing.store import store


def sizes() -> None:
    for title, manifest in (("dense, 70B at tp=8", dense_rank()), ("MoE", moe_rank())):
        ref, parts = manifests.encode(manifest)
        record = a_record(1234, 10_000, ref)
        click.echo(
            f"{title}: {ref.tensors:,} tensors; record {len(records.encode(record)):,} B "
            f"under a key of {len(record.key)} B; "
            f"manifest {sum(map(len, parts)):,} B in {len(parts)} part(s)"
        )


def main() -> None:
    match sys.argv[1:]:
        case ["sizes"]:
            sizes()
        case ["store", *counts] if counts:
            for count in counts:
                store(int(count), dense_rank())
        case ["store-moe", count]:
            store(int(count), moe_rank())
        case ["connections", count]:
            connections(int(count))
        case ["rates", *counts] if counts:
            for count in counts:
                rates(int(count), dense_rank())
        case ["hosts", count]:
            hosts(int(count))
        case ["expiry", count]:
            expiry(int(count), dense_rank())
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
