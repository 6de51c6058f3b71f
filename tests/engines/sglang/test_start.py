"""An unmodified SGLang starts from peers, or from its disk, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine_registry import Registry
from engine_registry.registration.held import keepers_here
from tests.engines.sglang.checkpoint import write_tied_checkpoint
from tests.engines.sglang.engines import EngineFailed, Engines, free_port
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
READ, COPIED = "with the engine's loader", "MB of weights from"
Settings = dict[str, object]


@pytest.mark.parametrize("layout", [{}, {"tp_size": 2}, {"pp_size": 2}], ids=["1", "tp2", "pp2"])
def test_the_second_engine_copies_from_the_first_and_generates_the_same(
    engines: Engines, registry: Registry, settings: Settings, model: Path, layout: dict[str, Any]
) -> None:
    ranks = layout.get("tp_size", 1) * layout.get("pp_size", 1)
    plain = engines.start(model, **layout)
    expected = plain.tokens()
    plain.close()
    first = engines.start(model, settings, **layout)
    assert len(first.lines(READ)) == ranks
    assert first.tokens() == expected
    second = engines.start(model, settings, **layout)
    assert len(second.lines(COPIED)) == ranks
    assert second.tokens() == expected
    statuses = registry.instances()
    assert [len(status.records) for status in statuses] == [ranks, ranks]
    assert statuses[0].contents == statuses[1].contents


def test_tied_weights_and_biases_are_copied(
    engines: Engines, settings: Settings, tmp_path: Path
) -> None:
    model = write_tied_checkpoint(tmp_path / "qwen2", seed=3)
    first = engines.start(model, settings)
    second = engines.start(model, settings)
    assert second.lines(COPIED)
    assert second.tokens() == first.tokens() == engines.start(model).tokens()


def test_of_engines_that_start_together_one_reads_the_disk(
    engines: Engines, settings: Settings, model: Path
) -> None:
    both = [engines.begin(model, settings) for _ in range(2)]
    tokens = [engine.ready().tokens() for engine in both]
    assert tokens[0] == tokens[1]
    assert sum(len(engine.lines(READ)) for engine in both) == 1
    assert sum(len(engine.lines(COPIED)) for engine in both) == 1


def test_an_engine_reads_its_disk_where_its_peer_has_been_killed(
    engines: Engines, settings: Settings, model: Path
) -> None:
    first = engines.start(model, settings)
    expected = first.tokens()
    first.close()
    second = engines.start(model, settings)
    assert second.lines(READ)
    assert second.tokens() == expected


@pytest.mark.parametrize("layout", [{}, {"tp_size": 2}], ids=["1", "tp2"])
def test_an_engine_adopts_what_one_has_left_that_was_killed(
    engines: Engines, registry: Registry, settings: Settings, model: Path, layout: dict[str, Any]
) -> None:
    ranks = layout.get("tp_size", 1)
    first = engines.start(model, settings | {"hold_s": 120}, **layout)
    assert first.lines("does not leave its weights") == []
    keys = {record.key for status in registry.instances() for record in status.records}
    expected = first.tokens()
    first.close()
    wait_until(lambda: keys == {kept.key for kept in keepers_here() if kept.held} & keys)
    second = engines.start(model, settings, **layout)
    assert len(second.lines("has adopted")) == ranks
    assert second.tokens() == expected
    assert not keys & {kept.key for kept in keepers_here()}


@pytest.mark.parametrize("revision", ["r1", "r2"])
def test_without_room_for_more_than_what_is_held_an_engine_adopts_or_does_as_without_it(
    engines: Engines, registry: Registry, settings: Settings, model: Path, revision: str
) -> None:
    first = engines.start(model, settings | {"hold_s": 120, "revision": "r1"})
    keys = {record.key for status in registry.instances() for record in status.records}
    expected = first.tokens()
    first.close()
    wait_until(lambda: keys == {kept.key for kept in keepers_here() if kept.held} & keys)
    more = settings | {"revision": revision}
    second = engines.start(model, more, environment={"TEST_NO_ROOM": "1"})
    assert second.lines("the model is made without memory for")
    assert len(second.lines("has adopted")) == (revision == "r1")
    assert len(second.lines(READ)) == (revision == "r2")
    assert second.tokens() == expected


def test_a_checkpoint_of_another_revision_is_no_peer(
    engines: Engines, settings: Settings, model: Path, trained: Path
) -> None:
    first = engines.start(model, settings | {"revision": "a"})
    second = engines.start(trained, settings | {"revision": "b"})
    assert second.lines(READ)
    assert first.tokens() != second.tokens()


def test_without_etcd_the_engine_reads_its_disk_after_one_warning(
    engines: Engines, settings: Settings, model: Path
) -> None:
    plain = engines.start(model)
    expected = plain.tokens()
    plain.close()
    away = f"127.0.0.1:{free_port()}"
    engine = engines.start(model, settings | {"etcd": away, "without_etcd_s": 1.0})
    assert engine.tokens() == expected
    assert len(engine.lines(READ)) == 1
    assert len([line for line in engine.lines(away) if "is not published" in line]) == 1


def test_an_engine_that_requires_etcd_fails_to_start_without_it(
    engines: Engines, settings: Settings, model: Path
) -> None:
    away = f"127.0.0.1:{free_port()}"
    with pytest.raises(EngineFailed):
        engines.start(model, settings | {"etcd": away, "without_etcd_s": 1.0, "required": True})
    assert "EtcdUnavailable" in engines.last_log()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"etdc": "10.0.0.5:2379"}, "has an unknown key: etdc: known are "),
        ({"protocol": "udp"}, "`protocol` 'udp' in the configuration of engine_registry is not"),
        ({"stage": "processed"}, "leave out `stage`, or say loaded"),
        ({"fallback_format": "gguf"}, "use one of auto, safetensors"),
    ],
)
def test_settings_that_are_not_valid_end_the_start_with_what_to_do(
    engines: Engines, settings: Settings, model: Path, wrong: Settings, said: str
) -> None:
    with pytest.raises(EngineFailed):
        engines.start(model, settings | wrong)
    assert said in engines.last_log()
