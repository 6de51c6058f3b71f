"""How weights are read that no peer has: what is seen of a function, and what is no fallback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from engine_loader.errors import Cancelled, TensorsUnusable, WeightsFileInvalid
from engine_loader.starting.reading import Call, check_fallback, reading_of
from engine_loader.tensors.destination import Destination
from engine_registry.errors import InvalidField


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_a_function_fills_dtensors_in_place_and_may_not_replace_their_parts(
    mesh: DeviceMesh,
) -> None:
    module = nn.Module()
    weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 3), mesh, [Split(0)]))
    module.w = weight
    destination = Destination(dict(module.named_parameters()), None)

    def fill() -> None:
        with torch.no_grad():
            weight.fill_(1)

    Call(fill, destination).read(None, None)
    assert torch.equal(destination.parts["w"], torch.ones(4, 3))
    replace = Call(lambda: module.to(torch.float64), destination)
    with pytest.raises(TensorsUnusable, match=r"`fallback` gave .* w: is now 96 bytes"):
        replace.read(None, None)


def test_a_function_that_was_cancelled_meanwhile_has_filled_nothing_that_counts() -> None:
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        Call(cancel.set, Destination({"w": torch.zeros(3)})).read(None, cancel)


def test_files_that_are_not_there_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsFileInvalid):
        reading_of(tmp_path / "none", Destination({"w": torch.zeros(3)}), 0)


@pytest.mark.parametrize("fallback", [None, 5, {"a": 1}, {"a"}], ids=repr)
def test_what_is_neither_a_path_nor_a_function_is_refused_by_name(fallback: Any) -> None:
    with pytest.raises(InvalidField, match=r"`fallback` .* is not valid") as caught:
        check_fallback(fallback)
    assert caught.value.details["field"] == "fallback"


@pytest.mark.parametrize("fallback", ["a", Path("a"), ["a", Path("b")], print], ids=repr)
def test_paths_and_functions_are_taken(fallback: Any) -> None:
    check_fallback(fallback)
