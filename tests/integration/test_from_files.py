"""A rank that registers with files: it is there, as loading, while they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import InProcessEngine, Publication, PublishOptions
from engine_loader.files.folder import files_of
from engine_loader.files.memory import memory_for
from engine_loader.files.stored import Files
from engine_loader.starting.from_files import publish_files
from engine_loader.transfer.progress import OnProgress
from engine_registry import InstanceState, ModelIdentity, RankState, Registry
from engine_registry.errors import RankConflict
from engine_registry.etcd.local import LocalEtcd
from tests.support.terminal import on_terminal
from tests.support.waiting import wait_until

WEIGHTS = {"w": torch.arange(1000, dtype=torch.float32)}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    return Files(files_of(path))


def publish(
    registry: Registry, engine: InProcessEngine, files: Files, progress: OnProgress
) -> tuple[Publication, dict[str, torch.Tensor]]:
    tensors = memory_for(files)
    where: dict[str, Any] = {"instance": "a", "rank": 0, "world_size": 1, "topology": {}}
    return (
        publish_files(
            registry,
            engine,
            files,
            tensors,
            **where,
            shards={},
            model=ModelIdentity("m"),
            options=PublishOptions(digests=True),
            progress=progress,
        ),
        tensors,
    )


def test_a_rank_is_listed_as_loading_while_it_reads_and_as_ready_with_all_of_it(
    registry: Registry, files: Files
) -> None:
    seen: list[RankState] = []
    with InProcessEngine() as engine:
        publication, tensors = publish(
            registry, engine, files, lambda _: seen.append(registry.ranks("a")[0].state)
        )
        with publication:
            assert set(seen) == {RankState.LOADING}
            assert registry.instance("a").state is InstanceState.READY
            assert registry.ranks("a")[0].content == publication.content
            assert torch.equal(tensors["w"], WEIGHTS["w"])


def test_a_rank_that_is_taken_is_refused_before_a_byte_is_read(
    registry: Registry, files: Files
) -> None:
    read: list[int] = []
    with InProcessEngine() as engine, publish(registry, engine, files, lambda _: None)[0]:
        with pytest.raises(RankConflict):
            publish(registry, engine, files, lambda progress: read.append(progress.nbytes))
    assert read == []


def test_a_rank_whose_read_is_interrupted_is_gone(registry: Registry, files: Files) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with InProcessEngine() as engine, pytest.raises(KeyboardInterrupt):
        publish(registry, engine, files, interrupt)
    assert registry.instance("a").state is InstanceState.GONE


def test_the_command_shows_a_bar_on_a_terminal(
    shared_etcd: LocalEtcd, namespace: str, files: Files
) -> None:
    args = ("--weights", str(files.paths[0]), "--host", "127.0.0.1", "--namespace", namespace)
    env = {"ENGINES_ETCD": shared_etcd.endpoint}
    with on_terminal(
        "register", "a", "--rank", "0", "--world-size", "1", *args, env=env
    ) as terminal:
        wait_until(lambda: "registered a/0 of 1" in terminal.said)
        before = terminal.said.split("registered a/0 of 1")[0]
        assert "a/0 " in before
        assert "bytes" in before
        assert "━" in before
