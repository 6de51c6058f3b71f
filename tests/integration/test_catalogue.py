"""The whole tensors of a source one after another: real etcd, sources that change and go between
two groups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine_loader import (
    Catalogue,
    Engine,
    InProcessEngine,
    Progress,
    Shard,
    TensorSpec,
    publish,
    read_catalogue,
)
from engine_loader.errors import (
    Cancelled,
    DigestMismatch,
    SourceLost,
    TornRead,
    VersionUnavailable,
    WeightsMismatch,
)
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import EngineRegistryError, InstanceNotFound, InvalidField
from tests.support.instances import Tensors, TwoRanks
from tests.support.launches import Origin, origins, the_origin, words
from tests.support.options import for_load

COUNT = 1024  # words of a tensor
LAYERS = (0, 2, 10)
NAMES = ["embed", "norm", *(f"layers.{layer}.{one}" for layer in LAYERS for one in ("down", "up"))]
A, B = Origin(1), Origin(2)


def parts_of(origin: Origin, rank: int) -> tuple[Tensors, dict[str, Shard]]:
    """Of two ranks: `up` is divided by rows, `down` by columns, the others are on both. They lie in
    memory in another order than that of their names.
    """
    tensors, boxes = {}, {}
    for name in reversed(NAMES):
        whole = words(origin, COUNT).view(32, 32)
        at = 12 * rank
        if name.endswith("up"):
            part, offsets = whole[at : at + 20], (at, 0)
        elif name.endswith("down"):
            part, offsets = whole[:, at : at + 20], (0, at)
        else:
            part, offsets = whole, (0, 0)
        tensors[name] = part.clone(memory_format=torch.contiguous_format)
        boxes[name] = Shard((32, 32), offsets)
    return tensors, boxes


class Instance(TwoRanks[Origin]):
    def __init__(
        self,
        registry: Registry,
        new_engine: Callable[[], Engine] = InProcessEngine,
        name: str = "a",
        origin: Origin = A,
        **options: Any,
    ) -> None:
        super().__init__(registry, new_engine, name, parts_of, origin, **options)


def catalogue_of(
    registry: Registry, engine: Engine | None = None, source: Any = "a", **options: Any
) -> Catalogue:
    given = {"timeout_s": 5.0, **options}
    return read_catalogue(registry, engine or InProcessEngine(), source, **for_load(given))


def taken(catalogue: Catalogue) -> Tensors:
    """What a consumer keeps, that copies each tensor before it asks for the next one."""
    return {name: tensor.clone() for name, tensor in catalogue}


def whose(tensors: Tensors) -> Origin:
    """AssertionError unless every tensor is whole, and all are of one origin."""
    (origin,) = {the_origin(origins(tensor)) for tensor in tensors.values()}
    return origin


def test_the_tensors_of_two_ranks_come_whole_and_a_layer_at_a_time(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    seen: list[Progress] = []
    with Instance(registry, new_engine, digests=True, version=4):
        catalogue = catalogue_of(registry, new_engine(), verify="digest", progress=seen.append)
        assert seen == []  # what follows is known before a byte moves
        spec = TensorSpec(torch.int64, (32, 32), 8 * COUNT)
        assert list(catalogue.tensors.items()) == [(name, spec) for name in NAMES]
        assert (catalogue.instance, catalogue.version) == ("a", 4)
        assert catalogue.contents == registry.instance("a").contents
        groups = [("embed", "norm"), *((f"layers.{n}.down", f"layers.{n}.up") for n in LAYERS)]
        assert catalogue.groups() == groups
        assert [tuple(group) for group in catalogue.by_group()] == groups
        for _ in range(2):
            found = taken(catalogue)
            assert list(found) == NAMES
            assert whose(found) == A
    assert seen[-1] == Progress(catalogue.nbytes, catalogue.nbytes)


def test_a_tensor_has_its_weights_until_the_first_one_of_the_next_group(registry: Registry) -> None:
    with Instance(registry):
        iterator = iter(catalogue_of(registry, max_group_nbytes=1))
        (_, first), (_, second) = next(iterator), next(iterator)
        assert first.data_ptr() == second.data_ptr()
        iterator = iter(catalogue_of(registry))
        (_, first), (_, second) = next(iterator), next(iterator)
        assert whose({"first": first, "second": second}) == A


def test_no_more_memory_is_taken_than_the_largest_group_needs(registry: Registry) -> None:
    group_nbytes = 2 * 8 * COUNT
    with Instance(registry):
        catalogue = catalogue_of(registry)
        of_one = peak_nbytes(catalogue_of(registry, names=catalogue.groups()[1]))
        of_all = peak_nbytes(catalogue)
    assert catalogue.nbytes == 4 * group_nbytes
    # beside the group there are headers, and chunks of which only a part is wanted
    assert group_nbytes <= of_one < 2 * group_nbytes
    assert of_all < of_one + 1024


def peak_nbytes(catalogue: Catalogue) -> int:
    """The bytes of torch's that an iteration holds at most: its allocations less what it frees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # copied into numpy's memory, which is not counted
        found = {name: tensor.numpy().copy() for name, tensor in catalogue}
    assert whose({name: torch.from_numpy(copied) for name, copied in found.items()}) == A
    held, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert held <= 1024
    return peak


