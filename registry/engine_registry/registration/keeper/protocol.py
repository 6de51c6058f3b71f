"""What a rank and its keeper say to each other over two pipes, and how soon each has to.

A message is one line of JSON, then the raw bytes whose lengths the line gives. The keeper reports
the state of the registration at every beat, and that it lives before every call to etcd, so that a
rank can distinguish a keeper that waits from one that hangs. The rank answers each report of the
state, so that the keeper can say which rank is stopped, or holds the GIL.

The JSON is written by `json`, not by msgspec as what lies in etcd is. Paths of files, and keys in
the details of an error, may be no text, and msgspec does not write half of a surrogate pair. Both
ends are of one version, and trust each other.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

# A call that etcd does not answer must not keep the keeper from noticing its rank's death for long.
CALL_TIMEOUT_S = 2.0
# For a call with its last retry, and a machine with too much to do. Silence that is longer, when
# something is due, is a hang.
ANSWER_S = 3 * CALL_TIMEOUT_S
_MAX_BEAT_S = 20.0
# From a change of the key to the look at it: an eviction marks many records in one transaction, and
# deletes them in another, which fails where a keeper has been faster.
SETTLE_S = 0.1
# Incarnations that the rank has had and that etcd may show again, as after a restored backup. Those
# that etcd may still have are all kept.
FORMER_KEPT = 32


def beat_s(ttl_s: float) -> float:
    """From one renewal of the lease to the next: the longest that a keeper has nothing to say."""
    return min(ttl_s / 3, _MAX_BEAT_S)


class Frame(NamedTuple):
    message: dict[str, Any]
    payloads: tuple[bytes, ...] = ()


def encode_frame(message: dict[str, Any], payloads: Sequence[bytes] = ()) -> bytes:
    line = json.dumps({**message, "payloads": [len(payload) for payload in payloads]})
    return b"".join((line.encode(), b"\n", *payloads))


def read_frame(pipe: IO[bytes]) -> Frame | None:
    """The next message, or None at the end: the other side has closed the pipe or died, be it in
    the middle of a message.
    """
    line = pipe.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    payloads = tuple(pipe.read(nbytes) for nbytes in message["payloads"])
    if sum(map(len, payloads)) != sum(message.pop("payloads")):
        return None
    return Frame(message, payloads)


class FrameBuffer:
    """For a reader that must not block: takes bytes as they come, and gives the messages that are
    complete.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._rest += data
        stream = io.BytesIO(self._rest)
        while (frame := read_frame(stream)) is not None:
            self._rest = stream.getbuffer()[stream.tell() :].tobytes()
            yield frame
