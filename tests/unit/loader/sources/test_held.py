"""What tensors hold already is found whatever the layouts, and nothing else is taken for it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_loader.digests import table
from engine_loader.digests.table import DigestCell
from engine_loader.errors import Cancelled, DigestsMissing
from engine_loader.planning.arrivals import Arrivals
from engine_loader.planning.plan import plan
from engine_loader.planning.reads import Span
from engine_loader.sources.held import Held, find_held
from engine_loader.sources.source import SourceRank
from engine_loader.sources.tables import Tables
from engine_registry import Manifest, TensorEntry
from tests.support.meshes import (
    Memory,
    Resharding,
    Whole,
    carry_out,
    memory_of,
    origins_of,
    reshardings,
    shards,
    slices_of,
)

CPU = torch.device("cpu")
BLOCK_NBYTES = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little data takes several."""
    monkeypatch.setitem(table.BLOCK_NBYTES, "xxh3_128", BLOCK_NBYTES)


def tensor_of(entry: TensorEntry, content: bytes) -> torch.Tensor:
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    flat = torch.frombuffer(bytearray(content), dtype=getattr(torch, entry.dtype))
    return (
        flat.view(entry.shape)
        if entry.strides is None
        else flat.as_strided(entry.shape, entry.strides)
    )


def tensors_of(memory: Memory) -> dict[str, torch.Tensor]:
    found = {}
    for entry in memory.manifest.tensors:
        at = entry.addr - memory.base
        content = memory.content[at : at + entry.nbytes] if entry.nbytes else b""
        found[entry.name] = tensor_of(entry, content)
    return found


class Offered:
    """A rank with a table of the digests of its memory."""

    def __init__(self, memory: Memory) -> None:
        tensors = tensors_of(memory)
        self._cell = DigestCell.with_blocks(tensors, CPU, "xxh3_128")
        self._cell.write(tensors)
        self.manifest = replace(memory.manifest, digests=self._cell.table)
        self.record = SimpleNamespace(content="of all ranks that hold the same")

    @property
    def algorithm(self) -> str:
        return "xxh3_128"


class Silent(Offered):
    """A rank without digests, as one that loads is."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.manifest = memory.manifest

    @property
    def algorithm(self) -> str:
        raise DigestsMissing("it offers none")


def with_tables(sources: Sequence[object], number: int = 0) -> Tables:
    """Each table is read from the source that comes as that in its list."""
    tables = Tables(cast(Sequence[SourceRank], sources), CPU)
    for span in tables.spans:
        source, addr = span.srcs[number % len(span.srcs)]
        ctypes.memmove(span.dst_addr, addr, span.nbytes)
        tables.receive(source, [span])
    return tables


def find(
    tables: Tables, spans: Sequence[Span], dst: Manifest, tensors: Mapping[str, torch.Tensor]
) -> list[Held]:
    return find_held(tables, spans, dst, tensors, threading.Event())


def changed(memory: Memory, data: st.DataObject) -> Memory:
    content = bytearray(memory.content)
    for at in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=3)):
        if content:
            content[at] ^= 1
    return replace(memory, content=bytes(content))


@settings(max_examples=50)
@given(reshardings(), st.data())
def test_all_that_is_not_read_was_there(ranks: Resharding, data: st.DataObject) -> None:
    spans = plan(origins_of(ranks.sources), ranks.dst.manifest, ranks.costs)
    here = changed(ranks.dst, data)
    tables = with_tables(list(map(Offered, ranks.sources)), data.draw(st.integers(0, 3)))
    arrivals = Arrivals(ranks.dst.manifest, data.draw(st.sampled_from([None, 8])))
    for some, numbers in find(tables, spans, ranks.dst.manifest, tensors_of(here)):
        assert numbers
        arrivals.add(some)
    rest = arrivals.missing(spans)
    content, times = carry_out(rest, ranks.sources, ranks.dst)
    for entry in ranks.dst.manifest.tensors:
        for at in range(entry.addr - here.base, entry.addr - here.base + entry.nbytes):
            found = content[at] if times[at] else here.content[at]
            assert found == ranks.dst.content[at]
            assert times[at] <= 1


@settings(max_examples=50)
@given(reshardings())
def test_of_a_rank_that_holds_the_same_nothing_is_read_if_nothing_has_changed(
    ranks: Resharding,
) -> None:
    spans = plan(origins_of([ranks.dst]), ranks.dst.manifest, ranks.costs)
    tables = with_tables([Offered(ranks.dst)])
    arrivals = Arrivals(ranks.dst.manifest)
    for some, _ in find(tables, spans, ranks.dst.manifest, tensors_of(ranks.dst)):
        arrivals.add(some)
    assert arrivals.missing(spans) == []


def columns(count: int) -> tuple[list[Memory], Memory]:
    """Ranks that hold columns of a matrix, and one that holds all of it."""
    whole = Whole("w", (8, 12), 1, bytes(range(96)))
    sources = [
        memory_of([(whole, slices_of(box))], 1_000_000 * (rank + 1), [0], [False])
        for rank, box in enumerate(shards(whole.shape, (count,), (1,)))
    ]
    (box,) = shards(whole.shape, (1,), (None,))
    return sources, memory_of([(whole, slices_of(box))], 9_000_000, [0], [False])


def test_a_tensor_of_columns_takes_the_word_of_all_ranks_that_hold_some() -> None:
    sources, dst = columns(3)
    spans = plan(origins_of(sources), dst.manifest)
    tables = with_tables(list(map(Offered, sources)))
    (found,) = find(tables, spans, dst.manifest, tensors_of(dst))
    assert found == Held([Span(9_000_000, 96, ())], frozenset({0, 1, 2}))
    one_short = with_tables([*map(Offered, sources[:2]), Silent(sources[2])])
    assert find(one_short, spans, dst.manifest, tensors_of(dst)) == []
    tensors = tensors_of(dst)
    tensors["w"][3, 7] += 1
    assert find(tables, spans, dst.manifest, tensors) == []


def test_ranks_that_hold_the_same_have_one_table_and_silent_ones_none() -> None:
    (first, *_), dst = columns(1)
    (other, *_), _ = columns(2)
    tables = with_tables([Silent(other), Offered(first), Offered(first)], 1)
    ((span),) = tables.spans
    assert [number for number, _ in span.srcs] == [1, 2]
    spans = [Span(9_000_000, 96, ((0, 0), (1, 1_000_000), (2, 1_000_000)))]
    (found,) = find(tables, spans, dst.manifest, tensors_of(dst))
    assert found == Held([Span(9_000_000, 96, ())], frozenset({2}))  # which has brought the table
    assert Tables(cast(Sequence[SourceRank], [Silent(first)]), CPU).spans == []


def test_a_table_holds_for_a_silent_rank_with_the_same_tensors_too() -> None:
    (first, *_), dst = columns(1)
    tables = with_tables([Silent(first), Offered(first)])
    ((span),) = tables.spans
    assert [number for number, _ in span.srcs] == [1]
    spans = plan(origins_of([first]), dst.manifest)  # which reads from the silent one alone
    (found,) = find(tables, spans, dst.manifest, tensors_of(dst))
    assert found == Held([Span(9_000_000, 96, ())], frozenset({1}))


def test_a_comparison_ends_when_the_load_is_cancelled() -> None:
    (first, *_), dst = columns(1)
    cancel = threading.Event()
    cancel.set()
    spans = plan(origins_of([first]), dst.manifest)
    with pytest.raises(Cancelled):
        find_held(with_tables([Offered(first)]), spans, dst.manifest, tensors_of(dst), cancel)