@pytest.mark.parametrize("ends", ["at the end", "half-way", "with an error"])
def test_an_iteration_gives_its_memory_back(registry: Registry, ends: str) -> None:
    engine = InProcessEngine()
    with Instance(registry) as instance:
        iterator = iter(catalogue_of(registry, engine, timeout_s=0.2))
        next(iterator)
        assert len(engine._lent) == 1
        if ends == "at the end":
            assert len(list(iterator)) == len(NAMES) - 1
        elif ends == "with an error":
            instance.close()
            with pytest.raises(SourceLost):
                list(iterator)
        else:
            del iterator
        assert len(engine._lent) == 0


def test_only_the_tensors_that_are_named_come(registry: Registry) -> None:
    with Instance(registry):
        catalogue = catalogue_of(registry, names={"layers.2.up", "embed"})
        assert list(catalogue.tensors) == ["embed", "layers.2.up"]
        assert list(taken(catalogue)) == ["embed", "layers.2.up"]
        assert catalogue.nbytes == 2 * 8 * COUNT
        nothing = catalogue_of(registry, names=[])
        assert (nothing.groups(), list(nothing)) == ([], [])


def test_names_that_the_source_does_not_have_are_refused_by_name(registry: Registry) -> None:
    with (
        Instance(registry),
        pytest.raises(
            WeightsMismatch, match=r"'a' does not have 2 of the 3 tensors .*: head; layers\.1\.up"
        ) as caught,
    ):
        catalogue_of(registry, names=["layers.1.up", "embed", "head"])
    assert caught.value.details["tensors"] == ["head", "layers.1.up"]


def test_a_tensor_that_is_not_wanted_need_not_be_whole(registry: Registry) -> None:
    tensors = {"w": words(A, COUNT), "part": words(A, COUNT)}
    shards = {"w": Shard((COUNT,), (0,)), "part": Shard((2 * COUNT,), (0,))}
    with publish(
        registry,
        InProcessEngine(),
        instance="a",
        rank=0,
        world_size=1,
        tensors=tensors,
        shards=shards,
        model=ModelIdentity("m"),
    ):
        with pytest.raises(WeightsMismatch, match="part: no rank has the part at"):
            catalogue_of(registry)
        assert whose(taken(catalogue_of(registry, names=["w"]))) == A


