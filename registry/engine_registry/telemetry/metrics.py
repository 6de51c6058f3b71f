"""What this package counts.

`enable` begins it, `render` is what a scrape gets; docs/reference/metrics.md says what each means.
"""

from __future__ import annotations

from engine_registry.errors import EtcdError, EtcdFull, EtcdRefused, EtcdUnavailable
from engine_registry.telemetry.info import Info
from engine_registry.telemetry.meters import (
    OTHER,
    Counter,
    Gauge,
    Histogram,
    counting,
    declared,
    disable,
    enable,
    enabled,
    render,
)

__all__ = ["OTHER", "counting", "declared", "disable", "enable", "enabled", "render"]

LOSSES = {  # by the reason that RankLost gives
    "withdrawn": "withdrawn",
    "process ended": "process_ended",
    "evicted": "evicted",
    "its source was evicted": "source_evicted",
    "lease expired or key deleted": "lease_expired",
    "replaced by another process": "replaced",
    "record damaged": "damaged",
}

# -- as a watch sees it: see watching.metrics
# ------------------------------------------------------------------------------

# Not `instance`: under that name Prometheus writes the address that it scrapes.
RANKS = Gauge("engines_registry_ranks", "Ranks that are registered.", ["engine_instance", "state"])
RANKS_EXPECTED = Gauge(
    "engines_registry_ranks_expected",
    "Ranks that the instance has when it is complete.",
    ["engine_instance"],
)
RANKS_UNRESPONSIVE = Gauge(
    "engines_registry_ranks_unresponsive",
    "Ranks whose process does not answer its keeper.",
    ["engine_instance"],
)
INSTANCE_READY = Gauge(
    "engines_registry_instance_ready",
    "1 if the instance is ready, 0 if it is degraded.",
    ["engine_instance"],
)
INSTANCE_LABELS = Info(
    "engines_registry_instance_labels",
    "1 for each instance, with the labels that people have given it.",
    ["engine_instance"],
)
INSTANCES = Gauge("engines_registry_instances", "Instances by state.", ["state"])
RANKS_LOST = Counter(
    "engines_registry_ranks_lost", "Ranks that were lost.", ["reason"], [*LOSSES.values(), OTHER]
)
INSTANCES_CLEANED = Counter(
    "engines_registry_instances_cleaned", "Degraded instances whose ranks this process has evicted."
)

# -- of every watch, election and wait in this process
# ---------------------------------------------------------------------------

STREAM_LOSSES = Counter(
    "engines_registry_watch_stream_losses", "Watch streams that etcd or the network ended."
)
RESYNCS = Counter("engines_registry_watch_resyncs", "Watches that began again from a snapshot.")
ETCD_ERRORS = Counter(
    "engines_registry_etcd_call_errors",
    "Calls to etcd that failed, each try of a call for itself.",
    ["error"],
    ["unavailable", "refused", "full"],
)

HOLDER_SCANS = Counter(
    "engines_registry_holder_scans",
    "Searches for a model that read all records, for ranks that are not in the index of holders.",
)

# -- of the registrations of this process
# ----------------------------------------------------------------------------------------

REGISTRATIONS = Gauge(
    "engines_registry_registrations",
    "Registrations of this process.",
    ["state"],
    ["registered", "suspended", "lost"],
)
REGISTRATION_CHANGES = Counter(
    "engines_registry_registration_changes",
    "How often a registration of this process came into the state.",
    ["state"],
    ["registered", "suspended", "lost", "closed"],
)
REREGISTRATIONS = Counter(
    "engines_registry_reregistrations", "Records that a keeper has put into etcd again."
)
KEEPER_RESTARTS = Counter(
    "engines_registry_keeper_restarts", "Keepers that died or hung and were replaced."
)
KEEPALIVE = Histogram(
    "engines_registry_keepalive_seconds",
    "How long etcd took to renew a lease, as the keeper saw it.",
    buckets=[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5],
)


def etcd_error(error: EtcdError) -> None:
    """Leases and history that are gone are answers, not errors."""
    for kind, name in (
        (EtcdFull, "full"),
        (EtcdRefused, "refused"),
        (EtcdUnavailable, "unavailable"),
    ):
        if isinstance(error, kind):
            ETCD_ERRORS.inc(name)
            return
