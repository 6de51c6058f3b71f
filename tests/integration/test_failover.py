"""Sources that are killed, stopped, cut off, evicted or changed in the middle of a load: real
processes, real transfer engine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from engine_loader import LoadOptions, Pace, Progress, load
from engine_loader.errors import Cancelled, SourceLost, Stalled
from engine_registry import Region, Registry
from tests.integration.conftest import Processes, line_of
from tests.support.engines import Meeting
from tests.support.processes.source import MODEL, content, empty
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

NBYTES = 32 << 20
PACE = Pace(256 << 10, 2, stall_s=0.5, patience_s=3.0)  # so that there is a middle

Fault = Callable[["Sources"], object]


class Sources:
    """Instances a, b, …, each a process; `victim` is the one that something happens to."""

    def __init__(self, registry: Registry, processes: Processes) -> None:
        self.registry = registry
        self._processes = processes
        self.started: dict[str, subprocess.Popen[str]] = {}
        self.hosts: dict[str, str] = {}

    def start(self, *names: str) -> None:
        for name in names:
            host = self.hosts[name] = _own_address(len(self.started))
            self.started[name] = self._processes.start(
                "-m", "tests.support.processes.source", name, str(NBYTES), host
            )
        for name in names:
            assert line_of(self.started[name]) == "version 0\n"

    def signal(self, number: signal.Signals) -> None:
        signal_and_wait(self.started["a"].pid, number)

    def evict(self) -> None:
        self.registry.evict(self.registry.ranks("a")[0])

    def update(self) -> None:
        stdin, process = self.started["a"].stdin, self.started["a"]
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()
        assert line_of(process) == "version 1\n"


def _own_address(number: int) -> str:
    """Of the loopback device, and of no other run of tests at this time: a route that drops its
    packets holds for the whole machine.
    """
    pid = os.getpid()
    return f"127.{1 + pid // 250 % 250}.{pid % 250}.{10 + number}"


@pytest.fixture
def sources(registry: Registry, processes: Processes) -> Iterator[Sources]:
    sources = Sources(registry, processes)
    yield sources
    for process in sources.started.values():
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def engine() -> Iterator[Meeting]:
    with Meeting("127.0.0.1") as engine:
        yield engine


def at_half(
    action: Callable[[], object], after: Callable[[], object] = lambda: None
) -> Callable[[Progress], None]:
    """Once, and not before `after` has returned."""
    left = [action]

    def on_progress(progress: Progress) -> None:
        if progress.nbytes >= progress.total_nbytes // 2 and left:
            after()
            left.pop()()

    return on_progress


FAULTS: dict[str, Fault] = {
    "killed": lambda sources: sources.signal(signal.SIGKILL),
    "stopped": lambda sources: sources.signal(signal.SIGSTOP),
    "evicted": lambda sources: sources.evict(),
    "changed": lambda sources: sources.update(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_from_two_goes_on_with_the_other_when_one_is(
    sources: Sources, engine: Meeting, fault: str
) -> None:
    sources.start("a", "b")
    tensors = empty(NBYTES)
    happen = at_half(lambda: FAULTS[fault](sources), lambda: engine.wait_until_met(2))
    report = load(
        sources.registry,
        engine,
        ["a", "b"],
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=PACE, progress=happen),
    )
    wanted = content(report.version, NBYTES)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert report.version == 0
    assert sum(share.nbytes for share in report.shares) == NBYTES
    assert {share.name for share in report.shares if share.nbytes and not share.error} == {
        "/engines/b/0"
    }


def test_a_load_by_model_reads_whoever_serves_it(sources: Sources, engine: Meeting) -> None:
    sources.start("a", "b")
    tensors = empty(NBYTES)
    report = load(
        sources.registry,
        engine,
        MODEL,
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=PACE, progress=at_half(lambda: engine.wait_until_met(2))),
    )
    assert {share.name for share in report.shares if share.nbytes} == {
        "/engines/a/0",
        "/engines/b/0",
    }
    assert all(torch.equal(tensors[name], wanted) for name, wanted in content(0, NBYTES).items())


def test_the_only_source_changed_meanwhile_is_read_again_in_its_new_version(
    sources: Sources, engine: Meeting
) -> None:
    sources.start("a")
    tensors = empty(NBYTES)
    report = load(
        sources.registry,
        engine,
        "a",
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=PACE, progress=at_half(sources.update)),
    )
    assert (report.version, report.retries > 0) == (1, True)
    assert all(torch.equal(tensors[name], wanted) for name, wanted in content(1, NBYTES).items())


@pytest.mark.parametrize(
    ("fault", "kind"), [("killed", SourceLost), ("stopped", Stalled), ("evicted", SourceLost)]
)
def test_the_only_source_lost_meanwhile_is_an_error_that_says_what_came(
    sources: Sources, engine: Meeting, fault: str, kind: type[SourceLost]
) -> None:
    sources.start("a")
    tensors = empty(NBYTES)
    with pytest.raises(
        SourceLost, match=r"/engines/a/0 could not be read to the end.*load again"
    ) as lost:
        load(
            sources.registry,
            engine,
            "a",
            rank=0,
            tensors=tensors,
            options=LoadOptions(pace=PACE, progress=at_half(lambda: FAULTS[fault](sources))),
        )
    assert isinstance(lost.value, kind) or "lease expired" in str(lost.value)
    wanted = content(0, NBYTES)
    assert all(torch.equal(tensors[name], wanted[name]) for name in lost.value.details["complete"])


def test_a_stopped_source_that_goes_on_in_time_is_read_to_the_end(
    sources: Sources, engine: Meeting
) -> None:
    sources.start("a")

    def stop_for_a_while() -> None:
        sources.signal(signal.SIGSTOP)
        threading.Timer(1.0, lambda: sources.signal(signal.SIGCONT)).start()

    tensors = empty(NBYTES)
    report = load(
        sources.registry,
        engine,
        "a",
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=PACE, progress=at_half(stop_for_a_while)),
    )
    assert report.version == 0
    assert all(torch.equal(tensors[name], wanted) for name, wanted in content(0, NBYTES).items())


def assert_nothing_comes_later(
    sources: Sources, engine: Meeting, tensors: dict[str, torch.Tensor]
) -> None:
    """Uses the memory for something else, and lets the source go on if it is stopped."""
    for tensor in tensors.values():
        tensor.fill_(77)
    sources.signal(signal.SIGCONT)
    # by when this has been read, the source has long sent what it had been asked for before
    fresh = empty(NBYTES)
    load(sources.registry, engine, "a", rank=0, tensors=fresh, timeout_s=30)
    assert all(torch.equal(fresh[name], wanted) for name, wanted in content(0, NBYTES).items())
    assert all(bool((tensor == 77).all()) for tensor in tensors.values())


def test_nothing_of_an_abandoned_read_is_written_when_its_source_goes_on(
    sources: Sources, engine: Meeting
) -> None:
    """The memory is the caller's again as soon as the load has ended, and is used for something
    else.
    """
    sources.start("a")
    tensors = empty(NBYTES)
    with pytest.raises(SourceLost):
        load(
            sources.registry,
            engine,
            "a",
            rank=0,
            tensors=tensors,
            options=LoadOptions(
                pace=Pace(4 << 20, 8, stall_s=0.3, patience_s=0.3),
                progress=at_half(lambda: sources.signal(signal.SIGSTOP)),
            ),
        )
    assert_nothing_comes_later(sources, engine, tensors)


@contextmanager
def dropped_packets(host: str) -> Iterator[None]:
    """Whatever is sent to one address of the loopback device is lost, acknowledgements too."""
    subprocess.run(["ip", "route", "add", "blackhole", host, "table", "local"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "route", "del", "blackhole", host, "table", "local"], check=True)


@pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0,
    reason="drops packets by a route, as root with iproute2",
)
@pytest.mark.parametrize("others", [(), ("b",)])
def test_a_source_cut_off_by_the_network_is_given_up_in_bounded_time(
    sources: Sources, engine: Meeting, others: tuple[str, ...]
) -> None:
    sources.start("a", *others)
    tensors = empty(NBYTES)
    cut = dropped_packets(sources.hosts["a"])
    try:
        happen = at_half(cut.__enter__, lambda: engine.wait_until_met(1 + len(others)))
        if others:
            report = load(
                sources.registry,
                engine,
                ["a", "b"],
                rank=0,
                tensors=tensors,
                options=LoadOptions(pace=PACE, progress=happen),
            )
            assert [share.name for share in report.shares if share.error] == ["/engines/a/0"]
            assert all(
                torch.equal(tensors[name], wanted) for name, wanted in content(0, NBYTES).items()
            )
        else:
            with pytest.raises(
                SourceLost
            ):  # Stalled, or refused at once as there is no route any more
                load(
                    sources.registry,
                    engine,
                    "a",
                    rank=0,
                    tensors=tensors,
                    options=LoadOptions(pace=PACE, progress=happen),
                )
    finally:
        cut.__exit__(None, None, None)


def assert_all_is_given_back(
    sources: Sources, engine: Meeting, tensors: dict[str, torch.Tensor]
) -> None:
    for tensor in tensors.values():  # would be a separate part, were it still registered or lent
        region = Region(
            tensor.untyped_storage().data_ptr() - 1, tensor.untyped_storage().nbytes() + 2
        )
        assert engine.register(region) == engine.lend(region) == (region,)
        engine.unregister(region)
        engine.take_back(region)
    assert sources.registry.pulls(sources.registry.ranks("a")[0]) == 0


def test_ctrl_c_in_the_middle_gives_everything_back(sources: Sources, engine: Meeting) -> None:
    sources.start("a")
    tensors = empty(NBYTES)
    with pytest.raises(KeyboardInterrupt):
        load(
            sources.registry,
            engine,
            "a",
            rank=0,
            tensors=tensors,
            options=LoadOptions(
                pace=PACE, progress=at_half(lambda: signal.raise_signal(signal.SIGINT))
            ),
        )
    assert_all_is_given_back(sources, engine, tensors)
    assert_nothing_comes_later(sources, engine, tensors)


def test_a_load_cancelled_from_another_thread_gives_everything_back(
    sources: Sources, engine: Meeting
) -> None:
    sources.start("a")
    tensors, cancel = empty(NBYTES), threading.Event()
    before = threading.active_count()
    with pytest.raises(Cancelled, match="was cancelled"):
        load(
            sources.registry,
            engine,
            "a",
            rank=0,
            tensors=tensors,
            options=LoadOptions(pace=PACE, cancel=cancel, progress=at_half(cancel.set)),
        )
    assert_all_is_given_back(sources, engine, tensors)
    wait_until(lambda: threading.active_count() <= before)
