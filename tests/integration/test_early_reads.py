"""Over cuda_ipc reads begin before etcd has said that the sources may be entered. Whatever it says,
the load ends with the bytes of one content, and nothing goes on writing to the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from engine_loader import CudaIpcEngine, Destination, LoadReport, Publication, load
from engine_loader.errors import SourceLost, TornRead
from engine_loader.loading.attempts import GONE_ON
from engine_loader.publishing import offering
from engine_loader.sources.entrance import Entered, Entrance
from engine_registry import Registry
from engine_registry.errors import InstanceNotFound
from tests.integration.test_load import Tensors, assert_equal, like, weights
from tests.integration.test_verification import offer
from tests.support.host_gpus import HostGpus


class Bench:
    """A source, and a reader that loads twice: memory is mapped from the first load on."""

    def __init__(
        self, stack: ExitStack, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.registry = registry
        self.engine = stack.enter_context(CudaIpcEngine(gpus=HostGpus()))
        self.source = weights()
        self.publication: Publication = offer(
            stack,
            registry,
            self.source,
            engine=stack.enter_context(CudaIpcEngine(gpus=HostGpus())),
            digests=None,
        )
        self.tensors: Tensors = like(self.source)
        self.destination = Destination(self.tensors)
        self.load()
        self.before: Callable[[], object] = lambda: None  # etcd is asked for tickets
        self.started: list[int] = []  # reads, whenever that was
        enter = Entrance.enter

        def asked(entrance: Entrance, *args: object) -> Entered:
            self.started.append(len(self.engine._launches._reads))
            self.before()
            return enter(entrance, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Entrance, "enter", asked)

    def load(self) -> LoadReport:
        return load(
            self.registry, self.engine, "a", rank=0, tensors=self.destination, timeout_s=0.0
        )

    def change(self) -> None:
        with self.publication.update():
            self.source["layer.0"].add_(1)

    def check_that_nothing_goes_on(self) -> None:
        assert not self.engine._launches._reads
        assert not self.engine._lent
        assert not self.engine._tallies._sums
        assert not self.registry.all_pulls()


@pytest.fixture
def bench(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(offering, "algorithm_for", lambda _: "multilinear_64")
    monkeypatch.setattr(offering, "check_can_be_served", lambda *_: None)
    with ExitStack() as stack:
        yield Bench(stack, registry, monkeypatch)


def test_reads_have_begun_when_etcd_is_asked_for_tickets(bench: Bench) -> None:
    bench.change()
    report = bench.load()
    (reads,) = bench.started
    assert reads > 0
    assert (report.version, report.verified) == (1, True)
    assert_equal(bench.tensors, bench.source)
    bench.check_that_nothing_goes_on()


def test_what_was_read_of_a_version_that_is_gone_by_then_does_not_count(bench: Bench) -> None:
    def change_once() -> None:
        bench.before = lambda: None
        bench.change()

    bench.before = change_once
    report = bench.load()
    assert len(bench.started) == 2
    assert (report.version, report.verified) == (1, True)
    assert_equal(bench.tensors, bench.source)
    bench.check_that_nothing_goes_on()


def test_a_source_that_always_goes_on_is_an_error_in_the_end(bench: Bench) -> None:
    bench.before = bench.change
    with pytest.raises(TornRead, match="has gone on to version"):
        bench.load()
    assert len(bench.started) == GONE_ON
    bench.check_that_nothing_goes_on()


def test_a_source_that_has_left_by_then_is_lost(bench: Bench) -> None:
    bench.before = bench.publication.close
    with pytest.raises((SourceLost, InstanceNotFound)):
        bench.load()
    bench.check_that_nothing_goes_on()


def test_an_interrupt_by_then_leaves_no_read_that_writes(bench: Bench) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    bench.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.load()
    bench.check_that_nothing_goes_on()
    bench.before = lambda: None
    bench.load()
    assert_equal(bench.tensors, bench.source)
