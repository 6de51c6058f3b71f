"""What the engines say to each other over a connection. Pure.

    reader    MAGIC
    source    hello: MAGIC, whether it demands a token, a challenge
    reader    a challenge, its proof of the token
    source    whether it takes that, its proof, where it is on its host
    reader    a question: the number of pieces, then the address and the length of each
    source    an answer: how many it offers, for each a byte that says whether it does, then the
              bytes of those that it does, in their order

The first two come at the same time. The last two repeat; questions may be sent ahead. All numbers
are little-endian. A proof is the HMAC-SHA256 of the side's name, both challenges and the address of
the source by the token, so the token itself is never sent, and nobody at another address can pass a
proof on.
"""

from __future__ import annotations

import hmac
import struct
from typing import NamedTuple

from engine_loader.engines.sockets.neighbour import Place

MAGIC = b"ENGSOCK1"
CHALLENGE_NBYTES = 32
MOST_PIECES = 1 << 16  # of one question

_HELLO = struct.Struct("<8sI32s")
_ANSWER = struct.Struct("<32s32s")
_WELCOME = struct.Struct("<I32s36sQIQ16s")
COUNT = struct.Struct("<I")
NO_PROOF = bytes(32)
HELLO_NBYTES, ANSWER_NBYTES, WELCOME_NBYTES = _HELLO.size, _ANSWER.size, _WELCOME.size


class NotOurs(Exception):
    """The other end does not speak this."""


class Hello(NamedTuple):
    demands_token: bool
    challenge: bytes

    def packed(self) -> bytes:
        return _HELLO.pack(MAGIC, self.demands_token, self.challenge)

    @classmethod
    def read(cls, packed: bytes) -> Hello:
        magic, demands_token, challenge = _HELLO.unpack(packed)
        check(magic)
        return cls(bool(demands_token), challenge)


class Answer(NamedTuple):
    challenge: bytes
    proof: bytes

    def packed(self) -> bytes:
        return _ANSWER.pack(self.challenge, self.proof)

    @classmethod
    def read(cls, packed: bytes) -> Answer:
        return cls(*_ANSWER.unpack(packed))


class Welcome(NamedTuple):
    """`place` is None where the source offers nothing to readers of its host."""

    taken: bool
    proof: bytes = NO_PROOF
    place: Place | None = None

    def packed(self) -> bytes:
        host, *rest = self.place or Place("", 0, 0, 0, bytes(16))
        return _WELCOME.pack(self.taken, self.proof, host.encode(), *rest)

    @classmethod
    def read(cls, packed: bytes) -> Welcome:
        taken, proof, host, *rest = _WELCOME.unpack(packed)
        place = Place(host.decode(errors="replace"), *rest)
        return cls(bool(taken), proof, place if place.pid else None)


def check(magic: bytes) -> None:
    """NotOurs."""
    if magic != MAGIC:
        raise NotOurs("it is no engine of the protocol socket")


class Contact(NamedTuple):
    """What both sides know of it: the source's address, its challenge, and the reader's."""

    session_id: str
    source: bytes
    reader: bytes

    def proof(self, token: bytes, side: bytes) -> bytes:
        """That this side, b"source" or b"reader", knows the token."""
        words = side + self.source + self.reader + self.session_id.encode()
        return hmac.digest(token, words, "sha256")

    def proves(self, token: bytes, side: bytes, given: bytes) -> bool:
        return hmac.compare_digest(self.proof(token, side), given)
