"""How an engine that is not ours starts: from peers, from its own loader, and in spite of us."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader import Engine, InProcessEngine
from engine_loader.engines.mooncake.choice import choose
from engine_loader.errors import EngineUnavailable
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import start_engine_of
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.serving import served_models
from engine_loader.integrations.starting import ModelStart
from engine_loader.integrations.tensors import loaded_tensors, runtime_tensors
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.errors import EngineRegistryError, EtcdUnavailable
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from tests.support.vllm_layers import Model, checkpoint
from tests.support.vllm_start import StartedRank, start_rank
from tests.support.waiting import wait_until

MODEL = ModelIdentity("qwen", "r1")
Started = tuple[ModelStart, nn.Linear, "Reader"]


class Reader:
    """The engine's loader of checkpoints."""

    def __init__(self, module: nn.Linear, error: Exception | None = None) -> None:
        self.module, self.error, self.calls = module, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        with torch.no_grad():
            self.module.weight.copy_(torch.arange(8.0).reshape(2, 4))


def own_engine(config: IntegrationConfig, registry: Registry) -> Engine:
    return InProcessEngine()


class Engines:
    """Starts engines one after another, as a user would start vLLM."""

    def __init__(self, etcd: str, namespace: str) -> None:
        self.settings: dict[str, Any] = {
            "etcd": etcd,
            "namespace": namespace,
            "without_etcd_s": 0.5,
            "timeout_s": 30,
        }
        self.started: list[ModelStart] = []
        self.modules: list[nn.Module] = []  # a model that is collected leaves

    def start(
        self,
        instance: str,
        settings: Mapping[str, Any] | None = None,
        *,
        model: ModelIdentity = MODEL,
        error: Exception | None = None,
        start_engine: Callable[[IntegrationConfig, Registry], Engine] = own_engine,
    ) -> Started:
        config = IntegrationConfig.of({**self.settings, **(settings or {})})
        seat = Seat(instance, "g-" + instance, Place(0, 1, {"tp": (0, 1)}))
        start = ModelStart(config, model, seat, start_engine=start_engine)
        self.started.append(start)
        module = nn.Linear(4, 2, bias=False)
        self.modules.append(module)
        reader = Reader(module, error)
        start.fill(loaded_tensors(module), reader)
        start.publish(module, loaded_tensors(module), loaded_tensors)
        return start, module, reader


@pytest.fixture
def engines(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Engines]:
    engines = Engines(shared_etcd.endpoint, namespace)
    yield engines
    for start in engines.started:
        start.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        one.getMessage()
        for one in caplog.records
        if one.levelno >= logging.WARNING and one.name.startswith("engine_loader")
    ]


def test_the_first_reads_and_the_next_one_copies_all_of_it(engines: Engines) -> None:
    first, module, reader = engines.start("a")
    second, other, unused = engines.start("b")
    assert (first.outcome().facts()["source"], reader.calls) == ("disk", 1)
    assert (second.outcome().facts()["source"], unused.calls) == ("peers", 0)
    assert second.outcome().facts()["nbytes"] == module.weight.nbytes
    assert torch.equal(module.weight, other.weight)
    assert (
        first.outcome().facts()["content"] == second.outcome().facts()["content"]
    )  # so a third reads from both
    assert str(second.outcome()).endswith("and serves them to peers")


def test_a_model_that_differs_is_read(engines: Engines) -> None:
    engines.start("a")
    other, _, reader = engines.start("b", model=ModelIdentity("qwen", "r2"))
    assert (other.outcome().facts()["source"], reader.calls) == ("disk", 1)


