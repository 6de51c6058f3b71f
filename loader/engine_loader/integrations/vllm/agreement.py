"""What all workers of a replica agree on. All of them call these at the same time.

The group is one of vLLM's `GroupCoordinator`s.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed

T = TypeVar("T")


def agree(value: T, group: Any) -> T:
    """The value of the group's first rank."""
    chosen: T = group.broadcast_object(value if group.rank_in_group == 0 else None, src=0)
    return chosen


def all_agree(good: bool, group: Any) -> bool:
    """Whether it is so for all of them."""
    if group.world_size == 1:
        return good
    answers: list[bool] = [False] * group.world_size
    torch.distributed.all_gather_object(answers, good, group=group.cpu_group)
    return all(answers)
