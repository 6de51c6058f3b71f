"""Workers that take weights together."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.errors import TornRead, WeightsMismatch
from engine_loader.integrations import agreement
from engine_loader.integrations.agreement import all_agree, together
from engine_loader.integrations.groups import agree, gathered

ALONE = SimpleNamespace(world_size=1, rank_in_group=0, broadcast_object=lambda value, src: value)


class Attempts:
    """Each has the next outcome."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes, self.begun_again = list(outcomes), 0

    def __call__(self) -> Exception | None:
        return self.outcomes.pop(0)

    def begin_again(self) -> None:
        self.begun_again += 1


def test_a_process_that_is_alone_agrees_with_itself() -> None:
    assert agree(ALONE, "content") == "content"
    assert all_agree(True, ALONE)
    assert not all_agree(False, ALONE)
    assert gathered(ALONE, 7) == [7]


def test_what_the_first_rank_says_holds_for_the_others() -> None:
    other = SimpleNamespace(rank_in_group=1, broadcast_object=lambda value, src: value or "first")
    assert agree(other, "own") == "first"


def test_a_source_that_changes_is_begun_with_again() -> None:
    attempts = Attempts(TornRead("it has changed"), None)
    together(attempts, attempts.begin_again, ALONE)
    assert (attempts.outcomes, attempts.begun_again) == ([], 1)


def test_an_error_that_another_attempt_would_not_mend_is_raised() -> None:
    attempts = Attempts(WeightsMismatch("other names"), None)
    with pytest.raises(WeightsMismatch):
        together(attempts, attempts.begin_again, ALONE)
    assert attempts.begun_again == 0


def test_a_source_that_goes_on_changing_is_an_error_in_the_end() -> None:
    attempts = Attempts(*[TornRead("it has changed")] * 9)
    with pytest.raises(TornRead):
        together(attempts, attempts.begin_again, ALONE)
    assert 0 < attempts.begun_again < 9


def others(*answers: bool) -> Callable[[bool, Any], bool]:
    """What all agree on, where the other workers give these answers one after another."""
    left = list(answers)
    return lambda good, group: left.pop(0) and good


def test_a_worker_that_has_its_weights_begins_again_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "all_agree", others(False, True, True))
    attempts = Attempts(None, None)
    together(attempts, attempts.begin_again, ALONE)
    assert (attempts.outcomes, attempts.begun_again) == ([], 1)


def test_a_worker_that_has_its_weights_fails_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "all_agree", others(False, False))
    attempts = Attempts(None)
    with pytest.raises(TornRead, match="another worker"):
        together(attempts, attempts.begin_again, ALONE)
