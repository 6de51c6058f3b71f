"""SGLang's words for a rank: what its seeds send and what its clients read, as manifests of ours.
Pure; used by the gateway.

A seed states the session of its transfer engine and, for each tensor, its address, how many
elements it has and how many bytes one takes. It does not say dtypes, shapes, the protocol, or how
many ranks there are. The source of the format is SGLang itself: `EngineInfoBootstrapServer`, and
`get_remote_instance_transfer_engine_info_per_rank` of its loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from engine_registry.errors import InvalidField
from engine_registry.gateway.ranks import world_rank
from engine_registry.schema import structs
from engine_registry.schema.address import parse_session, why_not_advertised
from engine_registry.schema.keys import MAX_RANKS
from engine_registry.schema.manifest import Manifest, Region, TensorEntry
from engine_registry.schema.printable import is_unicode, short
from engine_registry.schema.record import RankRecord
from engine_registry.schema.structs import Malformed

MAX_TENSORS = 200_000
_ANSWER = "remote_instance_transfer_engine_info"
_MAX_ADDR = 1 << 64
_MAX_ELEMENT_NBYTES = 256  # the largest of torch's is 16
_MAX_NAME = 4096
_TARGET = "target"  # the role of a model that is nobody's draft


_Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
_WorldSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]


class _EngineInfo(msgspec.Struct, frozen=True):
    session_id: str
    weights_info_dict: dict[str, Any]  # `_entry` checks each, and names it: a path would not


class _Body(msgspec.Struct, frozen=True):
    """What seeds send, or what SGLang's own server answers about a rank."""

    rank: _Rank | UnsetType = UNSET
    tp_rank: _Rank | UnsetType = UNSET
    pp_rank: _Rank | None = None  # beside `tp_rank`
    tp_size: _WorldSize | None = None
    transfer_engine_info: _EngineInfo | UnsetType = UNSET
    remote_instance_transfer_engine_info: Any = UNSET  # [session_id, weights_info_dict]
    world_size: _WorldSize | None = None
    role: str = ""


_BODY = msgspec.json.Decoder(_Body)


@dataclass(frozen=True)
class SeedInfo:
    """What a seed has said of one rank."""

    rank: int
    session_id: str
    manifest: Manifest
    world_size: int | None = None
    role: str = ""  # `draft` for a speculative draft model, which has a rank of the same number


def parse_registration(body: bytes, max_tensors: int = MAX_TENSORS) -> SeedInfo:
    """The body of a PUT; InvalidField says what is wrong with it.

    Beside what seeds send it may be what SGLang's own server answers about a rank, so that one can
    be fed from the other.
    """
    try:
        return _parse(body, max_tensors)
    except InvalidField as exc:
        error = InvalidField(exc.what, exc.remedy, **exc.details)
    # A copy: the error itself holds on to whatever its traceback has seen, and so to all that was
    # sent.
    raise error


def _parse(body: bytes, max_tensors: int) -> SeedInfo:
    _check_extent(body, max_tensors)
    try:
        data = structs.read(_BODY, body)
        rank = _rank(data)
        session_id, weights = _engine_info(data)
    except Malformed as exc:
        field = exc.field or "body"
        raise InvalidField(f"the body is not valid: {short(exc)}", field=field) from exc
    host, _ = parse_session(session_id)
    if problem := why_not_advertised(host):
        raise InvalidField(f"session_id {session_id!r} is not valid: {problem}", field="session_id")
    if len(weights) > max_tensors:
        raise InvalidField(
            f"{len(weights)} tensors are more than {max_tensors}", field="weights_info_dict"
        )
    return SeedInfo(rank, session_id, _manifest(weights), data.world_size, data.role)


def instance_of_role(instance: str, role: str) -> str:
    """A draft model is a separate instance."""
    return f"{instance}.{role}" if role and role != _TARGET else instance


def render(record: RankRecord, manifest: Manifest) -> bytes:
    """What SGLang's server answers about a rank:

    JSON. Clients unpack exactly a session and a table.
    """
    weights = {entry.name: [entry.addr, *_elements(entry)] for entry in manifest.tensors}
    return structs.write({"rank": record.rank, _ANSWER: [record.session_id, weights]})


def _rank(data: _Body) -> int:
    if data.rank is not UNSET:
        return data.rank
    if data.tp_rank is UNSET:
        raise Malformed("`$.rank` is missing", "$.rank")
    return world_rank(data.tp_rank, data.pp_rank, data.tp_size)


