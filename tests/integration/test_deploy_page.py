"""docs/how-to/deploy.md: the shell as PID 1 lets its rank drain, and then stays for a second."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.support.checkout import ROOT

PAGE = (ROOT / "docs" / "how-to" / "deploy.md").read_text("utf-8")
COMMAND = yaml.safe_load(re.findall(r"^```yaml\n(command:.*?)^```$", PAGE, re.M | re.S)[0])
SLEEP = """#!/bin/sh
echo "$1" >>"$SLEPT"
exec /bin/sleep "$1"
"""
ENGINE = """#!/bin/sh
trap '/bin/sleep 0.5; echo drained; exit 7' TERM
echo $$ "$@"
while :; do /bin/sleep 0.05; done
"""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command of the page, with an `engine` that drains for half a second, and a `sleep` that
    writes down for how long.
    """
    for name, script in (("engine", ENGINE), ("sleep", SLEEP)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    process = subprocess.Popen(
        [*COMMAND["command"], "--rank", "two words"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLEPT": str(tmp_path / "slept"),
        },
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # the engine too, which may have outlived the shell
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
    out, _ = container.communicate(timeout=100)
    assert (out, container.returncode) == ("drained\n", 7)


def test_the_shell_stays_for_a_second_after_a_rank_that_was_killed(
    container: subprocess.Popen[str], tmp_path: Path
) -> None:
    engine = started(container)
    assert not (tmp_path / "slept").exists()
    os.kill(engine, signal.SIGKILL)
    container.communicate(timeout=100)
    assert container.returncode == 128 + signal.SIGKILL
    assert (tmp_path / "slept").read_text() == "1\n"
