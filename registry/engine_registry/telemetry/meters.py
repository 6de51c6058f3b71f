"""What is counted, by name: the seam between our code and prometheus_client, which is imported when
somebody asks, not before.

Modules that count declare their meters at import (both are named `metrics`). A meter is a null
object until `enable` puts a metric of prometheus_client behind it: counting looks at one attribute
till then, and works where that is not installed. All calls may come from any thread. Starts none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from engine_registry.errors import MetricsUnavailable

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# stands for a value that was not declared: what etcd or a peer says must not make series without
# end
OTHER = "other"

_lock = threading.Lock()  # guards what follows
_declared: list[Meter] = []
_collectors: list[CollectorRegistry] = []  # where the metrics are to be found


class Meter:
    """`labels` take any value, and the code that sets them removes them too; or there is one
    label with these `values`.
    """

    kind = ""

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        values: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.name = name
        self.help = help
        self.labels = tuple(labels)
        self.values = tuple(values)
        self._options = options
        self._metric: Any = None  # prometheus_client's, if it is enabled
        self._live: Any = None  # what counts: the metric, or its parts by value; None is null
        with _lock:
            _declared.append(self)
            for collectors in _collectors:
                self._show_in(collectors)

    def _show_in(self, collectors: CollectorRegistry) -> None:
        if self._metric is None:
            self._begin()
        collectors.register(self._metric)

    def _begin(self) -> None:
        import prometheus_client

        metric = getattr(prometheus_client, self.kind)(
            self.name, self.help, self.labels, registry=None, **self._options
        )
        self._metric = metric
        self._live = (
            {value: metric.labels(value) for value in self.values} if self.values else metric
        )

    def _end(self) -> None:
        self._live = self._metric = None

    def _of(self, live: Any, value: str) -> Any:
        if not self.values:
            return live
        return live[value if value in live else OTHER]


class Counter(Meter):
    kind = "Counter"

    def inc(self, value: str = "", amount: float = 1) -> None:
        live = self._live
        if live is not None:
            self._of(live, value).inc(amount)


class Histogram(Meter):
    kind = "Histogram"

    def observe(self, amount: float) -> None:
        live = self._live
        if live is not None:
            live.observe(amount)


class Gauge(Meter):
    kind = "Gauge"

    def set(self, amount: float, *labels: str) -> None:
        live = self._live
        if live is not None:
            (live.labels(*labels) if labels else live).set(amount)

    def add(self, amount: float) -> None:
        live = self._live
        if live is not None:
            live.inc(amount)

    def remove(self, *labels: str) -> None:
        live = self._live
        if live is not None:
            with suppress(KeyError):  # what was never set; newer versions say nothing
                live.remove(*labels)

    def hold(self, value: str = "") -> Held:
        return Held(self, self._live, value)


class Held:
    """One thing that counts once in a gauge, under one value at a time, until it is let go."""

    def __init__(self, gauge: Gauge, live: Any, value: str) -> None:
        self._gauge = gauge
        self._live = (
            live  # of when it began: where it was not counted then it is not taken away later
        )
        self._part: Any = None
        self.move(value)

    def move(self, value: str) -> None:
        if self._live is None:
            return
        self.release()
        self._part = self._gauge._of(self._live, value)
        self._part.inc()

    def release(self) -> None:
        """Any number of times."""
        part, self._part = self._part, None
        if part is not None:
            part.dec()


def declared() -> tuple[Meter, ...]:
    """All that is counted by the modules that have been imported."""
    with _lock:
        return tuple(_declared)


def enabled() -> bool:
    return bool(_collectors)


def enable(collectors: CollectorRegistry | None = None) -> None:
    """Counts from now on; the metrics are in `collectors`, or in prometheus_client's own registry.
    What was before is not counted.

    May be called again, also for another registry, which then shows the same numbers. What is
    declared by modules that are imported later is counted too. MetricsUnavailable where
    prometheus_client is not installed.
    """
    collectors = _or_default(collectors)
    with _lock, ExitStack() as undo:
        if collectors in _collectors:
            return
        undo.callback(_end_if_unused)
        for meter in _declared:
            meter._show_in(collectors)
            undo.callback(collectors.unregister, meter._metric)
        _collectors.append(collectors)
        undo.pop_all()


def disable(collectors: CollectorRegistry | None = None) -> None:
    """Takes the metrics out of there again.

    The numbers are forgotten when they are in no registry any more.
    """
    collectors = _or_default(collectors)
    with _lock:
        if collectors not in _collectors:
            return
        _collectors.remove(collectors)
        for meter in _declared:
            collectors.unregister(meter._metric)
        _end_if_unused()


def _end_if_unused() -> None:
    if not _collectors:
        for meter in _declared:
            meter._end()


@contextmanager
def counting(collectors: CollectorRegistry | None = None) -> Iterator[None]:
    """`enable` for the length of a block."""
    enable(collectors)
    try:
        yield
    finally:
        disable(collectors)


def render(accept: str = "", collectors: CollectorRegistry | None = None) -> tuple[bytes, str]:
    """What a scrape gets, and its content type: for a server of one's own.

    `accept` is the request's header of that name.
    """
    collectors = _or_default(collectors)
    from prometheus_client.exposition import choose_encoder

    encode, content_type = choose_encoder(accept)
    return encode(collectors), content_type


def _or_default(collectors: CollectorRegistry | None) -> CollectorRegistry:
    try:
        import prometheus_client
    except ModuleNotFoundError as exc:
        raise MetricsUnavailable(
            "metrics need prometheus_client", "pip install 'engine-registry[metrics]'"
        ) from exc
    return collectors if collectors is not None else prometheus_client.REGISTRY
