"""A rank starts while etcd is away, late, silent, or refuses it: from its disk, and within the time
that it was given. It is published as soon as that is possible.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import engine_loader.files.disk
from engine_loader import InProcessEngine, Seeded
from engine_registry import Registry
from engine_registry.errors import EtcdRefused, EtcdUnavailable, InvalidField
from engine_registry.etcd.local import LocalEtcd
from tests.integration.test_seeding import events, ready, runs, start
from tests.support.faults import etcdctl
from tests.support.processes.start import content
from tests.support.waiting import wait_until

FOREVER_S = 10_000.0  # a test that waited for so long would never end


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(content(), path)
    return path


def lazily(endpoint: str, timeout_s: float = 3.0, **options: Any) -> Registry:
    return Registry.connect(endpoint, timeout_s=timeout_s, lazy=True, **options)


def unpublished(seeded: Seeded) -> type:
    assert (seeded.source, seeded.publication) == ("disk", None)
    return type(seeded.unpublished)


def silence(etcd: LocalEtcd) -> None:
    """It stays, and answers nothing."""
    etcd.pause()


def end(etcd: LocalEtcd) -> None:
    etcd.kill()


@pytest.mark.parametrize("break_it", [end, silence])
def test_without_etcd_from_the_beginning_the_disk_is_read_with_one_warning(
    own_etcd: LocalEtcd,
    path: Path,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[LocalEtcd], None],
) -> None:
    break_it(own_etcd)
    try:
        with lazily(own_etcd.endpoint) as registry, InProcessEngine() as engine:
            with (
                caplog.at_level(logging.INFO),
                start(registry, engine, path, without_etcd_s=1) as seeded,
            ):
                assert unpublished(seeded) is EtcdUnavailable
                assert "could not be reached for" in seeded.reason
    finally:
        if break_it is silence:
            own_etcd.resume()
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("engine_loader") and record.levelno >= logging.WARNING
    ]
    assert len(warnings) == 1
    assert own_etcd.endpoint in warnings[0]
    assert "check the address" in warnings[0]
    assert events(caplog, "seed_unpublished") == ["INFO"]


def test_an_etcd_that_comes_late_is_waited_for(
    own_etcd: LocalEtcd, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_etcd.kill()
    with (
        caplog.at_level(logging.INFO),
        lazily(own_etcd.endpoint) as registry,
        InProcessEngine() as engine,
        ThreadPoolExecutor() as pool,
    ):
        starting = pool.submit(start, registry, engine, path, without_etcd_s=FOREVER_S)
        wait_until(lambda: bool(events(caplog, "watch_lost")))
        own_etcd.start()
        with starting.result(60) as seeded:
            assert (seeded.source, seeded.reason, seeded.unpublished) == ("disk", "", None)
            assert ready(registry) == ["a"]


def test_peers_that_an_etcd_brings_back_are_loaded_from(
    own_etcd: LocalEtcd, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        lazily(own_etcd.endpoint) as registry,
        InProcessEngine() as first,
        InProcessEngine() as second,
        runs(registry, first, "runs"),
        ThreadPoolExecutor() as pool,
    ):
        own_etcd.kill()
        starting = pool.submit(
            start, registry, second, path / "is not there", without_etcd_s=FOREVER_S
        )
        wait_until(lambda: bool(events(caplog, "sources_unknown")))
        own_etcd.start()
        with starting.result(60) as seeded:
            assert (seeded.source, seeded.reason) == ("peers", "")


def test_an_etcd_that_comes_while_the_disk_is_read_has_the_rank_in_the_end(
    own_etcd: LocalEtcd, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_etcd.kill()
    read = engine_loader.files.disk.DiskRead.read

    def read_while_it_comes(*args: Any) -> object:
        own_etcd.start()
        return read(*args)

    monkeypatch.setattr(engine_loader.files.disk.DiskRead, "read", read_while_it_comes)
    with lazily(own_etcd.endpoint) as registry, InProcessEngine() as engine:
        with start(registry, engine, path, without_etcd_s=0.5) as seeded:
            assert (seeded.source, seeded.unpublished) == ("disk", None)
            assert "could not be reached" in seeded.reason
            assert ready(registry) == ["a"]


def test_an_etcd_that_refuses_the_password_is_not_waited_for(
    own_etcd: LocalEtcd, path: Path
) -> None:
    for command in ("user add root:secret", "user grant-role root root", "auth enable"):
        etcdctl(own_etcd.endpoint, *command.split())
    wrong = {"user": "root", "password": "guess"}  # which etcd takes its time to check
    with lazily(own_etcd.endpoint, 60, **wrong) as registry, InProcessEngine() as engine:
        with start(registry, engine, path, without_etcd_s=FOREVER_S, timeout_s=FOREVER_S) as seeded:
            assert unpublished(seeded) is EtcdRefused
            assert "refuses the credentials" in seeded.reason
            assert "guess" not in seeded.reason
        with pytest.raises(EtcdRefused):
            start(registry, engine, path, without_etcd_s=FOREVER_S, required=True)


def test_where_etcd_is_required_the_start_fails_without_it(path: Path, dead_address: str) -> None:
    with (
        lazily(dead_address) as registry,
        InProcessEngine() as engine,
        pytest.raises(EtcdUnavailable, match=r"could not be reached for .* check the address"),
    ):
        start(registry, engine, path / "is not read", without_etcd_s=0.5, required=True)


def test_a_rank_that_requires_etcd_outlives_its_end_once_it_is_registered(
    own_etcd: LocalEtcd, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = engine_loader.files.disk.DiskRead.read

    def read_without(*args: Any) -> object:
        own_etcd.kill()
        return read(*args)

    monkeypatch.setattr(engine_loader.files.disk.DiskRead, "read", read_without)
    with lazily(own_etcd.endpoint) as registry, InProcessEngine() as engine:
        with start(registry, engine, path, required=True) as seeded:
            assert seeded.publication is not None
            own_etcd.start()
            wait_until(lambda: ready(registry) == ["a"])


def test_a_registry_that_connects_lazily_asks_nothing_and_refuses_what_cannot_be() -> None:
    with lazily("127.0.0.1:1") as registry:
        with pytest.raises(EtcdUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
            registry.instances()
    wrongs: list[dict[str, Any]] = [
        {"endpoints": "nonsense"},
        {"user": "alone"},
        {"timeout_s": 0},
        {"key": "k"},
    ]
    for wrong in wrongs:
        with pytest.raises(InvalidField):
            Registry.connect(**{"endpoints": "127.0.0.1:1", "lazy": True, **wrong})


def test_a_registry_that_connects_lazily_works_once_etcd_is_there(own_etcd: LocalEtcd) -> None:
    own_etcd.kill()
    with lazily(own_etcd.endpoint) as registry:
        with pytest.raises(EtcdUnavailable, match="check the address"):
            registry.instances()
        own_etcd.start()
        wait_until(lambda: _answers(registry))
        assert registry.instances() == ()


def _answers(registry: Registry) -> bool:
    try:
        registry.instances()
    except EtcdUnavailable:
        return False
    return True
