"""The handle on a registration, with a line to a keeper that a test works: what the rank is asked
to do, what it may still change, and how it leaves.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Sequence

import pytest

from engine_registry import RankRecord, RankState, Registration, RegistrationState
from engine_registry.errors import Evicted, KeeperFailed, RankConflict, RegistryError
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.registration import handle as module
from engine_registry.registration.descriptors import Descriptors
from engine_registry.registration.hold import Hold
from engine_registry.telemetry import metrics
from engine_registry.telemetry.meters import Held
from tests.support.builders import OTHER_CONTENT, a_record

CONFIG = EtcdConfig(parse_endpoints("nowhere:1"))
REGISTERED, SUSPENDED = RegistrationState.REGISTERED, RegistrationState.SUSPENDED
LOST, CLOSED = RegistrationState.LOST, RegistrationState.CLOSED
HANG_S = 60.0


class Link:
    """As a KeeperLink; `problem` is what the next call raises."""

    def __init__(
        self,
        config: EtcdConfig,
        record: RankRecord,
        parts: Sequence[bytes],
        ttl_s: float,
        unresponsive_after_s: float,
        news: Callable[[], Callable[[str, str, RegistryError | None], None] | None],
        descriptors: Descriptors | None = None,
        hold: Hold | None = None,
        replaces: str = "",
    ) -> None:
        assert (config, parts, ttl_s) == (CONFIG, [b"part"], 3.0)
        assert unresponsive_after_s == 30.0
        self.record = record
        self.pid = 4711
        self.calls: list[str] = []
        self.in_end: Callable[[], object] = lambda: None
        self._news = news

    problem: BaseException | None = None

    def _do(self, call: str) -> None:
        self.calls.append(call)
        if self.problem is not None:
            raise self.problem

    def open(self) -> None:
        self._do("open")

    def update(
        self,
        change: Callable[[RankRecord], RankRecord],
        parts: Sequence[bytes] = (),
        descriptors: Descriptors | None = None,
    ) -> None:
        self._do("update")
        self.record = change(self.record)

    def end(self, reason: str) -> None:
        self.in_end()
        self._do(f"end: {reason}")

    def abandon(self) -> None:
        self.calls.append("abandon")

    def forget(self) -> None:
        self.calls.append("forget")

    def tell(self, state: RegistrationState, why: str, lost: RegistryError | None = None) -> None:
        on_news = self._news()
        assert on_news is not None
        on_news(state.name, why, lost)


class Bench:
    """A registration, and all that it does with its line, its callback and the metrics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Link] = []
        self.told: queue.SimpleQueue[tuple[RegistrationState, str]] = queue.SimpleQueue()
        self.changes: list[str] = []
        self.counted_as: list[str] = []
        monkeypatch.setattr(module, "KeeperLink", self._link)
        monkeypatch.setattr(metrics.REGISTRATION_CHANGES, "inc", self.changes.append)
        monkeypatch.setattr(metrics.REGISTRATIONS, "hold", self._hold)

    def _link(self, *parts: object) -> Link:
        self.made.append(Link(*parts))  # type: ignore[arg-type]
        return self.made[-1]

    def _hold(self, value: str) -> Held:
        bench = self

        class Counted(Held):
            def __init__(self) -> None:
                bench.counted_as.append(value)

            def move(self, value: str) -> None:
                bench.counted_as.append(value)

            def release(self) -> None:
                bench.counted_as.append("")

        return Counted()

    @property
    def link(self) -> Link:
        return self.made[-1]

    def register(self, on_state: bool = True) -> Registration:
        return Registration(
            CONFIG,
            a_record(),
            [b"part"],
            3.0,
            30.0,
            (lambda state, why: self.told.put((state, why))) if on_state else None,
        )

    def next_told(self) -> tuple[RegistrationState, str]:
        return self.told.get(timeout=HANG_S)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_registration_is_what_its_keeper_has_registered(bench: Bench) -> None:
    with bench.register() as registration:
        assert bench.link.calls == ["open"]
        assert (registration.state, registration.record) == (REGISTERED, a_record())
        assert (registration.lost, registration.withdrawn) == (None, False)
        assert registration.keeper_pid == 4711
        assert (bench.changes, bench.counted_as) == (["registered"], ["registered"])