def test_a_source_that_has_changed_before_the_first_group_is_read_as_it_is_now(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    with Instance(registry, new_engine) as instance:
        catalogue = catalogue_of(registry, new_engine())
        instance.update(B)
        assert whose(taken(catalogue)) == B
        assert (catalogue.version, catalogue.contents) == (1, registry.instance("a").contents)


def test_a_source_with_other_tensors_before_the_first_group_is_refused_by_name(
    registry: Registry,
) -> None:
    with Instance(registry):
        catalogue = catalogue_of(registry)
    tensors = {**parts_of(B, 0)[0], "norm": words(B, 7), "head": words(B, 7)}
    with (
        publish(
            registry,
            InProcessEngine(),
            instance="a",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity("m"),
        ),
        pytest.raises(WeightsMismatch, match="'a' has other tensors than when") as caught,
    ):
        list(catalogue)
    assert {"norm", "head"} <= set(caught.value.details["tensors"])
    assert "embed" not in caught.value.details["tensors"]
    assert caught.value.details["given"] == []


def test_a_source_that_changes_between_two_groups_is_an_error_that_names_what_was_given_out(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    with Instance(registry, new_engine) as instance:
        catalogue = catalogue_of(registry, new_engine())
        given = []
        with pytest.raises(  # noqa: PT012  it raises half-way
            TornRead, match="4 of 8 tensors of 'a' version 0 were given out, and"
        ) as caught:
            for name, tensor in catalogue:
                assert whose({name: tensor}) == A
                given.append(name)
                if name == "layers.0.down":
                    instance.update(B)
        assert caught.value.details["given"] == given == NAMES[:4]
        assert whose(taken(catalogue)) == B  # all of it, where it is begun again
        assert catalogue.version == 1


def test_a_source_that_goes_between_two_groups_is_an_error_that_names_what_was_given_out(
    registry: Registry,
) -> None:
    with Instance(registry) as instance:
        iterator = iter(catalogue_of(registry, timeout_s=0.2))
        given = [next(iterator)[0]]
        instance.close()
        with pytest.raises(SourceLost) as caught:
            given.extend(name for name, _ in iterator)
        assert caught.value.details["given"] == given == NAMES[:2]


@pytest.mark.parametrize("digests", [True, False])
def test_another_instance_goes_on_where_it_has_the_same_and_else_nothing_is_mixed(
    registry: Registry, digests: bool
) -> None:
    with (
        Instance(registry, name="a", origin=A, digests=digests) as first,
        Instance(registry, name="b", origin=A if digests else B, digests=digests) as second,
    ):
        catalogue = catalogue_of(registry, source=["a", "b"])
        iterator = iter(catalogue)
        kept = dict([next(iterator)])
        kept = {name: tensor.clone() for name, tensor in kept.items()}
        mine = the_origin(origins(kept["embed"]))
        (first if catalogue.instance == "a" else second).close()
        if digests:
            kept |= {name: tensor.clone() for name, tensor in iterator}
            assert list(kept) == NAMES
            assert whose(kept) == A
        else:
            with pytest.raises(TornRead) as caught:
                kept |= {name: tensor.clone() for name, tensor in iterator}
            assert caught.value.details["given"] == NAMES[:2]
            assert whose(taken(catalogue)) != mine


def test_a_tensor_that_is_not_what_was_published_is_an_error_that_names_what_was_given_out(
    registry: Registry,
) -> None:
    with Instance(registry, digests=True) as instance:
        instance.corrupt("layers.2.up")
        with pytest.raises(DigestMismatch, match=r"layers\.2\.up") as caught:
            list(catalogue_of(registry, verify="digest"))
    assert caught.value.details["given"] == NAMES[:4]


def test_contents_that_the_caller_has_chosen_are_not_changed_for_others(registry: Registry) -> None:
    with Instance(registry) as instance:
        contents = catalogue_of(registry).contents
        catalogue = catalogue_of(registry, contents=contents, timeout_s=0.2)
        assert whose(taken(catalogue)) == A
        instance.update(B)
        for _ in range(2):
            with pytest.raises(VersionUnavailable) as caught:
                list(catalogue)
            assert caught.value.details["given"] == []
        with pytest.raises(VersionUnavailable):
            catalogue_of(registry, version=0, timeout_s=0.2)
        assert whose(taken(catalogue_of(registry, version=1))) == B


def test_a_cancelled_iteration_says_what_was_given_out(registry: Registry) -> None:
    cancel = threading.Event()
    with Instance(registry):
        iterator = iter(catalogue_of(registry, cancel=cancel))
        next(iterator)
        cancel.set()
        with pytest.raises(Cancelled) as caught:
            list(iterator)
    assert caught.value.details["given"] == NAMES[:2]


def test_a_source_that_is_not_there_is_an_error_of_the_registry(registry: Registry) -> None:
    with pytest.raises(InstanceNotFound):
        catalogue_of(registry, timeout_s=0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("names", "embed"), ("names", [3]), ("names", 3), ("device", "nowhere"), ("device", 3.5)],
)
def test_an_argument_that_is_not_valid_is_refused_by_name(
    registry: Registry, field: str, value: Any
) -> None:
    with pytest.raises(EngineRegistryError, match=f"`{field}`") as caught:
        catalogue_of(registry, **{field: value})
    assert isinstance(caught.value, InvalidField)
    assert caught.value.details["field"] == field
