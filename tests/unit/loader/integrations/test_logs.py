"""Our lines in the log of an engine."""

from __future__ import annotations

import logging

import pytest

from engine_loader.integrations.logs import join_log

OURS = ("engine_loader", "engine_registry")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def forget_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an engine's process: pytest's own handlers, which come with the call of the test, are
    out of the way.
    """
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for name in OURS:
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "level", logging.NOTSET)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Lines:
    lines, logger = Lines(), logging.getLogger("an_engine")
    monkeypatch.setattr(logger, "handlers", [lines])
    monkeypatch.setattr(logger, "level", logging.INFO)
    return lines


def test_lines_go_to_the_log_of_the_engine_once(
    theirs: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_handlers(monkeypatch)
    join_log("an_engine")
    join_log("an_engine")
    logging.getLogger("engine_loader.x").info("filled")
    assert theirs.lines == ["filled"]


def test_a_user_with_own_handlers_keeps_them(
    theirs: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_handlers(monkeypatch)
    own = Lines()
    logging.getLogger("engine_loader").addHandler(own)
    join_log("an_engine")
    logging.getLogger("engine_loader.x").warning("filled")
    assert (own.lines, theirs.lines) == (["filled"], [])
