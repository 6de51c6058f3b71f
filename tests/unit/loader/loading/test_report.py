"""The error of an attempt says from which sources, and which tensors are whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from engine_loader import Cancelled, LoaderError, SourceLost, Stalled, TornRead
from engine_loader.loading.report import with_what_came
from engine_loader.planning.reads import Span
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from tests.support.builders import CONTENT, a_manifest, a_record, an_entry

DST = a_manifest(an_entry("a", addr=4096), an_entry("b", addr=8192))
SOURCES = [
    cast(SourceRank, SimpleNamespace(record=a_record(instance=name))) for name in ("one", "two")
]


def received(nbytes: int) -> Received:
    got = Received(CONTENT, DST)
    got.add(a_record(), [Span(4096, nbytes, ((0, 0),))] if nbytes else [])
    return got


@pytest.mark.parametrize("kind", [SourceLost, Stalled, TornRead])
def test_an_error_names_its_sources_and_keeps_its_kind(kind: type[LoaderError]) -> None:
    error = with_what_came(kind("it has ended"), SOURCES, received(0))
    assert type(error) is kind
    assert error.what == (
        "/engines/one/0 and /engines/two/0 could not be read to the end (it has ended); no tensor "
        "is usable"
    )
    assert error.remedy == "load again, or from another instance"
    assert error.details["sources"] == ["/engines/one/0", "/engines/two/0"]


def test_an_error_has_the_tensors_that_are_whole() -> None:
    error = with_what_came(SourceLost("gone", "look at its host"), SOURCES, received(16))
    assert error.what.endswith("16 of 32 bytes have come, 1 of 2 tensors are whole")
    assert error.details["complete"] == ["a"]
    assert error.remedy == "look at its host"


def test_a_part_of_a_tensor_makes_it_not_whole() -> None:
    error = with_what_came(SourceLost("gone"), SOURCES, received(8))
    assert error.what.endswith("8 of 32 bytes have come, 0 of 2 tensors are whole")
    assert error.details["complete"] == []


def test_a_load_that_was_cancelled_blames_no_source() -> None:
    error = with_what_came(Cancelled("the load was cancelled"), SOURCES, received(0))
    assert error.what == "the load was cancelled; no tensor is usable"
