"""What the ranks of one of an engine's groups say to each other. All of them call it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from engine_loader.errors import VersionUnavailable


class OfContents(Protocol):
    """What is read, as a catalogue: of one content for each rank of the source."""

    @property
    def contents(self) -> tuple[str, ...]: ...


T = TypeVar("T")
Read = TypeVar("Read", bound=OfContents)


def gathered(group: Any, value: T) -> list[T]:
    """What each rank of the group has given, by its number in the group."""
    values = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def read_one_content(group: Any, read: Callable[[Sequence[str] | None], Read]) -> Read:
    """The same weights for all ranks of the group: the first one chooses them.

    Args:
        group: With `rank_in_group` and `broadcast_object`.
        read: Gets the contents to be read, or None for any. The first rank calls it twice, as its
            source may have changed before the others knew what to read.

    Raises:
        VersionUnavailable: On the other ranks, where `read` has failed on the first one.
    """
    contents: tuple[str, ...] = ()
    try:
        if group.rank_in_group == 0:
            contents = read(None).contents
    finally:
        contents = group.broadcast_object(contents, src=0)
    if not contents:
        raise VersionUnavailable(
            "the first rank of the group has found no weights", "look at its log"
        )
    return read(contents)
