"""What all ranks of one of an engine's groups agree on. All of them call these at the same time.

The group is a `GroupCoordinator`, which vLLM and SGLang have alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_loader.errors import SourceLost, TornRead, VersionUnavailable
from engine_loader.integrations.groups import gathered

_ATTEMPTS = 3
_AGAIN = (TornRead, SourceLost, VersionUnavailable)  # the source has other weights now


def all_agree(good: bool, group: Any) -> bool:
    """Whether it is so for all of them."""
    return all(gathered(group, good))


def together(
    attempt: Callable[[], Exception | None], begin_again: Callable[[], object], group: Any
) -> None:
    """Until one attempt succeeds for all of them.

    Args:
        attempt: Does the work, and returns its error.
        begin_again: Undoes what an attempt has left, where the source has changed meanwhile.
        group: All that do the work.

    Raises:
        Exception: The error of this process. TornRead where only others have failed.
    """
    for left in reversed(range(_ATTEMPTS)):
        failure = attempt()
        if all_agree(failure is None, group):
            return
        if not all_agree(failure is None or isinstance(failure, _AGAIN), group) or not left:
            raise failure or TornRead(
                "another worker could not take the weights", "look at its log, then update again"
            )
        begin_again()
