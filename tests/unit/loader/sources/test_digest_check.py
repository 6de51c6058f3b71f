"""Digests of sources in whatever layout beside ours: what differs is named, what nothing proves is
reported before it is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

import pytest
import torch

from engine_loader import CudaIpcEngine, InProcessEngine
from engine_loader.digests.table import ALGORITHMS, DigestCell, digests_of
from engine_loader.engines.base import read
from engine_loader.errors import DigestMismatch, DigestsMissing
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import peer_of_record
from engine_loader.sources.digest_check import DigestCheck
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.regions import describe
from engine_loader.tensors.shards import Shard
from engine_registry import Manifest, RankRecord, TensorEntry
from tests.support.builders import a_record
from tests.support.host_gpus import HostGpus

CPU = torch.device("cpu")
WHOLE = torch.arange(48, dtype=torch.float32).view(6, 8)
BIAS = torch.arange(8, dtype=torch.int16)


@dataclass
class Offering:
    """A rank of a source with a table of digests."""

    record: RankRecord
    manifest: Manifest
    algorithm: str
    table: DigestCell


def offer(
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
    algorithm: str = "xxh3_128",
) -> Offering:
    table = DigestCell(tensors, CPU, algorithm)
    table.write(tensors)
    return Offering(
        a_record(), replace(describe(tensors, shards), digests=table.table), algorithm, table
    )


def rows(*places: tuple[int, int]) -> list[Offering]:
    """Ranks each of which has such rows of `WHOLE` as "w"; from where to where."""
    return [
        offer({"w": WHOLE[start:end]}, {"w": Shard((6, 8), (start, 0))}) for start, end in places
    ]


def check_of(
    sources: Sequence[Offering],
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
) -> tuple[DigestCheck, Manifest]:
    dst = describe(tensors, shards)
    return DigestCheck(cast(Sequence[SourceRank], sources), dst, tensors, CPU), dst


def compare(
    sources: Sequence[Offering],
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
    number: int = 0,
) -> None:
    """With the tables read: where several sources have the same, from the one that comes as that in
    the list.
    """
    check, dst = check_of(sources, tensors, shards)
    for span in check.spans:
        _, addr = span.srcs[number % len(span.srcs)]
        ctypes.memmove(span.dst_addr, addr, span.nbytes)
    check.compare(dst)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_that_differ_are_named_with_those_that_do_not(algorithm: str) -> None:
    ours = {"b": WHOLE.clone(), "a": BIAS.clone(), "c": torch.empty(0), "d": torch.tensor(2.5)}
    source = offer(
        {name: ours[name].clone() for name in sorted(ours, reverse=True)}, algorithm=algorithm
    )
    compare([source], ours)
    ours["a"][3] += 1
    ours["d"] += 1
    with pytest.raises(
        DigestMismatch, match=r"2 of 4 tensors are not what /engines/qwen/0 published.*a; d"
    ) as caught:
        compare([source], ours)
    assert caught.value.details == {"tensors": ["a", "d"], "complete": ["b", "c"]}


def test_sources_that_have_the_same_have_one_table_that_any_of_them_may_bring() -> None:
    sources = [offer({"w": WHOLE, "bias": BIAS}), offer({"bias": BIAS, "w": WHOLE})]
    check, _ = check_of(sources, {"w": WHOLE})
    ((span),) = check.spans
    assert span.srcs == ((0, sources[0].table.region.addr), (1, sources[1].table.region.addr))
    for number in range(2):
        compare(sources, {"w": WHOLE, "bias": BIAS}, number=number)


def test_a_tensor_that_is_put_together_is_compared_part_by_part() -> None:
    ours = {"w": WHOLE[1:5].clone()}
    shards = {"w": Shard((6, 8), (1, 0))}
    sources = rows((1, 2), (2, 4), (4, 5), (0, 6))
    compare(sources, ours, shards)
    ours["w"][2, 7] += 1
    with pytest.raises(DigestMismatch, match="1 of 1 tensors"):
        compare(sources, ours, shards)


def test_parts_that_are_columns_are_compared_although_they_do_not_lie_in_one_run_here() -> None:
    sources = [
        offer({"w": WHOLE[:, start : start + 4].contiguous()}, {"w": Shard((6, 8), (0, start))})
        for start in (0, 4)
    ]
    ours = {"w": WHOLE.clone()}
    whole = {"w": Shard((6, 8), (0, 0))}
    compare(sources, ours, whole)
    ours["w"][5, 3] += 1
    with pytest.raises(DigestMismatch):
        compare(sources, ours, whole)


def fused(*slices: tuple[int, int], dim: int = 0) -> tuple[torch.Tensor, Shard]:
    """Such rows of `WHOLE`, or columns, one after another."""
    part = torch.cat([WHOLE.narrow(dim, start, stop - start) for start, stop in slices], dim)
    return part, Shard((6, 8), (0, 0), {dim: slices})


def test_a_tensor_is_proven_by_fused_parts_whose_boxes_it_has_in_another_order() -> None:
    sources = []
    for slices in ([(0, 1), (3, 4), (5, 6)], [(1, 3), (4, 6)]):
        part, shard = fused(*slices)
        sources.append(offer({"w": part}, {"w": shard}))
    ours, shard = fused((3, 6), (0, 3))
    tensors = {"w": ours}
    compare(sources, tensors, {"w": shard})
    ours[1, 7] += 1
    with pytest.raises(DigestMismatch, match="1 of 1 tensors"):
        compare(sources, tensors, {"w": shard})


def test_fused_columns_that_lie_column_by_column_are_proven_as_they_lie() -> None:
    sources = []
    for slices in ([(0, 2), (4, 6)], [(2, 4), (6, 8)]):
        part, shard = fused(*slices, dim=1)
        sources.append(offer({"w": part.t().contiguous().t()}, {"w": shard}))
    ours, whole = WHOLE.t().contiguous().t(), {"w": Shard((6, 8), (0, 0))}
    compare(sources, {"w": ours}, whole)
    ours[5, 3] += 1
    with pytest.raises(DigestMismatch):
        compare(sources, {"w": ours}, whole)


def test_a_tensor_of_the_same_name_that_is_another_one_proves_nothing() -> None:
    """So it does where another rank has one of the same name for itself, or of another dtype."""
    boxed = {"w": Shard((8,), (0,))}
    strangers = [
        offer({"w": BIAS + 1}),
        offer({"w": (BIAS + 1).float()}, boxed),
        offer({"w": BIAS.view(4, 2)}, {"w": Shard((4, 2), (0, 0))}),
    ]
    for sources in (
        [offer({"w": BIAS}, boxed), *strangers],
        [*strangers, offer({"w": BIAS}, boxed)],
    ):
        for number in range(len(sources)):
            compare(sources, {"w": BIAS}, boxed, number=number)
    with pytest.raises(DigestsMissing):
        check_of(strangers, {"w": BIAS}, boxed)


def test_the_memory_for_tables_is_lent_to_the_engine_as_long_as_it_is_needed() -> None:
    with InProcessEngine() as peer, InProcessEngine() as engine:
        source = offer({"w": WHOLE})
        peer.register(source.table.region)
        check, dst = check_of([source], {"w": WHOLE})
        engine.connect(peer.session_id)
        with ExitStack() as undo:
            check.lend(engine, undo)
            (span,) = check.spans
            assert engine.done(
                engine.start(
                    peer.session_id, ReadOp("a", span.srcs[0][1], span.dst_addr, span.nbytes)
                )
            )
        check.compare(dst)
        assert not len(engine._lent)


def test_a_name_that_the_source_lacks_is_proven_by_another_of_the_same_memory() -> None:
    weight = WHOLE.clone()
    ours = {"embed": weight, "head": weight, "bias": BIAS.clone()}
    source = offer({"head": WHOLE.clone(), "bias": BIAS.clone()})
    compare([source], ours)
    weight[0, 0] += 1
    with pytest.raises(DigestMismatch, match="2 of 3 tensors are not what") as caught:
        compare([source], ours)
    assert caught.value.details == {"tensors": ["embed", "head"], "complete": ["bias"]}


# -- sums that the engine makes as it reads
# --------------------------------------------------------------------------------------------------

ALGORITHM = "multilinear_64"
WORDS = torch.arange(100, dtype=torch.int32)


class Reading:
    """A load of tensors from sources that an engine sums up as it reads, step by step."""

    def __init__(self, stack: ExitStack, count: int = 1) -> None:
        self.theirs = {"w": WORDS.clone(), "v": WORDS[:30] * 3}
        self.ours = {name: torch.zeros_like(tensor) for name, tensor in self.theirs.items()}
        self.reader = stack.enter_context(CudaIpcEngine(gpus=HostGpus()))
        self.sources: list[Offering] = []
        self._held = []
        for number in range(count):
            engine = stack.enter_context(CudaIpcEngine(gpus=HostGpus()))
            held = self.theirs if not number else {n: t.clone() for n, t in self.theirs.items()}
            self._held.append(held)
            source = offer(held, algorithm=ALGORITHM)
            source.record = a_record(
                session_id=engine.session_id, incarnation=f"{number:032x}", protocol="cuda_ipc"
            )
            for region in (*source.manifest.regions, source.table.region):
                engine.register(region)
            self.reader.connect(peer_of_record(source.record))
            self.sources.append(source)
        self.check, self.dst = check_of(self.sources, self.ours)
        for region in self.dst.regions:
            self.reader.lend(region)
        self.check.lend(self.reader, stack)
        for span in self.check.spans:
            self._read(0, span.srcs[0][1], span.dst_addr, span.nbytes)

    def read(self, name: str, start: int = 0, stop: int | None = None, number: int = 0) -> None:
        """Such words of the tensor."""
        there = {entry.name: entry for entry in self.sources[number].manifest.tensors}[name].addr
        here = self.ours[name].data_ptr()
        stop = self.ours[name].numel() if stop is None else stop
        self._read(number, there + 4 * start, here + 4 * start, 4 * (stop - start))

    def _read(self, number: int, src: int, dst: int, nbytes: int) -> None:
        peer = peer_of_record(self.sources[number].record)
        read(self.reader, peer, ReadOp("a/0", src, dst, nbytes))

    def fill(self, name: str) -> None:
        """Otherwise than by reads."""
        self.ours[name].copy_(self.theirs[name])


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors whose memory is looked at."""
    found: list[str] = []

    def digests(tensors: Mapping[TensorEntry, torch.Tensor], algorithm: str) -> object:
        found.extend(sorted(piece.name for piece in tensors))
        return digests_of(tensors, algorithm)

    monkeypatch.setattr("engine_loader.sources.digest_check.digests_of", digests)
    return found


