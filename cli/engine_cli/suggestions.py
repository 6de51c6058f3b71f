"""What a mistyped name may have been meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine_registry.errors import EtcdError, InstanceNotFound

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
    """The same question about instances that are registered. Empty also where etcd does not say,
    as to a user that may not see other instances.
    """
    try:
        known = [status.instance for status in registry.instances()]
    except EtcdError:
        return ""
    questions = dict.fromkeys(did_you_mean(name, known) for name in names)
    return " ".join(filter(None, questions))


@contextmanager
def suggesting(registry: Registry) -> Iterator[None]:
    """Within the block, the error of an instance that is not registered asks this question."""
    try:
        yield
    except InstanceNotFound as exc:
        hint = near_instances(registry, exc.details.get("instances", ()))
        if not hint:
            raise
        raise InstanceNotFound(exc.what, hint, **exc.details) from exc
