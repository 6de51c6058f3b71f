"""Two sets of very many small tensors, whose memory lies in turn, in one process: a model and its
draft, or two versions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from engine_loader import Engine, LoadOptions, Pace, Progress, Publication, Replica, load, publish
from engine_loader.errors import SourceLost
from engine_loader.planning.reads import Costs
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InstanceNotFound
from tests.support.gates import Gate, wait_for_checks

COUNT = 1_200  # so many that neighbours become one region
LENGTH = 96
MODEL, DRAFT = ModelIdentity("model"), ModelIdentity("draft")
NewEngine = Callable[[], Engine]
Tensors = dict[str, torch.Tensor]


def in_turn(*fills: int, count: int = COUNT, length: int = LENGTH) -> list[Tensors]:
    """A set of so many tensors for each number, which is written to all of them; each has a
    separate storage.
    """
    memory = np.zeros((count, len(fills), length), dtype=np.int32)
    sets: list[Tensors] = []
    for place, fill in enumerate(fills):
        tensors = {f"t{number}": torch.from_numpy(memory[number, place]) for number in range(count)}
        write(tensors, fill)
        sets.append(tensors)
    return sets


def write(tensors: Tensors, fill: int) -> None:
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(fill * 1_000_000 + number if fill else 0)


def assert_holds(tensors: Tensors, fill: int) -> None:
    for number, tensor in enumerate(tensors.values()):
        assert tensor.eq(fill * 1_000_000 + number).all(), number


def offer(
    registry: Registry, engine: Engine, model: ModelIdentity, tensors: Tensors
) -> Publication:
    return publish(
        registry, engine, instance=model.name, rank=0, world_size=1, model=model, tensors=tensors
    )


def test_a_model_and_its_draft_are_published_loaded_and_updated_side_by_side(
    registry: Registry, new_engine: NewEngine
) -> None:
    (model, draft), (model_here, draft_here) = in_turn(1, 2), in_turn(0, 0)
    engine, reader = new_engine(), new_engine()
    with offer(registry, engine, DRAFT, draft) as of_draft:
        with offer(registry, engine, MODEL, model) as of_model:
            for name, tensors in (("model", model_here), ("draft", draft_here)):
                load(registry, reader, name, rank=0, tensors=tensors)
            assert_holds(model_here, 1)
            assert_holds(draft_here, 2)
            with of_model.update():
                write(model, 3)
            load(registry, reader, "model", rank=0, tensors=model_here)
            assert_holds(model_here, 3)
            assert_holds(draft_here, 2)
        with of_draft.update():
            write(draft, 4)
        load(registry, reader, "draft", rank=0, tensors=draft_here)
        assert_holds(draft_here, 4)
        with pytest.raises((SourceLost, InstanceNotFound)):
            load(registry, reader, "model", rank=0, tensors=model_here, timeout_s=0)


def test_both_are_filled_at_once(registry: Registry, new_engine: NewEngine) -> None:
    (model, draft), here = in_turn(1, 2), in_turn(0, 0)
    reader = new_engine()
    with (
        offer(registry, new_engine(), MODEL, model),
        offer(registry, new_engine(), DRAFT, draft),
        ThreadPoolExecutor(2) as pool,
    ):
        for _ in range(3):
            loads = [
                pool.submit(load, registry, reader, name, rank=0, tensors=tensors)
                for name, tensors in zip(("model", "draft"), here, strict=True)
            ]
            for one in loads:
                one.result(60)
    assert_holds(here[0], 1)
    assert_holds(here[1], 2)


def test_a_rank_that_serves_the_draft_is_a_source_of_the_model_while_it_loads_that(
    registry: Registry, new_engine: NewEngine
) -> None:
    """Its memory is made of parts then, and so are the blocks that it marks as whole."""
    make = partial(in_turn, count=5_000, length=512)
    (model,), (here, draft), (there,) = make(1), make(0, 2), make(0)
    few = dict(itertools.islice(draft.items(), 900))  # so few that they are separate regions
    engine = new_engine()
    half = Gate(0.5)

    def look(progress: Progress) -> None:
        if progress.nbytes:
            wait_for_checks()  # of the rank that loads, which can be read from after it
            half.open.set()

    costs = Costs(staged_nbytes=256 << 10)  # so that there are many reads
    pace = Pace(256 << 10, 1, stall_s=30, starve_s=30, costs=costs)
    with (
        offer(registry, new_engine(), MODEL, model),
        offer(registry, engine, DRAFT, few),
        ThreadPoolExecutor(2) as pool,
    ):
        fill = partial(load, registry, source=MODEL, rank=0)
        first = pool.submit(
            fill,
            engine=engine,
            tensors=here,
            publish=Replica("first"),
            options=LoadOptions(pace=pace, progress=half.see),
        )
        assert half.reached.wait(60)
        second = pool.submit(
            fill,
            engine=new_engine(),
            tensors=there,
            publish=Replica("second"),
            options=LoadOptions(pace=pace, progress=look),
        )
        reports = [one.result(60) for one in (first, second)]
    regions = []
    for report in reports:
        assert report.publication is not None
        regions.append(report.publication.regions)
        report.publication.close()
    shares = {share.name: share.nbytes for share in reports[1].shares}
    assert shares["/engines/first/0"] > 0
    assert len(regions[0]) > 900
    assert len(regions[1]) == 1
    assert_holds(here, 1)
    assert_holds(draft, 2)
    assert_holds(there, 1)
