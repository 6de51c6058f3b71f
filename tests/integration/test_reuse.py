"""Loads that do not read what the tensors hold already: only blocks that differ move, whatever was
done to the tensors, and nothing counts that the source of a table took back.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import (
    CudaIpcEngine,
    InProcessEngine,
    LoadOptions,
    LoadReport,
    Pace,
    Replica,
    Shard,
    load_or_seed,
)
from engine_loader.digests.table import DigestCell
from engine_loader.errors import Cancelled, DigestMismatch
from engine_loader.publishing import offering
from engine_registry import Registry
from tests.integration.conftest import Processes, line_of
from tests.integration.test_failover import at_half
from tests.integration.test_load import assert_equal
from tests.support.engines import Interrupted, Meeting
from tests.support.host_gpus import HostGpus
from tests.support.offers import MODEL, Offers, Tensors, copy_of
from tests.support.processes.source import content

MIB = 1 << 20


def weights(seed: int = 0) -> Tensors:
    """Layers of several blocks, the last of which is short, and short tensors between them."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    layers = {f"layer.{number}": some(3 * MIB + 12) for number in range(3)}
    return {**layers, **{f"norm.{number}": some(100) for number in range(3)}}


NBYTES = sum(tensor.nbytes for tensor in weights().values())
# of the table: of each tensor, and of each block of the layers
TABLE_NBYTES = 16 * (6 + 3 * 4)


def came(report: LoadReport) -> int:
    return sum(share.nbytes for share in report.shares)


def test_of_a_fine_tune_its_own_blocks_alone_are_read(offers: Offers) -> None:
    tuned, tensors = weights(), weights()
    tuned["layer.1"][MIB + 5] ^= 1
    tuned["layer.2"][3 * MIB + 11] ^= 1  # in the last block, of 12 bytes
    tuned["norm.0"].add_(1)
    offers(tuned)
    report = offers.load(tensors)
    assert_equal(tensors, tuned)
    assert report.nbytes == NBYTES
    assert report.read_nbytes == MIB + 12 + 100
    assert report.skipped_nbytes == NBYTES - report.read_nbytes
    assert came(report) == report.read_nbytes + TABLE_NBYTES


def test_of_equal_tensors_nothing_is_read(offers: Offers) -> None:
    tensors = weights()
    offers(weights())
    report = offers.load(tensors)
    assert_equal(tensors, weights())
    assert (report.nbytes, report.skipped_nbytes) == (NBYTES, NBYTES)
    assert (report.read_nbytes, report.reads) == (0, 0)
    assert came(report) == TABLE_NBYTES
    assert report.facts()["skipped_nbytes"] == NBYTES


def test_of_tensors_that_have_nothing_in_common_with_them_all_is_read(offers: Offers) -> None:
    tensors = weights(1)
    offers(weights())
    report = offers.load(tensors)
    assert_equal(tensors, weights())
    assert (report.read_nbytes, report.skipped_nbytes) == (NBYTES, 0)
    assert "skipped_nbytes" not in report.facts()


def test_without_the_option_all_is_read(here: Offers) -> None:
    here(weights())
    report = here.load(weights(), reuse=False)
    assert (report.read_nbytes, report.skipped_nbytes) == (NBYTES, 0)


def test_what_was_written_between_two_loads_is_read_again(here: Offers) -> None:
    tensors = weights(1)
    here(weights())
    here.load(tensors)
    tensors["layer.0"][7] ^= 255
    tensors["norm.1"].zero_()
    report = here.load(tensors)
    assert_equal(tensors, weights())
    assert report.read_nbytes == MIB + 100


