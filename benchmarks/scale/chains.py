"""A thousand receivers against eight, on paper: with the fabric of
docs/explanation/fan-out-times.md.
"""

from __future__ import annotations

from benchmarks.fanout.model import Fabric, depths_of, joined, pipelined, pipelined_tree
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.sizes import Sizes

_NBYTES = 140e9
_HOP = 0.03  # over RDMA: 4 GiB of the 140 GB
_MANY, _FEW = 1_000, 8
_NOTICES_S = (0.02, 0.1)


def chains(sizes: Sizes, say: Say) -> Found:
    rows = []
    worst = 0.0
    for notice_s in _NOTICES_S:
        fabric = Fabric(
            nbytes_per_s=50e9, start_s=0.1, notice_s=notice_s, in_flight_nbytes=2 * (16 << 20)
        )
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
    return Found([table], {"chain_ratio": worst})
