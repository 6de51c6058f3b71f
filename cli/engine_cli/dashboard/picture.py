"""The picture of who reads from whom: nodes in columns and rows, and the flows between them. Pure.

A source stands left of its readers. Its first reader stands in its row, so that a chain is a line.
Anybody may have written a ticket: whatever they say of each other, the picture has an end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_cli.render.flows import Flows, Line, name_of
from engine_cli.render.states import rank_state_of
from engine_registry import RankState

MAX_NUMBER = (1 << 63) - 1  # that JSON is written with: sums of what anybody may claim go beyond
MAX_NODES = 48  # more than that nobody can look at


def picture(
    flows: Flows, speed_of: Callable[[str], float], max_nodes: int = MAX_NODES
) -> dict[str, Any]:
    """`speed_of` gives the bytes a second of a reader, by `reader_of`.

    Flows name their ends by the place in `nodes`. `more` is how many nodes have been left out.
    """
    strangers = {name_of(pulls[0]): reader for reader, pulls in flows.by_reader.items()}
    places: dict[str, int] = {}
    nodes: list[dict[str, Any]] = []
    edges: dict[tuple[int, int], None] = {}
    left_out: set[str] = set()
    row, before = -1, ""
    for line in flows.tree():
        if line.name not in places:
            if len(nodes) >= max_nodes:
                left_out.add(line.name)
                continue
            if line.depth == 0 or line.parent != before:
                row += 1
            places[line.name] = len(nodes)
            reader = line.record.incarnation if line.record else strangers.get(line.name)
            nodes.append(_node(line, row, speed_of(reader) if reader else 0.0))
            before = line.name
        elif not line.again and line.depth > nodes[places[line.name]]["column"]:
            nodes[places[line.name]]["column"] = line.depth
        if line.depth and line.parent in places and line.parent != line.name:
            edges[places[line.parent], places[line.name]] = None
    return {
        "nodes": nodes,
        "edges": [list(each) for each in edges],
        "loads": len(flows.by_reader),
        "speed": bounded(sum(map(speed_of, flows.by_reader))),
        "more": len(left_out),
    }


def bounded(number: float) -> int:
    return min(round(number), MAX_NUMBER)


def _node(line: Line, row: int, speed: float) -> dict[str, Any]:
    record, progress = line.record, line.progress
    loads = progress is not None and (record is None or record.state is RankState.LOADING)
    return {
        "name": line.name,
        "instance": record.instance if record else None,
        "rank": record.rank if record else None,
        "state": rank_state_of(record) if record else "load",
        "column": line.depth,
        "row": row,
        "fraction": progress.fraction if progress and loads else None,
        "nbytes": progress.nbytes if progress else 0,
        "total_nbytes": progress.total_nbytes if progress else 0,
        "speed": bounded(speed),
    }
