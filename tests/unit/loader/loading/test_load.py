"""A load counts once, however it ends, and leaves no publication behind where it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine_loader import InProcessEngine, load, metrics
from engine_loader.errors import Cancelled, SourceLost, TornRead, WeightsMismatch
from engine_loader.loading.attempts import Attempts
from engine_loader.loading.load import _fill
from engine_loader.loading.report import LoadReport
from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.watching.waiting import Wanted


@pytest.mark.parametrize("source", ["", ()])
def test_a_load_from_nobody_is_refused_by_its_field(source: Wanted) -> None:
    with InProcessEngine() as engine, pytest.raises(InvalidField) as caught:
        load(cast(Registry, None), engine, source, tensors={"w": torch.zeros(2)}, rank=0)
    assert caught.value.details["field"] == "source"
    assert caught.value.remedy == "name one in `source`"


@pytest.mark.parametrize("place", [{"world_size": 2}, {"topology": {"tp": (0, 2)}}])
def test_a_place_without_the_rank_that_it_is_about_is_refused(place: dict[str, Any]) -> None:
    with InProcessEngine() as engine, pytest.raises(InvalidField) as caught:
        load(cast(Registry, None), engine, "a", tensors={"w": torch.zeros(2)}, **place)
    assert caught.value.details["field"] in place


class Load:
    """As Attempts: all of them end with this."""

    def __init__(self, outcome: LoadReport | BaseException, publishes: bool = False) -> None:
        self._outcome = outcome
        self.closed = 0
        self.republication = SimpleNamespace(close=self._close) if publishes else None

    def _close(self) -> None:
        self.closed += 1

    def until_filled(self) -> LoadReport:
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    counted: list[object] = []
    monkeypatch.setattr(metrics.LOADS, "inc", counted.append)
    monkeypatch.setattr(metrics, "count_loaded", lambda *facts: counted.append(facts))
    return counted


@pytest.mark.parametrize("publishes", [False, True])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (SourceLost("gone while it was chosen"), "lost"),
        (TornRead("changed"), "torn"),
        (Cancelled("cancelled"), "cancelled"),
    ],
)
def test_a_load_that_fails_says_which_tensors_are_complete_though_none_is(
    counted: list[object], error: Cancelled, outcome: str, publishes: bool
) -> None:
    attempts = Load(error, publishes)
    with pytest.raises(type(error)) as caught:
        _fill(cast(Attempts, attempts))
    assert caught.value is error
    assert error.details["complete"] == []
    assert counted == [outcome]
    assert attempts.closed == publishes


def test_what_an_attempt_says_is_complete_stays(counted: list[object]) -> None:
    with pytest.raises(SourceLost) as caught:
        _fill(cast(Attempts, Load(SourceLost("gone", complete=["w"]))))
    assert caught.value.details["complete"] == ["w"]


@pytest.mark.parametrize("error", [WeightsMismatch("other tensors"), KeyboardInterrupt()])
def test_other_errors_are_raised_as_they_are(counted: list[object], error: BaseException) -> None:
    attempts = Load(error, publishes=True)
    with pytest.raises(type(error)) as caught:
        _fill(cast(Attempts, attempts))
    assert "complete" not in getattr(caught.value, "details", {})
    assert (attempts.closed, len(counted)) == (1, 1)


def test_a_load_that_succeeds_is_counted_and_keeps_its_publication(counted: list[object]) -> None:
    report = LoadReport("a", 0, 1, "c0" * 16, "tcp", 2, 16, 24, 3, 0, 0.5, 0.25, 0.0, ())
    attempts = Load(report, publishes=True)
    assert _fill(cast(Attempts, attempts)) is report
    assert (attempts.closed, counted) == (0, [(16, 0.5, 0, 0)])
