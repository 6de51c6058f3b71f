"""SGLang's words for a rank: what its seeds send and what its clients read, as manifests of ours.
Pure; used by the gateway.

A seed tells the session of its transfer engine and, for each tensor, its address, how many elements
it has and how many bytes one takes. It does not say dtypes, shapes, the protocol, or how many
ranks there are. The source of the format is SGLang itself: `EngineInfoBootstrapServer`, and
`get_remote_instance_transfer_engine_info_per_rank` of its loader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from engine_registry.errors import InvalidField
from engine_registry.schema.address import parse_session, why_not_advertised
from engine_registry.schema.keys import MAX_RANKS
from engine_registry.schema.manifest import Manifest, Region, TensorEntry
from engine_registry.schema.printable import is_unicode
from engine_registry.schema.record import RankRecord

MAX_TENSORS = 200_000
_ANSWER = "remote_instance_transfer_engine_info"
_MAX_ADDR = 1 << 64
_MAX_ELEMENT_NBYTES = 256  # the largest of torch's is 16
_MAX_NAME = 4096
_TARGET = "target"  # the role of a model that is nobody's draft


@dataclass(frozen=True)
class SeedInfo:
    """What a seed has said of one rank."""

    rank: int
    session_id: str
    manifest: Manifest
    world_size: int | None = None
    role: str = ""  # `draft` for a speculative draft model, which has a rank of the same number


def parse_rank(text: str | None) -> int:
    """Of a query; InvalidField where it is missing, negative or no number."""
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        found = "is missing" if text is None else f"{text[:20]!r} is not valid"
        raise InvalidField(f"rank {found}", "give ?rank=N with a whole number from 0", field="rank")
    return int(text)


def parse_world_size(text: str | None) -> int | None:
    """Of a query, where there is one."""
    return (
        None
        if text is None
        else _world_size(int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text[:20])
    )


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
        data = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise InvalidField(f"the body is not JSON: {str(exc)[:200]}", field="body") from exc
    _check_object(data, "the body")
    rank = data["rank"] if "rank" in data else data.get("tp_rank")
    if type(rank) is not int or not 0 <= rank < MAX_RANKS:
        raise InvalidField(
            f"rank {_short(rank)} is not valid: it is a whole number from 0 to {MAX_RANKS - 1}",
            field="rank",
        )
    session_id, weights = _engine_info(data)
    if not isinstance(session_id, str):
        raise InvalidField(
            f"session_id {_short(session_id)} is not valid: it is host:port", field="session_id"
        )
    host, _ = parse_session(session_id)
    if problem := why_not_advertised(host):
        raise InvalidField(f"session_id {session_id!r} is not valid: {problem}", field="session_id")
    _check_object(weights, "weights_info_dict")
    if len(weights) > max_tensors:
        raise InvalidField(
            f"{len(weights)} tensors are more than {max_tensors}", field="weights_info_dict"
        )
    role = data.get("role", "")
    if not isinstance(role, str):
        raise InvalidField(f"role {_short(role)} is not valid: it is a string", field="role")
    return SeedInfo(
        rank=rank,
        session_id=session_id,
        manifest=_manifest(weights),
        world_size=_world_size(data["world_size"]) if data.get("world_size") is not None else None,
        role=role,
    )


def instance_of_role(instance: str, role: str) -> str:
    """A draft model is an instance of its own."""
    return f"{instance}.{role}" if role and role != _TARGET else instance


def render(record: RankRecord, manifest: Manifest) -> bytes:
    """What SGLang's server answers about a rank:

    JSON. Clients unpack exactly a session and a table.
    """
    weights = {entry.name: [entry.addr, *_elements(entry)] for entry in manifest.tensors}
    return json.dumps(
        {"rank": record.rank, _ANSWER: [record.session_id, weights]}, separators=(",", ":")
    ).encode()


def _check_extent(body: bytes, max_tensors: int) -> None:
    """Before it is parsed: Python's objects take many times the room of their JSON."""
    if (
        body.count(b"[") + body.count(b"{") > max_tensors + 1000
        or body.count(b",") > 4 * max_tensors + 1000
    ):
        raise InvalidField(
            f"the body holds more than {max_tensors} tensors, or something else", field="body"
        )


def _check_object(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise InvalidField(f"{what} is not valid: it is a JSON object", field=what)


def _engine_info(data: dict[str, Any]) -> tuple[Any, Any]:
    if _ANSWER in data and "transfer_engine_info" not in data:
        answer = data[_ANSWER]
        if not isinstance(answer, list) or len(answer) < 2:
            raise InvalidField(
                f"{_ANSWER} is not valid: it is [session_id, weights_info_dict]", field=_ANSWER
            )
        return answer[0], answer[1]
    info = data.get("transfer_engine_info")
    _check_object(info, "transfer_engine_info")
    return info.get("session_id"), info.get("weights_info_dict")  # type: ignore[union-attr]  # it is a dict


def _world_size(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANKS:
        raise InvalidField(
            f"world_size {_short(value)} is not valid: it is a whole number from 1 to {MAX_RANKS}",
            field="world_size",
        )
    return value


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
