"""Memory of this host that keepers hold for ranks whose process has ended: a GPU that has less
memory than its processes take shows no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from engine_cli.doctor.finding import Finding, ok, warn

if TYPE_CHECKING:
    from engine_registry import Kept

CHECK = "memory.held"


def check_held() -> Iterator[Finding]:
    from engine_registry import keepers_here

    yield from judge_held(keepers_here())


def judge_held(kept: Sequence[Kept]) -> Iterator[Finding]:
    """`kept` is what the keepers of this user have."""
    held = [each for each in kept if each.held]
    for each in sorted(held, key=lambda each: each.key):
        yield _of(each)
    if not held:
        yield ok(CHECK, "no keeper of this user holds memory of a rank whose process has ended")


def _of(kept: Kept) -> Finding:
    from engine_cli.render.held import left
    from engine_cli.render.tables import size
    from engine_registry.schema.keys import parse_record_key

    instance, rank = parse_record_key(kept.key) or ("", 0)
    shared = f", shared by {kept.sharers} processes" if kept.sharers else ""
    ending = f", or end its keeper: kill -KILL {kept.pid}" if kept.pid else ""
    return warn(
        CHECK,
        f"{instance}/{rank} holds {size(kept.nbytes)} on {', '.join(kept.devices)}{shared}: its "
        f"process has ended; {left(kept.held_until)}",
        "start the rank again on this host, so that it adopts the memory; or free it: engines "
        f"release {instance} --held --rank {rank}{ending}",
    )