def _check_extent(body: bytes, max_tensors: int) -> None:
    """Before it is parsed: Python's objects take many times the room of their JSON."""
    if (
        body.count(b"[") + body.count(b"{") > max_tensors + 1000
        or body.count(b",") > 4 * max_tensors + 1000
    ):
        raise InvalidField(
            f"the body holds more than {max_tensors} tensors, or something else", field="body"
        )


def _engine_info(data: _Body) -> tuple[str, dict[str, Any]]:
    info, answer = data.transfer_engine_info, data.remote_instance_transfer_engine_info
    if info is not UNSET:
        return info.session_id, info.weights_info_dict
    if answer is UNSET:
        raise Malformed("`$.transfer_engine_info` is missing", "$.transfer_engine_info")
    if not isinstance(answer, list) or len(answer) < 2:
        raise Malformed(f"`$.{_ANSWER}` is not [session_id, weights_info_dict]", f"$.{_ANSWER}")
    info = structs.convert(dict(zip(("session_id", "weights_info_dict"), answer)), _EngineInfo)  # noqa: B905  it may say more
    return info.session_id, info.weights_info_dict


def _manifest(weights: dict[str, Any]) -> Manifest:
    tensors = tuple(_entry(name, place) for name, place in weights.items())
    manifest = Manifest(tensors, _regions(tensors))
    if manifest.nbytes >= _MAX_ADDR:
        raise InvalidField(
            f"the tensors take {manifest.nbytes} bytes, which no memory has",
            field="weights_info_dict",
        )
    return manifest


def _regions(tensors: Iterable[TensorEntry]) -> tuple[Region, ...]:
    """Each tensor is registered memory for sure; of what lies between them nothing is known.

    Those that share memory are one.
    """
    regions: list[Region] = []
    for addr, nbytes in sorted({(entry.addr, entry.nbytes) for entry in tensors if entry.nbytes}):
        last = regions[-1] if regions else Region(0, 0)
        if addr < last.end:
            regions[-1] = Region(last.addr, max(last.end, addr + nbytes) - last.addr)
        else:
            regions.append(Region(addr, nbytes))
    return tuple(regions)


def _entry(name: str, place: Any) -> TensorEntry:
    if not 0 < len(name) <= _MAX_NAME or not is_unicode(name):
        raise InvalidField(
            f"tensor name {_short(name)} is not valid: it is text of 1 to {_MAX_NAME} characters",
            field="name",
        )
    if (
        not isinstance(place, list)
        or len(place) != 3
        or not all(type(number) is int for number in place)
    ):
        raise InvalidField(
            f"tensor {_short(name)} is not valid: it is [address, number of elements, bytes "
            "of one], three whole numbers",
            field="weights_info_dict",
        )
    addr, numel, itemsize = place
    nbytes = numel * itemsize
    if (
        numel < 0
        or not 1 <= itemsize <= _MAX_ELEMENT_NBYTES
        or not bool(nbytes) <= addr <= _MAX_ADDR - nbytes
    ):
        raise InvalidField(
            f"tensor {_short(name)} is not valid: {_short(numel)} elements of "
            f"{_short(itemsize)} bytes at {_short(addr)} "
            f"are in no memory of 64 bits (an element takes 1 to {_MAX_ELEMENT_NBYTES})",
            field="weights_info_dict",
        )
    addr = min(addr, _MAX_ADDR - 1)  # of an empty tensor
    return TensorEntry(name, f"{itemsize}-byte", (numel,), addr, nbytes, (numel,), (0,))


def _elements(entry: TensorEntry) -> tuple[int, int]:
    """How many elements the tensor has, and how many bytes one takes."""
    numel = prod(entry.shape)
    if not numel:
        return 0, _itemsize(entry.dtype)
    return (numel, entry.nbytes // numel) if entry.nbytes % numel == 0 else (entry.nbytes, 1)


def _itemsize(dtype: str) -> int:
    """By its name, where there are no elements: torch's names hold the bits, ours of seeds
    the bytes.
    """
    number = re.search(r"[0-9]{1,4}", dtype)
    if number is None:  # bool
        return 1
    return int(number[0]) if dtype.endswith("-byte") else max(1, int(number[0]) // 8)


def _short(value: Any) -> str:
    """For a message: whatever was sent, in a few characters."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    return ascii(
        value[:100]
        if isinstance(value, str)
        else type(value).__name__
        if isinstance(value, list | dict)
        else value
    )[:100]
