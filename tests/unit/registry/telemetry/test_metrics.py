"""What is counted, where it is shown, and that it costs nobody anything who has not asked."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import engine_loader.errors
import engine_registry.errors
from engine_cli.runtime.children import python
from engine_loader import metrics as loader_metrics
from engine_loader.metrics import outcome_of, reason_of
from engine_registry import (
    InstanceCleaned,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    InstanceState,
    InstanceStatus,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
)
from engine_registry.pulls.watch import PullWatch
from engine_registry.registration.keeper.link import KeeperLink
from engine_registry.registration.writes import ENDINGS
from engine_registry.schema.keys import pull_key
from engine_registry.schema.keyvalue import Deletion, KeyValue
from engine_registry.telemetry import meters, metrics
from engine_registry.telemetry.info import Measured
from engine_registry.telemetry.meters import Counter, Gauge, Meter
from engine_registry.watching.metrics import WatchMetrics
from tests.support.builders import INCARNATION, OTHER_INCARNATION, a_record
from tests.support.checkout import ROOT
from tests.support.feed import Feed
from tests.support.waiting import wait_until


@pytest.fixture
def counted() -> Iterator[CollectorRegistry]:
    collectors = CollectorRegistry()
    with metrics.counting(collectors):
        yield collectors
    assert not metrics.enabled()


def families(collectors: CollectorRegistry) -> set[str]:
    return {family.name for family in collectors.collect()}


def series(collectors: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """By the values of the labels."""
    samples = [
        sample
        for family in collectors.collect()
        for sample in family.samples
        if sample.name == name
    ]
    return {tuple(sample.labels.values()): sample.value for sample in samples}


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[Meter]:
    """What is declared from here on goes with the test."""
    some = list(meters._declared)
    monkeypatch.setattr(meters, "_declared", some)
    return some


# -- the seam
# --------------------------------------------------------------------------------------------------


def test_counting_without_a_reader_is_nothing() -> None:
    metrics.RANKS_LOST.inc("evicted")
    metrics.KEEPALIVE.observe(0.1)
    metrics.INSTANCES.set(1, "ready")
    metrics.INSTANCES.remove("ready")
    held = metrics.REGISTRATIONS.hold("registered")
    held.move("lost")
    held.release()
    assert not metrics.enabled()


def test_nothing_of_prometheus_client_is_imported_until_somebody_asks() -> None:
    code = """
