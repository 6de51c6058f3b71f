"""Messages between a rank and its keeper over a pipe: one line of JSON, then the raw bytes whose lengths the line gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import IO, Any, NamedTuple


class Frame(NamedTuple):
    message: dict[str, Any]
    payloads: tuple[bytes, ...] = ()


def write_frame(pipe: IO[bytes], message: dict[str, Any], payloads: Sequence[bytes] = ()) -> None:
    line = json.dumps({**message, "payloads": [len(payload) for payload in payloads]})
    pipe.write(b"".join((line.encode(), b"\n", *payloads)))
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> Frame | None:
    """The next message, or None at the end: the other side has closed the pipe or died, be it in the middle of a message."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    payloads = tuple(pipe.read(nbytes) for nbytes in message["payloads"])
    if sum(map(len, payloads)) != sum(message.pop("payloads")):
        return None
    return Frame(message, payloads)
