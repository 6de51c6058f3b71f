"""Deltas of snapshots: a reader that has a version reads what has changed since, and whatever goes
wrong on the way, what it has in the end is the version that it was to have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine_loader import (
    Engine,
    InProcessEngine,
    LoadOptions,
    LoadReport,
    Pace,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    Snapshots,
    SourceLost,
    load,
    publish,
)
from engine_loader.deltas.format import HEADER_NBYTES
from engine_loader.sources.deltas import Deltas
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InvalidField
from tests.support.gates import Gate

MODEL = ModelIdentity("m")
ROWS, COLUMNS = 512, 1024
Tensors = dict[str, torch.Tensor]
NewEngine = Callable[[], Engine]


def weights(seed: int = 0) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {
        f"w{number}": torch.randn(ROWS, COLUMNS, generator=random).to(torch.bfloat16)
        for number in range(4)
    }


def train(tensors: Tensors, seed: int, share: float = 0.02) -> None:
    """Changes that share of the elements of each, as an optimizer would."""
    random = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        chosen = torch.rand(tensor.shape, generator=random) < share
        flat = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
        flat[chosen] ^= 1


@contextmanager
def trainer(
    registry: Registry,
    tensors: Tensors,
    engine: Engine | None = None,
    rank: int = 0,
    world_size: int = 1,
    shards: dict[str, Shard] | None = None,
    **options: Any,
) -> Iterator[Publication]:
    snapshots = Snapshots(**{"deltas": 3, **options})
    with publish(
        registry,
        engine or InProcessEngine(),
        instance="t",
        rank=rank,
        world_size=world_size,
        tensors=tensors,
        model=MODEL,
        shards=shards,
        options=PublishOptions(ttl_s=3.0, digests=True, snapshots=snapshots),
    ) as publication:
        yield publication


class Follower:
    """A reader that says what it has."""

    def __init__(self, registry: Registry, like: Tensors, engine: Engine | None = None) -> None:
        self._registry = registry
        self._engine = engine or InProcessEngine()
        self.tensors = {name: torch.zeros_like(one) for name, one in like.items()}
        self.base: tuple[str, ...] | None = None

    def follow(self, like: Tensors, **options: Any) -> LoadReport:
        report = load(
            self._registry,
            self._engine,
            "t",
            rank=0,
            tensors=self.tensors,
            options=LoadOptions(**{"base": self.base, **options}),
        )
        for name, one in like.items():
            ours = self.tensors[name].contiguous().view(torch.uint8)
            assert torch.equal(ours, one.contiguous().view(torch.uint8)), name
        self.base = report.contents
        return report


def nbytes_of(tensors: Tensors) -> int:
    return sum(one.nbytes for one in tensors.values())


def test_a_reader_reads_only_what_has_changed(registry: Registry, new_engine: NewEngine) -> None:
    tensors = weights()
    reader = Follower(registry, tensors, new_engine())
    with trainer(registry, tensors, new_engine()) as publication:
        first = reader.follow(tensors)
        assert (first.delta_nbytes, first.skipped_nbytes) == (0, 0)
        assert first.contents == (publication.content,)
        for version in range(1, 5):
            train(tensors, version)
            publication.snapshot()
            report = reader.follow(tensors)
            assert (report.version, report.read_nbytes) == (version, 0)
            assert 0 < report.delta_nbytes < 0.05 * nbytes_of(tensors)
            assert report.skipped_nbytes == report.nbytes == nbytes_of(tensors)
        again = reader.follow(tensors)  # nothing has changed
        assert (again.delta_nbytes, again.read_nbytes) == (0, 0)


def test_a_reader_that_was_away_takes_several_deltas_or_reads_all(registry: Registry) -> None:
    tensors = weights()
    late, later = Follower(registry, tensors), Follower(registry, tensors)
    with trainer(registry, tensors) as publication:
        for reader in (late, later):
            reader.follow(tensors)
        for version in range(1, 4):
            train(tensors, version)
            publication.snapshot()
        report = late.follow(tensors)  # three deltas are kept
        assert report.read_nbytes == 0
        assert 0 < report.delta_nbytes < 0.15 * nbytes_of(tensors)
        train(tensors, 4)
        publication.snapshot()
        report = later.follow(tensors)
        assert (report.delta_nbytes, report.read_nbytes) == (0, nbytes_of(tensors))


def test_where_too_much_has_changed_for_a_delta_only_blocks_that_differ_are_read(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = weights()
    reader = Follower(registry, tensors)
    with trainer(registry, tensors, changed=0.01) as publication:
        reader.follow(tensors)
        train({"w1": tensors["w1"]}, 1, share=0.5)
        publication.snapshot()
        report = reader.follow(tensors)
        assert (report.delta_nbytes, report.read_nbytes) == (0, tensors["w1"].nbytes)
        assert "more than 1 % of the elements have changed since version 0" in caplog.text
        train(tensors, 2, share=0.005)
        publication.snapshot()
        assert reader.follow(tensors).delta_nbytes > 0  # there is one again


def test_what_a_reader_says_of_its_tensors_may_be_wrong(registry: Registry) -> None:
    tensors = weights()
    reader = Follower(registry, tensors)
    with trainer(registry, tensors) as publication:
        reader.follow(tensors)
        train(tensors, 1)
        publication.snapshot()
        reader.tensors["w2"][7, 7] = 42.0
        reader.tensors["w0"].zero_()
        report = reader.follow(tensors)
        assert report.delta_nbytes > 0
        assert report.read_nbytes == 2 * tensors["w0"].nbytes  # which are a block each
        train(tensors, 2)
        publication.snapshot()
        reader.base = ("f" * 32,)  # nobody has ever had it
        assert reader.follow(tensors).delta_nbytes == 0


@pytest.mark.parametrize("place", [0, 8, 20, 50, 70, HEADER_NBYTES, 5000, -100, -9, -1])
def test_a_delta_that_is_damaged_does_no_harm(registry: Registry, place: int) -> None:
    """One byte, anywhere: in the header, in a section, in the directory."""
    tensors = weights()
    reader = Follower(registry, tensors)
    with trainer(registry, tensors) as publication:
        reader.follow(tensors)
        train(tensors, 1)
        publication.snapshot()
        ring = publication._served.ring
        assert ring is not None
        buffer = ring._deltas[-1]  # the newest
        nbytes = int.from_bytes(bytes(buffer[48:56].tolist()), "little")
        buffer[place if place >= 0 else nbytes + place] ^= 0x5A
        report = reader.follow(tensors)
        assert report.read_nbytes > 0


@pytest.mark.parametrize(("count", "newer"), [(3, 1), (3, 2), (3, 4), (2, 4)])
def test_a_delta_may_be_overwritten_while_it_is_read(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, count: int, newer: int
) -> None:
    tensors = weights()
    reader = Follower(registry, tensors)
    with trainer(registry, tensors, count=count, deltas=1, retain_s=0.0) as publication:
        reader.follow(tensors)
        train(tensors, 1)
        publication.snapshot()
        chains = Deltas._chains

        def late(self: Deltas, *args: Any) -> Any:
            found = chains(self, *args)
            monkeypatch.undo()
            for version in range(newer):
                train(tensors, 10 + version)
                publication.snapshot()
            return found

        monkeypatch.setattr(Deltas, "_chains", late)
        wanted = {name: one.clone() for name, one in tensors.items()}
        if count == 3:  # the version that is read is retained, and the delta to it is gone
            report = reader.follow(wanted)
            assert (report.version, report.retries) == (1, 0)
            assert report.read_nbytes == nbytes_of(tensors)
        else:
            reader.follow({})
            for name, one in tensors.items():
                assert torch.equal(reader.tensors[name].view(torch.int16), one.view(torch.int16)), (
                    name
                )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn, torch.bool]
)
def test_every_type_and_order_is_followed(registry: Registry, dtype: torch.dtype) -> None:
    base = torch.randn(ROWS, 32).to(torch.float32).to(dtype)
    tensors: Tensors = {
        "rows": base,
        "tied": base,
        "column": torch.randn(64, ROWS).to(torch.float32).to(dtype).t(),
        "odd": torch.randn(33).to(torch.float32).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }
    reader = Follower(registry, tensors)
    with trainer(registry, tensors, changed=0.2) as publication:
        reader.follow(tensors)
        for version in range(1, 3):
            for name in ("rows", "column", "odd"):
                flat = tensors[name].view(torch.uint8 if base.itemsize == 1 else dtype)
                flat[::17] = torch.ones_like(flat[::17]) * (version // 2)
            publication.snapshot()
            report = reader.follow(tensors)
            assert report.delta_nbytes > 0
            assert report.read_nbytes == 0


def test_a_reader_of_all_ranks_takes_the_deltas_of_each(registry: Registry) -> None:
    whole = weights()
    shapes = {name: tuple(one.shape) for name, one in whole.items()}
    half = ROWS // 2
    parts = [{name: one[rank * half :][:half] for name, one in whole.items()} for rank in range(2)]
    shards = [{name: Shard(shapes[name], (rank * half, 0)) for name in whole} for rank in range(2)]
    columns = {name: torch.zeros(ROWS, COLUMNS // 2, dtype=torch.bfloat16) for name in whole}
    of_columns = {name: Shard(shapes[name], (0, 0)) for name in whole}
    found = {name: torch.zeros_like(one) for name, one in whole.items()}
    of_whole = {name: Shard(shapes[name], (0, 0)) for name in whole}
    engine = InProcessEngine()
    with (
        trainer(registry, parts[0], None, 0, 2, shards[0]) as first,
        trainer(registry, parts[1], None, 1, 2, shards[1]) as second,
    ):
        bases: list[tuple[str, ...] | None] = [None, None]
        for version in range(3):
            for number, (into, boxes) in enumerate([(found, of_whole), (columns, of_columns)]):
                report = load(
                    registry,
                    engine,
                    "t",
                    tensors=into,
                    shards=boxes,
                    options=LoadOptions(base=bases[number]),
                )
                assert report.version == version
                assert set(report.contents) == {first.content, second.content}
                bases[number] = report.contents
                for name, one in whole.items():
                    wide = one[:, : into[name].shape[1]]
                    assert torch.equal(into[name].view(torch.int16), wide.view(torch.int16))
                if version and number == 0:
                    assert report.read_nbytes == 0
                    assert 0 < report.delta_nbytes < 0.05 * nbytes_of(whole)
            train(whole, version + 1)
            for publication in (first, second):
                publication.snapshot()


def test_a_replica_that_follows_is_a_source_itself(registry: Registry) -> None:
    tensors = weights()
    with trainer(registry, tensors) as publication:
        reader = Follower(registry, tensors)
        reader.follow(tensors)
        train(tensors, 1)
        publication.snapshot()
        report = load(
            registry,
            InProcessEngine(),
            "t",
            rank=0,
            tensors=reader.tensors,
            publish="replica",
            options=LoadOptions(base=reader.base),
        )
        assert report.publication is not None
        with report.publication as replica:
            assert (report.read_nbytes, replica.content) == (0, publication.content)
            other = {name: torch.zeros_like(one) for name, one in tensors.items()}
            load(registry, InProcessEngine(), "replica", rank=0, tensors=other)
            for name, one in tensors.items():
                assert torch.equal(other[name].view(torch.int16), one.view(torch.int16))


def test_what_has_come_is_not_changed_by_deltas_any_more(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of deltas that breaks off leaves what no digest is compared with then."""
    tensors = weights()
    reader = Follower(registry, tensors)
    with trainer(registry, tensors) as publication:
        reader.follow(tensors)
        train(tensors, 1)
        publication.snapshot()
        other = load(
            registry,
            InProcessEngine(),
            "t",
            rank=0,
            tensors={name: torch.zeros_like(one) for name, one in tensors.items()},
            publish=Replica("replica", options=PublishOptions(digests=True)),
        ).publication
        assert other is not None
        look = Deltas.look

        def fail(*_: Any) -> None:
            monkeypatch.setattr(Deltas, "look", look)
            raise SourceLost("so nothing was compared")

        monkeypatch.setattr(Deltas, "look", fail)

        (record,) = registry.ranks("t")
        ticket = registry.pull(record)  # so that the replica is read first
        assert ticket is not None
        gate = Gate(0.5)
        with ticket, ThreadPoolExecutor(1) as pool:
            loading = pool.submit(
                load,
                registry,
                InProcessEngine(),
                MODEL,
                rank=0,
                tensors=reader.tensors,
                options=LoadOptions(
                    base=reader.base,
                    max_sources=1,
                    pace=Pace(64 << 10, 1, 1, check_s=0.001, small_depth=1),
                    progress=gate.see,
                ),
            )
            assert gate.reached.wait(60)
            other.close()
            gate.open.set()
            report = loading.result(60)
        assert [share.nbytes > 0 for share in report.shares] == [True, True]
        assert report.delta_nbytes == 0
        for name, one in tensors.items():
            assert torch.equal(reader.tensors[name].view(torch.int16), one.view(torch.int16))


def test_deltas_need_digests_and_have_bounds(registry: Registry) -> None:
    with pytest.raises(InvalidField, match="needed for deltas"):
        PublishOptions(digests=False, snapshots=Snapshots(deltas=1))
    tensors = weights()
    with trainer(registry, tensors, deltas=2, changed=0.05) as publication:
        extra = publication.snapshots_nbytes - 2 * nbytes_of(tensors)
        assert extra < 2 * 0.09 * nbytes_of(tensors)
        (record,) = registry.ranks("t")
        assert len(registry.manifest(record).deltas) == 2