def test_without_etcd_the_engine_reads_after_one_warning(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines = Engines(f"127.0.0.1:{free_port('127.0.0.1')}", namespace)
    start, _, reader = engines.start("a")
    assert (reader.calls, start.serves) == (1, False)
    (line,) = warnings(caplog)
    assert "could not be reached" in line


def test_without_etcd_that_is_required_the_engine_does_not_start(namespace: str) -> None:
    engines = Engines(f"127.0.0.1:{free_port('127.0.0.1')}", namespace)
    with pytest.raises(EtcdUnavailable):
        engines.start("a", {"required": True})


def no_engine(config: IntegrationConfig, registry: Registry) -> Engine:
    raise EngineUnavailable("no transfer engine is installed", "install one")


def broken_engine(config: IntegrationConfig, registry: Registry) -> Engine:
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize(
    ("start_engine", "text"),
    [
        (no_engine, "no transfer engine is installed: install one"),
        (broken_engine, "RuntimeError: a bug of ours"),
    ],
)
def test_where_we_fail_the_engine_reads_after_one_warning(
    engines: Engines,
    caplog: pytest.LogCaptureFixture,
    start_engine: Callable[[IntegrationConfig, Registry], Engine],
    text: str,
) -> None:
    start, _, reader = engines.start("a", start_engine=start_engine)
    assert (reader.calls, start.serves) == (1, False)
    (line,) = warnings(caplog)
    assert text in line


def test_a_protocol_that_is_not_here_is_one_warning_with_the_remedy(
    engines: Engines,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        "engine_loader.engines.mooncake.engine.choose", partial(choose, root=tmp_path)
    )
    settings = {"protocol": "rdma", "host": "127.0.0.1"}
    _, _, reader = engines.start("a", settings, start_engine=start_engine_of)
    assert reader.calls == 1
    (line,) = warnings(caplog)
    assert line.endswith("say tcp")


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Engines over sockets have it from their environment."""
    file = tmp_path / "token"
    file.write_text("the token of this fleet\n")
    monkeypatch.setenv("ENGINES_SOCKET_TOKEN_FILE", str(file))
    return file


OVER_SOCKETS = {"protocol": "socket", "host": "127.0.0.1"}


def test_engines_over_sockets_take_their_credentials_from_the_environment(
    engines: Engines, token: Path
) -> None:
    engines.start("a", OVER_SOCKETS, start_engine=start_engine_of)
    second, _, unused = engines.start("b", OVER_SOCKETS, start_engine=start_engine_of)
    assert (second.outcome().facts()["source"], unused.calls) == ("peers", 0)


def test_an_engine_with_another_token_than_its_peers_reads_and_says_why(
    engines: Engines,
    token: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fleet = tmp_path / "fleet"
    engines.start("a", OVER_SOCKETS, start_engine=start_engine_of)
    fleet.write_text("the token of another fleet\n")
    monkeypatch.setenv("ENGINES_SOCKET_TOKEN_FILE", str(fleet))
    second, _, reader = engines.start("b", OVER_SOCKETS, start_engine=start_engine_of)
    assert (second.outcome().facts()["source"], reader.calls) == ("disk", 1)
    assert any("it has another token than this engine" in line for line in warnings(caplog))


def test_an_engine_whose_token_is_missing_reads_after_one_warning_with_the_variable(
    engines: Engines, token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token.unlink()
    _, _, reader = engines.start("a", OVER_SOCKETS, start_engine=start_engine_of)
    assert reader.calls == 1
    (line,) = warnings(caplog)
    assert "ENGINES_SOCKET_TOKEN_FILE" in line


def test_where_we_fail_and_are_required_the_engine_does_not_start(engines: Engines) -> None:
    with pytest.raises(EngineUnavailable):
        engines.start("a", {"required": True}, start_engine=no_engine)


def test_an_error_of_the_engines_loader_passes_through_and_it_is_not_called_again(
    engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader(nn.Linear(4, 2, bias=False), OSError("the disk is gone"))
    start = ModelStart(
        IntegrationConfig.of(engines.settings),
        MODEL,
        Seat("a", "g", Place(0, 1)),
        start_engine=own_engine,
    )
    with pytest.raises(OSError, match="the disk is gone"):
        start.fill(loaded_tensors(reader.module), reader)
    assert (reader.calls, warnings(caplog)) == (1, [])


def test_giving_up_is_one_warning_and_peers_find_nothing(
    engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    start, _, _ = engines.start("a")
    start.give_up("post-processing has overwritten the weights", "say `processed`")
    assert not start.serves
    assert len(warnings(caplog)) == 1
    _, _, reader = engines.start("b")
    assert reader.calls == 1


def test_giving_up_where_we_are_required_is_an_error(engines: Engines) -> None:
    start, _, _ = engines.start("a", {"required": True})
    with pytest.raises(EngineRegistryError, match="overwritten"):
        start.give_up("post-processing has overwritten the weights", "say `processed`")


def test_changed_weights_are_the_next_version(engines: Engines) -> None:
    start, module, _ = engines.start("a")
    start.pause()
    start.pause()
    with torch.no_grad():
        module.weight.fill_(7)
    start.republish()
    assert start.publication is not None
    assert (start.publication.version, start.publication.paused) == (1, False)
    other, copied, _ = engines.start("b")
    assert torch.equal(copied.weight, module.weight)
    assert other.outcome().facts()["version"] == 1


def test_weights_that_come_back_unchanged_are_served_on(engines: Engines) -> None:
    start, module, _ = engines.start("a")
    start.pause()
    start.resume()
    assert start.outcome().facts()["version"] == 0
    _, copied, _ = engines.start("b")
    assert torch.equal(copied.weight, module.weight)


def test_a_model_that_is_collected_leaves_the_registry(engines: Engines) -> None:
    start, module, reader = engines.start("a")
    assert start in served_models()
    key = start.publication.record.key if start.publication else ""
    registry = Registry.connect(engines.settings["etcd"], namespace=engines.settings["namespace"])
    with registry:
        assert [record.key for status in registry.instances() for record in status.records] == [key]
        del module, reader.module
        engines.modules.clear()
        gc.collect()
        wait_until(lambda: not registry.instances())


def test_ranks_of_another_layout_copy_their_parts(engines: Engines) -> None:
    def start(instance: str, rank: int, size: int, seed: int) -> StartedRank:
        started = start_rank(
            engines.settings, instance, rank=rank, size=size, seed=seed, start_engine=own_engine
        )
        engines.started.append(started.start)
        return started

    def expected(rank: int, size: int) -> dict[str, torch.Tensor]:
        model = Model(rank, size)
        model.load_weights(checkpoint())
        return runtime_tensors(model)

    one = start("a", 0, 1, seed=0)
    pair = [start("b", rank, 2, seed=1) for rank in range(2)]
    engines.started[0].close()
    again = start("c", 0, 1, seed=2)  # from the pair
    assert [rank.source for rank in (one, *pair, again)] == ["disk", "peers", "peers", "peers"]
    for started, (rank, size) in zip((*pair, again), ((0, 2), (1, 2), (0, 1)), strict=True):
        for name, tensor in expected(rank, size).items():
            assert torch.equal(started.tensors()[name].float(), tensor.float()), name


def test_weights_that_have_changed_are_copied_into_another_layout(engines: Engines) -> None:
    one = start_rank(engines.settings, "a", start_engine=own_engine)
    engines.started.append(one.start)
    one.start.pause()
    one.model.load_state_dict({name: torch.ones_like(t) for name, t in one.tensors().items()})
    one.start.republish()
    half = start_rank(engines.settings, "b", rank=1, size=2, start_engine=own_engine)
    engines.started.append(half.start)
    assert half.start.copied_version == 1
    assert all(bool((tensor.float() == 1).all()) for tensor in half.tensors().values())
