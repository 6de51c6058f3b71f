"""What one watch sees, as metrics: how many ranks each instance has in which state, its labels, and
why ranks were lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from engine_registry.schema.record import RankState
from engine_registry.telemetry import metrics
from engine_registry.watching.cleanup import InstanceCleaned
from engine_registry.watching.events import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    RankJoined,
    RankLost,
    RankUpdated,
    VersionReleased,
)


class WatchMetrics:
    """Show it every event of a watch, from its first on, after `metrics.enable`. For one watch of a
    process: two that see the same instance would count its losses twice. Not thread-safe.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, Counter[RankState]] = {}
        self._unresponsive: dict[str, set[int]] = {}
        self._ready: dict[str, bool] = {}
        self._show_instances()

    def see(self, event: Event | InstanceCleaned) -> None:
        if isinstance(event, InstanceCleaned):
            if not event.dry_run:
                metrics.INSTANCES_CLEANED.inc()
        elif isinstance(event, InstanceReady | InstanceDegraded | InstanceGone):
            self._see_instance(event)
        elif not isinstance(event, VersionReleased):
            self._see_rank(event)

    def _see_rank(self, event: RankJoined | RankUpdated | RankLost) -> None:
        record = event.record
        states = self._ranks.setdefault(record.instance, Counter())
        if isinstance(event, RankLost):
            states[record.state] -= 1
            metrics.RANKS_LOST.inc(metrics.LOSSES.get(event.reason, metrics.OTHER))
        else:
            states[record.state] += 1
            metrics.RANKS_EXPECTED.set(record.world_size, record.instance)
            metrics.INSTANCE_LABELS.put(record.instance, _named(record.labels))
        if isinstance(event, RankUpdated):
            states[event.previous.state] -= 1
        for state in RankState:
            metrics.RANKS.set(states[state], record.instance, state.value)
        silent = self._unresponsive.setdefault(record.instance, set())
        silent.discard(record.rank)
        if record.unresponsive_since and not isinstance(event, RankLost):
            silent.add(record.rank)
        metrics.RANKS_UNRESPONSIVE.set(len(silent), record.instance)

    def _see_instance(self, event: InstanceReady | InstanceDegraded | InstanceGone) -> None:
        instance = event.status.instance
        if isinstance(event, InstanceGone):
            self._forget(instance)
        else:
            self._ready[instance] = isinstance(event, InstanceReady)
            metrics.INSTANCE_READY.set(self._ready[instance], instance)
        self._show_instances()

    def _forget(self, instance: str) -> None:
        """Names of instances come and go: what is gone leaves no series behind."""
        if self._ready.pop(instance, None) is not None:
            metrics.INSTANCE_READY.remove(instance)
        if self._ranks.pop(instance, None) is not None:
            del self._unresponsive[instance]
            metrics.RANKS_EXPECTED.remove(instance)
            metrics.INSTANCE_LABELS.remove(instance)
            metrics.RANKS_UNRESPONSIVE.remove(instance)
            for state in RankState:
                metrics.RANKS.remove(instance, state.value)

    def _show_instances(self) -> None:
        ready = sum(self._ready.values())
        metrics.INSTANCES.set(ready, "ready")
        metrics.INSTANCES.set(len(self._ready) - ready, "degraded")

    def close(self) -> None:
        """For a watch that ends while the process goes on: nobody is left to say how things are."""
        for instance in {*self._ready, *self._ranks}:
            self._forget(instance)
        self._show_instances()


def _named(labels: Mapping[str, str]) -> dict[str, str]:
    """As Prometheus has names, and as kube-state-metrics makes them of the labels of pods: `label_`
    and the name, with _ for other characters. Of names that are the same so each has a number.
    """
    names = {name: f"label_{re.sub('[^A-Za-z0-9_]', '_', name)}" for name in sorted(labels)}
    count = Counter(names.values())
    seen: Counter[str] = Counter()
    named = {}
    for name, shown in names.items():
        seen[shown] += 1
        named[f"{shown}_conflict{seen[shown]}" if count[shown] > 1 else shown] = labels[name]
    return named
