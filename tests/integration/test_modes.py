"""Modes of torch that the caller is in: publications and loads do in them what they do outside."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine_loader import (
    InProcessEngine,
    Publication,
    Shard,
    load,
    load_module,
    load_or_seed,
    publish,
)
from engine_loader.files.disk import read_into
from engine_loader.files.weights import read_weights
from engine_registry import ModelIdentity, Registry
from tests.support.options import for_load, for_publish

MODEL = ModelIdentity("m")
Mode = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_device_is_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype_is_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Mode] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "default device": default_device_is_meta,
    "default dtype": default_dtype_is_double,
    "fake": FakeTensorMode,
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
inside_and_outside = pytest.mark.parametrize(
    ("first", "second"),
    [(torch.inference_mode, nullcontext), (nullcontext, torch.inference_mode)],
    ids=["inside, then outside", "outside, then inside"],
)


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"weight": values(seed, 5, 7), "bias": values(seed + 1, 5)}


def zeros() -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(5, 7), "bias": torch.zeros(5)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].detach().equal(other[name]) for name in one)


@pytest.fixture
def offer(registry: Registry, stack: ExitStack) -> Callable[..., Publication]:
    def offer(tensors: dict[str, torch.Tensor], **options: Any) -> Publication:
        given = {
            "instance": "a",
            "rank": 0,
            "world_size": 1,
            "model": MODEL,
            "ttl_s": 3.0,
            "digests": True,
            **options,
        }
        return stack.enter_context(
            publish(registry, InProcessEngine(), tensors=tensors, **for_publish(given))
        )

    return offer


def load_a(registry: Registry, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    load(
        registry,
        InProcessEngine(),
        "a",
        rank=0,
        tensors=tensors,
        timeout_s=2.0,
        **for_load({"verify": "digest", **options}),
    )


@every_mode
def test_weights_are_published_updated_loaded_and_closed_in_any_mode(
    registry: Registry, offer: Callable[..., Publication], mode: Mode
) -> None:
    served, found, new = weights(1), zeros(), weights(9)
    with mode():
        publication = offer(served)
        load_a(registry, found)
    assert same(found, served)
    with mode(), publication.update():
        for name, tensor in served.items():
            ctypes.memmove(tensor.data_ptr(), new[name].data_ptr(), tensor.nbytes)
    with mode():
        load_a(registry, found)
        publication.close()
    assert same(found, new)


@inside_and_outside
def test_published_in_one_mode_weights_are_updated_and_closed_in_the_other(
    registry: Registry, offer: Callable[..., Publication], first: Mode, second: Mode
) -> None:
    with first():
        served = weights(1)
        publication = offer(served)
    with second(), publication.update(), torch.inference_mode():
        for tensor in served.values():
            tensor.add_(1)
    with first():
        found = zeros()
    with second():
        load_a(registry, found)
        publication.close()
    assert same(found, served)
    assert publication.record.version == 1


@every_mode
def test_parts_are_put_together_in_any_mode(
    registry: Registry, offer: Callable[..., Publication], mode: Mode
) -> None:
    whole = values(1, 6, 8)
    for rank in range(2):
        part = whole[:, 4 * rank : 4 * rank + 4].contiguous()
        offer({"w": part}, rank=rank, world_size=2, shards={"w": Shard((6, 8), (0, 4 * rank))})
    with torch.inference_mode():
        found = {"w": torch.zeros(6, 8)}
    with mode():
        load_a(registry, found, shards={"w": Shard((6, 8), (0, 0))})
    assert same(found, {"w": whole})


@every_mode
def test_a_module_without_memory_is_filled_in_any_mode_and_can_be_trained(
    registry: Registry, offer: Callable[..., Publication], mode: Mode
) -> None:
    served = weights(1)
    offer(served)
    with torch.device("meta"):
        module = nn.Linear(7, 5)
    with mode():
        load_module(registry, InProcessEngine(), "a", module, rank=0)
    assert same(dict(module.state_dict()), served)
    module(values(3, 7)).sum().backward()
    with torch.no_grad():
        module.weight.zero_()
    assert module.weight.grad is not None
    assert not module.weight.is_inference()


@every_mode
def test_files_are_read_in_any_mode(tmp_path: Path, mode: Mode) -> None:
    served = weights(1)
    save_file(served, tmp_path / "model.safetensors")
    found = zeros()
    with mode():
        read_into(tmp_path, found)
        read = read_weights(tmp_path)
    assert same(found, served)
    assert same(read, served)
    assert not any(tensor.is_inference() for tensor in read.values())


@every_mode
def test_the_first_reads_files_and_the_second_reads_from_it_in_any_mode(
    registry: Registry, stack: ExitStack, tmp_path: Path, mode: Mode
) -> None:
    served, first, second = weights(1), zeros(), zeros()
    save_file(served, tmp_path / "model.safetensors")
    with mode():
        for instance, tensors in (("a", first), ("b", second)):
            weights_of = load_or_seed(
                registry,
                InProcessEngine(),
                MODEL,
                tensors=tensors,
                fallback=tmp_path,
                instance=instance,
                rank=0,
                world_size=1,
            )
            stack.enter_context(weights_of)
    assert same(first, served)
    assert same(second, served)