@pytest.mark.parametrize("problem", [RankConflict("taken"), KeyboardInterrupt()])
def test_a_registration_that_is_refused_or_interrupted_is_forgotten_and_counts_for_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    monkeypatch.setattr(Link, "problem", problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to be closed
        with pytest.raises(type(problem)) as caught:
            bench.register()
    assert caught.value is problem
    assert bench.link.calls == ["open", "forget"]
    assert (bench.changes, bench.counted_as) == ([], [])


def test_a_change_is_of_the_fields_that_are_given_and_no_other(bench: Bench) -> None:
    with bench.register() as registration:
        registration.update(version=0)
        assert registration.record == a_record(version=0)
        registration.update(content=OTHER_CONTENT, state=RankState.UPDATING)
        assert registration.record == a_record(
            version=0, content=OTHER_CONTENT, state=RankState.UPDATING
        )


def test_a_rank_that_drains_stays_so(bench: Bench) -> None:
    with bench.register() as registration:
        registration.update(state=RankState.DRAINING)
        registration.update(version=4, state=RankState.READY)
        assert registration.record == a_record(version=4, state=RankState.DRAINING)


def test_a_registration_that_is_over_is_not_changed(bench: Bench) -> None:
    with bench.register() as registration:
        bench.link.tell(LOST, "evicted", error := Evicted("evicted by hand"))
        with pytest.raises(Evicted) as caught:
            registration.update(version=1)
        assert caught.value is error
    closed = bench.register()
    closed.withdraw()
    with pytest.raises(RegistryError, match="the registration of /engines/qwen/0 is closed"):
        closed.update(version=1)
    assert "update" not in [call for link in bench.made for call in link.calls]


def test_a_registration_is_not_changed_any_more_once_it_begins_to_end(bench: Bench) -> None:
    registration = bench.register()

    def update() -> None:
        with pytest.raises(RegistryError, match="is closed"):
            registration.update(version=1)

    bench.link.in_end = update
    registration.withdraw()
    assert bench.link.calls == ["open", "end: withdrawn", "abandon"]


def test_another_process_neither_changes_nor_ends_its_copy_of_a_registration(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    registration = bench.register()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        with pytest.raises(RegistryError, match="this is a fork of it: update it there"):
            registration.update(version=1)
        registration.close()
        registration.__del__()
    assert (bench.link.calls, bench.counted_as) == (["open"], ["registered"])
    registration.close()


# -- leaving
# --------------------------------------------------------------------------------------------------


def test_a_registration_ends_once_with_its_reason(bench: Bench) -> None:
    registration = bench.register()
    registration.withdraw("for a test")
    registration.withdraw("again")
    registration.close()
    assert bench.link.calls == ["open", "end: for a test", "abandon"]
    assert (registration.state, registration.withdrawn) == (CLOSED, True)
    assert bench.next_told() == (CLOSED, "")
    assert bench.told.empty()
    assert bench.counted_as == ["registered", ""]
    assert bench.changes == ["registered", "closed"]


def test_a_registration_that_etcd_does_not_let_go_yet_is_closed_and_not_withdrawn(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    registration = bench.register()
    bench.link.problem = KeeperFailed("its keeper does not answer")
    registration.withdraw()
    assert (registration.state, registration.withdrawn) == (CLOSED, False)
    assert bench.link.calls == ["open", "end: withdrawn", "abandon"]
    assert "is not out of etcd yet" in caplog.text


def test_a_lost_registration_is_not_ended_again(bench: Bench) -> None:
    registration = bench.register()
    bench.link.tell(LOST, "evicted", Evicted("evicted by hand"))
    registration.withdraw()
    assert bench.link.calls == ["open", "abandon"]
    assert (registration.state, registration.withdrawn) == (CLOSED, False)


def test_whoever_withdraws_meanwhile_waits_until_it_is_done(bench: Bench) -> None:
    registration = bench.register()
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        assert go_on.wait(HANG_S)

    bench.link.in_end = hang
    first = threading.Thread(target=registration.withdraw, args=("first",))
    first.start()
    assert begun.wait(HANG_S)

    def withdraw_too() -> None:
        registration.withdraw("second")
        done.set()

    second = threading.Thread(target=withdraw_too)
    second.start()
    assert not done.wait(0.05)
    go_on.set()
    for thread in (first, second):
        thread.join(HANG_S)
    assert done.is_set()
    assert bench.link.calls == ["open", "end: first", "abandon"]


def test_a_forgotten_registration_is_left_to_its_line_and_counts_no_more(bench: Bench) -> None:
    registration = bench.register(on_state=False)
    with pytest.warns(ResourceWarning, match="Registration of /engines/qwen/0 was never closed"):
        del registration
    assert bench.link.calls == ["open"]  # it notices that the handle is gone
    assert bench.counted_as == ["registered", ""]


# -- news from the keeper
# --------------------------------------------------------------------------------------------------


def test_each_new_state_is_reported_once_and_in_order_until_the_rank_closes(bench: Bench) -> None:
    registration = bench.register()
    bench.link.tell(REGISTERED, "as it was")
    bench.link.tell(SUSPENDED, "etcd is away")
    bench.link.tell(SUSPENDED, "still")
    assert registration.state is SUSPENDED
    bench.link.tell(REGISTERED, "it is back")
    bench.link.tell(LOST, "evicted", error := Evicted("evicted by hand"))
    assert (registration.state, registration.lost) == (LOST, error)
    registration.close()
    bench.link.tell(SUSPENDED, "late news")
    assert registration.state is CLOSED
    assert [bench.next_told() for _ in range(4)] == [
        (SUSPENDED, "etcd is away"),
        (REGISTERED, "it is back"),
        (LOST, "evicted"),
        (CLOSED, ""),
    ]
    assert bench.told.empty()
    assert bench.counted_as == ["registered", "suspended", "registered", "lost", ""]
    assert bench.changes == ["registered", "suspended", "registered", "lost", "closed"]


@pytest.mark.parametrize(("on_state", "level"), [(False, "ERROR"), (True, "INFO")])
def test_a_loss_that_no_callback_gets_is_an_error_in_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture, on_state: bool, level: str
) -> None:
    caplog.set_level("INFO")
    with bench.register(on_state):
        bench.link.tell(LOST, "evicted", Evicted("evicted by hand"))
    levels = [each.levelname for each in caplog.records if "is lost: evicted" in each.message]
    assert levels == [level]