def test_from_a_source_without_digests_all_is_read(
    here: Offers, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = weights()
    here(weights(), digests=False)
    with caplog.at_level("INFO", "engine_loader"):
        report = here.load(tensors)
    assert (report.read_nbytes, report.skipped_nbytes) == (NBYTES, 0)
    assert "none of the sources has digests, so all is read" in caplog.text


def test_where_no_table_can_be_read_all_is_read(
    here: Offers, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    serving = stack.enter_context(InProcessEngine())
    table = here(weights(), engine=serving)._served.offering("test").digests
    assert table is not None
    serving.unregister(table.region)
    tensors = weights()
    with caplog.at_level("INFO", "engine_loader"):
        report = here.load(tensors)
    assert (report.read_nbytes, report.skipped_nbytes) == (NBYTES, 0)
    assert "what is there already is not known" in caplog.text
    assert_equal(tensors, weights())
    serving.register(table.region)  # which is taken back when it closes


def test_of_a_source_with_digests_of_whole_tensors_alone_tensors_that_differ_are_read(
    here: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions publish."""
    monkeypatch.setattr(
        DigestCell,
        "with_blocks",
        lambda tensors, device, algorithm, _: DigestCell(tensors, device, algorithm),
    )
    tuned, tensors = weights(), weights()
    tuned["layer.1"][MIB + 5] ^= 1
    here(tuned)
    report = here.load(tensors)
    assert_equal(tensors, tuned)
    assert report.read_nbytes == tuned["layer.1"].nbytes
    assert came(report) == report.read_nbytes + 6 * 16


# -- layouts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_of_a_tensor_that_two_ranks_hold_the_equal_parts_stay(here: Offers, axis: int) -> None:
    whole = torch.randint(0, 256, (2048, 2048), dtype=torch.uint8)
    other = torch.randint(0, 256, (2048, 2048), dtype=torch.uint8)
    for rank, (half, half_of_other) in enumerate(
        zip(whole.chunk(2, axis), other.chunk(2, axis), strict=True)
    ):
        offsets = tuple(1024 * rank if each == axis else 0 for each in range(2))
        box = Shard((2048, 2048), offsets)
        tensors = {"w": half.contiguous(), "x": half_of_other.contiguous()}
        here(tensors, rank=rank, world_size=2, shards={"w": box, "x": box})
    tensors = {"w": whole.clone(), "x": other.clone()}
    tensors["x"][0, 0] ^= 1
    report = here.load(
        tensors, rank=None, shards=dict.fromkeys(tensors, Shard((2048, 2048), (0, 0)))
    )
    assert_equal(tensors, {"w": whole, "x": other})
    # Of columns all of a tensor comes, or nothing.
    assert report.read_nbytes == (MIB if axis == 0 else 4 * MIB)


def test_of_rows_of_a_whole_tensor_blocks_that_differ_are_read(here: Offers) -> None:
    whole = torch.randint(0, 256, (4096, 1024), dtype=torch.uint8)
    here({"w": whole}, shards={"w": Shard((4096, 1024), (0, 0))})
    tensors = {"w": whole[1024:3072].clone()}
    tensors["w"][0, 0] ^= 1
    report = here.load(tensors, rank=None, shards={"w": Shard((4096, 1024), (1024, 0))})
    assert_equal(tensors, {"w": whole[1024:3072]})
    assert (report.read_nbytes, report.skipped_nbytes) == (MIB, MIB)


def test_tensors_that_are_one_memory_at_the_source_are_compared_each_for_itself(
    here: Offers,
) -> None:
    one = torch.randint(0, 256, (2 * MIB,), dtype=torch.uint8)
    here({"embed": one, "head": one})
    tensors = {"embed": one.clone(), "head": one.clone()}
    tensors["head"][5] ^= 1
    report = here.load(tensors)
    assert_equal(tensors, {"embed": one, "head": one})
    assert report.read_nbytes == MIB


def test_tied_tensors_are_compared_once(here: Offers) -> None:
    one = torch.randint(0, 256, (2 * MIB,), dtype=torch.uint8)
    here({"embed": one, "head": one})
    ours = one.clone()
    ours[5] ^= 1
    report = here.load({"embed": ours, "head": ours})
    assert torch.equal(ours, one)
    assert (report.read_nbytes, report.skipped_nbytes) == (MIB, MIB)


def test_tensors_in_another_order_in_memory_are_compared_as_they_lie(here: Offers) -> None:
    one = torch.randint(0, 256, (2048, 1024), dtype=torch.uint8)
    here({"w": one.t()})
    tensors = {"w": one.clone().t()}
    tensors["w"][3, 0] ^= 1
    report = here.load(tensors)
    assert torch.equal(tensors["w"], one.t())
    assert report.read_nbytes == MIB


# -- what happens meanwhile
# --------------------------------------------------------------------------------------------------


def test_an_update_of_the_source_meanwhile_makes_all_of_it_anew(
    here: Offers, stack: ExitStack
) -> None:
    theirs, tensors = weights(), weights()
    theirs["layer.0"][0] ^= 1
    publication = here(theirs)

    def update() -> None:
        with publication.update():
            theirs["layer.1"][0] ^= 1  # of which nothing was to be read

    engine = stack.enter_context(Interrupted(update, at=2))  # the table has come, and a block
    report = here.load(tensors, engine)
    assert_equal(tensors, theirs)
    assert (report.retries, report.version) == (1, 1)
    # what the first try had brought is compared, as all else
    assert (report.read_nbytes, report.skipped_nbytes) == (MIB, NBYTES - MIB)


def test_of_a_source_that_is_evicted_nothing_counts_that_its_table_says(
    here: Offers, stack: ExitStack, registry: Registry
) -> None:
    """Its table says of wrong bytes that they are right."""
    good, wrong = weights(), weights(1)
    wrong["layer.0"][:MIB] = good["layer.0"][:MIB] ^ 1  # so that something is read
    bad = here(copy_of(good), "bad")
    said = copy_of(wrong)
    said["layer.0"][0] ^= 1
    cell = bad._served.offering("test").digests
    assert cell is not None
    cell.write(said)

    def evict() -> None:
        here(good, "good")
        registry.evict(registry.ranks("bad")[0])

    engine = stack.enter_context(Interrupted(evict, at=2))
    report = here.load(wrong, engine, source=MODEL)
    assert_equal(wrong, good)
    # but for the block that "bad" had brought
    assert (report.instance, report.read_nbytes) == ("good", NBYTES - MIB)
    assert {share.name: share.nbytes for share in report.shares}["/engines/bad/0"] == 0


def test_a_killed_source_leaves_what_was_equal_to_another(
    registry: Registry, processes: Processes, here: Offers
) -> None:
    nbytes = 32 * MIB
    started = [
        processes.start("-m", "tests.support.processes.source", name, str(nbytes), host)
        for name, host in {"a": "127.0.0.1", "b": "127.0.0.2"}.items()
    ]
    for process in started:
        assert line_of(process) == "version 0\n"
    tensors = content(0, nbytes)
    for name in list(tensors)[8:]:
        tensors[name].zero_()

    with Meeting("127.0.0.1") as engine:
        kill = at_half(started[0].kill, lambda: engine.wait_until_met(2))
        report = here.load(
            tensors, engine, source=["a", "b"], progress=kill, pace=Pace(256 << 10, 2)
        )
    assert_equal(tensors, content(0, nbytes))
    assert report.skipped_nbytes == sum(tensors[name].nbytes for name in list(tensors)[:8])
    assert [share.name for share in report.shares if share.error is not None] == ["/engines/a/0"]


def test_a_load_that_is_cancelled_while_it_compares_ends(here: Offers, stack: ExitStack) -> None:
    here(weights())
    cancel = threading.Event()
    engine = stack.enter_context(Interrupted(cancel.set))
    with pytest.raises(Cancelled):
        here.load(weights(), engine, cancel=cancel)


# -- memory that is mapped
# --------------------------------------------------------------------------------------------------


def test_over_mapped_memory_blocks_of_4_mib_stay_and_all_is_verified(
    registry: Registry, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bytes that are not read the engine has no sums: digests of such tensors are computed."""
    monkeypatch.setattr(offering, "algorithm_for", lambda _: "multilinear_64")
    monkeypatch.setattr(offering, "check_can_be_served", lambda *_: None)
    offers = Offers(registry, lambda: stack.enter_context(CudaIpcEngine(gpus=HostGpus())), stack)
    generator = torch.Generator().manual_seed(3)
    theirs = {
        name: torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
        for name, nbytes in {"long": 9 * MIB, "short": 1000, "equal": 5 * MIB}.items()
    }
    tensors = copy_of(theirs)
    tensors["long"][-1] ^= 1
    tensors["short"].zero_()
    offers(theirs, digests=None)
    report = offers.load(tensors)
    assert_equal(tensors, theirs)
    assert report.verified
    assert (report.read_nbytes, report.skipped_nbytes) == (MIB + 1000, 13 * MIB)


# -- proofs
# --------------------------------------------------------------------------------------------------


def test_digests_are_verified_of_tensors_that_stay_in_part(here: Offers) -> None:
    theirs, tensors = weights(), weights()
    theirs["layer.1"][0] ^= 1
    here(theirs)
    report = here.load(tensors, verify="digest")
    assert_equal(tensors, theirs)
    assert (report.verified, report.read_nbytes) == (True, MIB)


def test_bytes_that_are_read_are_verified_against_the_digests(here: Offers) -> None:
    theirs, tensors = weights(), weights()
    theirs["layer.1"][0] ^= 1
    here(theirs)
    theirs["layer.1"][9] ^= 1  # behind the back of the publication
    with pytest.raises(DigestMismatch, match=r"1 of 6 tensors .*layer\.1"):
        here.load(tensors, verify="digest")


def test_what_is_there_is_passed_on_at_once_and_for_good(here: Offers) -> None:
    theirs, tensors = weights(), weights()
    theirs["layer.1"][0] ^= 1
    publication = here(theirs)
    report = here.load(tensors, source=MODEL, publish=Replica("b"))
    assert report.skipped_nbytes == NBYTES - MIB
    assert report.publication is not None
    with report.publication as replica:
        assert replica.content == publication.content
        publication.close()
        behind = weights(2)
        assert here.load(behind, source="b", reuse=False).read_nbytes == NBYTES
        assert_equal(behind, theirs)


def test_a_start_from_peers_reads_what_an_older_checkpoint_lacks(
    here: Offers, registry: Registry, stack: ExitStack, tmp_path: Path
) -> None:
    theirs, older = weights(), weights()
    theirs["layer.1"][0] ^= 1
    here(theirs)
    save_file(older, tmp_path / "older.safetensors")
    tensors = load_file(tmp_path / "older.safetensors")
    with load_or_seed(
        registry,
        stack.enter_context(InProcessEngine()),
        MODEL,
        tensors,
        rank=0,
        world_size=1,
        instance="b",
        fallback=tmp_path / "older.safetensors",
        load=LoadOptions(reuse=True),
    ) as seeded:
        assert seeded.report is not None
        assert (seeded.source, seeded.report.read_nbytes) == ("peers", MIB)
    assert_equal(tensors, theirs)


def test_published_tensors_take_over_what_differs_in_an_update(here: Offers) -> None:
    theirs, tensors = weights(), weights()
    theirs["layer.1"][0] ^= 1
    here(theirs)
    with here(tensors, "b") as own, own.update():
        assert here.load(tensors).read_nbytes == MIB
    assert_equal(tensors, theirs)
