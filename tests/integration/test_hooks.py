"""The command that is run for every event: real processes, that fail, hang, start others and are
asked to stop.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import engine_cli.runtime.hooks
from engine_cli.runtime.hooks import Hooks
from tests.integration.test_cli import wait_for_end
from tests.support.waiting import wait_until


def event(number: int) -> dict[str, Any]:
    return {
        "event": "rank_lost",
        "instance": "a",
        "rank": number,
        "state": "draining",
        "reason": "withdrawn",
    }


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_each_of_more_events_than_may_wait_gets_its_hook_in_order(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cli.runtime.hooks, "_MAX_WAITING", 5)
    with Hooks(f"echo $ENGINES_RANK >>{log}", 60) as hooks:
        for number in range(50):
            hooks.run(event(number))
            assert len(hooks._waiting) <= 5
    assert lines(log) == [str(number) for number in range(50)]


def test_a_hook_has_the_event_in_its_environment(log: Path) -> None:
    with Hooks(
        'echo "$ENGINES_EVENT $ENGINES_INSTANCE $ENGINES_RANK $ENGINES_STATE '
        f'$ENGINES_REASON" >>{log}',
        60,
    ) as hooks:
        hooks.run(event(3))
        hooks.run({"event": "instance_gone", "instance": "a", "state": "gone"})
    assert lines(log) == ["rank_lost a 3 draining withdrawn", "instance_gone a  gone "]


def test_a_hook_that_takes_too_long_is_ended_with_all_that_it_started_and_the_next_one_runs(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Hooks(
        f"echo $$ >>{log}; [ $ENGINES_RANK = 1 ] || {{ sleep 1000 & echo $! >>{log}; wait; }}", 3
    ) as hooks:
        hooks.run(event(0))
        hooks.run(event(1))
    shell, started, second = map(int, lines(log))
    for pid in (shell, started, second):
        wait_for_end(pid)
    assert len(caplog.messages) == 1
    assert "the hook for rank_lost of a was ended after 3 s" in caplog.messages[0]


def test_stopping_lets_the_hook_that_runs_finish_and_logs_how_many_do_not_run(
    log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "gate")
    with (
        caplog.at_level(logging.WARNING),
        Hooks(f"echo began >>{log}; read _ <{tmp_path / 'gate'}; echo ended >>{log}", 60) as hooks,
    ):
        for number in range(9):
            hooks.run(event(number))
        wait_until(lambda: lines(log) == ["began"])
        hooks.stop()
        (tmp_path / "gate").write_text("go on\n")
    assert lines(log) == ["began", "ended"]
    assert caplog.messages == ["hooks that were not run: 8"]


def test_stopping_ends_a_hook_that_does_not_end_by_itself(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_cli.runtime.hooks, "_LAST_S", 0.2)
    with Hooks(f"echo $$ >>{log}; sleep 1000", 1000) as hooks:
        hooks.run(event(0))
        wait_until(lambda: bool(lines(log)))
        hooks.stop()
    wait_for_end(int(lines(log)[0]))
    assert "not run" not in caplog.text


def test_killing_ends_the_hook_that_runs_at_once_and_begins_no_other(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Hooks(f"sleep 1000 & echo $! >>{log}; wait", 1000) as hooks:
        hooks.run(event(0))
        hooks.run(event(1))
        wait_until(lambda: bool(lines(log)))
        hooks.kill()
    (started,) = map(int, lines(log))
    wait_for_end(started)
    assert caplog.messages[-1] == "hooks that were not run: 1"


def test_an_event_that_waits_for_room_is_let_go_by_stopping(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cli.runtime.hooks, "_MAX_WAITING", 0)
    with Hooks(f"echo $$ >>{log}; sleep 1000", 1000) as hooks:
        hooks.run(event(0))
        blocked = threading.Thread(target=hooks.run, args=(event(1),))
        blocked.start()
        wait_until(lambda: bool(lines(log)) and len(hooks._waiting) == 1)
        hooks.kill()
        blocked.join(60)
        assert not blocked.is_alive()


def test_a_hook_that_cannot_be_started_is_reported_and_the_next_one_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Hooks("true", 60) as hooks:
        hooks.run({**event(0), "reason": "x" * 1_000_000})  # more than an environment holds
        hooks.run(event(1))
    assert len(caplog.messages) == 1
    assert "could not be started" in caplog.messages[0]
