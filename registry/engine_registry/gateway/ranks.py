"""Numbers of ranks as SGLang sends them, in queries and in bodies. Pure; used by the gateway.

SGLang's seeds give their tp rank. Under pipeline parallelism several ranks have the same one, so a
seed may add its pp rank and the tp size, which make the world rank.
"""

from __future__ import annotations

import re

from engine_registry.errors import InvalidField
from engine_registry.schema.keys import MAX_RANKS


def world_rank(tp_rank: int, pp_rank: int | None, tp_size: int | None) -> int:
    """The number of the rank over both axes; InvalidField where they do not make one."""
    if tp_size is not None and tp_rank >= tp_size:
        raise InvalidField(f"tp_rank {tp_rank} is not below tp_size {tp_size}", field="tp_rank")
    if not pp_rank:
        return tp_rank
    if tp_size is None:
        raise InvalidField(
            f"pp_rank {pp_rank} is given without tp_size, so the world rank is not known",
            "send tp_size, too, or the world rank as `rank`",
            field="tp_size",
        )
    rank = pp_rank * tp_size + tp_rank
    if rank >= MAX_RANKS:
        raise InvalidField(
            f"pp_rank {pp_rank} of tp_size {tp_size} is rank {rank}, and ranks are below "
            f"{MAX_RANKS}",
            field="pp_rank",
        )
    return rank


def parse_rank(text: str | None) -> int:
    """Of a query; InvalidField where it is missing, negative or no number."""
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        found = "is missing" if text is None else f"{text[:20]!r} is not valid"
        raise InvalidField(f"rank {found}", "give ?rank=N with a whole number from 0", field="rank")
    return int(text)


def parse_world_size(text: str | None) -> int | None:
    """Of a query, where there is one."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_RANKS:
        raise InvalidField(
            f"world_size {text[:20]!r} is not valid: it is a whole number from 1 to {MAX_RANKS}",
            field="world_size",
        )
    return int(text)
