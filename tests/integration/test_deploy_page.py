"""docs/how-to/deploy.md: the shell as PID 1 lets its rank drain, and then stays for a second."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.checkout import ROOT

PAGE = (ROOT / "docs" / "how-to" / "deploy.md").read_text("utf-8")
COMMAND = yaml.safe_load(re.findall(r"^```yaml\n(command:.*?)^```$", PAGE, re.M | re.S)[0])
ENGINE = """#!/bin/sh
trap 'sleep 0.5; echo drained; exit 7' TERM
echo $$ "$@"
while :; do sleep 0.05; done
"""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command of the page, with an `engine` that drains for half a second."""
    engine = tmp_path / "engine"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    process = subprocess.Popen(
        [*COMMAND["command"], "--rank", "two words"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def started(container: subprocess.Popen[str]) -> int:
    """The pid of the engine, which has its arguments."""
    assert container.stdout is not None
    pid, _, arguments = container.stdout.readline().partition(" ")
    assert arguments == "--rank two words\n"
    return int(pid)


def test_a_rank_drains_after_sigterm_and_its_code_is_the_containers(
    container: subprocess.Popen[str],
) -> None:
    started(container)
    container.send_signal(signal.SIGTERM)
    out, _ = container.communicate(timeout=60)
    assert (out, container.returncode) == ("drained\n", 7)


def test_the_shell_stays_for_a_second_after_a_rank_that_was_killed(
    container: subprocess.Popen[str],
) -> None:
    os.kill(started(container), signal.SIGKILL)
    killed = time.monotonic()
    container.communicate(timeout=60)
    assert container.returncode == 128 + signal.SIGKILL
    assert time.monotonic() - killed >= 1
