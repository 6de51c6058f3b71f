"""etcd in the place of SGLang's node 0: who registers, who is read, and what happens without it."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from engine_loader.errors import TornRead
from engine_loader.integrations.config import IntegrationConfig
from engine_registry import RankRecord
from engine_registry.errors import EtcdUnavailable, InvalidField
from tests.support.builders import a_record
from tests.support.sglang import HookRegistry, Process

URL = "http://10.0.0.9:30000"


class Registry:
    """Knows how many readers each seed has."""

    def __init__(self) -> None:
        self.readers: dict[str, int] = {}

    def pulls(self, record: RankRecord) -> int:
        return self.readers.get(record.instance, 0)


class Reading:
    """Of a seed by its name."""

    torn: set[str]

    def __init__(self, _: object, record: RankRecord, __: object) -> None:
        self._name = record.instance

    @property
    def answer(self) -> tuple[str, dict[str, Any]]:
        return self._name, {}

    def check(self) -> None:
        if self._name in self.torn:
            raise TornRead(f"{self._name} changed")

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Running:
    """A bootstrap in a process of SGLang, whose own transfer says where it read from."""

    def __init__(self, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        self.process = process
        self.module: Any = importlib.import_module("engine_loader.integrations.sglang.bootstrap")
        self.registry = Registry()
        self.seeds: list[RankRecord] = []
        self.published: list[Any] = []
        self.model = nn.Linear(1, 1)
        self.read_from: list[str] = []
        self.error: Exception | None = None
        Reading.torn = set()
        monkeypatch.setattr(self.module, "Reading", Reading)
        monkeypatch.setattr(self.module, "connect_registry", lambda _: self.registry)
        monkeypatch.setattr(self.module, "find_peers", lambda *_, **__: self._found())
        monkeypatch.setattr(self.module, "publish_seed", self._publish)
        monkeypatch.setattr(self.module, "updates_are_hooked", lambda: True)
        self.settings: dict[str, Any] = {}

    def bootstrap(self) -> Any:
        return self.module.Bootstrap(IntegrationConfig.of(self.settings))

    def load(self, bootstrap: Any) -> bool:
        def original(*_: object) -> bool:
            session, _weights = bootstrap.find(lambda url, _: (url, None), URL, 0)
            self.read_from.append(session)
            return session is not None

        return bool(bootstrap.load(original, None, self.model, None, URL, 0))

    def transporter(self, weight_info: object = None) -> Any:
        return SimpleNamespace(model=self.model, weight_info=weight_info or {"w": (1, 2, 3)})

    def _found(self) -> list[RankRecord]:
        if self.error is not None:
            raise self.error
        return self.seeds

    def _publish(self, *arguments: Any) -> object:
        if self.error is not None:
            raise self.error
        self.published.append(arguments)
        return SimpleNamespace(pause=None)


def a_seed(name: str, number: int) -> RankRecord:
    return a_record(instance=name, incarnation=f"{number:032x}")


@pytest.fixture
def running(sglang: Process, monkeypatch: pytest.MonkeyPatch) -> Running:
    return Running(sglang, monkeypatch)


def test_the_seed_with_the_fewest_readers_is_read(running: Running) -> None:
    running.seeds = [a_seed("busy", 1), a_seed("idle", 2)]
    running.registry.readers = {"busy": 3, "idle": 1}
    assert running.load(running.bootstrap())
    assert running.read_from == ["idle"]


def test_after_a_seed_that_changed_the_next_one_is_read(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.seeds = [a_seed("changing", 1), a_seed("still", 2)]
    Reading.torn = {"changing"}
    with caplog.at_level(logging.WARNING):
        assert running.load(running.bootstrap())
    assert running.read_from == ["changing", "still"]
    assert caplog.messages == [
        "the next seed is tried after /engines/changing/0: changing changed",
    ]


def test_where_etcd_has_no_seed_sglang_asks_the_one_that_it_was_given(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert running.load(running.bootstrap())
    assert running.read_from == [URL]
    (line,) = caplog.messages
    assert line.endswith(f"that can be read: SGLang asks {URL}")


def test_what_fails_of_this_library_is_one_warning_unless_it_is_required(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.error = EtcdUnavailable("etcd is away", "start it")
    with caplog.at_level(logging.WARNING):
        assert running.load(running.bootstrap())
    assert running.read_from == [URL]
    assert caplog.messages == [f"SGLang asks {URL} for a seed: etcd is away: start it"]
    running.settings = {"required": True}
    with pytest.raises(EtcdUnavailable):
        running.load(running.bootstrap())


def test_a_seed_registers_in_etcd_and_not_at_node_0(running: Running) -> None:
    running.process.parallel.tp_rank, running.process.parallel.tp_size = 1, 2
    running.process.parallel.pp_rank, running.process.parallel.pp_size = 1, 2
    running.settings = {"labels": {"team": "search"}, "location": "eu-1a"}
    at_node_0: list[object] = []
    running.bootstrap().register(at_node_0.append, running.transporter())
    ((_, _, tensors, _, seat, _, labels, location),) = running.published
    assert (at_node_0, labels, location) == ([], {"team": "search"}, "eu-1a")
    assert tensors.keys() == {"weight", "bias"}
    assert (seat.place.rank, seat.place.world_size) == (3, 4)


def test_a_seed_that_cannot_register_in_etcd_registers_at_node_0(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.error = EtcdUnavailable("etcd is away", "start it")
    at_node_0: list[object] = []
    transporter = running.transporter()
    with caplog.at_level(logging.WARNING):
        running.bootstrap().register(at_node_0.append, transporter)
    assert at_node_0 == [transporter]
    (line,) = caplog.messages
    assert "is no seed in etcd: etcd is away" in line
    running.settings = {"required": True}
    with pytest.raises(EtcdUnavailable):
        running.bootstrap().register(at_node_0.append, transporter)


@pytest.mark.parametrize(("wants", "seeds"), [(True, 1), (False, 0)])
def test_an_engine_that_has_read_from_a_seed_is_one_if_it_was_asked_to(
    running: Running, wants: bool, seeds: int
) -> None:
    started = running.process.model
    started.remote_instance_weight_loader_start_seed_via_transfer_engine = wants
    bootstrap = running.bootstrap()
    for _ in range(2):
        bootstrap.loaded(lambda _: None, running.transporter())
    assert len(running.published) == seeds


def test_the_hooks_are_registered_once(running: Running) -> None:
    running.module.hook_transfer({"etcd": "10.0.0.5:2379"})
    running.module.hook_transfer({"etcd": "10.0.0.5:2379"})
    assert sorted(target.rpartition(".")[2] for target in HookRegistry._hooks) == [
        "_register_to_engine_info_bootstrap",
        "get_remote_instance_transfer_engine_info_per_rank",
        "load_model_from_remote_instance_by_transfer_engine",
        "maybe_register_and_publish_weight_info",
    ]
    assert {len(hooks) for hooks in HookRegistry._hooks.values()} == {1}


def test_settings_that_are_not_valid_are_refused(running: Running) -> None:
    with pytest.raises(InvalidField, match="unknown key: etdc"):
        running.module.hook_transfer({"etdc": "10.0.0.5:2379"})
    assert HookRegistry._hooks == {}