import engine_loader, engine_registry.watching.metrics
from engine_registry.telemetry import metrics
metrics.RESYNCS.inc()
assert not [name for name in sys.modules if name.startswith("prometheus_client")], "imported"
metrics.enable()
assert "prometheus_client" in sys.modules
"""
    subprocess.run(python(code), check=True, cwd=ROOT)


def test_a_registry_of_ones_own_gets_the_metrics_and_nobody_else_does(
    counted: CollectorRegistry,
) -> None:
    metrics.RESYNCS.inc()
    assert families(counted) == {meter.name for meter in metrics.declared()}
    assert counted.get_sample_value("engines_registry_watch_resyncs_total") == 1
    assert not [
        name for name in families(prometheus_client.REGISTRY) if name.startswith("engines_")
    ]


def test_enabling_twice_counts_once(counted: CollectorRegistry) -> None:
    metrics.enable(counted)
    metrics.RESYNCS.inc()
    assert counted.get_sample_value("engines_registry_watch_resyncs_total") == 1


def test_two_registries_show_the_same_numbers_and_one_may_leave(counted: CollectorRegistry) -> None:
    metrics.RESYNCS.inc()
    other = CollectorRegistry()
    with metrics.counting(other):
        metrics.RESYNCS.inc()
        assert [
            some.get_sample_value("engines_registry_watch_resyncs_total")
            for some in (counted, other)
        ] == [2, 2]
    assert families(other) == set()
    metrics.RESYNCS.inc()
    assert counted.get_sample_value("engines_registry_watch_resyncs_total") == 3


def test_what_nobody_shows_any_more_is_forgotten() -> None:
    collectors = CollectorRegistry()
    with metrics.counting(collectors):
        metrics.RESYNCS.inc()
    metrics.disable(collectors)
    metrics.RESYNCS.inc()
    with metrics.counting(collectors):
        assert collectors.get_sample_value("engines_registry_watch_resyncs_total") == 0


def test_a_registry_that_has_one_of_the_names_is_refused_and_left_as_it_was() -> None:
    collectors = CollectorRegistry()
    taken = metrics.declared()[-1].name
    prometheus_client.Gauge(taken, "of somebody else", registry=collectors)
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.enable(collectors)
    assert (families(collectors), metrics.enabled()) == ({taken}, False)
    metrics.RESYNCS.inc()
    with metrics.counting(CollectorRegistry()):
        pass


def test_what_is_declared_later_is_counted_too(
    counted: CollectorRegistry, declared: list[Meter]
) -> None:
    late = Counter("engines_test_late", "Declared while somebody asks.", ["reason"], ["a", "b"])
    late.inc("b", 2)
    assert series(counted, "engines_test_late_total") == {("a",): 0, ("b",): 2}


def test_a_gauge_that_is_measured_shows_at_each_scrape_what_there_is_then(
    counted: CollectorRegistry, declared: list[Meter]
) -> None:
    there = {"host": 5.0}
    Measured("engines_test_measured", "Looked up.", "device", lambda: there)
    assert series(counted, "engines_test_measured") == {("host",): 5}
    there = {"GPU-1": 7.0, "GPU-2": 0.0}
    assert series(counted, "engines_test_measured") == {("GPU-1",): 7, ("GPU-2",): 0}
    there = {}
    assert series(counted, "engines_test_measured") == {}


def test_every_value_that_a_label_can_have_is_there_from_the_first_scrape_on(
    counted: CollectorRegistry,
) -> None:
    assert set(series(counted, "engines_registry_ranks_lost_total").values()) == {0}
    assert ("evicted",) in series(counted, "engines_loader_failovers_total")


def test_a_value_that_was_not_declared_makes_no_series_of_its_own(
    counted: CollectorRegistry,
) -> None:
    before = set(series(counted, "engines_registry_ranks_lost_total"))
    metrics.RANKS_LOST.inc("whatever is in etcd")
    after = series(counted, "engines_registry_ranks_lost_total")
    assert (set(after), after["other",]) == (before, 1)


def test_what_was_there_before_is_not_taken_away_later() -> None:
    held = metrics.REGISTRATIONS.hold("registered")
    collectors = CollectorRegistry()
    with metrics.counting(collectors):
        held.move("suspended")
        held.release()
        assert set(series(collectors, "engines_registry_registrations").values()) == {0}


def test_what_is_held_counts_under_one_value_at_a_time(counted: CollectorRegistry) -> None:
    held = metrics.REGISTRATIONS.hold("registered")
    held.move("suspended")
    assert series(counted, "engines_registry_registrations") == {
        ("registered",): 0,
        ("suspended",): 1,
        ("lost",): 0,
    }
    held.release()
    held.release()
    assert set(series(counted, "engines_registry_registrations").values()) == {0}


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
    ],
)
def test_a_server_of_ones_own_gets_text_and_its_type(
    counted: CollectorRegistry, accept: str, content_type: str
) -> None:
    metrics.RESYNCS.inc()
    body, got = metrics.render(accept, counted)
    assert got.startswith(content_type)
    assert b"engines_registry_watch_resyncs_total 1.0\n" in body
    if not accept:
        assert {family.name for family in text_string_to_metric_families(body.decode())} >= {
            "engines_registry_watch_resyncs"
        }


def test_without_prometheus_client_everything_else_works_and_metrics_say_what_to_install() -> None:
    code = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import engine_loader, engine_registry.watching.metrics
from engine_registry.telemetry import metrics
from engine_registry.errors import MetricsUnavailable
metrics.RESYNCS.inc()
for asked in (metrics.enable, metrics.disable, metrics.render):
    try:
        asked()
    except MetricsUnavailable as exc:
        said = "metrics need prometheus_client: pip install 'engine-registry[metrics]'"
        assert str(exc) == said, exc
    else:
        raise SystemExit(f"{asked} did not say it")
assert not metrics.enabled()
"""
    subprocess.run(python(code), check=True, cwd=ROOT)


