"""Fused weights of tensor-parallel engines fill one another in any layout, byte by byte, by every
call that loads: real etcd, and real processes with a real transfer engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from engine_loader import (
    Destination,
    Engine,
    EngineReader,
    LoadOptions,
    MooncakeEngine,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    load,
    load_full,
    load_instance,
    load_module,
    publish,
    read_catalogue,
)
from engine_loader.errors import DigestMismatch, DigestsMissing, WeightsMismatch
from engine_loader.files.disk import DiskRead
from engine_loader.files.folder import files_of
from engine_loader.files.memory import allocate_like, shards_like
from engine_loader.files.stored import Files
from engine_loader.files.weights import write_weights
from engine_loader.files.whole_files import WholeFiles
from engine_loader.tensors.regions import describe
from engine_registry import ModelIdentity, Registry
from tests.integration.conftest import Processes, line_of
from tests.support.fused import Part, Tensors, different, ranks_of, wholes

DIGEST = LoadOptions(verify="digest")
# where a rank of the source holds more than one here wants, nothing proves it
CUT = {("tp-1", "tp-2"), ("tp-2", "tp-4"), ("tp-1", "tp-4"), ("rows-3", "tp-2"), ("tp-2", "rows-3")}


def empty(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("source", "here"),
    [
        ("tp-1", "tp-2"),
        ("tp-2", "tp-1"),
        ("tp-2", "tp-4"),
        ("tp-4", "tp-2"),
        ("tp-4", "tp-1"),
        ("tp-1", "tp-4"),
        ("tp-4", "tp-4"),
        ("rows-3", "tp-2"),
        ("tp-2", "rows-3"),
    ],
)
def test_every_rank_gets_every_byte_from_another_layout(
    registry: Registry, processes: Processes, source: str, here: str
) -> None:
    started = processes.start("-m", "tests.support.processes.fused", "a", source)
    assert line_of(started) == "published\n"
    with MooncakeEngine("127.0.0.1") as engine:
        for part in ranks_of(here):
            wanted, shards = part.tensors()
            found = empty(wanted)
            destination = Destination(found, shards)
            if (source, here) in CUT:
                with pytest.raises(DigestsMissing, match=r"qkv_proj\.weight"):
                    load(registry, engine, "a", tensors=destination, options=DIGEST)
                assert not found["norm.weight"].any()
                load(registry, engine, "a", tensors=destination)
            else:
                load(registry, engine, "a", tensors=destination, options=DIGEST)
            assert different(found, wanted) == []


# -- every call that loads
# ------------------------------------------------------------------------------------


@pytest.fixture
def publications(
    registry: Registry, new_engine: Callable[[], Engine]
) -> Iterator[list[Publication]]:
    """The two ranks of `a`, with digests."""
    with ExitStack() as stack:
        found = []
        for part in (Part(0, 2), Part(1, 2)):
            tensors, shards = part.tensors()
            publication = publish(
                registry,
                new_engine(),
                instance="a",
                rank=part.rank,
                world_size=2,
                tensors=tensors,
                shards=shards,
                model=ModelIdentity("fused"),
                options=PublishOptions(digests=True),
            )
            found.append(stack.enter_context(publication))
        yield found


@pytest.fixture
def engine(publications: list[Publication], new_engine: Callable[[], Engine]) -> Engine:
    return new_engine()


def test_whole_tensors_are_written_to_files(
    registry: Registry, engine: Engine, tmp_path: Path
) -> None:
    with WholeFiles(tmp_path) as files:
        load_full(registry, engine, "a", files=files, options=DIGEST)
    assert different(load_file(tmp_path / "model.safetensors"), wholes()) == []


def test_a_catalogue_has_whole_tensors(registry: Registry, engine: Engine) -> None:
    found = {name: tensor.clone() for name, tensor in read_catalogue(registry, engine, "a")}
    assert different(found, wholes()) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch warns outside of a job
def test_a_distributed_checkpoint_has_whole_tensors(registry: Registry, engine: Engine) -> None:
    found = empty(wholes())
    dcp_load(found, storage_reader=EngineReader(registry, engine, "a"), no_dist=True)
    assert different(found, wholes()) == []


@pytest.mark.parametrize("part", [Part(0, 1), Part(3, 4)], ids=["whole", "fused"])
def test_a_module_is_filled(registry: Registry, engine: Engine, part: Part) -> None:
    wanted, shards = part.tensors()
    module = nn.Module()
    for name, tensor in wanted.items():
        path, _, leaf = name.rpartition(".")
        if path not in dict(module.named_children()):
            module.add_module(path, nn.Module())
        some = torch.empty_like(tensor, device="meta")
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(some, False))
    load_module(registry, engine, "a", module, shards=shards if part.tp > 1 else None)
    assert different(dict(module.state_dict()), wanted) == []


def test_ranks_are_filled_together(registry: Registry, engine: Engine) -> None:
    wanted = {part.rank: part.tensors() for part in (Part(0, 2), Part(1, 2))}
    found = {rank: empty(tensors) for rank, (tensors, _) in wanted.items()}
    shards = {rank: boxes for rank, (_, boxes) in wanted.items()}
    load_instance(registry, engine, "a", tensors=found, shards=shards, options=DIGEST)
    assert all(different(found[rank], tensors) == [] for rank, (tensors, _) in wanted.items())


def test_a_rank_that_has_loaded_is_a_source_of_fused_weights_too(
    registry: Registry, engine: Engine, new_engine: Callable[[], Engine]
) -> None:
    whole = Part(0, 1).tensors()
    found = empty(whole[0])
    report = load(
        registry,
        engine,
        "a",
        tensors=found,
        shards=whole[1],
        rank=0,
        publish=Replica("b", world_size=1),
    )
    with report.publication as publication:  # type: ignore[union-attr]
        publication.pause()
        publication.resume()
        wanted, shards = Part(1, 4).tensors()
        again = empty(wanted)
        load(registry, new_engine(), "b", tensors=again, shards=shards)
        assert different(again, wanted) == []


def test_a_pause_and_an_update_of_fused_weights(
    registry: Registry, engine: Engine, publications: list[Publication]
) -> None:
    publications[0].pause()
    with pytest.raises(Exception, match="paused"), publications[0].update():
        pass
    publications[0].replace(*Part(0, 2).tensors(version=1))
    publications[1].replace(*Part(1, 2).tensors(version=1))
    wanted, shards = Part(0, 1).tensors(version=1)
    found = empty(wanted)
    load(registry, engine, "a", tensors=found, shards=shards, options=DIGEST)
    assert different(found, wanted) == []


def test_a_fused_tensor_of_other_bytes_than_its_digest_is_named(
    registry: Registry, engine: Engine, publications: list[Publication]
) -> None:
    tensors, shards = Part(0, 1).tensors()
    publications[1]._served.offering("read").weights["experts.w13"].zero_()
    with pytest.raises(DigestMismatch, match=r"1 of 7 tensors .*: experts\.w13"):
        load(registry, engine, "a", tensors=empty(tensors), shards=shards, options=DIGEST)


def test_slices_that_no_rank_holds_are_named(registry: Registry, engine: Engine) -> None:
    with pytest.raises(WeightsMismatch, match=r"norm\.weight: part of 24 in the source, of 30 her"):
        load(
            registry,
            engine,
            "a",
            tensors={"norm.weight": torch.zeros(6)},
            shards={"norm.weight": Shard((30,), (0,), {0: [(0, 3), (20, 23)]})},
            options=LoadOptions(partial=True),
        )


def test_files_of_whole_tensors_and_of_just_this_part_fill_a_fused_one(tmp_path: Path) -> None:
    wanted, shards = Part(1, 2).tensors()
    del wanted["qkv_proj.weight_fp8"], shards["qkv_proj.weight_fp8"]  # files hold rows
    for name, tensors in (("whole.safetensors", wholes()), ("part.safetensors", wanted)):
        write_weights(tensors, tmp_path / name)
        found = empty(wanted)
        DiskRead(Files(files_of(tmp_path / name)), found, describe(found, shards)).read()
        assert different(found, wanted) == []


def test_memory_like_that_of_a_rank_is_filled(
    registry: Registry, engine: Engine, publications: list[Publication]
) -> None:
    """As `engines load --rank` does."""
    manifest = registry.manifest(publications[1].record)
    found, (wanted, _) = allocate_like(manifest), Part(1, 2).tensors()
    load(registry, engine, "a", tensors=found, shards=shards_like(manifest), options=DIGEST)
    assert different(found, wanted) == []
