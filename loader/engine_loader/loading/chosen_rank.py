"""Which rank is copied to which file, before anything is loaded. Imports no torch, so that a
mistake is reported at once. Used by `fetch` and by the command `engines load`.
"""

from __future__ import annotations

from pathlib import Path

from engine_registry import RankRecord, Registry
from engine_registry.errors import InstanceIncomplete, InvalidField
from engine_registry.schema.record import GATEWAY
from engine_registry.watching.waiting import Wanted


def rank_file(folder: Path, rank: int, force: bool) -> Path:
    """Where the rank's weights go. InvalidField if a file is there that may not be replaced."""
    path = folder / f"rank-{rank}.safetensors"
    if path.exists() and not force:
        raise InvalidField(
            f"{path} is there already", "choose another `out`, or `force`", field="out"
        )
    return path


def ranks_of(
    registry: Registry, source: Wanted, rank: int, timeout_s: float
) -> tuple[RankRecord, ...]:
    """All ranks of the first instance that is ready, of which `rank` is one that can be copied.

    Raises what `Registry.ready` raises, InvalidField if there is no such rank, and
    InstanceIncomplete for a seed of SGLang.
    """
    records = registry.ready(source, timeout_s)[0].records
    if not 0 <= rank < len(records):
        raise InvalidField(
            f"rank {rank} is not one of {records[0].instance!r}: its ranks are 0 to "
            f"{len(records) - 1}",
            field="rank",
        )
    record = records[rank]
    if record.kept_by == GATEWAY:
        raise InstanceIncomplete(
            f"{record.key} is an SGLang seed, which states neither dtypes nor shapes and has "
            "no header to check reads by",
            "load it with SGLang, through a gateway",
        )
    return records
