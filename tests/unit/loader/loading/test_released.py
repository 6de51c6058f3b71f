"""How often a load of the released version is made."""

from __future__ import annotations

import itertools
from typing import cast

import pytest

from engine_loader import LoadOptions
from engine_loader.errors import TornRead, VersionUnavailable
from engine_loader.loading import released
from engine_loader.loading.attempts import TRIES
from engine_loader.loading.released import load_released
from engine_loader.loading.together import load_together
from engine_registry import Registry


class Loads:
    """They fail with the error, so many times, and then bring what they are."""

    def __init__(self, error: Exception, failures: int = TRIES) -> None:
        self.made = 0
        self._error = error
        self._failures = failures

    def __call__(self, wait_s: float) -> str:
        self.made += 1
        if self.made <= self._failures:
            raise self._error
        return "weights"


def gone() -> VersionUnavailable:
    return VersionUnavailable("version 7 is not served", version=7, served=[8])


def test_a_release_that_goes_again_and_again_is_unavailable_and_other_weights_are_torn() -> None:
    loads = Loads(gone())
    with pytest.raises(VersionUnavailable):
        load_together(loads, 9.0, "one and the next", "released")
    assert loads.made == TRIES
    with pytest.raises(TornRead):
        load_together(Loads(gone()), 9.0, "one and the next")


def test_the_next_release_is_loaded_where_one_has_gone() -> None:
    assert load_together(Loads(gone(), 2), 9.0, "one and the next", "released") == ("weights", 2)


def test_no_release_was_waited_for_once_and_is_not_waited_for_again() -> None:
    loads = Loads(VersionUnavailable("no version is released", version="released", served=[]))
    with pytest.raises(VersionUnavailable):
        load_together(loads, 9.0, "one and the next", "released")
    assert loads.made == 1


def test_one_release_is_tried_five_times_and_a_newer_one_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contents = itertools.chain("abcdefghi", itertools.repeat("j"))

    def pinned(*_: object) -> LoadOptions:
        return LoadOptions(contents=[32 * f"{ord(next(contents)) % 10}"])

    monkeypatch.setattr(released, "pinned", pinned)
    loads = Loads(gone(), 100)

    def load(options: LoadOptions, wait_s: float) -> str:
        return loads(wait_s)

    with pytest.raises(VersionUnavailable):
        load_released(cast(Registry, None), "t", LoadOptions(version="released"), 60.0, load)
    assert loads.made == 9 + TRIES
    with pytest.raises(VersionUnavailable):  # there is no time
        load_released(cast(Registry, None), "t", LoadOptions(version="released"), 0.0, load)
    assert loads.made == 9 + 2 * TRIES
