"""A thousand receivers against eight, on paper: with the fabric of
docs/explanation/fan-out-times.md.
"""

from __future__ import annotations

from statistics import median

from benchmarks.fanout.model import (
    Fabric,
    crossings,
    depths_of,
    in_zones,
    joined,
    pipelined,
    pipelined_tree,
)
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.sizes import Sizes

_NBYTES = 140e9
_HOP = 0.03  # over RDMA: 4 GiB of the 140 GB
_MANY, _FEW = 1_000, 8
_NOTICES_S = (0.02, 0.1)
_COUNTS, _ZONES = (8, 100, 1_000), (1, 2, 4)
_DRAWS = 9


def _fabric(notice_s: float) -> Fabric:
    return Fabric(
        nbytes_per_s=50e9, start_s=0.1, notice_s=notice_s, in_flight_nbytes=2 * (16 << 20)
    )


def chains(sizes: Sizes, say: Say) -> Found:
    rows = []
    worst = 0.0
    for notice_s in _NOTICES_S:
        fabric = _fabric(notice_s)
        trees = {count: joined(count, _HOP) for count in (_FEW, _MANY)}
        few, many = (pipelined(fabric, _NBYTES, tree) for tree in trees.values())
        binary = pipelined_tree(fabric, _NBYTES, _MANY, 2)
        depth = max(depths_of(trees[_MANY]))
        rows.append((f"{notice_s} s", few, many, many / few, depth, binary / few))
        worst = max(worst, many / few)
    table = Table(
        f"Receivers by the rule of sources/chain.py, in the model: {_FEW} and {_MANY:,}",
        (
            "notice of a chunk",
            f"s of {_FEW}",
            f"s of {_MANY:,}",
            "ratio",
            "depth",
            "ratio of a binary tree",
        ),
        rows,
    )
    return Found([table, _in_zones()], {"chain_ratio": worst})


def _in_zones() -> Table:
    """The seed is in one of them, and each receiver in any."""
    rows = []
    for count in _COUNTS:
        for zones in _ZONES:
            draws = [_draw(count, zones, seed) for seed in range(_DRAWS)]
            blind, near, seconds = (median(values) for values in zip(*draws, strict=True))
            rows.append((count, zones, int(blind), int(near), seconds))
    return Table(
        f"Receivers in several zones, in the model: medians of {_DRAWS} draws",
        ("receivers", "zones", "read across without a location", "read across", "seconds"),
        rows,
        f"A notice of a chunk takes {_NOTICES_S[0]} s.",
    )


def _draw(count: int, zones: int, seed: int) -> tuple[float, float, float]:
    where = in_zones(count, zones, seed)
    blind, near = joined(count, _HOP, seed), joined(count, _HOP, seed, where)
    seconds = pipelined(_fabric(_NOTICES_S[0]), _NBYTES, near)
    return crossings(blind, where), crossings(near, where), seconds
