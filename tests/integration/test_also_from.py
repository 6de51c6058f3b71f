"""Loads that take blocks from ranks with other contents too: of a base model, or of the version
before. Whatever these ranks do meanwhile, the tensors hold exactly what the sources have.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch

from engine_loader import (
    CudaIpcEngine,
    Engine,
    InProcessEngine,
    LoadOptions,
    LoadReport,
    MooncakeEngine,
    Pace,
    Replica,
    Shard,
    load_full,
    metrics,
)
from engine_loader.digests.table import DigestCell
from engine_loader.errors import Cancelled
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing import offering
from engine_loader.publishing.header import peer_of_record
from engine_loader.transfer.pace import pace_for
from engine_registry import ModelIdentity, RankRecord, Registry
from engine_registry.watching.waiting import Wanted
from tests.integration.conftest import Processes, line_of
from tests.support.host_gpus import HostGpus
from tests.support.offers import Offers, Tensors, copy_of
from tests.support.processes.source import content

MIB = 1 << 20
LAYERS, BLOCKS = 5, 10  # blocks of a layer
NBYTES = LAYERS * BLOCKS * MIB
BASE, TUNED = ModelIdentity("m"), ModelIdentity("m", "tuned")
PACE = Pace(MIB, 2, stall_s=30.0)  # a read for each block


@cache
def _words(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << 60, (LAYERS, BLOCKS * MIB // 8), generator=generator)


def weights(seed: int = 0) -> Tensors:
    layers = _words(seed).clone().view(torch.uint8)
    return {f"layer.{number}": layer for number, layer in enumerate(layers)}


def tuned() -> Tensors:
    """Two blocks of 50 differ."""
    tensors = weights()
    tensors["layer.1"][3 * MIB + 5] ^= 1
    tensors["layer.3"][-1] ^= 1
    return tensors


SHARED_NBYTES = NBYTES - 2 * MIB


def zeros() -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


def assert_are(tensors: Tensors, wanted: Tensors) -> None:
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []


class Watched:
    """Reads of weights from sources end only once others have brought `nbytes`, and `action` runs
    before the read of those that is the `at`th ends.
    """

    def __init__(
        self,
        engine: Engine,
        sources: RankRecord | list[RankRecord],
        nbytes: int = 0,
        action: Callable[[], object] = lambda: None,
        at: int = 0,
    ) -> None:
        self.came: dict[str, int] = {}  # by peer
        self._reads: dict[int, tuple[str, int]] = {}
        self._start, self._done = engine.start, engine.done
        every = sources if isinstance(sources, list) else [sources]
        self._sources = {peer_of_record(record) for record in every}
        self._nbytes, self._action, self._at = nbytes, action, at
        self._ended = 0
        engine.start, engine.done = self.start, self.done  # type: ignore[method-assign]

    @property
    def lent(self) -> int:
        return sum(nbytes for peer, nbytes in self.came.items() if peer not in self._sources)

    def start(self, peer: str, op: ReadOp) -> int:
        number = self._start(peer, op)
        if op.nbytes > 10_000:  # neither a header nor a table
            self._reads[number] = peer, op.nbytes
        return number

    def done(self, number: int) -> bool:
        peer, nbytes = self._reads.get(number, ("", 0))
        if peer in self._sources and self.lent < self._nbytes:
            return False
        if peer and peer not in self._sources and self._ended == self._at - 1:
            self._ended += 1
            self._action()
        if not self._done(number):
            return False
        if peer:
            self.came[peer] = self.came.get(peer, 0) + nbytes
            self._ended += peer not in self._sources
        return True


def load_tuned(
    offers: Offers,
    tensors: Tensors,
    engine: Engine | None = None,
    source: Wanted = TUNED,
    **fields: object,
) -> LoadReport:
    given = {"reuse": False, "also_from": BASE, "pace": PACE, **fields}
    return offers.load(tensors, engine, source, **given)


def test_of_a_fine_tune_the_ranks_of_its_base_bring_what_they_have(
    offers: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[float] = []
    monkeypatch.setattr(metrics.LENT_NBYTES, "inc", lambda amount: lent.append(amount))
    source = offers(tuned(), "tuned", model=TUNED)
    for name in ("one", "two", "three"):
        offers(weights(), name, model=BASE)
    tensors, engine = zeros(), offers.new_engine()
    watched = Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(offers, tensors, engine=engine)
    assert_are(tensors, tuned())
    assert watched.came[peer_of_record(source.record)] == 2 * MIB
    assert (report.lent_nbytes, lent) == (SHARED_NBYTES, [SHARED_NBYTES])
    assert set(report.lent) == {f"/engines/{name}/0" for name in ("one", "two", "three")}
    assert (report.instance, report.content) == ("tuned", source.content)
    assert report.contents == (source.content,)
    assert report.facts()["lent_nbytes"] == SHARED_NBYTES


def test_without_the_option_the_sources_bring_all(here: Offers) -> None:
    here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    tensors = zeros()
    report = load_tuned(here, tensors, also_from=None)
    assert_are(tensors, tuned())
    assert (report.lent, [share.name for share in report.shares]) == ({}, ["/engines/tuned/0"])
    assert "lent_nbytes" not in report.facts()


def test_of_a_new_version_ranks_that_have_the_one_before_bring_what_has_not_changed(
    here: Offers,
) -> None:
    theirs, tensors = weights(), zeros()
    source = here(theirs, "new")
    for name in ("old", "older"):
        here(weights(), name)
    with source.update():
        for name, tensor in tuned().items():
            theirs[name].copy_(tensor)
    engine = here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(here, tensors, source=BASE, engine=engine)
    assert_are(tensors, tuned())
    assert (report.version, report.lent_nbytes) == (1, SHARED_NBYTES)


def test_names_of_instances_say_which_ranks_too(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    here(weights(), "two", model=ModelIdentity("another"))
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(here, tensors, engine=engine, also_from=["two", "tuned", "nobody"])
    assert_are(tensors, tuned())
    assert report.lent == {"/engines/two/0": SHARED_NBYTES}


def test_sources_and_others_are_no_more_than_the_load_allows(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    for number in range(5):
        here(weights(), f"base-{number}", model=BASE)
    engine = here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(here, zeros(), engine=engine, max_sources=3)
    assert len(report.lent) == 2
    assert load_tuned(here, zeros(), max_sources=1).lent == {}


def test_a_load_has_tickets_for_all_that_it_reads_from(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    base = here(weights(), "one", model=BASE)
    other = here(weights(3), "two", model=BASE)  # has nothing in common
    seen: list[list[int]] = []

    def look() -> None:
        seen.append([here.registry.pulls(one.record) for one in (source, base, other)])

    engine = here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES, look, at=2)
    load_tuned(here, zeros(), engine=engine)
    look()
    assert seen == [[1, 1, 1], [0, 0, 0]]


def test_where_others_have_nothing_in_common_the_sources_bring_all(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    other = here(weights(3), "two", model=BASE)
    seen: list[int] = []
    engine = here.new_engine()
    tensors = zeros()
    report = load_tuned(
        here,
        tensors,
        engine=engine,
        progress=lambda progress: seen.append(here.registry.pulls(other.record)),
    )
    assert_are(tensors, tuned())
    assert (report.lent, report.content, seen[-1]) == ({}, source.content, 0)


def test_files_of_whole_tensors_say_what_others_brought_of_all(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    engine = here.new_engine()
    Watched(engine, source.record, 2 * MIB)
    options = LoadOptions(also_from=BASE, pace=PACE)
    report = load_full(
        here.registry, engine, "tuned", max_file_nbytes=2 * BLOCKS * MIB, options=options
    )
    assert report.nbytes == NBYTES
    assert report.lent["/engines/one/0"] >= 2 * MIB


# -- layouts and digests
# --------------------------------------------------------------------------------------------------


def test_a_block_counts_of_whatever_tensor_it_is_there(here: Offers) -> None:
    """Their tensors have other names, other shapes, and another order in memory."""
    source = here(tuned(), "tuned", model=TUNED)
    layers = list(reversed(weights().values()))
    here({f"h.{number}": torch.cat(layers[number::2]) for number in range(2)}, "one", model=BASE)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, tuned())
    assert report.lent == {"/engines/one/0": SHARED_NBYTES}


def test_equal_blocks_of_one_tensor_come_from_anywhere(here: Offers) -> None:
    """All blocks of a layer are zero, there and here."""
    theirs, base = tuned(), weights()
    theirs["layer.2"].zero_()
    base["layer.0"].zero_()
    source = here(theirs, "tuned", model=TUNED)
    here(base, "one", model=BASE)
    tensors = {name: torch.ones_like(tensor) for name, tensor in theirs.items()}
    engine = here.new_engine()
    nbytes = SHARED_NBYTES - BLOCKS * MIB
    Watched(engine, source.record, nbytes)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, theirs)
    assert report.lent_nbytes >= nbytes


def test_of_ranks_that_hold_rows_each_takes_from_its_like(here: Offers) -> None:
    whole = {name: tensor.view(-1, 1024) for name, tensor in tuned().items()}
    base = {name: tensor.view(-1, 1024) for name, tensor in weights().items()}
    shape = tuple(whole["layer.0"].shape)
    for rank in range(2):
        boxes = {name: Shard(shape, (rank * shape[0] // 2, 0)) for name in whole}
        for instance, model, tensors in (("tuned", TUNED, whole), ("one", BASE, base)):
            halves = {name: tensor.chunk(2)[rank].clone() for name, tensor in tensors.items()}
            here(halves, instance, model=model, rank=rank, world_size=2, shards=boxes)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    boxes = {name: Shard(shape, (0, 0)) for name in whole}
    engine = here.new_engine()
    Watched(engine, list(here.registry.ranks("tuned")), SHARED_NBYTES)
    report = load_tuned(here, tensors, engine=engine, rank=None, shards=boxes)
    assert_are(tensors, whole)
    half = SHARED_NBYTES // 2
    assert report.lent == {"/engines/one/0": half, "/engines/one/1": half}


@pytest.mark.parametrize("without", ["the source", "the others"])
def test_without_digests_the_sources_bring_all(
    here: Offers, without: str, caplog: pytest.LogCaptureFixture
) -> None:
    here(tuned(), "tuned", model=TUNED, digests=without != "the source")
    here(weights(), "one", model=BASE, digests=without != "the others")
    tensors = zeros()
    with caplog.at_level("INFO", "engine_loader"):
        report = load_tuned(here, tensors)
    assert_are(tensors, tuned())
    assert report.lent == {}
    assert "no rank with another content is read from" in caplog.text


def test_digests_by_another_algorithm_say_nothing(
    here: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(tuned(), "tuned", model=TUNED)
    monkeypatch.setattr(offering, "algorithm_for", lambda _: "multilinear_64")
    here(weights(), "one", model=BASE)
    tensors = zeros()
    assert load_tuned(here, tensors).lent == {}
    assert_are(tensors, tuned())


def test_digests_of_whole_tensors_alone_are_enough_for_tensors_that_are_equal(
    here: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions publish."""
    monkeypatch.setattr(
        DigestCell,
        "with_blocks",
        lambda tensors, device, algorithm, _: DigestCell(tensors, device, algorithm),
    )
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, 3 * BLOCKS * MIB)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, tuned())
    assert report.lent_nbytes == 3 * BLOCKS * MIB


