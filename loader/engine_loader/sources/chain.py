"""Which rank to read from, where ranks that are still loading are sources too. Pure.

Ranks that load have an order that never changes: that of their registration. A rank reads from
those that are complete, and of those that load only from some that began before it. So no rank
reads from itself by way of others, whatever else each of them knows.

A rank sees a few ranks, not all. While so few load that one chain is quick enough, it goes by what
the others do that choose like it: each reads from the one that began just before it. Behind more
ranks it takes the one with the fewest readers of those that it sees, so that a tree grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What a rank somewhere in a tree costs more than a complete one, in loads: its depth is not known.
# Less than 1, so that it is preferred to a source that has a reader already.
_SOMEWHERE = 0.5


def costs(
    ready: Sequence[str],
    loading: Sequence[str],
    readers: Mapping[str, int],
    *,
    ahead: int,
    all_ready: bool,
    hop: float,
) -> dict[str, float]:
    """What it would cost to read from each of the ranks. All are named by their incarnations.

    The unit is the time that all weights take from a source that nobody else reads from: as many
    times that as there would be readers, and `hop` for each rank that they have gone through
    before.

    Args:
        ready: Ranks that are complete.
        loading: Ranks that load and began before, the last one first: those just before, or where
            more than `chain_length` did, some that are spread over all.
        readers: How many read from each now.
        ahead: How many load that began before.
        all_ready: Whether `ready` has all that there are.
        hop: The time that a rank adds, in loads.
    """
    longest = chain_length(hop)
    # Those ahead that have no ticket yet will take these: the first one, and the first behind the
    # chain.
    expected = int(all_ready and ahead >= len(ready)) + int(all_ready and 0 < longest < ahead)
    cost = {one: 1.0 + max(readers.get(one, 0), expected) for one in ready}
    for number, one in enumerate(loading):
        if ahead <= longest:
            # the one that began after it reads from it, or will
            reading = max(readers.get(one, 0), min(number, 1))
            cost[one] = 1 + reading + hop * (ahead - number)
        else:
            before = ahead * (1 - (number + 0.5) / len(loading))
            reading = max(readers.get(one, 0), int(before < longest - 1))
            cost[one] = 1 + reading + max(hop, _SOMEWHERE)
    return cost


def chain_length(hop: float) -> int:
    """How many ranks may read one from the other until the hops cost as much as to share a
    source.
    """
    return int(1 / hop) if hop > 0 else 1 << 30
