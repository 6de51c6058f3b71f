"""A mirror by itself: what it holds after loads that succeed, and after one that fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine_loader import (
    LoadOptions,
    Progress,
    Publication,
    PublishOptions,
    Shard,
    Snapshots,
    SocketEngine,
    publish,
)
from engine_loader.digests.table import digests_of
from engine_loader.loading.mirror import Mirror, mirror_nbytes
from engine_loader.loading.whole_source import Reader, WholeSource
from engine_registry import ModelIdentity, Registry

ROWS = 256
Tensors = dict[str, torch.Tensor]


class Interrupted(Exception):
    """Of a load that has brought all bytes."""


class Trainer:
    """Two ranks, each of which has half of the rows."""

    def __init__(self, registry: Registry) -> None:
        random = torch.Generator().manual_seed(0)
        names = ("b.1.w", "b.0.w", "a")
        self.whole = {name: torch.randn(ROWS, ROWS, generator=random) for name in names}
        self.halves = [
            {name: one[rank * ROWS // 2 :][: ROWS // 2].clone() for name, one in self.whole.items()}
            for rank in range(2)
        ]
        self.engines = [SocketEngine("127.0.0.1") for _ in range(2)]
        self.ranks: list[Publication] = [
            publish(
                registry,
                self.engines[rank],
                instance="t",
                rank=rank,
                world_size=2,
                tensors=self.halves[rank],
                model=ModelIdentity("m"),
                shards={name: Shard((ROWS, ROWS), (rank * ROWS // 2, 0)) for name in self.whole},
                options=PublishOptions(
                    digests=True, ttl_s=3.0, snapshots=Snapshots(count=3, deltas=3)
                ),
            )
            for rank in range(2)
        ]

    def step(self, name: str, *, every: int = 100) -> None:
        """Changes one of so many elements."""
        for rank, half in enumerate(self.halves):
            half[name].view(-1)[::every] += 1
            self.whole[name][rank * ROWS // 2 :][: ROWS // 2] = half[name]
        for publication in self.ranks:
            publication.snapshot()

    def close(self) -> None:
        for one in (*self.ranks, *self.engines):
            one.close()


@pytest.fixture
def trainer(registry: Registry) -> Iterator[Trainer]:
    trainer = Trainer(registry)
    yield trainer
    trainer.close()


class Loads:
    def __init__(self, registry: Registry, engine: SocketEngine) -> None:
        self._registry, self._engine = registry, engine
        self.mirror = Mirror(self.find())

    def find(self, options: LoadOptions | None = None) -> WholeSource:
        return Reader(self._registry, self._engine, "t", options or LoadOptions()).find(10.0)

    def holds(self, whole: Tensors) -> bool:
        assert self.mirror.digests == digests_of(self.mirror.tensors, "xxh3_128")
        return all(torch.equal(self.mirror.tensors[name], one) for name, one in whole.items())


@pytest.fixture
def loads(registry: Registry, trainer: Trainer) -> Iterator[Loads]:
    with SocketEngine("127.0.0.1") as engine:
        loads = Loads(registry, engine)
        yield loads
        loads.mirror.close()
        loads.mirror.close()


def test_a_mirror_of_two_ranks_follows_them_by_the_deltas_of_each(
    trainer: Trainer, loads: Loads
) -> None:
    mirror = loads.mirror
    assert (mirror.contents, mirror.version, mirror.digests) == ((), None, {})
    assert mirror.groups == [("a",), ("b.0.w",), ("b.1.w",)]
    assert mirror.nbytes == mirror_nbytes(loads.find()) == 3 * 4 * ROWS**2
    first = mirror.load(loads.find(), 10.0)
    assert (first.read_nbytes, first.delta_nbytes) == (mirror.nbytes, 0)
    assert loads.holds(trainer.whole)
    for version in (1, 2):
        trainer.step("b.0.w")
        before = dict(mirror.digests)
        found = loads.find()
        report = mirror.load(found, 10.0)
        assert report.read_nbytes == 0 < report.delta_nbytes
        assert loads.holds(trainer.whole)
        assert (mirror.contents, mirror.version) == (found.contents, version)
        changed = [name for name, one in mirror.digests.items() if one != before[name]]
        assert changed == ["b.0.w"]


def test_after_a_load_that_failed_the_mirror_holds_nothing_known_and_the_next_is_exact(
    trainer: Trainer, loads: Loads
) -> None:
    mirror = loads.mirror
    mirror.load(loads.find(), 10.0)
    trainer.step("a", every=1)  # too much for a delta

    def interrupt(progress: Progress) -> None:
        if progress.nbytes >= progress.total_nbytes:
            raise Interrupted

    with pytest.raises(Interrupted):
        mirror.load(loads.find(LoadOptions(progress=interrupt)), 10.0)
    assert (mirror.contents, mirror.digests) == ((), {})
    report = mirror.load(loads.find(), 10.0)
    assert report.read_nbytes == 0  # all was there
    assert loads.holds(trainer.whole)


def test_other_tensors_do_not_fit(trainer: Trainer, loads: Loads) -> None:
    found = loads.find()
    assert loads.mirror.fits(found)
    assert not loads.mirror.fits(WholeSource(found.reader, found.records, found.wholes[1:]))
