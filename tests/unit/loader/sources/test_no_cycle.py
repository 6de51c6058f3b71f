"""No rank reads from itself by way of others: whoever joins, dies, is registered again or looks
late, in whatever order and wherever it stands.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine_loader import InProcessEngine
from engine_loader.sources.groups import Found
from engine_loader.sources.search import Search
from engine_registry import Location, Manifest, ModelIdentity, Place, RankRecord, RankState
from engine_registry.schema.holder import holder_keys
from tests.support.builders import a_record
from tests.support.fake_etcd import FakeEtcd
from tests.support.shelf import OverFake, shelve

MODEL = ModelIdentity("m")
WHERE = ("", "a", "b", "b/r", "b/r/n", "/r")
ENGINES = {location: InProcessEngine(location=location) for location in WHERE}
A_RANK = st.integers(0, 11)


class Joining(RuleBasedStateMachine):
    """Ranks that load one model; `reads_from` is whom each has chosen, by incarnation."""

    @initialize(hop=st.sampled_from([0.0, 0.3, 5.0]))
    def begin(self, hop: float) -> None:
        self.etcd = FakeEtcd()
        self.registry = OverFake(self.etcd)
        self.hop = hop
        self.loading: list[RankRecord] = []
        self.looks: dict[str, Found] = {}
        self.reads_from: dict[str, RankRecord] = {}
        shelve(self.etcd, self._rank("root"))

    def _rank(self, name: str, **changes: Any) -> RankRecord:
        given = {"rank": 0, "world_size": 1, "model": MODEL, "topology": {}, "fabric": ""}
        return a_record(
            instance=name, incarnation=f"{name:_>32}", protocol="in_process", **given, **changes
        )

    def _some(self, number: int) -> RankRecord | None:
        return self.loading[number % len(self.loading)] if self.loading else None

    @rule(indexed=st.booleans(), at_once=st.booleans(), location=st.sampled_from(WHERE))
    def join(self, indexed: bool, at_once: bool, location: str) -> None:
        """Ranks that register at once have one order."""
        name = f"r{len(self.loading)}"
        order = self.loading[-1].order if self.loading and at_once else 0
        where = Location.parse(location)
        rank = self._rank(name, state=RankState.LOADING, order=order, location=where)
        self.loading.append(shelve(self.etcd, rank, indexed=indexed))

    @rule(number=A_RANK, again=st.booleans())
    def look(self, number: int, again: bool) -> None:
        """It may read much later from what it finds, or find it `again` without a look."""
        if (me := self._some(number)) is None:
            return
        before = self.looks.get(me.incarnation) if again else None
        search = Search(
            registry=self.registry,
            engine=ENGINES[str(me.location)],
            wanted=MODEL,
            place=Place(0),
            dst=Manifest((), ()),
            boxes=False,
            by_rank=True,
            pipelined=True,
            hop=self.hop,
        )
        self.looks[me.incarnation] = search.find(
            0.0, me=me, seen=before.holders if before is not None else None
        )

    @rule(number=A_RANK, which=st.integers(0, 20))
    def read(self, number: int, which: int) -> None:
        """From any that the look has found, not only from the best."""
        me = self._some(number)
        if me is None or me.incarnation not in self.looks:
            return
        found = [team[0] for group in self.looks[me.incarnation].alike for team in group.teams]
        self.reads_from[me.incarnation] = found[which % len(found)]

    @rule(number=A_RANK)
    def lose_the_lease(self, number: int) -> None:
        """Its keeper puts the record again, whose revisions are new then."""
        if (me := self._some(number)) is None:
            return
        for key in (me.key, *holder_keys(me)):
            self.etcd.delete(key)
        again = shelve(self.etcd, me, indexed=bool(me.order))
        if not me.order:  # a rank of the release before is another one then
            again = replace(again, order=0)
        self.loading[self.loading.index(me)] = again

    @invariant()
    def nobody_reads_from_itself(self) -> None:
        for incarnation in getattr(self, "reads_from", ()):
            seen: list[str] = []
            at = incarnation
            while at in self.reads_from:
                assert at not in seen, f"a cycle: {seen}"
                seen.append(at)
                at = self.reads_from[at].incarnation


TestJoining = Joining.TestCase
TestJoining.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
