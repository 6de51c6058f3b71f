"""What fires each alert, and what does not: series of one sample a minute, as promtool writes them.

`1+0x9` is ten samples of 1; `_` is none. A case is looked at in its last minute.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Series = dict[str, str]

WATCH = 'up{job="engines-watch",instance="w"}'
RANK = 'up{job="engines-rank",instance="r"}'
READY = 'engines_registry_instance_ready{engine_instance="q",instance="w"}'
READY_2 = 'engines_registry_instance_ready{engine_instance="q",instance="w2"}'
LOADING = 'engines_registry_ranks{engine_instance="q",state="loading",instance="w"}'

SILENT = 'engines_registry_ranks_unresponsive{engine_instance="q",instance="w"}'


def _lost(reason: str, watch: str = "w") -> str:
    return f'engines_registry_ranks_lost_total{{reason="{reason}",instance="{watch}"}}'


def _refused(error: str) -> str:
    return (
        "engines_registry_etcd_call_errors_total"
        f'{{error="{error}",job="engines-watch",instance="w"}}'
    )


def _registered(state: str) -> str:
    return f'engines_registry_registrations{{state="{state}",instance="r"}}'


def _loads(outcome: str) -> str:
    return f'engines_loader_loads_total{{outcome="{outcome}",instance="r"}}'


def _failovers(reason: str) -> str:
    return f'engines_loader_failovers_total{{reason="{reason}",instance="r"}}'


def _starts(source: str) -> str:
    return f'engines_loader_starts_total{{source="{source}",instance="r"}}'


def _histogram(name: str, **counts: str) -> Series:
    """By the upper bounds of the buckets, as `le_1` and `le_inf`."""
    return {
        f'{name}_bucket{{instance="r",le="{bound.removeprefix("le_").replace("inf", "+Inf")}"}}': at
        for bound, at in counts.items()
    }


def _renewals(**counts: str) -> Series:
    return _histogram("engines_registry_keepalive_seconds", **counts)


def _speeds(**counts: str) -> Series:
    return _histogram("engines_loader_load_bytes_per_second", **counts)


@dataclass(frozen=True)
class Cases:
    """`minutes` is how long all series go on."""

    minutes: int
    fires: Series
    labels: Series = field(default_factory=dict)
    quiet: dict[str, Series] = field(default_factory=dict)  # by what is then so


_TARGET = {"job": "engines-watch", "instance": "w"}
CASES = {
    "WatchesDown": Cases(
        4,
        {RANK: "1+0x9"},
        quiet={"one of two answers": {WATCH: "1+0x9", WATCH.replace('"w"', '"w2"'): "0+0x9"}},
    ),
    "WatchDown": Cases(
        4,
        {WATCH: "0+0x9"},
        _TARGET,
        {"a scrape fails": {WATCH: "1 1 0 1 1"}, "a rank is down": {RANK: "0+0x9"}},
    ),
    "ScrapeFails": Cases(
        6,
        {RANK: "0+0x9"},
        {"job": "engines-rank", "instance": "r"},
        {"it answers": {RANK: "1+0x9"}, "a watch is down": {WATCH: "0+0x9"}},
    ),
    "InstanceGone": Cases(
        15,
        {WATCH: "1+0x20", READY: "1 1 1 1"},
        {"engine_instance": "q"},
        {
            "it is there": {WATCH: "1+0x20", READY: "1+0x20"},
            "it is degraded": {WATCH: "1+0x20", READY: "1 1 0+0x20"},
            "it was never ready, as it loaded": {WATCH: "1+0x20", READY: "0 0 0"},
            "no watch answers": {WATCH: "1 1 0+0x20", READY: "1 1"},
            "another watch took over": {WATCH: "1+0x20", READY: "1 1", READY_2: "_ 1+0x20"},
        },
    ),
    "InstanceDegraded": Cases(
        7,
        {READY: "0+0x9", READY_2: "0+0x9", LOADING: "0+0x9"},
        {"engine_instance": "q"},
        {
            "it is ready": {READY: "1+0x9", LOADING: "0+0x9"},
            "a rank loads": {READY: "0+0x9", LOADING: "1+0x9"},
            "a rank loaded until just now": {READY: "0+0x9", LOADING: "2 2 2 2 2 0+0x9"},
            "a rank came back in time": {READY: "0 0 0 0 1+0x9", LOADING: "0+0x9"},
        },
    ),
    "LoadingTakesLong": Cases(
        32,
        {LOADING: "2+0x40"},
        {"engine_instance": "q"},
        {"the load ends in time": {LOADING: "2+0x20 0+0x20"}},
    ),
    "RanksUnresponsive": Cases(
        7,
        {SILENT: "0 2+0x9"},
        {"engine_instance": "q"},
        {
            "they answer again in time": {SILENT: "2+0x3 0+0x9"},
            "all of them answer": {SILENT: "0+0x9"},
        },
    ),
    "RanksLost": Cases(
        15,
        {_lost("process_ended"): "0 0 2 2 4 4+0x20"},
        {"reason": "process_ended"},
        {
            "two watches see two losses": {
                _lost("process_ended"): "0 0 2+0x20",
                _lost("process_ended", "w2"): "0 0 2+0x20",
            },
            "ranks leave in order": {_lost("withdrawn"): "0 0 8+0x20"},
        },
    ),
    "RecordsDamaged": Cases(
        15,
        {_lost("damaged"): "0 0 1+0x20"},
        quiet={"a rank dies": {_lost("process_ended"): "0 0 1+0x20", _lost("damaged"): "0+0x20"}},
    ),
    "EtcdUnreachable": Cases(
        8,
        {_refused("unavailable"): "0+5x9"},
        _TARGET,
        {"one call failed": {_refused("unavailable"): "0 0 0 0 0 0 1 1 1"}},
    ),
    "EtcdFull": Cases(
        8,
        {_refused("full"): "0 0 0 0 1 1 1 1 1"},
        _TARGET,
        {"etcd is away": {_refused("full"): "0+0x9", _refused("unavailable"): "0+5x9"}},
    ),
    "EtcdRefuses": Cases(
        12,
        {_refused("refused"): "0+1x20"},
        _TARGET,
        {"one call was refused": {_refused("refused"): "0 0 0 0 1+0x20"}},
    ),
    "WatchResyncs": Cases(
        60,
        {'engines_registry_watch_resyncs_total{job="engines-watch",instance="w"}': "0+1x60"},
        _TARGET,
        {"twice": {"engines_registry_watch_resyncs_total": "0 1 1 2+0x60"}},
    ),
    "RankSuspended": Cases(
        4,
        {_registered("suspended"): "1+0x9"},
        {"state": "suspended", "instance": "r"},
        {"etcd comes back": {_registered("suspended"): "0 0 1 1 0"}},
    ),
    "RegistrationLost": Cases(
        6,
        {_registered("lost"): "1+0x9"},
        {"state": "lost", "instance": "r"},
        {"it ends": {_registered("lost"): "1 1 stale"}},
    ),
    "KeepaliveSlow": Cases(
        12,
        _renewals(le_1="0+90x20", le_2="0+100x20", le_inf="0+100x20"),
        {"instance": "r"},
        {"one in a thousand": _renewals(le_1="0+999x20", le_2="0+1000x20", le_inf="0+1000x20")},
    ),
    "KeepersDie": Cases(
        60,
        {'engines_registry_keeper_restarts_total{instance="r"}': "0 1 2 3 4+0x60"},
        {"instance": "r"},
        {"one was killed": {"engines_registry_keeper_restarts_total": "0 1+0x60"}},
    ),
    "WeightsCorrupt": Cases(
        30,
        {'engines_loader_digest_mismatches_total{instance="r"}': "0 0 1+0x60"},
        {"instance": "r"},
        {"none": {'engines_loader_digest_mismatches_total{instance="r"}': "0+0x60"}},
    ),
    "LoadsFail": Cases(
        15,
        {_loads("mismatch"): "0 0 1+0x20"},
        {"outcome": "mismatch"},
        {
            "loads succeed or are cancelled": {
                _loads("loaded"): "0+3x20",
                _loads("cancelled"): "0+1x20",
                _loads("no_source"): "0+0x20",
            }
        },
    ),
    "LoadsStall": Cases(
        15,
        {_loads("stalled"): "0+0x20", _failovers("stalled"): "0 0 1+0x20"},
        quiet={
            "sources end": {
                _loads("stalled"): "0+0x20",
                _failovers("stalled"): "0+0x20",
                _failovers("lost"): "0 0 1+0x20",
            }
        },
    ),
    "SourcesFail": Cases(
        15,
        {_failovers("lost"): "0+1x20"},
        {"reason": "lost"},
        {"one source was lost": {_failovers("lost"): "0 0 1+0x20"}},
    ),
    "StartsFromDisk": Cases(
        15,
        {_starts("disk_alone"): "0 0 1+0x20"},
        {"source": "disk_alone"},
        {"the first of its model": {_starts("disk"): "0 0 1+0x20", _starts("peers"): "0+1x20"}},
    ),
    "LoadsSlow": Cases(
        20,
        _speeds(le_1e8="0+2x20", le_1e9="0+3x20", le_inf="0+3x20"),
        quiet={
            "they are quick": _speeds(le_1e9="0+0x20", le_4e9="0+3x20", le_inf="0+3x20"),
            "nobody loads": _speeds(le_1e9="5+0x20", le_4e9="5+0x20", le_inf="5+0x20"),
        },
    ),
}