# -- what a watch sees
# --------------------------------------------------------------------------------------------------

ONE, TWO = a_record(), a_record(rank=1)


def status(state: InstanceState, *records: RankRecord) -> InstanceStatus:
    return InstanceStatus("qwen", state, records)


def test_a_watch_shows_ranks_by_instance_and_state(counted: CollectorRegistry) -> None:
    seen = WatchMetrics()
    updating = replace(ONE, state=RankState.UPDATING)
    for event in (
        RankJoined(ONE),
        RankJoined(TWO),
        InstanceReady(status(InstanceState.READY)),
        RankUpdated(updating, ONE),
    ):
        seen.see(event)
    assert series(counted, "engines_registry_ranks") == {
        ("qwen", "ready"): 1,
        ("qwen", "updating"): 1,
        ("qwen", "loading"): 0,
        ("qwen", "draining"): 0,
    }
    assert series(counted, "engines_registry_ranks_expected") == {("qwen",): 2}
    assert series(counted, "engines_registry_instance_ready") == {("qwen",): 1}
    assert series(counted, "engines_registry_instances") == {("ready",): 1, ("degraded",): 0}
    seen.see(InstanceDegraded(status(InstanceState.DEGRADED)))
    assert series(counted, "engines_registry_instance_ready") == {("qwen",): 0}
    assert series(counted, "engines_registry_instances") == {("ready",): 0, ("degraded",): 1}


def test_the_labels_of_an_instance_are_one_series_that_others_are_joined_with(
    counted: CollectorRegistry,
) -> None:
    seen = WatchMetrics()
    labels = {"team": "search", "example.com/owner": "a", "example.com_owner": "b"}
    seen.see(RankJoined(replace(ONE, labels=labels)))
    seen.see(RankJoined(replace(TWO, labels=labels)))
    seen.see(RankJoined(a_record(instance="silent")))
    text, _ = metrics.render("", counted)
    (family,) = [
        family
        for family in text_string_to_metric_families(text.decode())
        if family.name == "engines_registry_instance_labels"
    ]
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        (
            {
                "engine_instance": "qwen",
                "label_example_com_owner_conflict1": "a",
                "label_example_com_owner_conflict2": "b",
                "label_team": "search",
            },
            1,
        ),
        ({"engine_instance": "silent"}, 1),
    ]


def test_a_watch_counts_the_ranks_that_do_not_answer(counted: CollectorRegistry) -> None:
    seen = WatchMetrics()
    silent = replace(ONE, unresponsive_since="2026-01-02T03:05:00.000+00:00")
    counts = []
    for event in (
        RankJoined(ONE),
        RankUpdated(silent, ONE),
        RankJoined(replace(TWO, unresponsive_since=silent.unresponsive_since)),
        RankUpdated(ONE, silent),
        RankLost(TWO, "process ended"),
    ):
        seen.see(event)
        counts.append(series(counted, "engines_registry_ranks_unresponsive")["qwen",])
    assert counts == [0, 1, 2, 1, 0]


def test_a_loss_counts_once_by_its_reason_and_in_the_state_that_the_rank_had(
    counted: CollectorRegistry,
) -> None:
    seen = WatchMetrics()
    for event in (
        RankJoined(ONE),
        RankLost(ONE, "process ended"),
        RankJoined(TWO),
        RankLost(TWO, "set by a stranger"),
    ):
        seen.see(event)
    lost = {
        reason: count
        for (reason,), count in series(counted, "engines_registry_ranks_lost_total").items()
        if count
    }
    assert lost == {"process_ended": 1, "other": 1}
    assert set(series(counted, "engines_registry_ranks").values()) == {0}


def test_every_way_in_which_a_registration_ends_is_counted_by_its_name() -> None:
    assert set(ENDINGS) <= set(metrics.LOSSES)


