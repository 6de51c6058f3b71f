"""A load that is cancelled while it waits for a source ends at once, not when its time is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from engine_loader import (
    Engine,
    InProcessEngine,
    LoadOptions,
    load,
    load_full,
    load_instance,
    load_module,
    read_catalogue,
)
from engine_loader.errors import Cancelled
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.errors import InstanceNotFound
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.local import LocalEtcd
from engine_registry.holders.query import HolderQuery
from engine_registry.schema.keyvalue import Batch, Snapshot

LONG_S = 1000.0  # the limit of a test would end a load that waits for so long
MODEL = ModelIdentity("nowhere")

Load = Callable[[Registry, Engine, LoadOptions], object]

LOADS: dict[str, Load] = {
    "load by name": lambda registry, engine, options: load(
        registry, engine, "a", rank=0, tensors=tensors(), timeout_s=LONG_S, options=options
    ),
    "load by model": lambda registry, engine, options: load(
        registry, engine, MODEL, rank=0, tensors=tensors(), timeout_s=LONG_S, options=options
    ),
    "load_instance": lambda registry, engine, options: load_instance(
        registry, engine, "a", tensors={0: tensors()}, timeout_s=LONG_S, options=options
    ),
    "load_full": lambda registry, engine, options: load_full(
        registry, engine, "a", timeout_s=LONG_S, options=options
    ),
    "read_catalogue": lambda registry, engine, options: read_catalogue(
        registry, engine, "a", timeout_s=LONG_S, options=options
    ),
    "load_module": lambda registry, engine, options: load_module(
        registry, engine, "a", torch.nn.Linear(2, 2), timeout_s=LONG_S, options=options
    ),
}


def tensors() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(4)}


@pytest.fixture
def cancel(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when a wait has looked once, and goes on."""
    cancel = threading.Event()

    class Cancelling(Follower):
        def __iter__(self) -> Iterator[Snapshot | Batch]:
            for update in super().__iter__():
                yield update
                cancel.set()

    for module in ("watching.waiting", "holders.waiting"):
        monkeypatch.setattr(f"engine_registry.{module}.Follower", Cancelling)
    return cancel


@pytest.mark.parametrize("name", LOADS)
def test_a_load_that_waits_for_a_source_is_cancelled(
    registry: Registry, cancel: threading.Event, name: str
) -> None:
    with InProcessEngine() as engine:
        with pytest.raises(Cancelled, match="the load was cancelled") as caught:
            LOADS[name](registry, engine, LoadOptions(cancel=cancel))
    assert isinstance(caught.value.__cause__, InstanceNotFound)
    assert [thread.name for thread in threading.enumerate() if "is cancelled" in thread.name] == []


def test_a_load_that_waits_for_an_etcd_that_is_away_is_cancelled(own_etcd: LocalEtcd) -> None:
    cancel = threading.Event()
    with Registry.connect(own_etcd.endpoint) as registry, InProcessEngine() as engine:
        own_etcd.kill()
        timer = threading.Timer(0.5, cancel.set)
        timer.start()
        with pytest.raises(Cancelled):
            LOADS["load by name"](registry, engine, LoadOptions(cancel=cancel))
        timer.join()


def test_a_wait_of_the_registry_that_is_cancelled_ends_as_if_its_time_were_over(
    registry: Registry, cancel: threading.Event
) -> None:
    with pytest.raises(InstanceNotFound, match=r"not registered after [0-9.]+ s"):
        registry.ready("a", LONG_S, cancel)
    with pytest.raises(InstanceNotFound):
        registry.holders(HolderQuery(MODEL, Place(0)), LONG_S, cancel)  # it was set before
