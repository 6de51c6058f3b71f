"""The guarded write of a release: every rank holds the version when it is written, and of two
writers one succeeds, however their steps and those of the ranks interleave.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_registry import RankRecord, RankState, Release
from engine_registry.errors import (
    EtcdUnavailable,
    InstanceNotFound,
    InvalidField,
    ReleaseIncomplete,
    SchemaUnsupported,
)
from engine_registry.registration.writes import end
from engine_registry.releases.writing import Order
from engine_registry.releases.writing import release as release_order
from engine_registry.schema.keys import record_key, release_key
from engine_registry.schema.keyvalue import KeyValue, Put
from engine_registry.schema.record import Retained
from engine_registry.schema.record_format import decode_item, encode
from engine_registry.schema.release import decode_release
from tests.support.builders import a_record, a_release
from tests.support.fake_etcd import FakeEtcd

KEY = release_key("qwen")


def release(
    etcd: FakeEtcd,
    instance: str,
    version: int,
    timeout_s: float,
    rank: int = 0,
    back: bool = False,
    former: Release | None = None,
) -> Release:
    return release_order(etcd, Order(instance, version, rank, back, former), timeout_s)


def content(version: int, rank: int = 0) -> str:
    return f"{version:016x}{rank:016x}"


def holding(rank: int, *versions: int, world_size: int = 2, **fields: object) -> RankRecord:
    """A rank that has these versions, the present one first."""
    present, *others = versions
    return a_record(
        rank=rank,
        world_size=world_size,
        topology={},
        incarnation=f"{rank:032x}",
        version=present,
        content=content(present, rank),
        retained=tuple(Retained(each, content(each, rank), 8192) for each in others),
        **fields,
    )


def put(etcd: FakeEtcd, record: RankRecord) -> None:
    """Under the lease that the rank has, or a new one."""
    found = etcd.get(record.key)
    lease_id = found.lease_id if found is not None else etcd.grant(10)
    etcd.commit([], [Put(record.key, encode(record), lease_id)])


def standing(etcd: FakeEtcd) -> Release | None:
    found = etcd.get(KEY)
    return decode_release(found) if found is not None else None


def version_of(etcd: FakeEtcd) -> int | None:
    found = standing(etcd)
    return found.version if found is not None else None


@pytest.fixture
def etcd() -> FakeEtcd:
    etcd = FakeEtcd()
    for rank in range(2):
        put(etcd, holding(rank, 7))
    return etcd


def test_a_version_that_every_rank_holds_is_released_with_what_each_holds(etcd: FakeEtcd) -> None:
    made = release(etcd, "qwen", 7, 0.0)
    assert made == standing(etcd)
    assert (made.instance, made.version) == ("qwen", 7)
    assert made.contents == (content(7, 0), content(7, 1))
    assert "@" in made.by


def test_it_lies_under_the_lease_of_the_rank_that_is_named(etcd: FakeEtcd) -> None:
    release(etcd, "qwen", 7, 0.0, rank=1)
    assert etcd.lease_of(KEY) == etcd.lease_of(record_key("qwen", 1))
    put(etcd, holding(0, 8, 7))
    put(etcd, holding(1, 8, 7))
    release(etcd, "qwen", 8, 0.0)
    assert etcd.lease_of(KEY) == etcd.lease_of(record_key("qwen", 0))
    etcd.expire(etcd.lease_of(KEY))
    assert standing(etcd) is None


def test_ranks_may_have_gone_on_from_it_and_retain_it(etcd: FakeEtcd) -> None:
    put(etcd, holding(0, 9, 8, 7))
    put(etcd, holding(1, 8, 7))
    assert release(etcd, "qwen", 7, 0.0).contents == (content(7, 0), content(7, 1))
    assert release(etcd, "qwen", 8, 0.0).contents == (content(8, 0), content(8, 1))


def test_who_comes_second_finds_it_done_and_writes_nothing(etcd: FakeEtcd) -> None:
    first = release(etcd, "qwen", 7, 0.0)
    before = len(etcd.history)
    assert release(etcd, "qwen", 7, 0.0, rank=1) == first
    assert len(etcd.history) == before


def test_the_same_number_with_other_bytes_is_another_release(etcd: FakeEtcd) -> None:
    first = release(etcd, "qwen", 7, 0.0)
    for rank in range(2):
        put(etcd, replace(holding(rank, 7), content=content(99, rank)))
    second = release(etcd, "qwen", 7, 0.0)
    assert second == standing(etcd) != first


def test_releases_move_forward_but_for_a_rollback(etcd: FakeEtcd) -> None:
    for rank in range(2):
        put(etcd, holding(rank, 8, 7))
    release(etcd, "qwen", 8, 0.0)
    with pytest.raises(InvalidField, match="is older than version 8") as caught:
        release(etcd, "qwen", 7, 0.0)
    assert caught.value.details == {"field": "version"}
    assert version_of(etcd) == 8
    assert release(etcd, "qwen", 7, 0.0, back=True) == standing(etcd)
    assert version_of(etcd) == 7


@pytest.mark.parametrize(
    ("change", "ranks", "said"),
    [
        (
            lambda etcd: put(etcd, holding(1, 6)),
            {1: "version 6"},
            "it is kept back by rank 1 (version 6)",
        ),
        (
            lambda etcd: put(etcd, holding(1, 9, 8)),
            {1: "versions 8 and 9"},
            "rank 1 (versions 8 and 9)",
        ),
        (
            lambda etcd: put(etcd, holding(1, 7, state=RankState.LOADING)),
            {1: "loading"},
            "rank 1 (loading)",
        ),
        (
            lambda etcd: etcd.delete(record_key("qwen", 1)),
            {1: "not registered"},
            "rank 1 (not registered)",
        ),
        (
            lambda etcd: put(etcd, holding(1, 7, ended="withdrawn")),
            {1: "not registered"},
            "rank 1 (not registered)",
        ),
        (
            lambda etcd: put(etcd, holding(1, 7, generation="other")),
            {},
            "rank 1 has generation 'other', rank 0 has 'launch-1'",
        ),
        (lambda etcd: etcd.put(record_key("qwen", 1), b"{"), {1: "not registered"}, "rank 1"),
    ],
)
def test_a_rank_that_does_not_hold_it_keeps_it_back_and_is_named(
    etcd: FakeEtcd, change: Callable[[FakeEtcd], object], ranks: dict[int, str], said: str
) -> None:
    change(etcd)
    with pytest.raises(ReleaseIncomplete, match="version 7 of 'qwen' is not released") as caught:
        release(etcd, "qwen", 7, 0.0)
    assert said in caught.value.what
    assert caught.value.details["ranks"] == ranks
    assert standing(etcd) is None


def test_many_ranks_are_named_by_what_they_lack() -> None:
    etcd = FakeEtcd()
    for rank in range(1000):
        put(etcd, holding(rank, 7 if rank % 500 else 6, world_size=1001))
    with pytest.raises(ReleaseIncomplete) as caught:
        release(etcd, "qwen", 7, 0.0)
    assert caught.value.what == (
        "version 7 of 'qwen' is not released: it is kept back by ranks 0,500 (version 6), "
        "rank 1000 (not registered)"
    )


def test_of_many_ranks_one_comparison_guards_all() -> None:
    etcd = FakeEtcd()
    for rank in range(300):
        put(etcd, holding(rank, 7, world_size=300))
    guards = []
    decide = etcd.decide

    def counted(some, writes, then=(), otherwise=()):  # type: ignore[no-untyped-def]
        guards.extend(some)
        return decide(some, writes, then, otherwise)

    etcd.decide = counted  # type: ignore[method-assign]
    made = release(etcd, "qwen", 7, 0.0)
    assert len(guards) == 3
    assert made.is_of(7, [content(7, rank) for rank in range(300)])
    put_contents = standing(etcd)
    assert put_contents is not None
    assert put_contents.contents == ()


def test_nobody_there_is_an_instance_that_is_not_found() -> None:
    with pytest.raises(InstanceNotFound, match="'qwen' is not registered"):
        release(FakeEtcd(), "qwen", 7, 0.0)


def test_a_release_that_is_damaged_is_replaced_and_a_newer_schema_is_not(etcd: FakeEtcd) -> None:
    etcd.put(KEY, b"{")
    assert release(etcd, "qwen", 7, 0.0) == standing(etcd)
    etcd.put(KEY, a_release().encode().replace(b'"schema":1', b'"schema":9'))
    with pytest.raises(SchemaUnsupported):
        release(etcd, "qwen", 7, 0.0)


def test_a_write_whose_answer_was_lost_counts_once(etcd: FakeEtcd) -> None:
    etcd.retry_next_commit = True
    made = release(etcd, "qwen", 7, 0.0)
    assert made == standing(etcd)
    assert len([one for one in etcd.history if one.key == KEY]) == 1


def test_an_etcd_that_is_away_is_an_error_and_nothing_is_released(etcd: FakeEtcd) -> None:
    etcd.available = False
    with pytest.raises(EtcdUnavailable):
        release(etcd, "qwen", 7, 0.0)
    etcd.available = True
    assert standing(etcd) is None


def test_a_rank_that_the_instance_does_not_have_is_an_error(etcd: FakeEtcd) -> None:
    with pytest.raises(InvalidField, match="'qwen' has no rank 2"):
        release(etcd, "qwen", 7, 0.0, rank=2)


def test_a_release_is_kept_as_it_was_after_its_lease_was_lost(etcd: FakeEtcd) -> None:
    made = release(etcd, "qwen", 7, 0.0)
    before = etcd.value(KEY)
    etcd.expire(etcd.lease_of(KEY))
    with pytest.raises(ReleaseIncomplete, match="rank 0"):
        release(etcd, "qwen", 7, 0.0, former=made)
    put(etcd, holding(0, 7))
    assert release(etcd, "qwen", 7, 0.0, former=made) == made
    assert (etcd.value(KEY), etcd.lease_of(KEY)) == (before, etcd.lease_of(record_key("qwen", 0)))
    writes = len(etcd.history)
    assert release(etcd, "qwen", 7, 0.0, former=made) == made
    assert len(etcd.history) == writes


def test_a_release_is_not_kept_where_ranks_hold_other_bytes_by_its_number(
    etcd: FakeEtcd,
) -> None:
    made = release(etcd, "qwen", 7, 0.0)
    put(etcd, replace(holding(1, 7), content=content(99)))
    with pytest.raises(ReleaseIncomplete, match="not what was released by that number"):
        release(etcd, "qwen", 7, 0.0, former=made)


def test_a_release_moves_to_the_lease_that_its_rank_has_by_now(etcd: FakeEtcd) -> None:
    made = release(etcd, "qwen", 7, 0.0)
    former = etcd.lease_of(KEY)
    record = holding(0, 7)
    etcd.commit([], [Put(record.key, encode(record), etcd.grant(10))])
    assert release(etcd, "qwen", 7, 0.0, former=made) == made
    etcd.expire(former)
    assert standing(etcd) == made


def test_a_release_is_not_kept_where_another_was_made_since(etcd: FakeEtcd) -> None:
    for rank in range(2):
        put(etcd, holding(rank, 8, 7))
    former = release(etcd, "qwen", 7, 0.0)
    newer = release(etcd, "qwen", 8, 0.0, rank=1)
    assert release(etcd, "qwen", 7, 0.0, back=True, former=former) == newer
    back = release(etcd, "qwen", 7, 0.0, rank=1, back=True)
    assert back.contents == former.contents
    assert release(etcd, "qwen", 7, 0.0, former=replace(former, by="bob@node-1")) == back


# -- interleavings
# --------------------------------------------------------------------------------------------------


def test_a_rank_that_goes_on_before_the_write_makes_it_fail(etcd: FakeEtcd) -> None:
    etcd.before_commit = lambda: put(etcd, holding(1, 8))
    with pytest.raises(ReleaseIncomplete, match=r"rank 1 \(version 8\)"):
        release(etcd, "qwen", 7, 0.0)
    assert standing(etcd) is None


def test_a_rank_that_goes_on_and_retains_it_is_looked_at_again(etcd: FakeEtcd) -> None:
    etcd.before_commit = lambda: put(etcd, holding(1, 8, 7))
    assert release(etcd, "qwen", 7, 0.0) == standing(etcd)


def test_a_rank_that_ends_and_comes_back_with_other_bytes_makes_it_fail(etcd: FakeEtcd) -> None:
    def again() -> None:
        etcd.delete(record_key("qwen", 1))
        put(etcd, replace(holding(1, 7), incarnation="f" * 32, content=content(99)))

    etcd.before_commit = again
    made = release(etcd, "qwen", 7, 0.0)
    assert made.contents == (content(7, 0), content(99))


def test_the_rank_whose_lease_it_gets_may_be_gone_by_then(etcd: FakeEtcd) -> None:
    etcd.before_commit = lambda: etcd.expire(etcd.lease_of(record_key("qwen", 0)))
    with pytest.raises(ReleaseIncomplete, match=r"rank 0 \(not registered\)"):
        release(etcd, "qwen", 7, 0.0)
    assert etcd.keys == [record_key("qwen", 1)]


def test_another_rank_that_is_gone_by_then_leaves_what_its_end_a_moment_later_would(
    etcd: FakeEtcd,
) -> None:
    etcd.before_commit = lambda: etcd.expire(etcd.lease_of(record_key("qwen", 1)))
    made = release(etcd, "qwen", 7, 0.0)
    assert made.contents == (content(7, 0), content(7, 1))
    assert etcd.keys == [record_key("qwen", 0), KEY]


def test_a_newer_release_that_comes_before_the_write_stays(etcd: FakeEtcd) -> None:
    for rank in range(2):
        put(etcd, holding(rank, 8, 7))
    others: list[Release] = []
    etcd.before_commit = lambda: others.append(release(etcd, "qwen", 8, 0.0, rank=1))
    with pytest.raises(InvalidField, match="older than version 8"):
        release(etcd, "qwen", 7, 0.0)
    assert version_of(etcd) == 8


def test_the_same_release_by_another_before_the_write_is_found_done(etcd: FakeEtcd) -> None:
    others: list[Release] = []
    etcd.before_commit = lambda: others.append(release(etcd, "qwen", 7, 0.0, rank=1))
    assert [release(etcd, "qwen", 7, 0.0)] == others
    assert len([one for one in etcd.history if one.key == KEY]) == 1


def test_in_a_wiped_store_nothing_is_released_by_what_was_seen_before(etcd: FakeEtcd) -> None:
    """A wiped store counts its revisions from 1 again, so they do not say what is new there."""

    def wipe() -> None:
        others = [holding(rank, 8) for rank in range(2)]
        puts = [Put(one.key, encode(one), etcd.grant(10)) for one in others]
        etcd.restore(puts, back_to_revision=1)

    etcd.before_commit = wipe
    with pytest.raises(ReleaseIncomplete):
        release(etcd, "qwen", 7, 0.0)
    assert standing(etcd) is None


@dataclass
class World:
    """Ranks that come, go on and go, and a check of all that was ever released."""

    size: int
    etcd: FakeEtcd = field(default_factory=FakeEtcd)
    versions: dict[int, list[int]] = field(default_factory=dict)  # by rank, the newest first
    made: list[Release] = field(default_factory=list)

    def act(self, name: str, rank: int) -> None:
        rank %= self.size
        if name == "go on":
            self.versions[rank] = [self.versions.get(rank, [0])[0] + 1]
        elif name == "snapshot":
            had = self.versions.get(rank, [0])
            self.versions[rank] = [had[0] + 1, *had][:3]
        elif name == "lose":
            self.versions.pop(rank, None)
            self.etcd.delete(record_key("qwen", rank))
            return
        elif name == "end":
            found = self.etcd.get(record_key("qwen", rank))
            self.versions.pop(rank, None)
            if found is not None:
                end(self.etcd, found, "withdrawn")
            return
        put(self.etcd, holding(rank, *self.versions.setdefault(rank, [0]), world_size=self.size))

    def release(self, version: int, rank: int, back: bool) -> None:
        with suppress(ReleaseIncomplete, InvalidField, InstanceNotFound):
            self.made.append(
                release(self.etcd, "qwen", version, 0.0, rank=rank % self.size, back=back)
            )

    def check(self) -> None:
        """Of each write of a release, at its revision: what every rank that stands holds, and what
        one that is gone held last.
        """
        last: dict[int, RankRecord] = {}
        there: set[int] = set()
        written = []
        for change in self.etcd.history:
            if change.key == KEY:
                if isinstance(change, KeyValue):
                    made = decode_release(change)
                    written.append(made)
                    held = [last[rank].as_of(made.version) for rank in range(self.size)]
                    assert all(one is not None and not one.ended for one in held) or (
                        there != set(range(self.size))
                    )
                    for rank in there:
                        one = last[rank].as_of(made.version)
                        assert one is not None
                        assert not one.ended
                        assert one.content == made.contents[rank]
                continue
            rank = int(change.key.rsplit("/", 1)[1])
            if isinstance(change, KeyValue):
                last[rank] = decode_item(change)
                there.add(rank)
            else:
                there.discard(rank)
        for made in self.made:
            assert made in written


@dataclass(frozen=True)
class Step:
    """Of a rank, or a release of a version by it."""

    name: str
    rank: int
    version: int = 0

    def take(self, world: World) -> None:
        if self.name in ("release", "roll back"):
            world.release(self.version, self.rank, self.name == "roll back")
        else:
            world.act(self.name, self.rank)


STEPS = st.builds(
    Step,
    st.sampled_from(["go on", "snapshot", "lose", "end", "put"]),
    st.integers(0, 3),
) | st.builds(Step, st.sampled_from(["release", "roll back"]), st.integers(0, 3), st.integers(0, 4))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(STEPS, st.lists(STEPS, max_size=4)), max_size=25),
)
def test_whatever_happens_between_a_look_and_its_write_no_rank_that_stands_lacks_what_is_released(
    size: int, steps: list[tuple[Step, list[Step]]]
) -> None:
    world = World(size)
    for rank in range(size):
        world.act("put", rank)
    for step, between in steps:

        def meanwhile(between: list[Step] = between) -> None:
            for each in between:
                each.take(world)

        if step.name in ("release", "roll back"):
            world.etcd.before_commit = meanwhile
        step.take(world)
        world.etcd.before_commit = None
    world.check()
