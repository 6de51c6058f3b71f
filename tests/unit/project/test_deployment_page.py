"""docs/how-to/deploy.md tells of everything that can be raised, told or returned."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import engine_loader.errors
import engine_registry.errors
from engine_cli.exits import Exit, code_of
from engine_cli.render.documents import _INSTANCE_EVENTS, _RANK_EVENTS
from engine_registry import Event, InstanceCleaned, RegistrationState
from engine_registry.registration.writes import DIED, EVICTED, WITHDRAWN
from engine_registry.watching.watch import EXPIRED
from tests.support.checkout import ROOT

PAGE = (ROOT / "docs" / "how-to" / "deploy.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = PAGE.split(f"\n### {heading}\n", 1)[1].split("\n##", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]
    ]


ERRORS = {
    row[0].strip("`"): row
    for heading in ("Errors of the registry", "Errors of the loader")
    for row in rows(heading)
}
TOLD = rows("Events and states")


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
    _, code, meaning, remedy = ERRORS[error.__name__]
    assert int(code) == code_of(error("x"))
    assert meaning
    assert remedy


@pytest.mark.parametrize("event", [*typing.get_args(Event), InstanceCleaned])
def test_every_event_is_explained(event: type) -> None:
    names: dict[Any, str] = {
        **_RANK_EVENTS,
        **_INSTANCE_EVENTS,
        InstanceCleaned: "instance_cleaned",
    }
    assert any(
        row[0].startswith(f"`{event.__name__}`, `{names[event]}`") and all(row) for row in TOLD
    )


@pytest.mark.parametrize(
    "reason", [WITHDRAWN, DIED, EVICTED, EXPIRED, "record damaged", "replaced by another process"]
)
def test_every_reason_of_a_loss_is_explained(reason: str) -> None:
    assert any(row[0] == f"`RankLost`, `rank_lost`: `{reason}`" for row in TOLD)


@pytest.mark.parametrize("state", RegistrationState)
def test_every_state_of_a_registration_is_explained(state: RegistrationState) -> None:
    assert any(row[0] == f"`{state.name}`" and all(row) for row in TOLD)


@pytest.mark.parametrize("code", Exit)
def test_every_exit_code_is_explained(code: Exit) -> None:
    assert any(row[0] == str(int(code)) and all(row) for row in rows("Exit codes"))


def test_what_the_page_links_to_is_there() -> None:
    folder = ROOT / "docs" / "how-to"
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (folder / target).exists(), target
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
