"""Tensors that fill their memory in another order than row by row load where both sides have the
same order.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from engine_loader import (
    Destination,
    EngineReader,
    InProcessEngine,
    Publication,
    Shard,
    load,
    load_full,
    publish,
)
from engine_loader.digests.table import digests_of
from engine_loader.errors import TensorsUnusable, WeightsMismatch
from engine_loader.files.memory import allocate_like
from engine_loader.files.weights import write_weights
from engine_loader.files.whole_files import WholeFiles
from engine_loader.planning.content import content_of
from engine_loader.tensors.regions import describe
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import RecordDamaged
from engine_registry.schema.manifest import dense_strides
from engine_registry.schema.manifest_format import decode, encode
from tests.support.options import for_load, for_publish

Offer = Callable[..., Publication]
WHOLE = {"w": Shard((6, 4), (0, 0))}


def values() -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(6, 4)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, but in memory column by column."""
    return tensor.t().contiguous().t()


@pytest.fixture
def offer(registry: Registry) -> Iterator[Offer]:
    with ExitStack() as stack:

        def offer(tensor: torch.Tensor, rank: int = 0, **options: Any) -> Publication:
            given = {
                "instance": "a",
                "world_size": 1,
                "model": ModelIdentity("m"),
                "ttl_s": 3.0,
                "digests": True,
                **options,
            }
            return stack.enter_context(
                publish(
                    registry,
                    InProcessEngine(),
                    tensors={"w": tensor},
                    rank=rank,
                    **for_publish(given),
                )
            )

        yield offer


def load_a(registry: Registry, tensor: torch.Tensor, **options: Any) -> None:
    load(
        registry,
        InProcessEngine(),
        "a",
        rank=0,
        tensors={"w": tensor},
        timeout_s=2.0,
        **for_load({"verify": "digest", **options}),
    )


@pytest.mark.parametrize("shards", [None, WHOLE], ids=["opaque", "with a shard"])
def test_a_turned_tensor_is_loaded_into_one_that_is_turned_alike(
    registry: Registry, offer: Offer, shards: dict[str, Shard] | None
) -> None:
    found = turned(torch.zeros(6, 4))
    offer(turned(values()), shards=shards)
    load_a(registry, found, shards=shards)
    assert found.equal(values())


@pytest.mark.parametrize("shards", [None, WHOLE], ids=["opaque", "with a shard"])
@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (turned(values()), torch.zeros(6, 4), r"strides \[1, 6\] in the source, contiguous here"),
        (values(), turned(torch.zeros(6, 4)), r"contiguous in the source, strides \[1, 6\] here"),
    ],
    ids=["here in rows", "there in rows"],
)
def test_another_order_is_refused_before_a_byte_moves(
    registry: Registry,
    offer: Offer,
    there: torch.Tensor,
    here: torch.Tensor,
    said: str,
    shards: dict[str, Shard] | None,
) -> None:
    offer(there.clone(), shards=shards)
    with pytest.raises(WeightsMismatch, match=f"w: {said}: give both sides the same strides"):
        load_a(registry, here, shards=shards)
    assert not here.any()


@pytest.mark.parametrize("axis", [0, 1])
def test_turned_tensors_are_put_together_from_turned_parts(
    registry: Registry, offer: Offer, axis: int
) -> None:
    for rank, part in enumerate(values().chunk(2, axis)):
        offsets = tuple(rank * part.shape[dim] if dim == axis else 0 for dim in range(2))
        offer(turned(part), rank, world_size=2, shards={"w": Shard((6, 4), offsets)})
    found = turned(torch.zeros(6, 4))
    load_a(registry, found, shards=WHOLE)
    assert found.equal(values())
    with pytest.raises(WeightsMismatch, match="in the source, contiguous here"):
        load_a(registry, torch.zeros(6, 4), shards=WHOLE)
    part = turned(torch.zeros(3, 4))
    load_a(registry, part, shards={"w": Shard((6, 4), (2, 0))}, verify="header")
    assert part.equal(values()[2:5])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch warns outside of a job
def test_turned_parts_are_read_whole_into_a_file_and_into_a_checkpoint(
    registry: Registry, offer: Offer, tmp_path: Path
) -> None:
    for rank, part in enumerate(values().chunk(2)):
        offer(turned(part), rank, world_size=2, shards={"w": Shard((6, 4), (3 * rank, 0))})
    with WholeFiles(tmp_path) as files:
        load_full(registry, InProcessEngine(), "a", files=files)
    assert load_file(tmp_path / "model.safetensors")["w"].equal(values())
    found = {"w": torch.zeros(6, 4)}
    dcp_load(found, storage_reader=EngineReader(registry, InProcessEngine(), "a"), no_dist=True)
    assert found["w"].equal(values())


def test_memory_for_a_turned_tensor_is_turned_too(registry: Registry, offer: Offer) -> None:
    offered = {"w": turned(values()), "v": torch.zeros(3)}
    found = allocate_like(describe(offered))
    assert {name: tensor.stride() for name, tensor in found.items()} == {"w": (1, 6), "v": (1,)}
    offer(offered["w"])
    load_a(registry, found["w"])
    assert found["w"].equal(values())


