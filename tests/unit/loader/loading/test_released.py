"""How often a load of the released version is made."""

from __future__ import annotations

import pytest

from engine_loader.errors import TornRead, VersionUnavailable
from engine_loader.loading.attempts import TRIES
from engine_loader.loading.together import load_together


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