def test_what_was_summed_up_as_it_was_read_is_not_looked_at_again(
    stack: ExitStack, looked_at: list[str]
) -> None:
    reading = Reading(stack)
    reading.read("w", 0, 33)
    reading.read("v")
    reading.read("w", 33)
    reading.check.compare(reading.dst)
    assert looked_at == []


def test_sources_that_have_the_same_sum_up_together(stack: ExitStack, looked_at: list[str]) -> None:
    reading = Reading(stack, count=3)
    for number, (start, stop) in enumerate([(0, 20), (20, 90), (90, 100)]):
        reading.read("w", start, stop, number)
    reading.read("v", number=1)
    reading.check.compare(reading.dst)
    assert looked_at == []
    assert torch.equal(reading.ours["w"], WORDS)


def test_memory_is_not_looked_at_of_what_was_proven_to_be_there(
    stack: ExitStack, looked_at: list[str]
) -> None:
    reading = Reading(stack)
    reading.fill("w")
    reading.fill("v")
    reading.check.spare(["w"])
    reading.check.compare(reading.dst)
    assert looked_at == ["v"]


def test_memory_is_looked_at_of_what_came_in_part(stack: ExitStack, looked_at: list[str]) -> None:
    reading = Reading(stack)
    reading.fill("w")
    reading.read("w", 0, 50)
    reading.read("v")
    reading.check.compare(reading.dst)
    assert looked_at == ["w"]


