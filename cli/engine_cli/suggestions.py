"""What a mistyped name may have been meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine_registry.errors import EtcdRefused

if TYPE_CHECKING:
    from engine_registry import Registry

_MOST = 3
_LIKENESS = 0.6  # of 1; below it, names are guesses


def near(name: str, known: Iterable[str], most: int = _MOST) -> str:
    """The known names that are like this one, as `a, b or c`; empty if there is none."""
    found = difflib.get_close_matches(name, sorted(known), most, _LIKENESS)
    return " or ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))


def did_you_mean(name: str, known: Iterable[str], most: int = _MOST) -> str:
    """A question with the names that are like this one; empty if there is none."""
    names = near(name, known, most)
    return f"did you mean {names}?" if names else ""


def near_instances(registry: Registry, names: Iterable[str]) -> str:
    """The same question about instances that are registered. Empty also for a user of etcd that
    may not see other instances.
    """
    try:
        known = [status.instance for status in registry.instances()]
    except EtcdRefused:
        return ""
    return " ".join(filter(None, [did_you_mean(name, known) for name in names]))
