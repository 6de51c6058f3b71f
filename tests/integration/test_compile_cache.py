"""The compile cache of an engine that is not ours: from peers before it compiles, for peers after,
and in spite of us.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_loader import Engine, InProcessEngine, PublishOptions, Shard, publish
from engine_loader.artifacts.key import ArtifactName
from engine_loader.errors import EngineUnavailable
from engine_loader.integrations.artifacts import CompileCache
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.seat import Seat
from engine_registry import Place, Registry
from engine_registry.etcd.local import LocalEtcd


def own_engine(config: IntegrationConfig, registry: Registry) -> Engine:
    return InProcessEngine()


def no_engine(config: IntegrationConfig, registry: Registry) -> Engine:
    raise EngineUnavailable("there is none", "install one")


def compile_into(folder: Path, *kernels: str) -> None:
    """As a compiler does."""
    for kernel in kernels:
        path = folder / kernel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"code of {kernel}")


class Starts:
    """Starts of one engine after another, each with a folder of its own."""

    def __init__(self, etcd: str, namespace: str, folder: Path) -> None:
        self.settings = {"etcd": etcd, "namespace": namespace, "timeout_s": 30}
        self.folder = folder
        self.caches: list[CompileCache] = []

    def new(
        self, name: str, config: str = "c1", *, parts: bool = False, **changes: Any
    ) -> tuple[CompileCache, Path]:
        settings = {**self.settings, **changes}
        engine = settings.pop("engine", own_engine)
        cache = CompileCache(
            IntegrationConfig.of(settings),
            Seat(name, "", Place(0, 1, {})),
            "vllm",
            self.folder / name,
            lambda: {"config": config},
            entry_of=(lambda path: path.split("/")[0]) if parts else None,
            start_engine=engine,
        )
        self.caches.append(cache)
        return cache, self.folder / name


@pytest.fixture
def starts(shared_etcd: LocalEtcd, namespace: str, tmp_path: Path) -> Iterator[Starts]:
    starts = Starts(shared_etcd.endpoint, namespace, tmp_path)
    yield starts
    for cache in starts.caches:
        cache.close()


def test_the_second_start_has_what_the_first_has_compiled_and_says_so(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, theirs = starts.new("first")
    first.pull()
    compile_into(theirs, "h1/a.so", "h1/b.so")
    first.publish(graphs=(0, 2))
    second, ours = starts.new("second")
    second.pull()
    assert sorted(path.name for path in ours.rglob("*.so")) == ["a.so", "b.so"]
    second.publish(graphs=(2, 0))
    facts = second.facts()
    assert (facts["fetched"], facts["added"], facts["serves"]) == (2, 0, True)
    assert (facts["graphs_found"], facts["graphs_missed"]) == (2, 0)
    said = [record.getMessage() for record in caplog.records if "has added" in record.message]
    assert said == [
        "first/0 has fetched no files of compile cache, has found 0 graphs in its cache and "
        "missed 2, and has added 2 files, and serves all to peers",
        "second/0 has fetched 2 files of compile cache, has found 2 graphs in its cache and "
        "missed 0, and has added 0 files, and serves all to peers",
    ]


def test_when_the_first_has_left_the_second_serves_the_third(starts: Starts) -> None:
    for number, name in enumerate(("first", "second", "third")):
        cache, folder = starts.new(name)
        cache.pull()
        assert cache.facts()["fetched"] == (1 if number else 0)
        compile_into(folder, "a.so")
        cache.publish()
        if number:
            starts.caches[number - 1].close()


def test_another_configuration_compiles_by_itself(starts: Starts) -> None:
    first, theirs = starts.new("first")
    first.pull()
    compile_into(theirs, "a.so")
    first.publish()
    second, ours = starts.new("second", "c2")
    second.pull()
    assert second.facts()["fetched"] == 0
    assert not ours.exists()


def test_only_the_parts_that_a_start_has_used_are_published(
    starts: Starts, registry: Registry
) -> None:
    cache, folder = starts.new("first", parts=True)
    compile_into(folder, "old/a.so", "used/b.so")
    cache.pull()
    compile_into(folder, "new/c.so")
    cache.publish(used=[folder / "used" / "inductor_cache", "/elsewhere"])
    second, ours = starts.new("second", parts=True)
    second.pull()
    assert sorted(path.name for path in ours.iterdir()) == ["new", "used"]


def test_what_was_fetched_is_published_also_where_nothing_says_that_it_was_used(
    starts: Starts,
) -> None:
    first, folder = starts.new("first", parts=True)
    first.pull()
    compile_into(folder, "h1/a.so")
    first.publish()
    second, _ = starts.new("second", parts=True)
    second.pull()
    second.publish()
    first.close()
    third, ours = starts.new("third", parts=True)
    third.pull()
    assert (ours / "h1" / "a.so").exists()


def test_a_start_that_compiles_nothing_publishes_nothing(
    starts: Starts, registry: Registry
) -> None:
    cache, _ = starts.new("first")
    cache.pull()
    cache.publish()
    cache.publish()
    assert cache.facts()["serves"] is False
    assert registry.instances() == ()


@pytest.mark.parametrize("required", [False, True])
def test_whatever_fails_the_engine_starts_after_one_warning(
    starts: Starts, dead_address: str, caplog: pytest.LogCaptureFixture, required: bool
) -> None:
    broken: dict[str, dict[str, Any]] = {
        "etcd": {"etcd": dead_address},
        "engine": {"engine": no_engine},
    }
    for name, changes in broken.items():
        caplog.clear()
        cache, folder = starts.new(name, required=required, **changes)
        cache.pull()
        compile_into(folder, "a.so")
        cache.publish()
        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert [one.fields["event"] for one in warnings] == ["artifacts_failed"]  # type: ignore[attr-defined]
        assert (cache.facts()["added"], cache.facts()["serves"]) == (1, False)


def test_a_damaged_artifact_of_a_peer_is_one_warning_and_the_engine_offers_its_own(
    starts: Starts, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = torch.zeros(100, dtype=torch.uint8)
    with (
        InProcessEngine() as engine,
        publish(
            registry,
            engine,
            instance="damaged",
            rank=0,
            world_size=1,
            tensors={"archive": damaged},
            shards={"archive": Shard((100,), (0,))},
            model=ArtifactName("vllm", {"config": "c1"}).model,
            options=PublishOptions(digests=True),
        ),
    ):
        cache, folder = starts.new("first")
        cache.pull()
        assert "first/0 fetches no compile cache: the archive is damaged" in caplog.text
        compile_into(folder, "a.so")
        cache.publish()
        assert cache.facts()["serves"] is True


def test_a_folder_with_a_link_is_not_published_and_the_engine_starts(
    starts: Starts, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    cache, folder = starts.new("first")
    cache.pull()
    compile_into(folder, "a.so")
    (folder / "link").symlink_to("a.so")
    cache.publish()
    assert "offers no compile cache: no artifact can hold" in caplog.text
    assert registry.instances() == ()
