"""The request of a driver, as the name of an empty tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_loader.integrations.sglang import request
from engine_loader.integrations.sglang.order import Order
from engine_registry.errors import InvalidField


def test_what_is_sent_is_what_arrives() -> None:
    sent = request("trainer", version=3, timeout_s=5, etcd="10.0.0.5:2379")
    assert Order.decode(sent) == Order("trainer", 3, 5.0, {"etcd": "10.0.0.5:2379"})
    assert Order.decode(request("trainer")) == Order("trainer")
    assert Order.decode(request("trainer", version="released")).version == "released"


def test_it_travels_without_memory_so_that_it_reaches_other_nodes() -> None:
    ((_, tensor),) = request("trainer")
    assert tensor.numel() == 0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"source": "a b"}, "instance"),
        ({"source": "a", "version": -1}, "version"),
        ({"source": "a", "timeout_s": "soon"}, "timeout_s"),
        ({"source": "a", "etdc": "x"}, "etdc"),
    ],
)
def test_a_request_that_is_not_valid_is_refused_where_it_is_made(
    arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        request(**arguments)
    assert caught.value.details["field"] == field


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [("w", torch.zeros(3))],
        [("engine_registry", torch.zeros(1))],
        [("engine_registry:", torch.zeros(0))],
        [*request("trainer"), ("w", torch.zeros(3))],
        [("engine_registry:[1]", torch.zeros(0))],
        [('engine_registry:{"x": 1}', torch.zeros(0))],
    ],
)
def test_tensors_that_are_no_request_are_refused(tensors: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(InvalidField, match="the request to pull weights is not valid") as caught:
        Order.decode(tensors)
    assert "request(SOURCE)" in caught.value.remedy
