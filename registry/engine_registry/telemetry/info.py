"""Gauges whose series are made at each scrape: `Info`, which is always 1 and whose labels are the
facts, as labels of people are; and `Measured`, which nobody sets.

Prometheus joins an `Info` with the other metrics of the same thing, which so need no such labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from engine_registry.telemetry.meters import Gauge

if TYPE_CHECKING:
    from prometheus_client import Metric

_Sample = tuple[dict[str, str], float]  # with its labels


class Info(Gauge):
    """1 for each thing. Its one label names the thing, and each thing has further labels, which
    nobody knows beforehand.
    """

    def _begin(self) -> None:
        label, facts = self.labels[0], dict[str, dict[str, str]]()
        self._live = facts
        self._metric = _Samples(
            self, lambda: [({label: thing, **more}, 1.0) for thing, more in facts.copy().items()]
        )

    def put(self, thing: str, labels: Mapping[str, str]) -> None:
        """Instead of its labels before."""
        live = self._live
        if live is not None:
            live[thing] = dict(labels)

    def remove(self, *labels: str) -> None:
        live = self._live
        if live is not None:
            live.pop(labels[0], None)


class Measured(Gauge):
    """What `measure` gives at each scrape: amounts by the values of its one label. It is called
    from the thread of the scrape, and raises nothing.
    """

    def __init__(
        self, name: str, help: str, label: str, measure: Callable[[], Mapping[str, float]]
    ) -> None:
        self._measure = measure
        super().__init__(name, help, [label])

    def _begin(self) -> None:
        label, measure = self.labels[0], self._measure
        self._metric = _Samples(
            self, lambda: [({label: value}, amount) for value, amount in measure().items()]
        )


class _Samples:
    """What prometheus_client asks for the series: the series of its own metrics have the same
    labels, and are there until somebody removes them.
    """

    def __init__(self, gauge: Gauge, now: Callable[[], Iterable[_Sample]]) -> None:
        self._gauge = gauge
        self._now = now

    def describe(self) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        return [GaugeMetricFamily(self._gauge.name, self._gauge.help)]

    def collect(self) -> Iterable[Metric]:
        (family,) = self.describe()
        for labels, amount in self._now():
            family.add_sample(self._gauge.name, labels, amount)
        return [family]