def test_what_is_here_already_comes_from_nobody(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    tensors, engine = zeros(), here.new_engine()
    tensors["layer.0"].copy_(weights()["layer.0"])
    shared = SHARED_NBYTES - BLOCKS * MIB
    Watched(engine, source.record, shared)
    report = load_tuned(here, tensors, engine=engine, reuse=True)
    assert_are(tensors, tuned())
    assert (report.skipped_nbytes, report.lent_nbytes) == (BLOCKS * MIB, shared)


def test_digests_of_whole_tensors_are_verified_besides(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(here, tensors, engine=engine, verify="digest")
    assert_are(tensors, tuned())
    assert (report.verified, report.lent_nbytes) == (True, SHARED_NBYTES)


def test_blocks_that_are_longer_than_a_chunk_come_in_parts_from_several(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    for name in ("one", "two"):
        here(weights(), name, model=BASE)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES // 2)
    report = load_tuned(here, tensors, engine=engine, pace=Pace(700_000, 2, stall_s=30.0))
    assert_are(tensors, tuned())
    assert report.lent_nbytes >= SHARED_NBYTES // 2


def test_over_mapped_memory_blocks_of_4_mib_come_from_others_and_all_is_verified(
    registry: Registry, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine sums up what it reads from the sources alone: of other tensors digests are
    computed.
    """
    monkeypatch.setattr(offering, "algorithm_for", lambda _: "multilinear_64")
    monkeypatch.setattr(offering, "check_can_be_served", lambda *_: None)
    there = Offers(registry, lambda: stack.enter_context(CudaIpcEngine(gpus=HostGpus())), stack)
    theirs = tuned()
    source = there(theirs, "tuned", model=TUNED, digests=None)
    there(weights(), "one", model=BASE, digests=None)
    tensors, engine = zeros(), there.new_engine()
    Watched(engine, source.record, 4 * MIB)
    pace = replace(pace_for("cuda_ipc"), stall_s=30.0)
    report = load_tuned(there, tensors, engine=engine, pace=pace)
    assert_are(tensors, theirs)
    assert (report.verified, set(report.lent)) == (True, {"/engines/one/0"})


# -- what happens meanwhile
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["updates", "closes", "is evicted"])
def test_whatever_becomes_of_another_rank_meanwhile_the_result_is_exact(
    here: Offers, stack: ExitStack, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    theirs, serving = weights(), stack.enter_context(InProcessEngine())
    one = here(theirs, "one", engine=serving, model=BASE)

    def happen() -> None:
        if fate == "updates":
            with one.update():
                for tensor in theirs.values():
                    tensor.zero_()
        elif fate == "closes":
            one.close()
            serving.close()
            for tensor in theirs.values():
                tensor.zero_()
        else:
            here.registry.evict(here.registry.ranks("one")[0])

    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, 5 * MIB, happen, at=7)
    failovers: list[str] = []
    monkeypatch.setattr(metrics.FAILOVERS, "inc", failovers.append)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, tuned())
    shares = {share.name: share for share in report.shares}
    assert shares["/engines/one/0"].error is not None
    assert report.lent_nbytes < SHARED_NBYTES
    if fate == "is evicted":
        assert report.lent == {}
    assert failovers == ["evicted" if fate == "is evicted" else "lost"]
    assert (report.retries, report.content) == (0, source.content)


def test_a_killed_rank_leaves_its_part_to_the_others(
    registry: Registry, processes: Processes, here: Offers, stack: ExitStack
) -> None:
    nbytes = 32 * MIB
    base = processes.start("-m", "tests.support.processes.source", "base", str(nbytes))
    assert line_of(base) == "version 0\n"
    theirs = content(0, nbytes)
    theirs["t3"][0] ^= 1
    source = here(
        theirs, "tuned", model=TUNED, engine=stack.enter_context(MooncakeEngine("127.0.0.1"))
    )
    tensors = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    with MooncakeEngine("127.0.0.1") as engine:
        Watched(engine, source.record, 4 * MIB, base.kill, at=7)
        report = load_tuned(here, tensors, engine=engine, also_from="base")
    assert_are(tensors, theirs)
    assert [share.name for share in report.shares if share.error] == ["/engines/base/0"]


@pytest.mark.parametrize("truth", ["some blocks are torn", "all is something else"])
def test_blocks_that_are_not_what_their_table_says_do_not_count(
    here: Offers, truth: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The table of one rank has the digests of the base, over other bytes; another rank is true."""
    source = here(tuned(), "tuned", model=TUNED)
    theirs = weights()
    wrong = here(theirs, "wrong", model=BASE)
    here(weights(), "true", model=ModelIdentity("another"))
    if truth == "some blocks are torn":  # behind the back of the publication
        for name in list(theirs)[:4]:
            theirs[name].view(BLOCKS, MIB)[:, 7] ^= 1
    else:
        for tensor in theirs.values():
            tensor.random_(256)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, 5 * MIB)
    with caplog.at_level("WARNING", "engine_loader"):
        report = load_tuned(here, tensors, engine=engine, also_from=["wrong", "true"])
    assert_are(tensors, tuned())
    shares = {share.name: share for share in report.shares}
    assert "digests" in str(shares[wrong.record.key].error)
    assert "/engines/wrong/0 has brought blocks that are not what its digests" in caplog.text
    if truth == "all is something else":
        assert wrong.record.key not in report.lent
    assert report.content == source.content


def test_a_rank_whose_table_cannot_be_read_is_left_out(here: Offers, stack: ExitStack) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    serving = stack.enter_context(InProcessEngine())
    one = here(weights(1), "one", engine=serving, model=BASE)
    here(weights(), "two", model=BASE)
    table = one._served.offering("test").digests
    assert table is not None
    serving.unregister(table.region)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, tuned())
    assert report.lent == {"/engines/two/0": SHARED_NBYTES}
    assert [share.name for share in report.shares if share.error] == ["/engines/one/0"]
    serving.register(table.region)  # which is taken back when it closes


def test_an_update_of_the_source_begins_the_load_anew(here: Offers) -> None:
    theirs, tensors = tuned(), zeros()
    source = here(theirs, "tuned", model=TUNED)
    here(weights(), "one", model=BASE)

    def update() -> None:
        with source.update():
            theirs["layer.2"][0] ^= 1

    engine = here.new_engine()
    Watched(engine, source.record, 0, update, at=7)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, theirs)
    assert (report.version, report.content) == (1, source.content)


def test_a_source_that_goes_leaves_the_load_to_another_and_to_the_others(
    here: Offers, stack: ExitStack
) -> None:
    serving = stack.enter_context(InProcessEngine())
    first = here(tuned(), "tuned", engine=serving, model=TUNED)
    here(weights(), "one", model=BASE)

    def go() -> None:
        here(tuned(), "tuned-2", model=TUNED)
        first.close()
        serving.close()

    tensors, engine = zeros(), here.new_engine()
    Watched(engine, first.record, 0, go, at=3)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, tuned())
    assert report.instance == "tuned-2"


