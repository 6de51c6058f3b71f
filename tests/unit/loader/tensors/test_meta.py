"""Modules that are built without memory for their parameters, and with their buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine_loader.tensors.meta import parameters_on_meta


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        self.register_parameter("nothing", None)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.marked = nn.Parameter(torch.ones(3))
        self.marked.loader = "of an engine"  # type: ignore[attr-defined]


def test_parameters_have_no_memory_and_buffers_their_values() -> None:
    with parameters_on_meta():
        module = Tied()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module.get_buffer("frequencies"), torch.arange(4.0))
    assert torch.equal(module.norm.get_buffer("running_var"), torch.ones(4))
    plain = {name: (one.shape, one.dtype) for name, one in Tied().state_dict().items()}
    assert {name: (one.shape, one.dtype) for name, one in module.state_dict().items()} == plain


def test_ties_and_what_hangs_on_parameters_stay() -> None:
    with parameters_on_meta():
        module = Tied()
    assert module.head.weight is module.embed.weight
    assert (module.frozen.requires_grad, module.head.bias.requires_grad) == (False, True)
    assert module.marked.loader == "of an engine"  # type: ignore[attr-defined]


def test_modules_have_memory_again_afterwards_also_where_building_failed() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        _ = 1 / 0
    assert not nn.Linear(2, 2).weight.is_meta
