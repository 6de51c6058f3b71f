"""`Info`: a gauge that is always 1 and whose labels are the facts, as labels of people are.

Prometheus joins it with the other metrics of the same thing, which so need no such labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from engine_registry.telemetry.meters import Gauge

if TYPE_CHECKING:
    from prometheus_client import Metric


class Info(Gauge):
    """1 for each thing. Its one label names the thing, and each thing has further labels, which
    nobody knows beforehand.
    """

    def _begin(self) -> None:
        self._metric = self._live = _Facts(self.name, self.help, self.labels[0])

    def put(self, thing: str, labels: Mapping[str, str]) -> None:
        """Instead of its labels before."""
        live = self._live
        if live is not None:
            live.of[thing] = dict(labels)

    def remove(self, *labels: str) -> None:
        live = self._live
        if live is not None:
            live.of.pop(labels[0], None)


class _Facts:
    """What prometheus_client asks for the series: its metrics have the same labels in all."""

    def __init__(self, name: str, help: str, label: str) -> None:
        self._name = name
        self._help = help
        self._label = label
        self.of: dict[str, dict[str, str]] = {}

    def describe(self) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        return [GaugeMetricFamily(self._name, self._help)]

    def collect(self) -> Iterable[Metric]:
        (family,) = self.describe()
        for thing, labels in self.of.copy().items():
            family.add_sample(self._name, {self._label: thing, **labels}, 1)
        return [family]
