"""The index of who holds the weights of a model: keys that lead to records. Pure.

    /holders/<model digest>/<rank>/<state>/<version>/<order>
    /holders/near/<area>/<model digest>/<rank>/<state>/<version>/<order>
    /holders/retained/<model digest>/<rank>/<state>/<version>/<order>

The value is the key of the record. Versions count down, so that the newest is read first. In the
state `loading` the order begins with the revision before which the rank registered, which counts
down too: so a range that begins at one rank's key has those that began before it, the last first.
In the other states the order is the incarnation alone, which is random: so a range from a random
place is a sample. A rank with a location has such an entry in each area that it lies in, as well,
and under `retained` one for each version before its present one that can still be read.

An entry is a hint. Whoever reads it reads the record as well, and believes that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from engine_registry.schema.keys import (
    HOLDERS,
    NEAR_HOLDERS,
    RETAINED_HOLDERS,
    parse_record_key,
)
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import (
    MAX_REVISION,
    MAX_VERSION,
    ModelIdentity,
    RankRecord,
    RankState,
)


def model_digest(model: ModelIdentity) -> str:
    """128 bits as 32 hexadecimal digits, by BLAKE2b, of the identity as JSON without spaces: a
    list of its name, revision, dtype and quantization, and of `extra` with its names in order.
    """
    identity = [model.name, model.revision, model.dtype, model.quantization, dict(model.extra)]
    written = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def holders_prefix(
    model: ModelIdentity,
    rank: int | None = None,
    state: RankState | None = None,
    version: int | None = None,
    area: str = "",
    retained: bool = False,
) -> str:
    """Of all entries of the model, or of those of a rank, a state, a version; each only together
    with the ones before it. With `area`, of the entries in that area. `retained`: of entries of
    versions before the present ones.
    """
    parts = [model_digest(model)]
    if rank is not None:
        parts.append(str(rank))
    if state is not None:
        parts.append(state.value)
    if version is not None:
        parts.append(_down_from(MAX_VERSION, version))
    start = f"{NEAR_HOLDERS}{area}/" if area else RETAINED_HOLDERS if retained else HOLDERS
    return f"{start}{'/'.join(parts)}/"


def holder_keys(record: RankRecord) -> list[str]:
    """All entries of the record; none without `order`."""
    if not record.order:
        return []
    keys = [holder_key(record, area) for area in ("", *record.location.areas)]
    return keys + [_retained_key(record, one.version) for one in record.retained]


def holder_key(record: RankRecord, area: str = "") -> str:
    """The entry of a record with `order`, or its entry in the area."""
    prefix = holders_prefix(record.model, record.rank, record.state, record.version, area)
    if record.state is RankState.LOADING:
        return f"{prefix}{_down_from(MAX_REVISION, record.order)}-{record.incarnation}"
    return prefix + record.incarnation


def _retained_key(record: RankRecord, version: int) -> str:
    prefix = holders_prefix(record.model, record.rank, record.state, version, retained=True)
    return prefix + record.incarnation


def loading_key(model: ModelIdentity, rank: int, version: int, order: int, area: str = "") -> str:
    """The first key of those that began to load at the revision `order` or before."""
    prefix = holders_prefix(model, rank, RankState.LOADING, version, area)
    return prefix + _down_from(MAX_REVISION, max(0, min(order, MAX_REVISION)))


_NEAR = NEAR_HOLDERS.removeprefix(HOLDERS).rstrip("/")
_RETAINED = RETAINED_HOLDERS.removeprefix(HOLDERS).rstrip("/")


@dataclass(frozen=True)
class Entry:
    """An entry of the index, as it was read. `order` is 0 for ranks that are not loading."""

    record_key: str
    rank: int
    state: RankState
    version: int
    order: int
    incarnation: str


def parse_entry(item: KeyValue) -> Entry | None:
    """None where the key is no entry, or leads nowhere."""
    if not item.key.startswith(HOLDERS):
        return None
    parts = item.key.removeprefix(HOLDERS).split("/")
    try:
        ahead = {_NEAR: 2, _RETAINED: 1}.get(parts[0], 0)
        _, rank, name, version, incarnation = parts[ahead:]
        state, order = RankState(name), ""
        if state is RankState.LOADING:
            order, incarnation = incarnation.split("-", 1)
        entry = Entry(
            item.value.decode(),
            int(rank),
            state,
            MAX_VERSION - int(version, 16),
            MAX_REVISION - int(order, 16) if order else 0,
            incarnation,
        )
    except ValueError:
        return None
    place = parse_record_key(entry.record_key)
    return entry if incarnation and place is not None and place[1] == entry.rank else None


def _down_from(most: int, number: int) -> str:
    """16 hexadecimal digits, the less the greater the number is."""
    return f"{most - number:016x}"
