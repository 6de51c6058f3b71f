"""Metrics and logs of real ranks, watches and loads: what a scrape gets, and that faults count
once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from engine_cli.exits import Exit
from engine_loader import LoadOptions, MooncakeEngine, load, publish
from engine_loader.errors import DigestMismatch, SourceLost, WeightsMismatch
from engine_registry import ModelIdentity, RankLost, RegistrationState, Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from engine_registry.telemetry import metrics
from tests.integration.conftest import Processes, events_until, line_of
from tests.integration.test_failover import FAULTS, NBYTES, PACE, Sources, at_half
from tests.integration.test_failover import engine as engine
from tests.integration.test_failover import sources as sources
from tests.support.engines import Meeting
from tests.support.keepers import pid_of_keeper
from tests.support.options import for_publish
from tests.support.processes.source import empty
from tests.support.ranks import register
from tests.support.waiting import wait_until


@pytest.fixture
def counted() -> Iterator[CollectorRegistry]:
    collectors = CollectorRegistry()
    with metrics.counting(collectors):
        yield collectors


class Shown:
    """What one registry counts, read by name: `shown("registry_ranks", engine_instance="a")`."""

    def __init__(self, collectors: CollectorRegistry) -> None:
        self._collectors = collectors

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._collectors.get_sample_value(f"engines_{name}", labels)

    def nonzero(self, name: str) -> dict[str, float]:
        """By the value of the only label."""
        samples = [
            sample
            for family in self._collectors.collect()
            for sample in family.samples
            if sample.name == f"engines_{name}"
        ]
        return {
            next(iter(sample.labels.values())): sample.value for sample in samples if sample.value
        }


@pytest.fixture
def shown(counted: CollectorRegistry) -> Shown:
    return Shown(counted)


class Scraped:
    """What `engines … --metrics-port` serves, on a port that it has chosen and logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        line = json.loads(process.stderr.readline())
        assert line["fields"]["event"] == "metrics_served"
        self.port = int(line["fields"]["port"])
        self._url = line["fields"]["url"]

    def __call__(self, name: str, **labels: str) -> float | None:
        with urllib.request.urlopen(self._url, timeout=60) as answer:  # noqa: S310  on 127.0.0.1
            assert answer.headers["Content-Type"].startswith("text/plain")
            text = answer.read().decode()
        samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
        found = [
            each.value
            for each in samples
            if each.name == f"engines_{name}" and each.labels == labels
        ]
        assert len(found) <= 1
        return found[0] if found else None


SERVED = ("--metrics-port", "0", "--log-level", "info", "--log-json")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.rand(1000, 100)}, path)
    return path


# -- over HTTP
# --------------------------------------------------------------------------------------------------


def test_a_watch_serves_what_it_sees_and_a_killed_rank_counts_once_by_its_reason(
    processes: Processes, namespace: str, registry: Registry
) -> None:
    watch = processes.engines("watch", "--namespace", namespace, "--json", *SERVED)
    scraped = Scraped(watch)
    ranks = [processes.rank("a", rank, 2) for rank in range(2)]
    wait_until(lambda: scraped("registry_instance_ready", engine_instance="a") == 1)
    assert (
        scraped("registry_ranks", engine_instance="a", state="ready")
        == scraped("registry_ranks_expected", engine_instance="a")
        == 2
    )
    assert scraped("registry_instances", state="ready") == 1
    ranks[1].kill()
    wait_until(lambda: scraped("registry_instance_ready", engine_instance="a") == 0)
    assert scraped("registry_ranks_lost_total", reason="process_ended") == 1
    assert scraped("registry_ranks", engine_instance="a", state="ready") == 1
    registry.evict(registry.ranks("a")[0])
    wait_until(lambda: scraped("registry_instance_ready", engine_instance="a") is None)
    reasons = {
        reason: scraped("registry_ranks_lost_total", reason=reason)
        for reason in metrics.RANKS_LOST.values
    }
    assert {reason: count for reason, count in reasons.items() if count} == {
        "process_ended": 1,
        "evicted": 1,
    }
    assert scraped("registry_ranks", engine_instance="a", state="ready") is None

    watch.send_signal(signal.SIGTERM)
    out, err = watch.communicate(timeout=100)
    assert (watch.returncode, err) == (Exit.DONE, "")
    # stdout has events, and nothing but events
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert events.count("rank_lost") == 2
    with socket.create_server(("127.0.0.1", scraped.port)):  # the port is free again
        pass