def test_memory_is_looked_at_of_what_came_twice(stack: ExitStack, looked_at: list[str]) -> None:
    reading = Reading(stack)
    for start, stop in [(0, 100), (10, 20)]:
        reading.read("w", start, stop)
    reading.read("v")
    reading.check.compare(reading.dst)
    assert looked_at == ["w"]


def test_as_many_bytes_as_there_are_prove_nothing_if_some_came_twice_and_some_did_not(
    stack: ExitStack, looked_at: list[str]
) -> None:
    reading = Reading(stack)
    reading.fill("w")
    for _ in range(2):
        reading.read("w", 0, 50)
    reading.read("v")
    reading.check.compare(reading.dst)
    assert looked_at == ["w"]
    reading.ours["w"][99] += 1
    with pytest.raises(DigestMismatch) as caught:
        reading.check.compare(reading.dst)
    assert caught.value.details == {"tensors": ["w"], "complete": ["v"]}


def test_what_changed_at_the_source_since_it_was_published_is_another_one(
    stack: ExitStack, looked_at: list[str]
) -> None:
    reading = Reading(stack)
    reading.theirs["v"][7] += 1
    for name in ("w", "v"):
        reading.read(name)
    with pytest.raises(DigestMismatch, match="1 of 2 tensors are not what") as caught:
        reading.check.compare(reading.dst)
    assert caught.value.details == {"tensors": ["v"], "complete": ["w"]}
    assert looked_at == ["v"]


def test_of_two_checks_at_once_the_second_looks_at_memory(
    stack: ExitStack, looked_at: list[str]
) -> None:
    reading = Reading(stack)
    with ExitStack() as inner:
        check, dst = check_of(reading.sources, reading.ours)
        check.lend(reading.reader, inner)
        for name in ("w", "v"):
            reading.read(name)
        ctypes.memmove(check.spans[0].dst_addr, reading.check.spans[0].dst_addr, 32)
        check.compare(dst)
        assert looked_at == ["v", "w"]
    reading.check.compare(reading.dst)
    assert looked_at == ["v", "w"]


def test_digests_by_another_algorithm_are_compared_with_memory(
    stack: ExitStack, looked_at: list[str]
) -> None:
    source, ours = offer({"w": WORDS}), {"w": WORDS.clone()}
    check, dst = check_of([source], ours)
    check.lend(stack.enter_context(CudaIpcEngine(gpus=HostGpus())), stack)
    ctypes.memmove(check.spans[0].dst_addr, source.table.region.addr, 16)
    check.compare(dst)
    assert looked_at == ["w"]
