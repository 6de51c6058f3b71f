"""Blocks of a plan that ranks with other contents hold as well, as tables of digests say: spans
that name these ranks beside the sources, and what of them has come. Pure.

A block counts by its digest alone. So it does not matter of which tensor it is there, nor which
layout the rank has.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine_loader.planning.held import Block, DigestedMemory
from engine_loader.planning.reads import Span, Srcs

LEAST_NBYTES = 256 << 10  # a shorter run is not worth a read of its own


class _Place(NamedTuple):
    """Of a block in the memory of a rank: the number of its tensor, and where it begins."""

    tensor: int
    addr: int


class Elsewhere:
    """The blocks of a rank with another content, by their digests. `number` is the rank's."""

    def __init__(
        self, number: int, memory: DigestedMemory, digest_of: Callable[[int], bytes]
    ) -> None:
        """`digest_of` a slot of the rank's table."""
        self.number = number
        self._at: dict[_Place, tuple[bytes, int]] = {}
        self._places: dict[tuple[bytes, int], _Place] = {}
        for tensor, block in memory.each():
            kind = digest_of(block.slot), block.nbytes
            place = _Place(tensor, block.addr)
            self._at[place] = kind
            self._places.setdefault(kind, place)

    def find(self, digest: bytes, nbytes: int, best: _Place | None) -> _Place | None:
        """Where there is such a block, if there is: at the best place, if it is there."""
        kind = digest, nbytes
        if best is not None and self._at.get(best) == kind:
            return best
        return self._places.get(kind)


@dataclass
class Piece:
    """Blocks in a row of our memory, in a span of their own. `number` is the source whose table
    has their digests.

    `left` is how many bytes have not come, `lent` what has come from ranks with other contents.
    """

    number: int
    blocks: list[Block]
    left: int = 0
    lent: list[tuple[int, Span]] = field(default_factory=list)

    @property
    def addr(self) -> int:
        return self.blocks[0].addr


@dataclass(frozen=True)
class Sharing:
    """Puts ranks with other contents beside the sources.

    Attributes:
        memories: What tables have digests of, by the number of the source.
        digest_of: A slot of the table of the source with that number.
        elsewhere: The other ranks. Their numbers follow those of the sources.
        piece_nbytes: Bytes of a piece, at most, unless a block has more.
        is_known: Whether digests of these bytes of our memory, an address and a length, can be
            computed.
    """

    memories: Mapping[int, DigestedMemory]
    digest_of: Callable[[int, int], bytes]
    elsewhere: Sequence[Elsewhere]
    piece_nbytes: int
    is_known: Callable[[int, int], bool]

    def share(self, spans: Iterable[Span]) -> tuple[list[Span], list[Piece]]:
        """The same spans, cut so that each piece is one."""
        shared: list[Span] = []
        pieces: list[Piece] = []
        for span in spans:
            src = next((src for src in span.srcs if src[0] in self.memories), None)
            if span.lines or src is None:
                shared.append(span)
                continue
            number, addr = src
            start = span.dst_addr
            blocks = self.memories[number].blocks(addr, start, span.nbytes)
            for piece, srcs in self._pieces(number, blocks):
                if piece.addr > start:
                    shared.append(_part(span, start, piece.addr - start))
                one = _part(span, piece.addr, piece.left)
                shared.append(one._replace(srcs=one.srcs + srcs))
                pieces.append(piece)
                start = piece.addr + piece.left
            end = span.dst_addr + span.nbytes
            if start < end:
                shared.append(_part(span, start, end - start))
        return shared, pieces

    def _pieces(self, number: int, blocks: Iterable[Block]) -> Iterator[tuple[Piece, Srcs]]:
        """Each with the other ranks that hold it, and where."""
        piece = Piece(number, [])
        first: dict[int, _Place] = {}  # by the number of the rank: where the piece begins there
        for block in blocks:
            behind = {
                one: _Place(tensor, addr + piece.left) for one, (tensor, addr) in first.items()
            }
            found = self._find(self.digest_of(number, block.slot), block, behind)
            follows = (
                bool(first)
                and found == behind
                and block.addr == piece.addr + piece.left
                and piece.left + block.nbytes <= self.piece_nbytes
            )
            if not follows:
                if piece.left >= LEAST_NBYTES:
                    yield piece, _srcs(first)
                piece, first = Piece(number, []), found
            if first:
                piece.blocks.append(block)
                piece.left += block.nbytes
        if piece.left >= LEAST_NBYTES:
            yield piece, _srcs(first)

    def _find(self, digest: bytes, block: Block, behind: Mapping[int, _Place]) -> dict[int, _Place]:
        if not self.is_known(block.addr, block.nbytes):
            return {}
        return {
            one.number: place
            for one in self.elsewhere
            if (place := one.find(digest, block.nbytes, behind.get(one.number))) is not None
        }


def _srcs(places: Mapping[int, _Place]) -> Srcs:
    return tuple([(number, place.addr) for number, place in places.items()])


def _part(span: Span, dst_addr: int, nbytes: int) -> Span:
    ahead = dst_addr - span.dst_addr
    return Span(dst_addr, nbytes, tuple([(number, addr + ahead) for number, addr in span.srcs]))


class Pieces:
    """What has come of pieces."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = sorted(pieces, key=lambda piece: piece.addr)
        self._starts = [piece.addr for piece in self._pieces]

    def come(self, spans: Iterable[Span], lender: int | None = None) -> list[Piece]:
        """These parts of the spans have come, from the rank with another content that has the
        number `lender`, or from a source. Returns the pieces that are whole now, and not from
        sources alone.
        """
        whole = []
        for span in spans:
            piece = self._at(span)
            if piece is None:
                continue
            piece.left -= span.nbytes
            if lender is not None:
                piece.lent.append((lender, span))
            if not piece.left and piece.lent:
                whole.append(piece)
        return whole

    def _at(self, span: Span) -> Piece | None:
        """The one that the span is a part of."""
        place = bisect.bisect_right(self._starts, span.dst_addr) - 1
        if span.lines or place < 0:
            return None
        piece = self._pieces[place]
        last = piece.blocks[-1]
        return piece if span.dst_addr < last.addr + last.nbytes else None


def lent_by(pieces: Iterable[Piece]) -> dict[tuple[int, int], list[Span]]:
    """What ranks with other contents have brought of these, by the number of the rank and that of
    the source whose table has the digests.
    """
    found: defaultdict[tuple[int, int], list[Span]] = defaultdict(list)
    for piece in pieces:
        for lender, span in piece.lent:
            found[lender, piece.number].append(span)
    return dict(found)