def test_a_rank_serves_its_registration_and_who_has_read_from_it(
    processes: Processes, namespace: str, weights: Path
) -> None:
    options = ("--namespace", namespace, "--host", "127.0.0.1")
    args = ("--rank", "0", "--world-size", "1", "--weights", str(weights), *options, "--ttl", "2")
    server = processes.engines("register", "a", *args, *SERVED)
    scraped = Scraped(server)
    assert line_of(server).startswith("registered")
    assert scraped("registry_registrations", state="registered") == 1
    for _ in range(2):
        assert processes.run("load", "a", "--rank", "0", *options).returncode == Exit.DONE
    wait_until(lambda: (scraped("loader_pulls_served_total"), scraped("loader_pulls")) == (2, 0))
    wait_until(lambda: (scraped("registry_keepalive_seconds_count") or 0) >= 2)
    assert (scraped("registry_keepalive_seconds_sum") or 0) > 0
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=100)
    assert (server.returncode, out) == (Exit.DONE, "withdrew a/0\n")
    logged = [json.loads(line) for line in err.splitlines()]
    assert [each["fields"]["event"] for each in logged] == ["registered", "disk_read", "withdrawn"]
    assert logged[0]["fields"] == {"event": "registered", "instance": "a", "rank": 0}


def test_a_load_that_serves_shows_its_own_load_and_those_that_read_from_it(
    processes: Processes, namespace: str, weights: Path
) -> None:
    options = ("--rank", "0", "--namespace", namespace, "--host", "127.0.0.1")
    processes.engines("register", "a", *options, "--world-size", "1", "--weights", str(weights))
    replica = processes.engines("load", "a", *options, "--serve", "b", *SERVED)
    scraped = Scraped(replica)
    assert line_of(replica).startswith("loaded a/0")
    assert scraped("loader_loads_total", outcome="loaded") == 1
    assert scraped("registry_registrations", state="registered") == 1
    assert processes.run("load", "b", *options).returncode == Exit.DONE
    wait_until(lambda: scraped("loader_pulls_served_total") == 1)
    replica.send_signal(signal.SIGTERM)
    replica.communicate(timeout=100)
    assert replica.returncode == Exit.DONE


@pytest.mark.parametrize("command", ["watch", "register", "load"])
def test_a_port_that_is_in_use_is_one_line_that_says_what_to_do(
    processes: Processes, command: str, weights: Path
) -> None:
    args = {
        "watch": (),
        "register": ("a", "--rank", "0", "--world-size", "1", "--weights", str(weights)),
        "load": ("a", "--rank", "0", "--serve", "b"),
    }[command]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = processes.run(command, *args, "--metrics-port", str(port))
    assert (ran.returncode, ran.stdout) == (Exit.FAILED, "")
    assert (
        ran.stderr
        == f"engines: error: port {port} on 127.0.0.1 is in use: choose another --metrics-port\n"
    )


def test_a_host_that_is_not_ours_or_without_a_port_is_refused(processes: Processes) -> None:
    ran = processes.run("watch", "--metrics-port", str(free_port()), "--metrics-host", "192.0.2.1")
    assert (ran.returncode, len(ran.stderr.splitlines())) == (Exit.FAILED, 1)
    assert "check --metrics-host" in ran.stderr
    ran = processes.run("watch", "--metrics-host", "127.0.0.1")
    assert ran.returncode == Exit.USAGE
    assert "--metrics-host goes with --metrics-port" in ran.stderr


def test_clients_that_say_nothing_or_hang_up_keep_nobody_from_scraping(
    processes: Processes, namespace: str
) -> None:
    watch = processes.engines("watch", "--namespace", namespace, *SERVED)
    scraped = Scraped(watch)
    idle = [socket.create_connection(("127.0.0.1", scraped.port)) for _ in range(20)]
    for number in range(20):
        with socket.create_connection(("127.0.0.1", scraped.port)) as rude:
            rude.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" if number % 2 else b"nonsense\0\r\n")
            # closes with a reset
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert scraped("registry_instances", state="ready") == 0
    watch.send_signal(signal.SIGTERM)
    _, err = watch.communicate(timeout=100)
    assert (watch.returncode, err) == (Exit.DONE, "")
    for each in idle:
        each.close()


_HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from engine_cli.main import main
main()
"""


def test_without_prometheus_client_all_works_but_metrics_which_say_what_to_install(
    processes: Processes, namespace: str, weights: Path
) -> None:
    options = ("--namespace", namespace, "--host", "127.0.0.1")
    args = (
        "register",
        "a",
        "--rank",
        "0",
        "--world-size",
        "1",
        "--weights",
        str(weights),
        *options,
    )
    server = processes.start("-c", _HIDDEN, *args)
    assert line_of(server).startswith("registered")
    loader = processes.start("-c", _HIDDEN, "load", "a", "--rank", "0", *options)
    out, err = loader.communicate(timeout=100)
    assert (loader.returncode, out.startswith("loaded a/0"), err) == (Exit.DONE, True, "")
    watch = processes.start("-c", _HIDDEN, "watch", "--namespace", namespace, "--json")
    assert json.loads(line_of(watch))["event"] == "rank_joined"
    for command in (args, ("watch", "--namespace", namespace)):
        refused = processes.start("-c", _HIDDEN, *command, "--metrics-port", "0")
        out, err = refused.communicate(timeout=100)
        assert (refused.returncode, out) == (Exit.FAILED, "")
        assert err == (
            "engines: error: metrics need prometheus_client: pip install "
            "'engine-registry[metrics]'\n"
        )


# -- faults of etcd and of keepers
# -----------------------------------------------------------------------------------------------


def test_an_etcd_that_comes_back_empty_counts_one_suspension_one_registration_and_one_resync(
    own_etcd: LocalEtcd, counted: CollectorRegistry, shown: Shown
) -> None:
    states: list[RegistrationState] = []
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        registry.watch("a") as watch,
        register(registry, on_state=lambda state, _: states.append(state)),
    ):
        events_until(watch, lambda event: type(event).__name__ == "InstanceReady")
        assert shown.nonzero("registry_registrations") == {"registered": 1}
        own_etcd.kill()
        wait_until(lambda: shown.nonzero("registry_registrations") == {"suspended": 1})
        wait_until(lambda: shown("registry_watch_stream_losses_total") == 1)
        wait_until(lambda: (shown("registry_etcd_call_errors_total", error="unavailable") or 0) > 0)
        own_etcd.wipe()
        own_etcd.start()
        wait_until(lambda: shown.nonzero("registry_registrations") == {"registered": 1})
        wait_until(lambda: shown("registry_watch_resyncs_total") == 1)
        wait_until(lambda: shown("registry_reregistrations_total") == 1)
        renewals = shown("registry_keepalive_seconds_count") or 0
        wait_until(lambda: (shown("registry_keepalive_seconds_count") or 0) > renewals)
    assert shown.nonzero("registry_registrations") == {}
    assert shown.nonzero("registry_registration_changes_total") == {
        "registered": 2,
        "suspended": 1,
        "closed": 1,
    }
    for name, count in {
        "reregistrations": 1,
        "watch_resyncs": 1,
        "watch_stream_losses": 1,
        "keeper_restarts": 0,
    }.items():
        assert shown(f"registry_{name}_total") == count


def test_a_keeper_that_is_killed_counts_as_replaced_and_its_record_as_put_again(
    registry: Registry, shown: Shown
) -> None:
    with register(registry) as registration:
        os.kill(pid_of_keeper(registration), signal.SIGKILL)
        wait_until(lambda: shown("registry_reregistrations_total") == 1)
        assert shown("registry_keeper_restarts_total") == 1


def test_an_evicted_rank_counts_as_lost_until_it_is_closed(
    registry: Registry, shown: Shown
) -> None:
    with register(registry):
        registry.evict(registry.ranks("a")[0])
        wait_until(lambda: shown.nonzero("registry_registrations") == {"lost": 1})
    assert shown.nonzero("registry_registrations") == {}


def test_a_registration_that_is_refused_counts_for_nothing(
    registry: Registry, shown: Shown
) -> None:
    with register(registry):
        with pytest.raises(Exception, match="already registered"):
            register(registry)
        assert shown.nonzero("registry_registrations") == {"registered": 1}
        assert shown("registry_etcd_call_errors_total", error="refused") == 0


def test_closing_in_order_is_no_error_of_etcd(
    registry: Registry, shared_etcd: LocalEtcd, shown: Shown
) -> None:
    with registry.watch() as watch:
        register(registry).withdraw()
        events_until(watch, lambda event: isinstance(event, RankLost))
    with Registry.connect(shared_etcd.endpoint):
        pass
    assert shown.nonzero("registry_etcd_call_errors_total") == {}
    assert (shown("registry_watch_stream_losses_total"), shown("registry_watch_resyncs_total")) == (
        0,
        0,
    )


# -- loads
# --------------------------------------------------------------------------------------------------

REASONS = {"killed": "lost", "stopped": "stalled", "evicted": "evicted", "changed": "torn"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_given_up_counts_as_one_failover_by_its_reason(
    sources: Sources, engine: Meeting, shown: Shown, fault: str
) -> None:
    sources.start("a", "b")
    happen = at_half(lambda: FAULTS[fault](sources), lambda: engine.wait_until_met(2))
    report = load(
        sources.registry,
        engine,
        ["a", "b"],
        rank=0,
        tensors=empty(NBYTES),
        options=LoadOptions(pace=PACE, progress=happen),
    )
    # a read may fail before etcd says why
    assert shown.nonzero("loader_failovers_total") in (
        {REASONS[fault]: 1},
        {"lost": 1},
    )
    assert shown.nonzero("loader_loads_total") == {"loaded": 1}
    assert shown("loader_loaded_bytes_total") == NBYTES
    assert (shown("loader_read_bytes_total") or 0) >= NBYTES
    assert shown("loader_torn_retries_total") == 0
    assert shown("loader_load_seconds_count") == shown("loader_load_bytes_per_second_count") == 1
    assert shown("loader_load_seconds_sum") == pytest.approx(report.seconds)
    assert shown("loader_register_seconds_sum") == pytest.approx(report.register_s)
    assert 0 < report.register_s < report.seconds
    assert report.regions > 0
    assert shown("loader_load_bytes_per_second_sum") == pytest.approx(report.gb_per_s * 1e9)


def test_a_load_that_reads_again_after_an_update_counts_a_retry_and_no_failover(
    sources: Sources, engine: MooncakeEngine, shown: Shown
) -> None:
    sources.start("a")
    report = load(
        sources.registry,
        engine,
        "a",
        rank=0,
        tensors=empty(NBYTES),
        options=LoadOptions(pace=PACE, progress=at_half(sources.update)),
    )
    assert shown("loader_torn_retries_total") == report.retries > 0
    assert shown.nonzero("loader_failovers_total") == {}
    assert shown.nonzero("loader_loads_total") == {"loaded": 1}


def test_the_only_source_stopped_counts_as_a_load_that_stalled_and_the_reads_that_were_ended(
    sources: Sources, engine: MooncakeEngine, shown: Shown
) -> None:
    sources.start("a")
    stop = at_half(lambda: sources.signal(signal.SIGSTOP))
    with pytest.raises(SourceLost):
        load(
            sources.registry,
            engine,
            "a",
            rank=0,
            tensors=empty(NBYTES),
            options=LoadOptions(pace=PACE, progress=stop),
        )
    # Its lease goes on, as its keeper lives: only the silence shows it.
    assert shown.nonzero("loader_loads_total") == {"stalled": 1}
    assert (shown("loader_abandoned_reads_total") or 0) > 0
    assert shown.nonzero("loader_failovers_total") == {}
    assert shown("loader_loaded_bytes_total") == 0


def test_loads_that_fail_before_a_byte_or_by_digest_count_by_their_outcome(
    registry: Registry, engine: MooncakeEngine, shown: Shown
) -> None:
    weights = {"w": torch.arange(1000, dtype=torch.float32), "v": torch.zeros(10)}
    options = {
        "instance": "a",
        "rank": 0,
        "world_size": 1,
        "model": ModelIdentity("m"),
        "digests": True,
    }
    with (
        MooncakeEngine("127.0.0.1") as source,
        publish(registry, source, tensors=weights, **for_publish(options)),
    ):
        with pytest.raises(WeightsMismatch):
            load(registry, engine, "a", rank=0, tensors={"other": torch.zeros(3)})
        weights["w"][7] = -1.0  # outside of `update`
        with pytest.raises(DigestMismatch):
            load(
                registry,
                engine,
                "a",
                rank=0,
                tensors={name: torch.zeros_like(t) for name, t in weights.items()},
                options=LoadOptions(verify="digest"),
            )
        with pytest.raises(Exception, match="is not registered"):
            load(registry, engine, "nobody", rank=0, tensors={"w": torch.zeros(3)}, timeout_s=0)
        wait_until(lambda: (shown("loader_pulls_served_total"), shown("loader_pulls")) == (1, 0))
    assert shown.nonzero("loader_loads_total") == {
        "mismatch": 1,
        "digest_mismatch": 1,
        "no_source": 1,
    }
    assert shown("loader_digest_mismatches_total") == 1


# -- logs of the commands
# --------------------------------------------------------------------------------------------------


def test_a_load_logs_json_on_stderr_and_its_report_on_stdout(
    processes: Processes, namespace: str, weights: Path
) -> None:
    options = ("--namespace", namespace, "--host", "127.0.0.1")
    server = processes.engines(
        "register", "a", "--rank", "0", "--world-size", "1", "--weights", str(weights), *options
    )
    line_of(server)
    ran = processes.run(
        "load", "a", "--rank", "0", *options, "--json", "--log-json", "--log-level", "info"
    )
    assert ran.returncode == Exit.DONE
    report, (line,) = json.loads(ran.stdout), map(json.loads, ran.stderr.splitlines())
    assert set(line) == {"time", "level", "logger", "message", "fields"}
    assert (line["level"], line["logger"], line["fields"]["event"]) == (
        "info",
        "engine_loader.loading.load",
        "loaded",
    )
    assert line["fields"]["nbytes"] == report["nbytes"]
    assert line["fields"]["sources"] == ["/engines/a/0"]


def test_the_error_that_ends_a_command_is_json_where_logs_are(
    processes: Processes, namespace: str
) -> None:
    for args, code, kind in (
        (("evict", "nobody"), Exit.INSTANCE, "InstanceNotFound"),
        (("load", "nobody", "--rank", "0", "--wait", "0"), Exit.INSTANCE, "InstanceNotFound"),
        (("watch", "--dry-run"), Exit.USAGE, "UsageError"),
    ):
        ran = processes.run(*args, "--namespace", namespace, "--log-json", "--debug")
        (line,) = map(json.loads, ran.stderr.splitlines())
        assert (ran.returncode, line["fields"]) == (
            code,
            {"event": "command_failed", "error": kind},
        )
        assert kind in line["exception"]


def test_the_transfer_engines_log_shows_with_debug_and_only_then(
    processes: Processes, namespace: str, weights: Path
) -> None:
    noisy = {"MC_LOG_LEVEL": "INFO"}
    engine_line = re.compile(r"^[IWE]\d{4} .*\.(cpp|h):\d+\] ", re.MULTILINE)
    args = ("a", "--rank", "0", "--namespace", namespace, "--host", "127.0.0.1")
    register = ("register", *args, "--world-size", "1", "--weights", str(weights))
    for debug in ((), ("--debug",)):
        server = processes.engines(*register, *debug, **noisy)
        line_of(server)
        ran = processes.run("load", *args, *debug, **noisy)
        assert ran.returncode == Exit.DONE
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=100)
        for text in (ran.stderr, err):
            assert bool(engine_line.search(text)) is bool(debug)
            assert debug or text == ""


def test_an_outage_of_etcd_is_one_warning_and_its_end_one_line(
    own_etcd: LocalEtcd, processes: Processes
) -> None:
    watch = processes.engines("watch", "--etcd", own_etcd.endpoint, "--timeout", "0.2", *SERVED)
    scraped = Scraped(watch)
    with Registry.connect(own_etcd.endpoint) as registry, register(registry):
        line_of(watch)  # it watches
    own_etcd.kill()
    assert watch.stderr is not None
    lost = json.loads(watch.stderr.readline())
    assert (lost["level"], lost["fields"]["event"]) == ("warning", "watch_lost")
    before = scraped("registry_etcd_call_errors_total", error="unavailable") or 0
    wait_until(
        lambda: (scraped("registry_etcd_call_errors_total", error="unavailable") or 0) > before + 5
    )
    own_etcd.start()
    resumed = json.loads(watch.stderr.readline())
    assert (resumed["level"], resumed["fields"]["event"], resumed["fields"]["away_s"] > 0) == (
        "info",
        "watch_resumed",
        True,
    )


def test_no_password_is_in_any_log(own_etcd: LocalEtcd, processes: Processes) -> None:
    secret = "hunter2-and-more"
    args = (
        "--etcd",
        own_etcd.endpoint,
        "--user",
        "u",
        "--timeout",
        "1",
        "--log-level",
        "debug",
        "--debug",
        "--log-json",
    )
    refused = processes.run("watch", *args, ENGINES_ETCD_PASSWORD=secret)
    assert refused.returncode == Exit.ETCD
    own_etcd.kill()
    away = processes.run("watch", *args, ENGINES_ETCD_PASSWORD=secret)
    assert away.returncode == Exit.ETCD
    for ran in (refused, away):
        assert ran.stderr
        assert secret not in ran.stdout + ran.stderr


def test_what_a_process_of_these_tests_says_when_it_fails_is_free_of_the_transfer_engines_log(
    processes: Processes,
) -> None:
    source = processes.start(
        "-m", "tests.support.processes.source", "a", "1000", ENGINES_ETCD="127.0.0.1:1"
    )
    _, err = source.communicate(timeout=100)
    assert err.splitlines()[-1].startswith("engine_registry.errors.EtcdUnavailable: ")
    good = processes.start("-m", "tests.support.processes.source", "a", "100000")
    assert line_of(good) == "version 0\n"
    assert good.communicate(timeout=100) == ("", "")  # ends with its input
