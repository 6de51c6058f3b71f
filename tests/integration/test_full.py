"""All tensors of an instance are put together from its ranks' shards: real etcd, sources that
change and die between two files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_loader import (
    Engine,
    InProcessEngine,
    LoadReport,
    Progress,
    Shard,
    load,
    load_full,
    publish,
)
from engine_loader.errors import (
    DigestMismatch,
    SourceUnreachable,
    TornRead,
    WeightsFileInvalid,
    WeightsMismatch,
)
from engine_loader.files.weights import read_weights
from engine_loader.files.whole_files import WholeFiles
from engine_loader.loading.attempts import TRIES
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import InstanceIncomplete
from tests.support.instances import Tensors, TwoRanks
from tests.support.options import for_load


def whole(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "column": torch.rand(16, 64, generator=generator),
        "row": torch.rand(16, 64, generator=generator).to(torch.bfloat16),
        "norm": torch.rand(100, generator=generator),
        "scale": torch.rand((), generator=generator),
        "empty": torch.empty(0, 5),
    }


def shards_of(tensors: Tensors, rank: int) -> tuple[Tensors, dict[str, Shard]]:
    """Of two ranks: one tensor divided by rows, one by columns, at uneven places, the others on
    both.
    """
    rows, columns = (slice(0, 5), slice(0, 40)) if rank == 0 else (slice(5, 16), slice(40, 64))
    parts = {
        **tensors,
        "column": tensors["column"][rows].clone(),
        "row": tensors["row"][:, columns].contiguous(),
    }
    offsets = {"column": (rows.start, 0), "row": (0, columns.start)}
    boxes = {
        name: Shard(tuple(one.shape), offsets.get(name, (0,) * one.ndim))
        for name, one in tensors.items()
    }
    return parts, boxes


class Instance(TwoRanks[int]):
    def __init__(
        self, registry: Registry, new_engine: Callable[[], Engine], name: str = "a", **options: Any
    ) -> None:
        super().__init__(registry, new_engine, name, _parts_of, 0, **options)


def _parts_of(seed: int, rank: int) -> tuple[Tensors, dict[str, Shard]]:
    return shards_of(whole(seed), rank)


def load_into(
    folder: Path, registry: Registry, engine: Engine, source: Any = "a", **options: Any
) -> LoadReport:
    with WholeFiles(folder) as files:
        return load_full(
            registry,
            engine,
            source,
            files=files,
            **for_load({"max_file_nbytes": 4096, "timeout_s": 5.0, **options}),
        )


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


class At:
    """Does something once, when a load has come so far."""

    def __init__(self, nbytes: int, action: Callable[[], object], always: bool = False) -> None:
        self._nbytes = nbytes
        self._action = action
        self._always = always
        self.times = 0

    def __call__(self, progress: Progress) -> None:
        if progress.nbytes >= self._nbytes and (self._always or not self.times):
            self.times += 1
            self._action()


NBYTES = sum(tensor.nbytes for tensor in whole().values())
# bytes that are there when the first file is written and the second is being read
SECOND_FILE = 4096 + 1


def test_uneven_shards_of_two_ranks_become_whole_tensors_in_several_files(
    registry: Registry, new_engine: Callable[[], Engine], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    with Instance(registry, new_engine, digests=True, version=4):
        report = load_into(tmp_path, registry, new_engine(), verify="digest", progress=seen.append)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal(read_weights([tmp_path]), whole())
    assert (report.instance, report.rank, report.version, report.tensors, report.retries) == (
        "a",
        None,
        4,
        5,
        0,
    )
    assert report.nbytes == NBYTES <= report.read_nbytes
    assert {share.name for share in report.shares} == {"/engines/a/0", "/engines/a/1"}
    assert [progress.nbytes for progress in seen] == sorted(progress.nbytes for progress in seen)
    assert {progress.total_nbytes for progress in seen} == {NBYTES}
    assert seen[-1].nbytes == NBYTES


def test_without_files_all_is_read_and_nothing_written(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    with Instance(registry, new_engine):
        assert load_full(registry, new_engine(), "a").nbytes == NBYTES


def test_the_memory_of_one_file_is_all_that_is_taken(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storages: set[tuple[int, int]] = set()

    def watched(*args: Any, tensors: Tensors, **options: Any) -> LoadReport:
        storages.update(
            (one.untyped_storage().data_ptr(), one.untyped_storage().nbytes())
            for one in tensors.values()
        )
        return load(*args, tensors=tensors, **options)

    monkeypatch.setattr("engine_loader.loading.whole_source.load", watched)
    with Instance(registry, InProcessEngine):
        load_into(tmp_path, registry, InProcessEngine())
    assert [nbytes for _, nbytes in storages] == [4096]


def test_tensors_that_are_tied_in_the_source_are_written_one_by_one(
    registry: Registry, tmp_path: Path
) -> None:
    weight = torch.rand(8, 8)
    tied = {"embed": weight, "head": weight}
    with (
        InProcessEngine() as engine,
        publish(
            registry,
            engine,
            instance="a",
            rank=0,
            world_size=1,
            tensors=tied,
            model=ModelIdentity("m"),
        ),
    ):
        load_into(tmp_path, registry, InProcessEngine())
    assert_equal(read_weights([tmp_path]), tied)


def test_tensors_that_no_file_can_hold_are_refused_before_a_byte_is_read(
    registry: Registry, tmp_path: Path
) -> None:
    read: list[Progress] = []
    tensors = {"__metadata__": torch.rand(8), "w": torch.rand(8)}
    with (
        InProcessEngine() as engine,
        publish(
            registry,
            engine,
            instance="a",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity("m"),
        ),
        pytest.raises(
            WeightsFileInvalid, match=r"cannot write .*/model\.safetensors: .*: __metadata__: "
        ),
    ):
        load_into(tmp_path / "new", registry, InProcessEngine(), progress=read.append)
    assert read == []
    assert list(tmp_path.iterdir()) == []


def test_an_only_rank_need_not_say_that_its_tensors_are_whole(
    registry: Registry, new_engine: Callable[[], Engine], tmp_path: Path
) -> None:
    shards = {"norm": Shard((100,), (0,))}
    with publish(
        registry,
        new_engine(),
        instance="a",
        rank=0,
        world_size=1,
        tensors=whole(),
        shards=shards,
        model=ModelIdentity("m"),
    ):
        report = load_into(tmp_path, registry, new_engine())
    assert_equal(read_weights([tmp_path]), whole())
    assert (report.rank, report.tensors) == (None, 5)


def test_several_ranks_that_do_not_say_what_they_hold_are_refused_and_another_instance_is_taken(
    registry: Registry, tmp_path: Path
) -> None:
    with Instance(registry, InProcessEngine, name="silent", shards=None):
        with pytest.raises(
            WeightsMismatch,
            match="5 of 5 tensors of 'silent' do not say which part of the whole they are",
        ):
            load_into(tmp_path, registry, InProcessEngine(), "silent")
        assert list(tmp_path.iterdir()) == []
        with Instance(registry, InProcessEngine):
            load_into(tmp_path, registry, InProcessEngine(), ["silent", "a"])
    assert_equal(read_weights([tmp_path]), whole())


def test_an_instance_of_which_a_rank_cannot_be_reached_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    fabrics = iter(("here", "island"))
    with (
        Instance(registry, lambda: InProcessEngine(fabric=next(fabrics))),
        pytest.raises(SourceUnreachable, match="/engines/a/1 is on the fabric 'island'"),
    ):
        load_into(tmp_path, registry, InProcessEngine(fabric="here"))


def test_weights_that_change_between_two_files_are_all_loaded_again(
    registry: Registry, new_engine: Callable[[], Engine], tmp_path: Path
) -> None:
    with Instance(registry, new_engine) as instance:
        update = At(SECOND_FILE, lambda: instance.update(1))
        report = load_into(tmp_path, registry, new_engine(), progress=update)
    assert update.times == 1
    assert (report.version, report.retries) == (1, 1)
    assert_equal(read_weights([tmp_path]), whole(1))


def test_weights_that_change_in_every_try_are_an_error_and_no_file(
    registry: Registry, tmp_path: Path
) -> None:
    with Instance(registry, InProcessEngine) as instance:
        updates = At(SECOND_FILE, lambda: instance.update(1), always=True)
        with pytest.raises(
            TornRead, match=f"the weights changed between one file and the next, in {TRIES} tries"
        ):
            load_into(tmp_path, registry, InProcessEngine(), progress=updates)
    assert updates.times >= TRIES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digests", [True, False])
def test_where_one_instance_goes_between_two_files_another_goes_on(
    registry: Registry, new_engine: Callable[[], Engine], tmp_path: Path, digests: bool
) -> None:
    """From where it is, if digests prove that it holds the same; else all comes from there."""
    with (
        Instance(registry, new_engine, "a", digests=digests) as first,
        Instance(registry, new_engine, "b", digests=digests),
    ):
        leave = At(SECOND_FILE, first.close)
        load_into(tmp_path, registry, new_engine(), ["a", "b"], progress=leave)
    assert leave.times == 1
    assert_equal(read_weights([tmp_path]), whole())


def test_an_instance_that_goes_between_two_files_and_does_not_come_back_leaves_none(
    registry: Registry, tmp_path: Path
) -> None:
    with Instance(registry, InProcessEngine) as instance:
        leave = At(4096, instance.close)  # all of the first file is there
        with pytest.raises(Exception, match=r"could not be read to the end|is not registered"):
            load_into(tmp_path, registry, InProcessEngine(), progress=leave, timeout_s=0.2)
    assert leave.times == 1
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_what_was_published_is_an_error_and_no_file(
    registry: Registry, tmp_path: Path
) -> None:
    with Instance(registry, InProcessEngine, digests=True) as instance:
        instance.corrupt("row")
        with pytest.raises(DigestMismatch, match="row"):
            load_into(tmp_path, registry, InProcessEngine(), verify="digest")
    assert list(tmp_path.iterdir()) == []


def test_an_instance_that_is_not_complete_is_waited_for_and_reported(
    registry: Registry, tmp_path: Path
) -> None:
    parts, boxes = shards_of(whole(), 0)
    with (
        InProcessEngine() as engine,
        publish(
            registry,
            engine,
            instance="a",
            rank=0,
            world_size=2,
            tensors=parts,
            shards=boxes,
            model=ModelIdentity("m"),
        ),
        pytest.raises(InstanceIncomplete, match="missing rank 1 of 2"),
    ):
        load_into(tmp_path, registry, InProcessEngine(), timeout_s=0.1)
