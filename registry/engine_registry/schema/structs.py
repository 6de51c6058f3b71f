"""JSON to and from Structs of msgspec: the place where its errors become ours. Pure.

Used by the formats in this folder and by the gateway. A Struct gives the type and the bounds of
each field. msgspec has no bounds of 2^63 or more, so a Struct checks those in `__post_init__`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

Natural = Annotated[int, msgspec.Meta(ge=0)]  # see `check_64_bits`
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number with a fraction",
    "int": "a whole number",
    "null": "null",
    "object": "an object",
    "str": "a text",
}
# What msgspec says, and the words for it. `{}` are the groups, with types in our words.
_SENTENCES = (
    (r"Expected `([a-z| ]+)`, got `([a-z]+)`", "{} was expected, {} was found"),
    (r"Expected `([a-z]+)` of length (<=|>=|) ?(\d+)", "{} of {}{} was expected"),
    (r"Expected `([a-z]+)` (<=|>=) (-?\d+)", "{} of {}{} was expected"),
    (r"Invalid enum value (.{1,100})", "{} is none of the words that may stand there"),
    (r"Integer value out of range", "the number is out of range"),
)
_COMPARED = {"<=": "at most ", ">=": "at least ", "": ""}


class Malformed(ValueError):
    """The JSON path of a fault, and what was expected there and found.

    `field` is the last name of the path; empty where the JSON as a whole is at fault.
    """

    def __init__(self, text: str, path: str = "$") -> None:
        super().__init__(text)
        names = re.findall(r"\.(\w+)", path)
        self.field = names[-1] if names else ""


def read(decoder: msgspec.json.Decoder[T], value: bytes) -> T:
    """The Struct in the JSON. Malformed, also for nesting without end."""
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as exc:
        raise _malformed(str(exc)) from exc
    except (ValueError, RecursionError) as exc:  # DecodeError, and bytes that are not UTF-8
        raise Malformed(f"it is not JSON: {exc}") from exc


def convert(data: Any, kind: type[T]) -> T:
    """The Struct in what was read as plain data. Malformed."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as exc:
        raise _malformed(str(exc)) from exc


def write(struct: Any) -> bytes:
    """The Struct as JSON, its fields in their order."""
    return msgspec.json.encode(struct, enc_hook=_plain)


def plain(struct: msgspec.Struct) -> dict[str, Any]:
    """The fields that `write` writes, as plain data."""
    fields: dict[str, Any] = msgspec.to_builtins(struct, enc_hook=_plain)
    return fields


def check_64_bits(struct: Any, *names: str) -> None:
    """For `__post_init__`: ValueError unless each of the numbers has at most 64 bits."""
    for name in names:
        number = getattr(struct, name)
        if isinstance(number, int) and number >= 1 << 64:
            raise ValueError(f"{name} is out of range: {number}")


class _Schema(msgspec.Struct, frozen=True):
    schema: int


_SCHEMA = msgspec.json.Decoder(_Schema)


def schema_of(value: bytes) -> int:
    """The schema number of JSON that may be of any later schema; 0 where it has none."""
    try:
        return read(_SCHEMA, value).schema
    except Malformed:
        return 0


def _malformed(error: str) -> Malformed:
    said, _, path = error.partition(" - at `")
    path = path.rstrip("`") or "$"
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", said):
        path = f"{path}.{missing[1]}"
        return Malformed(f"`{path}` is missing", path)
    for pattern, sentence in _SENTENCES:
        if match := re.fullmatch(pattern, said):
            said = sentence.format(*map(_word, match.groups()))
            break
    return Malformed(f"`{path}`: {said}", path)


def _word(group: str) -> str:
    if group in _COMPARED:
        return _COMPARED[group]
    return " or ".join(_WORDS.get(kind, kind) for kind in group.split(" | "))


def _plain(value: Any) -> Any:
    """Texts and numbers of types that only look like Python's own, as numpy's do."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