@pytest.mark.parametrize("reason", metrics.LOSSES)
def test_the_reasons_that_are_counted_are_those_that_are_reported(reason: str) -> None:
    from engine_registry.registration import writes
    from engine_registry.watching import tracker

    sources = inspect.getsource(tracker) + inspect.getsource(writes)
    assert f'"{reason}"' in sources


def test_an_instance_that_is_gone_leaves_no_series_behind(counted: CollectorRegistry) -> None:
    seen = WatchMetrics()
    for event in (
        RankJoined(ONE),
        InstanceDegraded(status(InstanceState.DEGRADED, ONE)),
        RankLost(ONE, "withdrawn"),
        InstanceGone(status(InstanceState.GONE)),
    ):
        seen.see(event)
    for name in (
        "ranks",
        "ranks_expected",
        "ranks_unresponsive",
        "instance_ready",
        "instance_labels",
    ):
        assert series(counted, f"engines_registry_{name}") == {}
    assert series(counted, "engines_registry_instances") == {("ready",): 0, ("degraded",): 0}


def test_a_watch_that_ends_shows_nothing_any_more(counted: CollectorRegistry) -> None:
    seen = WatchMetrics()
    seen.see(RankJoined(ONE))
    seen.see(InstanceReady(status(InstanceState.READY, ONE)))
    seen.close()
    assert series(counted, "engines_registry_ranks") == {}
    assert set(series(counted, "engines_registry_instances").values()) == {0}


def test_a_clean_up_counts_where_it_is_done_and_not_where_it_is_only_reported(
    counted: CollectorRegistry,
) -> None:
    seen = WatchMetrics()
    seen.see(InstanceCleaned("qwen", ONE, (TWO,), dry_run=True))
    seen.see(InstanceCleaned("qwen", ONE, (TWO,), dry_run=False))
    assert counted.get_sample_value("engines_registry_instances_cleaned_total") == 1


# -- what comes from a keeper
# --------------------------------------------------------------------------------------------------


def a_beat(claims_again: int = 0, renewed_in_s: float | None = None) -> dict[str, Any]:
    return {
        "state": "REGISTERED",
        "why": "",
        "claims_again": claims_again,
        "renewed_in_s": renewed_in_s,
    }


@pytest.fixture
def link() -> KeeperLink:
    from engine_registry.etcd.config import EtcdConfig, parse_endpoints

    return KeeperLink(EtcdConfig(parse_endpoints("h:1")), ONE, [], 10.0, 30.0, lambda *_: None)


def test_the_time_of_a_renewal_comes_with_the_state(
    counted: CollectorRegistry, link: KeeperLink
) -> None:
    for message in (
        a_beat(renewed_in_s=0.003),
        a_beat(),
        a_beat(renewed_in_s=0.004),
        {"state": "SUSPENDED", "why": "etcd is away"},
    ):
        link._receive(message)
    assert counted.get_sample_value("engines_registry_keepalive_seconds_count") == 2
    assert counted.get_sample_value("engines_registry_keepalive_seconds_sum") == pytest.approx(
        0.007
    )


def test_registrations_that_were_renewed_count_once_also_where_messages_were_lost(
    counted: CollectorRegistry, link: KeeperLink
) -> None:
    for claims in (0, 1, 1, 4):
        link._receive(a_beat(claims))
    assert counted.get_sample_value("engines_registry_reregistrations_total") == 4


# -- who reads from a rank
# --------------------------------------------------------------------------------------------------


def ticket(load_id: str, incarnation: str = INCARNATION, value: bytes | None = None) -> KeyValue:
    said = b'{"incarnation": "%s"}' % incarnation.encode() if value is None else value
    return KeyValue(pull_key("qwen", 0, load_id), said, 1, 1, 1)


def test_every_ticket_counts_once_and_while_it_is_out(counted: CollectorRegistry) -> None:
    feed = Feed(ticket("before"))
    with PullWatch(feed, ONE, loader_metrics.on_pull):
        feed.give(ticket("a"), ticket("b"))
        feed.give(ticket("a"), Deletion(ticket("a").key, 3))
        feed.wait_until_taken(2)
        assert counted.get_sample_value("engines_loader_pulls_served_total") == 3
        assert counted.get_sample_value("engines_loader_pulls") == 2
    assert counted.get_sample_value("engines_loader_pulls") == 0


