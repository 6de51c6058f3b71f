"""A real vLLM that follows a trainer's snapshots by a mirror in the host's memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import Publication, Snapshots, SocketEngine, publish_state_dict
from engine_loader.options import PublishOptions
from engine_registry import ModelIdentity, Registry
from tests.engines.vllm.conftest import Engine, Engines
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
Checkpoint = Callable[..., str]
TRANSFER, PLAIN = {"backend": "engine_registry"}, ("plain_linear_layers",)
# of each: the share of elements that change, in tensors with this part in their names
STEPS = ((0.02, ""), (0.02, "layers.2."), (0.02, ""))


class Trainer:
    """Trains the weights of a checkpoint, and publishes snapshots with deltas."""

    def __init__(self, folder: str, publication: Publication, state: dict[str, torch.Tensor]):
        self._folder = Path(folder)
        self._publication = publication
        self._state = state

    def step(self, share: float, part: str = "") -> int:
        """Changes a share of the elements of each tensor with this part in its name; the version
        that this makes.
        """
        random = torch.Generator().manual_seed(self._publication.version or 0)
        for name, tensor in self._state.items():
            if part in name:
                chosen = torch.rand(tensor.shape, generator=random) < share
                tensor[chosen] += 1
        self._publication.snapshot()
        return int(self._publication.version or 0)

    def save(self, folder: Path) -> str:
        """A checkpoint of the weights as they are now."""
        shutil.copytree(self._folder, folder)
        save_file(self._state, folder / "model.safetensors", {"format": "pt"})
        return str(folder)


@contextmanager
def training(registry: Registry, folder: str) -> Iterator[Trainer]:
    state = load_file(Path(folder, "model.safetensors"))
    with (
        SocketEngine("127.0.0.1") as engine,
        publish_state_dict(
            registry,
            engine,
            state,
            instance="trainer",
            rank=0,
            world_size=1,
            model=ModelIdentity("policy"),
            options=PublishOptions(snapshots=Snapshots(count=3, deltas=4, changed=0.1)),
        ) as publication,
    ):
        yield Trainer(folder, publication, state)


def follow(engine: Engine, registry: Registry, mirror: bool) -> None:
    engine.ask(
        "follow",
        init_info={
            "source": "trainer",
            "etcd": str(registry.config),
            "namespace": registry.config.namespace,
            "host": "127.0.0.1",
            "protocol": "socket",
            "mirror": mirror,
            "timeout_s": 5,
        },
    )


def update_when_mirrored(engine: Engine, version: int) -> None:
    """vLLM serves until the mirrors of all workers have the version."""

    def updated() -> bool:
        try:
            engine.ask("update", update_info={"version": version, "wait": False})
        except AssertionError as exc:
            if f"the mirror does not have version {version} of trainer yet" not in str(exc):
                raise
            return False
        return True

    wait_until(updated, 60)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_three_versions_are_loaded_while_vllm_serves_and_are_those_of_checkpoints(
    engines: Engines,
    checkpoint: Checkpoint,
    registry: Registry,
    tmp_path: Path,
    kind: str,
    tp: int,
) -> None:
    how: dict[str, Any] = {"tensor_parallel_size": tp, "patches": PLAIN}
    with training(registry, checkpoint(kind, seed=7)) as trainer:
        engine = engines.start(checkpoint(kind), weight_transfer_config=TRANSFER, **how)
        follow(engine, registry, mirror=True)
        engine.ask("update", update_info={})
        everything = engine.ask("last_update")[0]["changed"]
        for number, (share, part) in enumerate(STEPS):
            before = engine.generate()
            version = trainer.step(share, part)
            assert engine.generate() == before
            update_when_mirrored(engine, version)
            expected = engines.start(trainer.save(tmp_path / str(number)), **how)
            assert engine.ask("checksums") == expected.ask("checksums")
            assert engine.generate() == expected.generate() != before
            expected.close()
            for last in engine.ask("last_update"):
                assert last["version"] == version
                assert 0 < last["changed"] <= (everything / 2 if part else everything)
        assert len(engine.lines("0.0 of")) == len(STEPS) * tp  # but for the first, deltas did
        assert not engine.lines("Linear: Failed to load weights")


@pytest.mark.parametrize("kind", ["llama", "llama-int8", "qwen3moe"])
def test_updates_by_a_mirror_do_what_others_do(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, kind: str
) -> None:
    """Also where vLLM's reload on CPUs does not do what a start does."""
    with training(registry, checkpoint(kind, seed=7)) as trainer:
        both = [engines.start(checkpoint(kind), weight_transfer_config=TRANSFER) for _ in range(2)]
        for engine, mirror in zip(both, (True, False), strict=True):
            follow(engine, registry, mirror=mirror)
        for share, part in STEPS:
            version = trainer.step(share, part)
            for engine in both:
                engine.ask("update", update_info={"version": version})
            first, second = both
            assert first.ask("checksums") == second.ask("checksums")
            assert first.generate() == second.generate()
        handed, all_of_them = [engine.ask("last_update")[0]["changed"] for engine in both]
        assert handed == all_of_them


@pytest.mark.parametrize("tp", [1, 2])
def test_a_trainer_that_dies_leaves_vllm_with_the_weights_that_it_has(
    engines: Engines, checkpoint: Checkpoint, registry: Registry, tp: int
) -> None:
    engine = engines.start(
        checkpoint("llama"), weight_transfer_config=TRANSFER, tensor_parallel_size=tp
    )
    with training(registry, checkpoint("llama", seed=7)):
        follow(engine, registry, mirror=True)
        engine.ask("update", update_info={})
        before = engine.generate()
    for _ in range(2):
        with pytest.raises(AssertionError, match="'trainer' is not registered"):
            engine.ask("update", update_info={"version": 1})
    assert engine.generate() == before
    with training(registry, checkpoint("llama", seed=9)) as trainer:
        engine.ask("update", update_info={"version": trainer.step(0.02)})
        assert engine.generate() != before
