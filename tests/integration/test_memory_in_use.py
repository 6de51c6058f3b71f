"""Memory that is published, filled, both, or not there any more: what is refused, and what a reader
sees of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import (
    Destination,
    InProcessEngine,
    LoadOptions,
    Pace,
    Progress,
    Publication,
    load,
    load_or_seed,
    publish,
)
from engine_loader.errors import MemoryInUse, TensorsUnusable
from engine_registry import ModelIdentity, RankState, Registry
from engine_registry.errors import InstanceIncomplete
from tests.support.launches import Origin, origins, the_origin, words
from tests.support.options import for_load, for_publish

COUNT = 1 << 17
MODEL = ModelIdentity("m")
A, B = Origin(launch=1), Origin(launch=2)
Tensors = dict[str, torch.Tensor]
Offer = Callable[..., Publication]


@pytest.fixture
def offer(registry: Registry) -> Iterator[Offer]:
    with ExitStack() as stack:

        def offer(instance: str, tensors: Any, **options: Any) -> Publication:
            given = {"rank": 0, "world_size": 1, "model": MODEL, "ttl_s": 2.0, **options}
            return stack.enter_context(
                publish(
                    registry,
                    InProcessEngine(),
                    instance=instance,
                    tensors=tensors,
                    **for_publish(given),
                )
            )

        yield offer


def into() -> Tensors:
    return {"w": torch.zeros(COUNT, dtype=torch.int64)}


def load_a(registry: Registry, tensors: Any, **options: Any) -> Origin:
    load(
        registry,
        InProcessEngine(),
        "a",
        rank=0,
        tensors=tensors,
        **for_load({"timeout_s": 1.0, **options}),
    )
    return the_origin(origins(tensors["w"]))


# -- filled while it is published, or twice
# ----------------------------------------------------------


def test_published_weights_are_filled_only_inside_an_update(
    registry: Registry, offer: Offer
) -> None:
    offer("a", {"w": words(A, COUNT)})
    served = {"w": words(B, COUNT)}
    publication = offer("b", served)
    with pytest.raises(
        MemoryInUse, match="a load of a cannot fill memory that is published as b/0"
    ):
        load_a(registry, served)
    assert the_origin(origins(served["w"])) == B
    with publication.update():
        assert load_a(registry, served) == A
    found = into()
    report = load(registry, InProcessEngine(), "b", rank=0, tensors=found)
    assert (the_origin(origins(found["w"])), report.version) == (A, 1)


def test_a_part_of_published_memory_counts_as_well(registry: Registry, offer: Offer) -> None:
    offer("a", {"w": words(A, 10)})
    whole = words(B, COUNT)
    offer("b", {"whole": whole})
    with pytest.raises(MemoryInUse):
        load(registry, InProcessEngine(), "a", rank=0, tensors={"w": whole[5:15]})


def test_two_loads_into_the_same_tensors_are_not_both_let_in(
    registry: Registry, offer: Offer
) -> None:
    offer("a", {"w": words(A, COUNT)})
    offer("b", {"w": words(B, COUNT)}, model=ModelIdentity("other"))
    tensors = into()
    errors: list[BaseException] = []

    def load_b_meanwhile(_: Progress) -> None:
        try:
            load(registry, InProcessEngine(), "b", rank=0, tensors=tensors)
        except MemoryInUse as exc:
            errors.append(exc)

    assert load_a(registry, tensors, progress=load_b_meanwhile) == A
    assert "a load of b cannot fill memory that a load of a fills" in str(errors[0])
    load(registry, InProcessEngine(), "b", rank=0, tensors=tensors)  # afterwards it can


def test_weights_that_a_load_fills_are_not_published_meanwhile(
    registry: Registry, offer: Offer
) -> None:
    offer("a", {"w": words(A, COUNT)})
    tensors = into()

    def publish_them(_: Progress) -> None:
        with pytest.raises(
            MemoryInUse, match="b/0 cannot be published: a load of a fills its memory"
        ):
            offer("b", tensors)

    load_a(registry, tensors, progress=publish_them)
    assert registry.ranks("b") == ()
    offer("b", tensors)


def test_memory_that_two_publish_is_not_updated(offer: Offer) -> None:
    tensors = {"w": words(A, COUNT)}
    first, second = offer("a", tensors), offer("b", tensors)
    with (
        pytest.raises(MemoryInUse, match="a/0 cannot be updated: b/0 publishes the same memory"),
        first.update(),
    ):
        pass
    assert first.record.state is RankState.READY
    second.close()
    with first.update():
        pass


def test_a_load_that_lasts_longer_than_the_update_it_belongs_to_keeps_the_rank_from_being_read(
    registry: Registry, offer: Offer
) -> None:
    offer("a", {"w": words(A, COUNT)})
    served = {"w": words(B, COUNT)}
    publication = offer("b", served)
    begun, go_on = threading.Event(), threading.Event()

    def wait(_: Progress) -> None:
        begun.set()
        go_on.wait(60)

    loading = threading.Thread(target=load_a, args=(registry, served), kwargs={"progress": wait})

    def begin_and_end_the_update() -> None:
        with publication.update():
            loading.start()
            begun.wait(60)

    with pytest.raises(
        MemoryInUse, match="b/0 is not complete: a load of a still fills its memory"
    ):
        begin_and_end_the_update()
    assert publication.record.state is RankState.UPDATING
    go_on.set()
    loading.join(60)
    with publication.update():
        pass
    found = into()
    load(registry, InProcessEngine(), "b", rank=0, tensors=found)
    assert the_origin(origins(found["w"])) == A


def test_a_start_from_files_has_the_memory_for_itself(registry: Registry, tmp_path: Path) -> None:
    save_file({"w": words(A, COUNT)}, tmp_path / "model.safetensors")
    tensors = into()
    refused: list[str] = []

    def load_meanwhile(_: Progress) -> None:
        with pytest.raises(MemoryInUse, match="a read of weights for me/0 fills"):
            load_a(registry, tensors)
        refused.append("yes")

    with (
        publish(
            registry,
            InProcessEngine(),
            instance="a",
            rank=0,
            world_size=1,
            tensors={"w": words(B, COUNT)},
            model=ModelIdentity("x"),
        ),
        load_or_seed(
            registry,
            InProcessEngine(),
            MODEL,
            tensors,
            rank=0,
            world_size=1,
            instance="me",
            fallback=tmp_path,
            load=LoadOptions(progress=load_meanwhile),
        ) as seeded,
    ):
        assert seeded.source == "disk"
        assert refused
        assert the_origin(origins(tensors["w"])) == A
        with pytest.raises(MemoryInUse, match="published as me/0"):
            load_a(registry, tensors)


# -- moved
# -------------------------------------------------------------------------------------------


def replaced(tensors: Tensors) -> None:
    tensors["w"].data = tensors["w"] * 2


def freed(tensors: Tensors) -> None:
    tensors["w"].untyped_storage().resize_(0)


def put_elsewhere(tensors: Tensors) -> None:
    tensors["w"].set_(torch.zeros(COUNT, dtype=torch.int64))  # type: ignore[call-overload]


def of_another_dtype(tensors: Tensors) -> None:
    """As `module.to(torch.float64)` does with the parameters of a module."""
    tensors["w"].data = torch.nn.Parameter(torch.zeros(COUNT)).to(torch.float64).data


MOVES = [replaced, freed, put_elsewhere, of_another_dtype]


@pytest.mark.parametrize("move", MOVES)
def test_weights_that_have_moved_in_an_update_are_named_and_nobody_reads_the_rank(
    registry: Registry, offer: Offer, move: Callable[[Tensors], None]
) -> None:
    tensors = {"other": words(A, 8), "w": words(A, COUNT)}
    publication = offer("a", tensors)
    with pytest.raises(
        TensorsUnusable,
        match=r"tensors of /engines/a/0 have other memory than .* peers read.*: w: .*: copy into",
    ):
        with publication.update():
            move(tensors)
    assert publication.record.state is RankState.UPDATING
    with pytest.raises(InstanceIncomplete, match="rank 0 updating"):
        load_a(registry, {**into(), "other": torch.zeros(8, dtype=torch.int64)}, timeout_s=0.2)
    header = publication._header.read()
    assert header is not None
    assert header.updating
    publication.close()


def test_a_reader_in_the_middle_of_such_an_update_gets_no_byte_of_it(
    registry: Registry, offer: Offer
) -> None:
    tensors = {"w": words(A, COUNT)}
    publication = offer("a", tensors)

    def move(_: Progress) -> None:
        if publication.record.state is RankState.READY:
            with pytest.raises(TensorsUnusable), publication.update():
                replaced(tensors)

    with pytest.raises(InstanceIncomplete, match="rank 0 updating"):
        load_a(registry, into(), progress=move, pace=Pace(64 << 10, 2, check_s=0.0), timeout_s=0.2)


@pytest.mark.parametrize("move", MOVES)
def test_a_destination_whose_tensors_have_moved_is_refused_before_a_byte_moves(
    registry: Registry, offer: Offer, move: Callable[[Tensors], None]
) -> None:
    offer("a", {"w": words(A, COUNT)})
    tensors = into()
    destination = Destination(tensors)
    assert load_a(registry, destination) == A
    move(tensors)
    with pytest.raises(
        TensorsUnusable,
        match=r"tensors have other memory than when .* was made: w: .*: make a new one",
    ):
        load_a(registry, destination)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("publish_as", [False, "copy"])
def test_tensors_that_move_while_they_are_filled_are_an_error_and_no_source(
    registry: Registry, offer: Offer, move: Callable[[Tensors], None], publish_as: Any
) -> None:
    offer("a", {"w": words(A, COUNT)})
    tensors = into()
    left = [move]

    def move_once(_: Progress) -> None:
        if left:
            left.pop()(tensors)

    with pytest.raises(
        TensorsUnusable,
        match=r"tensors were given other memory while they were being filled: w: .*: load again",
    ):
        load_a(registry, tensors, progress=move_once, publish=publish_as)
    assert registry.ranks("copy") == ()