def test_a_source_that_was_evicted_is_not_believed(here: Offers, stack: ExitStack) -> None:
    """Its table says of the bytes of another rank that they are right."""
    good, wrong = tuned(), weights(1)
    here(copy_of(wrong), "one", model=BASE)
    wrong["layer.4"].zero_()
    bad = here(wrong, "bad", model=TUNED)

    def evict() -> None:
        here(good, "good", model=TUNED)
        here.registry.evict(here.registry.ranks("bad")[0])

    tensors, engine = zeros(), here.new_engine()
    Watched(engine, bad.record, 5 * MIB, evict, at=7)
    report = load_tuned(here, tensors, engine=engine)
    assert_are(tensors, good)
    assert (report.instance, report.lent) == ("good", {})


def test_a_load_that_is_cancelled_meanwhile_ends(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    cancel, engine = threading.Event(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES, cancel.set, at=3)
    with pytest.raises(Cancelled):
        load_tuned(here, zeros(), engine=engine, cancel=cancel)


# -- ranks that are published
# --------------------------------------------------------------------------------------------------


def test_a_replica_offers_what_others_have_brought(here: Offers) -> None:
    source = here(tuned(), "tuned", model=TUNED)
    here(weights(), "one", model=BASE)
    tensors, engine = zeros(), here.new_engine()
    Watched(engine, source.record, SHARED_NBYTES // 2)
    report = load_tuned(here, tensors, engine=engine, publish=Replica("copy"))
    assert_are(tensors, tuned())
    assert report.lent_nbytes >= SHARED_NBYTES // 2
    assert report.publication is not None
    with report.publication as replica:
        assert replica.content == source.content
        source.close()
        behind = zeros()
        here.load(behind, source="copy", reuse=False)
        assert_are(behind, tuned())


def test_a_replica_offers_nothing_that_is_not_proven(here: Offers) -> None:
    """Whoever reads from a replica that reads from a wrong rank gets what is right."""
    source = here(tuned(), "tuned", model=TUNED)
    theirs = weights()
    here(theirs, "wrong", model=BASE)
    for tensor in theirs.values():
        tensor.zero_()  # behind the back of the publication
    behind = zeros()

    def read() -> None:
        here.load(behind, source=TUNED, reuse=False)

    tensors, engine = zeros(), here.new_engine()
    # The rank is left as soon as it is found out, so no more is waited for than its first read.
    Watched(engine, source.record, 1, read, at=2)
    report = load_tuned(here, tensors, engine=engine, publish=Replica("copy"))
    assert_are(tensors, tuned())
    assert_are(behind, tuned())
    assert report.publication is not None
    report.publication.close()


@pytest.mark.parametrize("seed", range(6))
def test_of_any_mix_of_versions_each_is_loaded_exactly(here: Offers, seed: int) -> None:
    """Each block of each rank is of one of three versions."""
    choose = random.Random(seed)
    versions = [weights(number) for number in range(3)]

    def mixed() -> Tensors:
        return {
            name: torch.cat(
                [choose.choice(versions)[name].split(MIB)[block] for block in range(BLOCKS)]
            )
            for name in versions[0]
        }

    ranks = {f"rank-{number}": mixed() for number in range(4)}
    for name, tensors in ranks.items():
        here(tensors, name)
    tensors = zeros()
    pace = Pace(choose.choice([MIB // 4, MIB, 4 * MIB]), 2)
    for name, wanted in ranks.items():
        report = here.load(
            tensors,
            source=name,
            also_from=BASE,
            pace=pace,
            reuse=choose.choice([False, True]),
            verify=choose.choice(["header", "digest"]),
        )
        assert_are(tensors, wanted)
        assert report.instance == name
