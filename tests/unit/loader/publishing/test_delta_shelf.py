"""Which deltas a publication passes on, and what is in its buffers then."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from engine_loader import Destination, InProcessEngine, PublishOptions, Shard
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import HEADER_NBYTES, capacity_of, header_of
from engine_loader.deltas.kept import KeptDelta
from engine_loader.errors import SnapshotsUnfit
from engine_loader.publishing import slots
from engine_loader.publishing.delta_shelf import DeltaShelf, keep_deltas, offer_shelf

CONTENTS = [f"{number:032x}" for number in range(1, 9)]
Tensors = dict[str, torch.Tensor]


def weights(version: int = 0) -> Tensors:
    tensors = {"a": torch.arange(1000.0), "b": torch.ones(3, 5)}
    for tensor in tensors.values():
        tensor.flatten()[:: version + 1] += version
    return tensors


def delta(number: int, before: Tensors, after: Tensors, shard: Shard | None = None) -> KeptDelta:
    """As it comes from a source with such tensors, from one of the contents to the next."""
    shards = {"b": shard} if shard is not None else None
    entries = Destination(before, shards).manifest.tensors
    buffer = torch.zeros(capacity_of(entries), dtype=torch.uint8)
    made = encode(entries, before, after, buffer, CONTENTS[number], CONTENTS[number + 1])
    assert made is not None
    header = header_of(bytes(buffer[:HEADER_NBYTES]), entries)
    assert header is not None
    return KeptDelta(header, entries, buffer[: header.nbytes])


def deltas(*numbers: int) -> list[KeptDelta]:
    return [delta(number, weights(number), weights(number + 1)) for number in numbers]


class Shelf:
    """Of a publication, which begins without deltas; and what its readers find."""

    def __init__(self, stack: ExitStack, count: int = 2, changed: float = 1.0) -> None:
        self.weights = Destination(weights())
        options = PublishOptions(deltas=count, changed=changed)
        shelf = offer_shelf(InProcessEngine(), self.weights, stack, "x/0", options)
        assert shelf is not None
        self.shelf: DeltaShelf = shelf

    def found(self) -> set[tuple[str, bytes]]:
        """Of each delta: the content that it leads to, and its bytes."""
        found = set()
        for buffer in self.shelf._buffers:
            header = header_of(bytes(buffer[:HEADER_NBYTES]), self.weights.manifest.tensors)
            if header is not None:
                found.add((header.after, bytes(buffer[: header.nbytes])))
        return found


def bytes_of(some: list[KeptDelta]) -> set[tuple[str, bytes]]:
    return {(one.header.after, bytes(one.data)) for one in some}


def test_deltas_are_kept_as_they_came_until_their_places_are_needed(stack: ExitStack) -> None:
    shelf = Shelf(stack)
    assert shelf.found() == set()
    some = deltas(0, 1, 2, 3, 4)
    for number, each in enumerate(some):
        keep_deltas(shelf.weights.runs, [each])
        assert shelf.found() == bytes_of(some[max(0, number - 1) : number + 1])


def test_of_several_that_came_at_once_the_last_are_kept(stack: ExitStack) -> None:
    shelf = Shelf(stack)
    some = deltas(0, 1, 2, 3)
    keep_deltas(shelf.weights.runs, some[:3])
    assert shelf.found() == bytes_of(some[1:3])
    keep_deltas(shelf.weights.runs, some[3:])
    assert shelf.found() == bytes_of(some[2:])


def test_those_before_one_that_is_too_long_are_not_kept(
    stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf(stack, count=4, changed=0.3)
    long = delta(1, weights(1), {name: one + 1 for name, one in weights(2).items()})
    some = [*deltas(4), long, *deltas(5, 6)]
    keep_deltas(shelf.weights.runs, some)
    assert shelf.found() == bytes_of(some[2:])
    keep_deltas(shelf.weights.runs, some)
    told = [one for one in caplog.records if one.fields["event"] == "delta_not_kept"]  # type: ignore[attr-defined]
    assert [one.levelname for one in told] == ["WARNING"]
    assert "changed" in told[0].getMessage()


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"c": torch.ones(2)}, False),
        ({"b": torch.ones(5, 3)}, False),
        ({"b": torch.ones(5, 3).t()}, False),
        ({"b": torch.ones(3, 5).to(torch.int32)}, False),
    ],
    ids=["none", "another tensor", "a shape", "an order", "a type"],
)
def test_only_deltas_of_the_same_layout_are_kept(
    stack: ExitStack, change: Tensors, kept: bool
) -> None:
    shelf = Shelf(stack)
    before = {**weights(), **change}
    one = delta(0, before, {name: tensor + 1 for name, tensor in before.items()})
    keep_deltas(shelf.weights.runs, [one])
    assert shelf.found() == (bytes_of([one]) if kept else set())


def test_a_delta_of_another_box_is_not_kept(stack: ExitStack) -> None:
    shelf = Shelf(stack)
    keep_deltas(shelf.weights.runs, [delta(0, weights(), weights(1), Shard((6, 5), (3, 0)))])
    assert shelf.found() == set()


def test_a_delta_of_tensors_that_share_memory_is_not_kept_for_others(stack: ExitStack) -> None:
    shelf = Shelf(stack)
    tied = torch.ones(1000)
    before = {"a": tied, "b": weights()["b"]}
    of_two = {**before, "c": tied}
    ours = Destination({**of_two, "c": tied.clone()}).manifest.tensors
    one = delta(0, of_two, {name: tensor + 1 for name, tensor in of_two.items()})
    assert one.is_of(Destination(of_two).manifest.tensors)
    assert not one.is_of(ours)
    keep_deltas(shelf.weights.runs, [one])
    assert shelf.found() == set()


def test_other_memory_is_no_business_of_the_shelf(stack: ExitStack) -> None:
    shelf = Shelf(stack)
    keep_deltas(Destination(weights()).runs, deltas(0))
    assert shelf.found() == set()


def test_nothing_is_found_or_kept_once_the_memory_is_given_back(stack: ExitStack) -> None:
    shelf = Shelf(stack)
    keep_deltas(shelf.weights.runs, deltas(0))
    stack.close()
    assert shelf.found() == set()
    keep_deltas(shelf.weights.runs, deltas(1))
    assert shelf.found() == set()


def test_without_memory_for_deltas_there_is_no_publication(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "available_nbytes", lambda _: 100)
    with pytest.raises(SnapshotsUnfit, match="2 deltas of "):
        Shelf(stack)
