"""Everything that has to be closed: closing twice is silent, and forgetting is a warning that names
the class and leaves nothing running.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import pkgutil
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import engine_loader
import engine_registry
from engine_loader import (
    Adopted,
    Arena,
    CudaIpcEngine,
    InProcessEngine,
    MooncakeEngine,
    Publication,
    PublishOptions,
    Seeded,
    SocketEngine,
    WholeFiles,
    adopt,
    arena_of,
    publish,
)
from engine_loader.engines.base import ClosableEngine
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import Connection
from engine_loader.tensors.host_memory import HostMemory
from engine_registry import (
    AllInstances,
    AllPulls,
    CleaningWatch,
    Election,
    HolderWatch,
    ModelIdentity,
    PullTicket,
    PullWatch,
    RankRecord,
    Registration,
    Registry,
    Watch,
)
from engine_registry.etcd.kept import Kept
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.gateway.server import Gateway
from engine_registry.lifetime import Closable
from engine_registry.registration import held
from engine_registry.registration.descriptors import DescriptorPlace, Descriptors
from engine_registry.registration.held import Share, Taken, share
from tests.support.checkout import ROOT
from tests.support.host_gpus import HostGpus
from tests.support.ranks import register
from tests.support.waiting import wait_until


def the_record(registry: Registry) -> RankRecord:
    (record,) = registry.ranks("b")
    return record


def a_ticket(registry: Registry, etcd: LocalEtcd) -> PullTicket:
    ticket = registry.pull(the_record(registry))
    assert ticket is not None
    return ticket


def a_publication(registry: Registry, etcd: LocalEtcd) -> Publication:
    return publish(
        registry,
        InProcessEngine(),
        instance="a",
        rank=0,
        world_size=1,
        tensors={"w": torch.zeros(4)},
        model=ModelIdentity("m"),
    )


def a_connection(_: Registry, etcd: LocalEtcd) -> Connection:
    config = IntegrationConfig(etcd=etcd.endpoint, namespace="/nobody-else-is-here")
    connection = Connection(config)
    assert not connection.registry.instances()
    return connection


def a_descriptor(_: Registry, etcd: LocalEtcd) -> Descriptors:
    return Descriptors(DescriptorPlace.new(), [os.memfd_create("a test's")])


def a_share(registry: Registry, etcd: LocalEtcd) -> Share:
    """Of memory that is let go at once, which it does not hear of."""
    given = a_descriptor(registry, etcd)
    with register(registry, "shared", descriptors=given):
        return share(given.place)


def an_adopted_one(registry: Registry, _: LocalEtcd) -> Adopted:
    tensors = {"w": torch.zeros(4)}
    arena_of(tensors).close()
    with publish(
        registry,
        InProcessEngine(),
        instance="shared",
        rank=0,
        world_size=1,
        tensors=tensors,
        model=ModelIdentity("m"),
        options=PublishOptions(hold_s=60),
    ):
        like = {"w": torch.zeros(4)}
        adopted = adopt(registry, ModelIdentity("m"), like, rank=0, world_size=1, shared=True)
    assert adopted is not None
    return adopted


MAKERS: dict[type[Closable], Callable[[Registry, LocalEtcd], Closable]] = {
    Connection: a_connection,
    Registry: lambda registry, etcd: Registry.connect(etcd.endpoint),
    Registration: lambda registry, etcd: register(registry),
    Watch: lambda registry, etcd: registry.watch(),
    CleaningWatch: lambda registry, etcd: registry.cleaning_watch(grace_s=1).__enter__(),
    Election: lambda registry, etcd: registry.election("x").start(),
    PullTicket: a_ticket,
    PullWatch: lambda registry, etcd: registry.watch_pulls(the_record(registry), lambda _: None),
    AllPulls: lambda registry, etcd: registry.follow_pulls(),
    HolderWatch: lambda registry, etcd: registry.watch_holders(ModelIdentity("m"), 0),
    AllInstances: lambda registry, etcd: registry.follow_instances(),
    LocalEtcd: lambda registry, etcd: LocalEtcd().start(),
    LocalCluster: lambda registry, etcd: LocalCluster(),
    Gateway: lambda registry, etcd: Gateway(registry, "q", port=0),
    CudaIpcEngine: lambda registry, etcd: CudaIpcEngine("127.0.0.1", gpus=HostGpus()),
    MooncakeEngine: lambda registry, etcd: MooncakeEngine("127.0.0.1"),
    SocketEngine: lambda registry, etcd: SocketEngine("127.0.0.1"),
    Publication: a_publication,
    Arena: lambda registry, etcd: Arena("cpu", 4096),
    Descriptors: a_descriptor,
    Share: a_share,
    Adopted: an_adopted_one,
}
OTHERS: dict[type, str] = {
    Kept: "is the base of two",
    Closable: "is their base",
    held._Connection: "is the base of the next one and Share",
    Taken: "needs a rank that has died",
    HostMemory: "lives as long as the tensors in it",
    ClosableEngine: "is the base of engines",
    InProcessEngine: "holds nothing but memory of Python",
    Seeded: "holds a publication, which warns",
    WholeFiles: "holds something only inside its block",
}


@pytest.fixture(params=MAKERS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Closable]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def make(
    kind: type[Closable], registry: Registry, shared_etcd: LocalEtcd
) -> Callable[[], Closable]:
    return lambda: MAKERS[kind](registry, shared_etcd)


@pytest.fixture(autouse=True)
def _one_rank(registry: Registry) -> Iterator[None]:
    with register(registry, "b"):
        yield


def forget(resource: list[Any]) -> None:
    """`resource` is a list, so that it is the last that refers to its one item."""
    resource.clear()
    gc.collect()


def made(make: Callable[[], Closable]) -> list[Any]:
    """Without the garbage of its making, such as tracebacks of attempts that failed."""
    resource: list[Any] = [make()]
    gc.collect()
    return resource


def listens(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_closing_twice_is_silent(kind: type[Closable], make: Callable[[], Closable]) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        resource = make()
        resource.close()
        resource.close()
        del resource
        gc.collect()
    assert [str(warning.message) for warning in warned] == []


def test_the_end_of_a_block_closes(kind: type[Closable], make: Callable[[], Closable]) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        resource = make()
        if kind in (Election, CleaningWatch, LocalEtcd, LocalCluster):
            resource.__exit__(None, None, None)  # whose block starts it, as the maker has done
        else:
            with resource as entered:
                assert entered is resource
                del entered
        del resource
        gc.collect()
    assert [str(warning.message) for warning in warned] == []


def test_forgetting_warns_with_the_name_of_the_class_and_closes(
    kind: type[Closable], make: Callable[[], Closable]
) -> None:
    before = set(threading.enumerate())
    resource = made(make)
    with pytest.warns(ResourceWarning, match=rf"^{kind.__name__} .*was never closed$") as warned:
        forget(resource)
    assert len(warned) == 1
    del warned
    wait_until(lambda: {each for each in threading.enumerate() if each.is_alive()} <= before)


def test_a_local_etcd_that_is_forgotten_does_not_go_on() -> None:
    etcd = made(lambda: LocalEtcd().start())
    endpoint, folder = etcd[0].endpoint, etcd[0].log_path.parent
    with pytest.warns(ResourceWarning, match=f"^LocalEtcd at {endpoint} was never closed$"):
        forget(etcd)
    wait_until(lambda: not listens(endpoint))
    wait_until(lambda: not folder.exists())


NOT_IMPORTED = (
    "engine_loader.digests.kernel",  # needs triton, and has functions only
    "engine_loader.engines.cuda_ipc.kernel",
    "engine_loader.integrations.sglang.",  # needs SGLang
    "engine_loader.integrations.vllm.",
)


@pytest.mark.parametrize("package", [engine_registry, engine_loader])
def test_every_context_manager_of_a_package_is_such_a_resource(package: ModuleType) -> None:
    """Those for the length of a call are functions; a class is for a resource that lives on."""
    found = set()
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.startswith(NOT_IMPORTED):
            continue
        for _, each in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if each.__module__.startswith(f"{package.__name__}.") and hasattr(each, "__exit__"):
                found.add(each)
    expected = {*MAKERS, *OTHERS}
    assert found == {each for each in expected if each.__module__.startswith(package.__name__)}


NEVER_CLOSES = """
import sys
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from engine_registry.gateway.server import Gateway
local = LocalEtcd().start()
registry = Registry.connect(local.endpoint)
watch = registry.watch()
cleaning = registry.cleaning_watch(grace_s=1).__enter__()
election = registry.election("x").start()
pulls = registry.follow_pulls()
instances = registry.follow_instances()
gateway = Gateway(registry, "q", port=0)
watch.next(0.1)
print(local.pid, local.data_dir)
"""


@pytest.mark.parametrize("option", ["default", "ignore"])
def test_a_process_that_closes_nothing_ends_all_the_same(option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", f"{option}::ResourceWarning", "-c", NEVER_CLOSES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pid, folder = done.stdout.split()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() and not Path(folder).exists())
    assert "Traceback" not in done.stderr
    assert ("was never closed" in done.stderr) == (option == "default")


KEEPS_TO_THE_LAST = """
import sys
from engine_loader import InProcessEngine
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from tests.support.ranks import register
with LocalEtcd() as local:
    registry = Registry.connect(local.endpoint)
    registration = register(registry, rank=0)
    kept = [InProcessEngine(), registry, registration]
    if {closes}:
        for each in reversed(kept):
            each.close()
    # Somebody has references to all modules, as transformers does: the interpreter then takes the
    # names of our modules away, and those of sys last.
    sys.kept = kept, dict(sys.modules)
"""


@pytest.mark.parametrize("closes", [True, False])
def test_what_outlives_the_modules_of_a_process_ends_without_a_word(closes: bool) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "default::ResourceWarning",
            "-c",
            KEEPS_TO_THE_LAST.format(closes=closes),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