def test_a_file_has_its_values_row_by_row(tmp_path: Path) -> None:
    write_weights({"w": turned(values())}, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")["w"]
    assert found.is_contiguous()
    assert found.equal(values())


def test_a_whole_model_is_written_row_by_row(
    registry: Registry, offer: Offer, tmp_path: Path
) -> None:
    offer(turned(values()))
    with WholeFiles(tmp_path) as files:
        load_full(registry, InProcessEngine(), "a", files=files)
    found = load_file(tmp_path / "model.safetensors")["w"]
    assert found.is_contiguous()
    assert found.equal(values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch warns outside of a job
@pytest.mark.parametrize("there", [values(), turned(values())], ids=["row by row", "with strides"])
@pytest.mark.parametrize("here", [(4, 1), (1, 6), (16, 2)], ids=str)
def test_a_distributed_checkpoint_is_read_into_any_strides(
    registry: Registry, offer: Offer, here: tuple[int, int], there: torch.Tensor
) -> None:
    offer(there.clone(), shards=WHOLE)
    found = {"w": torch.zeros(100).as_strided((6, 4), here)}
    dcp_load(found, storage_reader=EngineReader(registry, InProcessEngine(), "a"), no_dist=True)
    assert torch.equal(found["w"], there)


def test_the_digest_is_of_the_bytes_as_they_lie() -> None:
    for algorithm in ("xxh3_128", "multilinear_64"):
        found = digests_of(
            {"turned": turned(values()), "as it lies": values().t().contiguous()}, algorithm
        )
        assert found["turned"] == found["as it lies"]
        assert found["turned"] != digests_of({"w": values()}, algorithm)["w"]


def test_another_order_is_another_content() -> None:
    digests = {"w": bytes(16)}
    contents = {
        content_of(describe({"w": some}), digests, "xxh3_128")
        for some in (values(), turned(values()))
    }
    assert len(contents) == 2


def test_an_update_that_turns_a_tensor_in_its_memory_is_noticed() -> None:
    tensor = torch.zeros(4, 4)
    destination = Destination({"w": tensor})
    destination.check_in_place("nothing has changed")
    tensor.t_()
    with pytest.raises(
        TensorsUnusable,
        match=r"w: is now 64 bytes .* with shape \[4, 4\] and strides \[1, 4\], was 64 bytes",
    ):
        destination.check_in_place("turned")
    tensor.t_()
    destination.check_in_place("turned back")
    tensor.untyped_storage().resize_(0)
    with pytest.raises(TensorsUnusable, match="w: has no memory: its storage was freed"):
        destination.check_in_place("freed")


# -- the manifest
# ------------------------------------------------------------------------------------


def test_only_manifests_with_strides_have_a_newer_schema_and_they_come_back() -> None:
    both = {"w": values(), "t": turned(values())}
    shards = {"t": Shard((8, 4), (0, 0), {0: [(0, 2), (4, 8)]})}
    for tensors, boxes, schema in (({"w": values()}, {}, 1), (both, {}, 2), (both, shards, 3)):
        manifest = describe(tensors, boxes)
        ref, parts = encode(manifest)
        assert decode("a/0", ref, parts) == manifest
        assert data_of(parts)["schema"] == schema
        assert ("strides" in data_of(parts)) == (schema > 1)


def data_of(parts: list[bytes]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(zlib.decompress(b"".join(parts)))
    return data


BAD: list[dict[str, Any]] = [
    {"strides": [[6, 1]]},
    {"strides": [[4, 1]]},
    {"strides": [[1, 7]]},
    {"strides": [[1]]},
    {"strides": [[1, -6]]},
    {"strides": [[1, 6.0]]},
    {"strides": ["16"]},
    {"strides": [5]},
    {"strides": []},
    {"strides": None},
    {"schema": 1},
    {"strides": [[True, 6]]},
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_strides_that_nobody_has_written_are_damage(change: dict[str, Any]) -> None:
    ref, parts = encode(describe({"w": turned(values())}))
    stored = zlib.compress(json.dumps({**data_of(parts), **change}).encode())
    ref = replace(ref, digest=hashlib.sha256(stored).hexdigest())
    with pytest.raises(RecordDamaged, match=r"^the manifest of a/0 is damaged: "):
        decode("a/0", ref, [stored])


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((6, 4), (4, 1), None),
        ((6, 4), (1, 6), (1, 6)),
        ((2, 1, 3), (1, 77, 2), (1, 1, 2)),
        ((1, 3), (5, 1), None),
        ((2, 3, 4), (1, 8, 2), (1, 8, 2)),
        ((), (), None),
    ],
)
def test_a_dimension_of_size_one_has_any_stride(
    shape: tuple[int, ...], strides: tuple[int, ...], dense: tuple[int, ...] | None
) -> None:
    assert dense_strides(shape, strides) == dense


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((6, 4), (8, 1)), ((3, 3), (1, 1)), ((3,), (0,)), ((3,), (2,)), ((2, 2), (1, 3))],
)
def test_gaps_and_overlaps_are_no_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="leave gaps or overlap"):
        dense_strides(shape, strides)
