"""Spans name ranks with other contents for blocks with equal digests, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning import shared
from engine_loader.planning.boxes import Lines
from engine_loader.planning.held import Block, DigestedMemory
from engine_loader.planning.reads import Span
from engine_loader.planning.shared import Elsewhere, Piece, Pieces, Sharing, lent_by
from engine_registry import Manifest
from engine_registry.schema.manifest import DigestTable
from tests.support.builders import a_manifest, an_entry

BLOCK_NBYTES = 4
SOURCE, OTHER, DST = 1000, 5000, 9000


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LEAST_NBYTES", 1)


class Rank:
    """Tensors of these bytes, one behind the other from the address on."""

    def __init__(self, addr: int, *tensors: bytes) -> None:
        self.addr = addr
        self.content = b"".join(tensors)
        entries = []
        at = addr
        for number, content in enumerate(tensors):
            entries.append(an_entry(f"t{number}", at, len(content)))
            at += len(content)
        some = a_manifest(*entries)
        self.manifest = Manifest(
            some.tensors, some.regions, DigestTable("xxh3_128", 64, BLOCK_NBYTES)
        )
        self.memory = DigestedMemory(self.manifest)
        self._blocks = {block.slot: block for _, block in self.memory.each()}

    def bytes_at(self, addr: int, nbytes: int) -> bytes:
        start = addr - self.addr
        assert 0 <= start <= start + nbytes <= len(self.content)
        return self.content[start : start + nbytes]

    def digest(self, slot: int) -> bytes:
        """The bytes themselves."""
        block = self._blocks[slot]
        return self.bytes_at(block.addr, block.nbytes)

    def as_other(self, number: int) -> Elsewhere:
        return Elsewhere(number, self.memory, self.digest)


def share(
    source: Rank,
    others: Sequence[Rank],
    spans: Sequence[Span] | None = None,
    piece_nbytes: int = 100,
    unknown: range = range(0),
) -> tuple[list[Span], list[Piece]]:
    """The source has the number 0."""
    whole = Span(DST, len(source.content), ((0, source.addr),))
    return Sharing(
        {0: source.memory},
        lambda number, slot: source.digest(slot),
        [other.as_other(number) for number, other in enumerate(others, 1)],
        piece_nbytes,
        lambda addr, nbytes: addr not in unknown,
    ).share([whole] if spans is None else spans)


def test_blocks_that_another_rank_has_are_pieces_of_it_too() -> None:
    source, other = Rank(SOURCE, b"aaaabbbbccccdddd"), Rank(OTHER, b"aaaabbbbxxxxdddd")
    spans, pieces = share(source, [other])
    assert spans == [
        Span(DST, 8, ((0, SOURCE), (1, OTHER))),
        Span(DST + 8, 4, ((0, SOURCE + 8),)),
        Span(DST + 12, 4, ((0, SOURCE + 12), (1, OTHER + 12))),
    ]
    assert [(piece.addr, piece.left, len(piece.blocks)) for piece in pieces] == [
        (DST, 8, 2),
        (DST + 12, 4, 1),
    ]


def test_a_piece_is_no_longer_than_a_chunk_unless_a_block_is() -> None:
    source, other = Rank(SOURCE, b"aaaabbbbcccc"), Rank(OTHER, b"aaaabbbbcccc")
    assert [span.nbytes for span in share(source, [other], piece_nbytes=9)[0]] == [8, 4]
    assert [span.nbytes for span in share(source, [other], piece_nbytes=8)[0]] == [8, 4]
    assert [span.nbytes for span in share(source, [other], piece_nbytes=7)[0]] == [4, 4, 4]
    assert [span.nbytes for span in share(source, [other], piece_nbytes=3)[0]] == [4, 4, 4]


def test_a_piece_lies_in_one_tensor_of_each_other_rank() -> None:
    """Their next tensor may lie in another region."""
    source, other = Rank(SOURCE, b"aaaabbbb"), Rank(OTHER, b"aaaa", b"bbbb")
    assert [span.nbytes for span in share(source, [other])[0]] == [4, 4]


def test_each_rank_that_has_a_block_is_named_wherever_it_lies_there() -> None:
    source = Rank(SOURCE, b"aaaabbbb")
    one, two = Rank(OTHER, b"xxxxbbbbaaaa"), Rank(7000, b"bbbb")
    assert share(source, [one, two])[0] == [
        Span(DST, 4, ((0, SOURCE), (1, OTHER + 8))),
        Span(DST + 4, 4, ((0, SOURCE + 4), (1, OTHER + 4), (2, 7000))),
    ]


def test_equal_blocks_in_a_row_are_one_piece() -> None:
    source, other = Rank(SOURCE, b"00000000aaaa"), Rank(OTHER, b"000000000000aaaa")
    assert [span.nbytes for span in share(source, [other])[0]] == [8, 4]


def test_a_run_that_is_too_short_stays_with_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LEAST_NBYTES", 5)
    source, other = Rank(SOURCE, b"aaaabbbbccccdddd"), Rank(OTHER, b"aaaaxxxxccccdddd")
    spans, _ = share(source, [other])
    assert spans == [
        Span(DST, 8, ((0, SOURCE),)),
        Span(DST + 8, 8, ((0, SOURCE + 8), (1, OTHER + 8))),
    ]
    monkeypatch.setattr(shared, "LEAST_NBYTES", 8)
    assert share(source, [other])[0] == spans
    longer = Rank(SOURCE, b"ccccddddxxxx"), Rank(OTHER, b"ccccdddd")
    assert [len(span.srcs) for span in share(longer[0], [longer[1]])[0]] == [2, 1]


def test_what_no_digest_here_can_prove_stays_with_the_sources() -> None:
    source, other = Rank(SOURCE, b"aaaabbbb"), Rank(OTHER, b"aaaabbbb")
    spans, _ = share(source, [other], unknown=range(DST, DST + 1))
    assert [len(span.srcs) for span in spans] == [1, 2]


def test_spans_with_lines_and_of_sources_without_digests_stay_as_they_are() -> None:
    source, other = Rank(SOURCE, b"aaaabbbb"), Rank(OTHER, b"aaaabbbb")
    given = [
        Span(0, 8, ((0, SOURCE),), (Lines(0, DST, 8),)),
        Span(DST + 20, 8, ((5, SOURCE),)),
        Span(DST + 40, 3, ((0, SOURCE + 1),)),
    ]
    assert share(source, [other], given) == (given, [])


LETTERS = st.lists(st.sampled_from([b"aaaa", b"bbbb", b"cccc", b"dd", b"00000000"]), min_size=1)


@given(LETTERS, st.lists(LETTERS, max_size=3), st.integers(1, 12), st.data())
def test_every_byte_comes_once_from_ranks_that_have_it(
    source: list[bytes], others: list[list[bytes]], piece_nbytes: int, data: st.DataObject
) -> None:
    def rank(addr: int, blocks: list[bytes]) -> Rank:
        cut = data.draw(st.integers(0, len(blocks)))
        some = [b"".join(blocks[:cut]), b"".join(blocks[cut:])]
        return Rank(addr, *[one for one in some if one])

    ranks = [rank(SOURCE, source), *[rank(OTHER + 1000 * at, one) for at, one in enumerate(others)]]
    spans, pieces = share(ranks[0], ranks[1:], piece_nbytes=piece_nbytes)
    at = DST
    for span in spans:
        assert span.dst_addr == at
        wanted = ranks[0].content[at - DST : at - DST + span.nbytes]
        for number, addr in span.srcs:
            assert ranks[number].bytes_at(addr, span.nbytes) == wanted
        at += span.nbytes
    assert at == DST + len(ranks[0].content)
    assert [piece.addr for piece in pieces] == [
        span.dst_addr for span in spans if len(span.srcs) > 1
    ]


def piece(addr: int, *sizes: int) -> Piece:
    blocks = []
    for slot, nbytes in enumerate(sizes):
        blocks.append(Block(slot, addr, nbytes))
        addr += nbytes
    return Piece(0, blocks, sum(sizes))


def test_a_piece_is_to_be_proven_when_it_is_whole_and_another_rank_brought_some() -> None:
    first, second = piece(DST, 4, 4), piece(DST + 12, 4)
    some = Pieces([second, first])
    a, b = Span(DST, 4, ()), Span(DST + 4, 4, ())
    assert some.come([a], lender=3) == []
    elsewhere = [Span(DST + 8, 4, ()), Span(DST - 4, 4, ())]  # in no piece
    assert some.come(elsewhere) == []
    lines = Span(DST + 4, 4, (), (Lines(0, DST + 4, 4),))
    assert some.come([lines, *elsewhere, b]) == [first]
    assert lent_by([first]) == {(3, 0): [a]}
    assert some.come([Span(DST + 12, 4, ())]) == []  # from a source
    assert lent_by([]) == {}
