"""Ranks that start where one like them was killed: its weights are still there."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from engine_loader import InProcessEngine, LoadOptions, PublishOptions, Seeded, load_or_seed
from engine_loader.adopting.finding import find_held
from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.destination import Destination
from engine_registry import ModelIdentity, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.integration.test_seeding import events
from tests.support.processes.held import MODEL, content
from tests.support.waiting import wait_until


def kill(
    engine: subprocess.Popen[str], registry: Registry, model: ModelIdentity, topology: Any
) -> None:
    engine.kill()
    engine.wait()
    wait_until(
        lambda: find_held(registry, model, rank=0, world_size=1, topology=topology) is not None
    )


def nothing_to_read() -> None:
    raise AssertionError("the fallback is read")


Start = Callable[..., Seeded]


@pytest.fixture
def start(registry: Registry) -> Iterator[Start]:
    with ExitStack() as stack:
        engine = stack.enter_context(InProcessEngine())

        def start(
            tensors: Any,
            fallback: Callable[[], object] = nothing_to_read,
            registry: Registry = registry,
            **options: Any,
        ) -> Seeded:
            seeded = load_or_seed(
                registry,
                engine,
                MODEL,
                tensors,
                rank=0,
                world_size=1,
                instance="b",
                fallback=fallback,
                **options,
            )
            return stack.enter_context(seeded)

        yield start


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in content().items()}


@pytest.fixture
def left(processes: Processes, registry: Registry) -> None:
    """A rank has been killed, and its weights are held."""
    rank = processes.start("-m", "tests.support.processes.held")
    assert line_of(rank) == "serves\n"
    kill(rank, registry, MODEL, {})


@pytest.mark.usefixtures("left")
def test_what_is_held_is_published_again_with_its_content_and_version(start: Start) -> None:
    tensors = zeros()
    seeded = start(tensors)
    assert (seeded.source, seeded.report, seeded.reason) == ("held", None, "")
    assert seeded.adopted is not None
    assert seeded.publication is not None
    assert seeded.publication.version == seeded.version == 7
    assert seeded.publication.content == seeded.adopted.content
    assert all(torch.equal(tensors[name], tensor) for name, tensor in content().items())


@pytest.mark.usefixtures("left")
def test_what_is_held_is_published_later_in_its_version(start: Start) -> None:
    tensors = zeros()
    seeded = start(tensors, publish_later=True)
    assert (seeded.source, seeded.publication) == ("held", None)
    publication = seeded.publish(tensors, options=PublishOptions(hold_s=60))
    assert publication is not None
    assert publication.version == 7


@pytest.mark.usefixtures("left")
def test_what_differs_stays_held_and_the_fallback_is_read(
    registry: Registry, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"other": torch.zeros(3)}
    seeded = start(tensors, lambda: tensors["other"].fill_(1))
    assert (seeded.source, seeded.adopted) == ("disk", None)
    assert events(caplog, "held_unusable") == ["WARNING"]
    assert find_held(registry, MODEL, rank=0, world_size=1) is not None


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("adopt", [False, lambda tensors: "t0" not in tensors])
def test_a_start_that_may_not_adopt_reads(
    start: Start, adopt: bool | Callable[[Any], bool]
) -> None:
    tensors = zeros()
    where = tensors["t0"].data_ptr()
    assert start(tensors, filling(tensors), adopt=adopt).source == "disk"
    assert tensors["t0"].data_ptr() == where


@pytest.mark.usefixtures("left")
def test_a_destination_is_given_no_other_memory(start: Start) -> None:
    tensors = Destination(zeros())
    assert start(tensors, filling(tensors)).source == "disk"


class OnMeta:
    """Tensors without memory, and how they get some."""

    def __init__(self) -> None:
        self.tensors = {name: tensor.to("meta") for name, tensor in content().items()}
        self.allocated = 0

    def allocate(self) -> None:
        self.allocated += 1
        for tensor in self.tensors.values():
            torch.utils.swap_tensors(tensor, torch.empty_like(tensor, device="cpu"))


@pytest.mark.usefixtures("left")
def test_tensors_on_the_meta_device_get_no_other_memory_than_what_is_held(start: Start) -> None:
    made = OnMeta()
    assert start(made.tensors, allocate=made.allocate).source == "held"
    assert made.allocated == 0
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in content().items())


def test_tensors_on_the_meta_device_get_memory_where_nothing_is_held(start: Start) -> None:
    made = OnMeta()
    seeded = start(made.tensors, filling(made.tensors), allocate=made.allocate)
    assert (seeded.source, made.allocated) == ("disk", 1)
    seeded.close()
    again = OnMeta()
    with pytest.raises(TensorsUnusable, match="is on the meta device and has no memory"):
        start(again.tensors, filling(again.tensors))


def filling(tensors: Any) -> Callable[[], None]:
    def read() -> None:
        for name, tensor in content().items():
            tensors[name].copy_(tensor)

    return read


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize(("verify", "verified"), [("auto", True), ("header", False)])
def test_digests_are_compared_unless_the_header_is_enough(
    start: Start, verify: Any, verified: bool
) -> None:
    seeded = start(zeros(), load=LoadOptions(verify=verify))
    assert seeded.adopted is not None
    assert seeded.adopted.verified is verified


def test_an_etcd_that_comes_late_is_waited_for_with_what_is_held(
    processes: Processes, own_etcd: LocalEtcd, namespace: str, start: Start
) -> None:
    rank = processes.start("-m", "tests.support.processes.held", ENGINES_ETCD=own_etcd.endpoint)
    assert line_of(rank) == "serves\n"
    with Registry.connect(
        own_etcd.endpoint, namespace=namespace, timeout_s=3, lazy=True
    ) as registry:
        kill(rank, registry, MODEL, {})
        own_etcd.kill()
        with on_line("waits for a peer", own_etcd.start):
            assert start(zeros(), registry=registry, without_etcd_s=100).source == "held"


@contextmanager
def on_line(text: str, act: Callable[[], object]) -> Iterator[None]:
    """When a start logs it."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                act()

    log, handler = logging.getLogger("engine_loader.starting.start"), Handler()
    log.addHandler(handler)
    level, log.level = log.level, logging.INFO
    try:
        yield
    finally:
        log.level = level
        log.removeHandler(handler)
