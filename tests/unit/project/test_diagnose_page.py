"""docs/how-to/diagnose.md says what to do about each error, event, state and exit code."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from types import ModuleType

import pytest

import engine_loader.errors
import engine_registry.errors
from engine_cli.exits import Exit, code_of
from engine_cli.render.documents import EVENTS
from engine_registry import Event, InstanceCleaned, RegistrationState
from engine_registry.telemetry.metrics import LOSSES
from tests.support.checkout import ROOT

PAGE = (ROOT / "docs" / "how-to" / "diagnose.md").read_text()
MEANINGS = (ROOT / "docs" / "reference" / "errors-and-exit-codes.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n##", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]
    ]


ERRORS = {
    row[0].strip("`"): row
    for heading in ("Errors of the registry", "Errors of the loader")
    for row in rows(heading)
}


def classes(module: ModuleType, base: type[Exception]) -> Iterator[type[Exception]]:
    for _, found in inspect.getmembers(module, inspect.isclass):
        if issubclass(found, base):
            yield found


RAISED = [
    *classes(engine_registry.errors, engine_registry.errors.RegistryError),
    *classes(engine_loader.errors, engine_loader.errors.LoaderError),
]


@pytest.mark.parametrize("error", RAISED)
def test_every_error_is_explained_with_its_exit_code_and_what_to_do(error: type[Exception]) -> None:
    _, code, remedy = ERRORS[error.__name__]
    assert int(code) == code_of(error("x"))
    assert remedy
    assert re.search(rf"^\| `{error.__name__}` \| .+ \|$", MEANINGS, re.MULTILINE)


@pytest.mark.parametrize("event", [*typing.get_args(Event), InstanceCleaned])
def test_every_event_is_explained(event: type) -> None:
    assert any(
        row[:2] == [f"`{event.__name__}`", f"`{EVENTS[event]}`"] and len(row) == 4 and all(row)
        for row in rows("Events")
    )


@pytest.mark.parametrize("reason", LOSSES)
def test_every_reason_of_a_loss_has_a_meaning_and_what_to_do(reason: str) -> None:
    found = [row for row in rows("A rank is lost") if row[0] == f"`{reason}`"]
    assert len(found) == 2
    assert all(map(all, found))


@pytest.mark.parametrize("state", RegistrationState)
def test_every_state_of_a_registration_is_explained(state: RegistrationState) -> None:
    assert any(row[0] == f"`{state.name}`" and all(row) for row in rows("States of a registration"))


@pytest.mark.parametrize("code", Exit)
def test_every_exit_code_is_explained(code: Exit) -> None:
    assert any(row[0] == str(int(code)) and all(row) for row in rows("Exit codes"))
