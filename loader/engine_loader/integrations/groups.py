"""What the ranks of one of an engine's groups say to each other. All of them call it together.

The group is a `GroupCoordinator`, which vLLM and SGLang have alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from engine_loader.errors import VersionUnavailable
from engine_loader.integrations.logs import reason


class OfContents(Protocol):
    """What is read, as a catalogue: of one content for each rank of the source."""

    @property
    def contents(self) -> tuple[str, ...]: ...


T = TypeVar("T")
Read = TypeVar("Read", bound=OfContents)


def agree(group: Any, value: T) -> T:
    """The value of the group's first rank."""
    chosen: T = group.broadcast_object(value if group.rank_in_group == 0 else None, src=0)
    return chosen


def gathered(group: Any, value: T) -> list[T]:
    """What each rank of the group has given, by its number in the group."""
    values = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def read_one_content(group: Any, read: Callable[[Sequence[str] | None], Read]) -> Read:
    """The same weights for all ranks of the group: the first one chooses them.

    Args:
        group: All that read.
        read: Gets the contents to be read, or None for any. The first rank calls it twice, as its
            source may have changed before the others knew what to read.

    Raises:
        VersionUnavailable: On the other ranks, where `read` has failed on the first one.
    """
    contents: tuple[str, ...] = ()
    why = "it was interrupted"
    try:
        if group.rank_in_group == 0:
            contents = read(None).contents
    except Exception as exc:
        why = reason(exc)
        raise
    finally:
        contents, why = agree(group, (contents, why))
    if not contents:
        raise VersionUnavailable(
            f"the first rank of the group has found no weights: {why}", "look at its log"
        )
    return read(contents)
