"""Where things lie in etcd, and which names may be part of a key. Pure."""

from __future__ import annotations

import re

from engine_registry.errors import InvalidField
from engine_registry.schema.numbers import whole

ENGINES = "/engines/"
MANIFESTS = "/manifests/"
EVICTED = "/evicted/"
PULLS = "/pulls/"
HOLDERS = "/holders/"
# no model's digest begins like these
NEAR_HOLDERS = "/holders/near/"
RETAINED_HOLDERS = "/holders/retained/"
ELECTIONS = "/elections/"
EVICTION_NOTES = "/eviction-notes/"
RELEASES = "/releases/"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_RECORD_KEY = re.compile(ENGINES + r"([A-Za-z0-9._-]{1,128})/(0|[1-9][0-9]{0,6})")
_PULL_KEY = re.compile(
    PULLS + r"([A-Za-z0-9._-]{1,128})/(0|[1-9][0-9]{0,6})/([A-Za-z0-9._-]{1,128})"
)
MAX_RANKS = 100_000


def check_instance(name: str) -> str:
    """`name` itself, or InvalidField."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidField(
            f"instance name {name!r} is not valid",
            "use 1 to 128 of the characters A-Z a-z 0-9 . _ -",
            field="instance",
        )
    return name


def check_rank(rank: object, world_size: object) -> tuple[int, int]:
    """Both as Python's integers, or InvalidField."""
    size = whole("world_size", world_size, 1, MAX_RANKS)
    try:
        return whole("rank", rank, 0, size - 1), size
    except InvalidField as exc:
        raise InvalidField(f"{exc.what}, as world_size is {size}", field="rank") from exc


def instance_prefix(instance: str) -> str:
    return f"{ENGINES}{instance}/"


def record_key(instance: str, rank: int) -> str:
    return f"{ENGINES}{instance}/{rank}"


def parse_record_key(key: str) -> tuple[str, int] | None:
    """(instance, rank), or None where the key is not a record's."""
    match = _RECORD_KEY.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def manifest_prefix(instance: str, rank: int, incarnation: str) -> str:
    return f"{MANIFESTS}{instance}/{rank}/{incarnation}/"


def manifest_part_key(instance: str, rank: int, incarnation: str, part: int) -> str:
    return f"{manifest_prefix(instance, rank, incarnation)}{part}"


def pulls_prefix(instance: str, rank: int) -> str:
    return f"{PULLS}{instance}/{rank}/"


def pull_key(instance: str, rank: int, load_id: str) -> str:
    return f"{pulls_prefix(instance, rank)}{load_id}"


def parse_pull_key(key: str) -> tuple[str, int, str] | None:
    """(instance, rank, load id), or None where the key is not a ticket's."""
    match = _PULL_KEY.fullmatch(key)
    return (match[1], int(match[2]), match[3]) if match else None


def election_key(name: str) -> str:
    return f"{ELECTIONS}{name}/leader"  # no name is a prefix of another so


def eviction_note_key(instance: str) -> str:
    return f"{EVICTION_NOTES}{instance}"


def release_key(instance: str) -> str:
    return f"{RELEASES}{instance}"


def parse_release_key(key: str) -> str | None:
    """The instance, or None where the key is not a release's."""
    name = key.removeprefix(RELEASES)
    return name if key.startswith(RELEASES) and _NAME.fullmatch(name) else None


def evicted_key(instance: str, rank: int, incarnation: str) -> str:
    """The mark that keeps an evicted registration from coming back when etcd is back."""
    return f"{EVICTED}{instance}/{rank}/{incarnation}"