@pytest.mark.parametrize(
    "other",
    [
        ticket("x", OTHER_INCARNATION),
        ticket("x", value=b"{"),
        ticket("x", value=b"[]"),
        ticket("x", value=b"[" * 100_000),
    ],
)
def test_a_ticket_for_somebody_else_or_of_nonsense_is_not_counted(
    counted: CollectorRegistry, other: KeyValue
) -> None:
    feed = Feed()
    with PullWatch(feed, ONE, loader_metrics.on_pull):
        feed.give(other, Deletion(other.key, 3))
        feed.give(ticket("a"))
        feed.wait_until_taken(2)
    assert counted.get_sample_value("engines_loader_pulls_served_total") == 1


def test_an_etcd_that_refuses_to_list_readers_is_no_failure_of_the_rank(
    counted: CollectorRegistry,
) -> None:
    class Refusing(Feed):
        def snapshot(self, prefix: str, exact: bool = False) -> Any:
            raise engine_registry.errors.EtcdRefused("no permission")

    with PullWatch(Refusing(), ONE, loader_metrics.on_pull) as watch:
        wait_until(lambda: not watch._thread.is_alive())
    assert counted.get_sample_value("engines_loader_pulls_served_total") == 0


# -- loads
# --------------------------------------------------------------------------------------------------

ERRORS = [
    kind
    for module in (engine_registry.errors, engine_loader.errors)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, Exception) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize(
    "kind",
    [*ERRORS, KeyError, MemoryError, KeyboardInterrupt, SystemExit],
    ids=lambda kind: kind.__name__,
)
def test_however_a_load_ends_it_has_an_outcome_that_is_declared(kind: type[BaseException]) -> None:
    assert outcome_of(kind("what happened")) in loader_metrics.LOADS.values


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (engine_loader.errors.Stalled("x"), "stalled"),
        (engine_loader.errors.SourceLost("x"), "lost"),
        (engine_loader.errors.TornRead("x"), "torn"),
        (engine_loader.errors.WeightsMismatch("x"), "mismatch"),
        (engine_loader.errors.Cancelled("x"), "cancelled"),
        (KeyboardInterrupt(), "cancelled"),
        (engine_registry.errors.InstanceNotFound("x"), "no_source"),
        (engine_registry.errors.EtcdUnavailable("x"), "failed"),
    ],
)
def test_outcomes_are_those_that_are_documented(error: BaseException, outcome: str) -> None:
    assert outcome_of(error) == outcome


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (engine_loader.errors.SourceLost("x"), "lost"),
        (engine_loader.errors.SourceLost("x", reason="process ended"), "lost"),
        (engine_loader.errors.SourceEvicted("x"), "evicted"),
        (engine_loader.errors.Stalled("x"), "stalled"),
        (engine_loader.errors.TornRead("x"), "torn"),
    ],
)
def test_a_source_that_was_given_up_has_a_reason(
    error: engine_loader.errors.LoaderError, reason: str
) -> None:
    assert reason_of(error) == reason
    assert reason in loader_metrics.FAILOVERS.values


def test_gauges_with_free_labels_are_few_and_never_name_a_tensor() -> None:
    free = {label for meter in metrics.declared() if not meter.values for label in meter.labels}
    assert free == {"engine_instance", "state", "device"}
    assert all(
        isinstance(meter, Gauge)
        for meter in metrics.declared()
        if meter.labels and not meter.values
    )


def test_the_kinds_of_errors_of_etcd_count_and_its_ordinary_answers_do_not(
    counted: CollectorRegistry,
) -> None:
    for kind in ("EtcdUnavailable", "EtcdRefused", "EtcdFull", "LeaseNotFound", "HistoryLost"):
        metrics.etcd_error(getattr(engine_registry.errors, kind)("x"))
    assert series(counted, "engines_registry_etcd_call_errors_total") == {
        ("unavailable",): 1,
        ("refused",): 1,
        ("full",): 1,
    }
