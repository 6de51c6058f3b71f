"""What the ranks of one of an engine's groups say to each other. All of them call it together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gathered(group: Any, value: T) -> list[T]:
    """What each rank of the group has given, by its number in the group."""
    values = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values
