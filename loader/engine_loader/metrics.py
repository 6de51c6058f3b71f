"""What this package counts.

`engine_registry.telemetry.metrics.enable` begins it. docs/reference/metrics.md explains each.
"""

from __future__ import annotations

from engine_loader import errors
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.telemetry.meters import Counter, Gauge, Histogram

# The first that an error is decides.
_OUTCOMES: dict[str, tuple[type[BaseException], ...]] = {
    "no_source": (
        InstanceNotFound,
        InstanceIncomplete,
        errors.SourceUnreachable,
        errors.VersionUnavailable,
    ),
    "mismatch": (errors.WeightsMismatch, errors.DigestsMissing),
    "stalled": (errors.Stalled,),
    "lost": (errors.SourceLost,),
    "torn": (errors.TornRead,),
    "digest_mismatch": (errors.DigestMismatch,),
    "failed": (Exception,),
}
_CANCELLED = "cancelled"

LOADS = Counter(
    "engines_loader_loads",
    "Loads that have ended.",
    ["outcome"],
    ["loaded", _CANCELLED, *_OUTCOMES],
)
LOADED_NBYTES = Counter(
    "engines_loader_loaded_bytes", "Bytes of the tensors that were loaded, of loads that succeeded."
)
STARTS = Counter(
    "engines_loader_starts",
    "Weights that `load_or_seed` has brought: from where, and why from the disk.",
    ["source"],
    ["held", "peers", "disk", "disk_after_peers", "disk_alone"],
)
READ_NBYTES = Counter(
    "engines_loader_read_bytes",
    "Bytes that have come from sources, also those that were read again.",
)
SKIPPED_NBYTES = Counter(
    "engines_loader_skipped_bytes",
    "Bytes that loads with `reuse` did not read, as the tensors held them already.",
)
LENT_NBYTES = Counter(
    "engines_loader_lent_bytes",
    "Bytes that loads with `also_from` took from ranks with other contents.",
)
LOAD_S = Histogram(
    "engines_loader_load_seconds",
    "How long loads took that succeeded.",
    buckets=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800],
)
LOAD_NBYTES_PER_S = Histogram(
    "engines_loader_load_bytes_per_second",
    "Bytes of the tensors by seconds, of loads that succeeded.",
    buckets=[1e7, 3e7, 1e8, 3e8, 1e9, 2e9, 4e9, 8e9, 16e9, 32e9, 64e9, 128e9, 256e9, 512e9],
)
REGISTER_S = Histogram(
    "engines_loader_register_seconds",
    "How long the transfer engine took to register a rank's memory, to be read or filled.",
    buckets=[0.001, 0.01, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300],
)
SNAPSHOT_NBYTES = Counter(
    "engines_loader_snapshot_bytes",
    "Bytes that were copied for snapshots of published weights.",
)
SNAPSHOT_S = Histogram(
    "engines_loader_snapshot_seconds",
    "How long the copy for a snapshot kept its caller waiting.",
    buckets=[0.001, 0.01, 0.1, 0.3, 1, 3, 10, 30, 60],
)
DELTA_NBYTES = Counter(
    "engines_loader_delta_bytes",
    "Bytes of the deltas that were written for snapshots.",
)
DELTA_S = Histogram(
    "engines_loader_delta_seconds",
    "How long it took to find out what had changed from one snapshot to the next.",
    buckets=[0.001, 0.01, 0.1, 0.3, 1, 3, 10, 30, 60],
)
RETRIES = Counter(
    "engines_loader_torn_retries",
    "Loads that began again, as the weights had changed while they were read.",
)
FAILOVERS = Counter(
    "engines_loader_failovers",
    "Sources that were given up by loads that went on with others.",
    ["reason"],
    ["lost", "stalled", "torn", "evicted"],
)
ABANDONED_READS = Counter(
    "engines_loader_abandoned_reads", "Reads in flight that were ended, as nothing came of them."
)
DIGEST_MISMATCHES = Counter(
    "engines_loader_digest_mismatches", "Tensors that were not what their source had published."
)
PULLS_SERVED = Counter(
    "engines_loader_pulls_served", "Loads that have begun to read from ranks of this process."
)
PULLS = Gauge("engines_loader_pulls", "Loads that are reading from ranks of this process.")


def outcome_of(error: BaseException) -> str:
    if isinstance(error, errors.Cancelled) or not isinstance(
        error, Exception
    ):  # Ctrl-C is no failure either
        return _CANCELLED
    return next(outcome for outcome, kinds in _OUTCOMES.items() if isinstance(error, kinds))


def reason_of(error: errors.LoaderError) -> str:
    """Why a source was given up."""
    if isinstance(error, errors.Stalled):
        return "stalled"
    if isinstance(error, errors.TornRead):
        return "torn"
    return "evicted" if isinstance(error, errors.SourceEvicted) else "lost"


def count_loaded(
    nbytes: int, seconds: float, skipped_nbytes: int = 0, lent_nbytes: int = 0
) -> None:
    LOADS.inc("loaded")
    LOADED_NBYTES.inc(amount=nbytes)
    SKIPPED_NBYTES.inc(amount=skipped_nbytes)
    LENT_NBYTES.inc(amount=lent_nbytes)
    LOAD_S.observe(seconds)
    LOAD_NBYTES_PER_S.observe(nbytes / seconds if seconds else 0.0)


def on_pull(change: int) -> None:
    """A load begins (+1) or ends (-1) to read from a rank of this process."""
    if change > 0:
        PULLS_SERVED.inc()
    PULLS.add(change)
