"""Whether what post-processing makes of the weights is all in tensors."""

from __future__ import annotations

import torch
from torch import nn

from engine_loader.integrations.vllm.processed import Unprocessed, served_tensors


class Method:
    pass


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.quant_method = Method()
        self.scale = 1.0
        self.kv_cache = torch.ones(9)


def test_the_kv_cache_is_not_served() -> None:
    assert set(served_tensors(Layer())) == {"weight"}


def test_a_weight_that_is_replaced_or_renamed_is_not_lost() -> None:
    layer = Layer()
    before = Unprocessed(layer)
    layer.weight = nn.Parameter(torch.ones(3, 2))
    assert before.lost(layer) == []
    del layer.weight
    layer.packed = torch.ones(6)
    assert before.lost(layer) == []


def test_a_weight_that_a_kernel_has_taken_is_lost() -> None:
    layer = Layer()
    before = Unprocessed(layer)
    layer.weight = nn.Parameter(torch.empty(0))
    assert before.lost(layer) == ["weight"]
    del layer.weight
    assert before.lost(layer) == ["weight"]


def test_a_number_that_processing_computes_is_lost() -> None:
    layer = nn.Sequential(Layer())
    before = Unprocessed(layer)
    vars(layer[0])["scale"] = 0.5
    assert before.lost(layer) == ["0!scale"]
    vars(layer[0])["scale"] = 1.0
    assert before.lost(layer) == []
