"""Modules that are built without memory for their large parameters, and get it later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engine_loader.tensors.deferred import deferred_parameters

CPU = torch.device("cpu")
MIB = 1 << 20


class Marked(nn.Parameter):
    """As engines have them."""


class Layer(nn.Module):
    """A large tensor that a checkpoint fills, one that it fills in part, and a short one."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        weight: Any = Marked(torch.empty(MIB // 2, dtype=dtype), requires_grad=False)
        self.register_parameter("weight", weight)
        weight.loader = self.load  # after it is registered, as vLLM does
        self.padded = nn.Parameter(torch.zeros(512, MIB // 1024).t())
        self.bias = nn.Parameter(torch.ones(8))

    def load(self) -> None: ...


def built(make: Callable[[], nn.Module] = lambda: nn.Sequential(Layer(), Layer())) -> Any:
    with deferred_parameters(CPU) as deferred:
        module = make()
    return module, deferred


def test_large_parameters_have_no_memory_and_stay_what_they_are() -> None:
    module, deferred = built()
    for layer in module:
        assert (layer.weight.is_meta, layer.padded.is_meta, layer.bias.is_meta) == (
            True,
            True,
            False,
        )
        assert type(layer.weight) is Marked
        assert vars(layer.weight) == {"loader": layer.load}
        assert (layer.weight.requires_grad, layer.padded.requires_grad) == (False, True)
        assert layer.padded.stride() == (1, MIB // 1024)
    assert deferred.nbytes == sum(
        parameter.nbytes for parameter in module.parameters() if parameter.is_meta
    )


def test_they_get_memory_with_the_values_that_they_had() -> None:
    module, deferred = built()
    before = dict(module.named_parameters())
    deferred.give_memory()
    deferred.give_memory()
    assert deferred.nbytes == 0
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert not parameter.is_meta
    for layer in module:
        assert not layer.padded.any()
        assert layer.padded.stride() == (1, MIB // 1024)
        assert layer.weight.loader == layer.load


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.uint8, torch.int16, torch.float16, torch.float32, torch.int64],
)
def test_what_torch_leaves_unwritten_is_deferred_whatever_its_dtype(dtype: torch.dtype) -> None:
    module, deferred = built(lambda: nn.Sequential(Layer(dtype), Layer(torch.bfloat16)))
    assert module[0].weight.is_meta == (module[0].weight.nbytes >= MIB)
    deferred.give_memory()
    assert module[0].weight.dtype is dtype


def test_parameters_with_values_of_their_own_keep_memory_and_values() -> None:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Embedding(1024, 1024))
    torch.manual_seed(0)
    module, deferred = built(lambda: nn.Sequential(nn.Embedding(1024, 1024)))
    assert deferred.nbytes == 0
    assert torch.equal(module[0].weight, plain[0].weight)


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_one_element_that_differs_is_seen(at: int) -> None:
    def make() -> nn.Module:
        layer: Any = Layer()
        layer.padded.data.t().view(-1)[at] = 1
        return nn.Sequential(layer)

    module, _ = built(make)
    assert module[0].weight.is_meta
    assert not module[0].padded.is_meta
    assert module[0].padded.sum() == 1


def test_memory_that_something_else_uses_stays() -> None:
    seen: list[torch.Tensor] = []

    def make() -> nn.Module:
        layer: Any = Layer()
        seen.append(layer.weight.detach())
        seen.append(layer.padded[:3])
        return nn.Sequential(layer)

    module, deferred = built(make)
    assert deferred.nbytes == 0
    assert module[0].weight.data_ptr() == seen[0].data_ptr()


def test_a_parameter_that_another_one_took_the_place_of_gets_no_memory() -> None:
    def make() -> nn.Module:
        module: Any = nn.Sequential(Layer(), Layer())
        module[1].weight = module[0].weight
        return nn.Sequential(module)

    module, deferred = built(make)
    assert module[0][0].weight is module[0][1].weight
    assert deferred.nbytes == module[0][0].weight.nbytes + 2 * module[0][0].padded.nbytes


def test_other_devices_and_torch_are_left_as_they_are() -> None:
    with deferred_parameters(torch.device("meta")) as deferred:
        module: Any = nn.Sequential(Layer())
    assert deferred.nbytes == 0
    assert not module[0].weight.is_meta
    with pytest.raises(RuntimeError, match="a model"), deferred_parameters(CPU):
        raise RuntimeError("a model that cannot be built")
    assert not torch.are_deterministic_algorithms_enabled()
    assert not nn.Sequential(Layer())[0].weight.is_meta
