"""`engines load --out` that is killed: the next load into the folder leaves nothing of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.conftest import Processes, line_of
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("how", "file"), [("--full", "model.safetensors"), ("--rank=0", "rank-0.safetensors")]
)
def test_a_load_after_a_killed_one_sweeps_what_that_has_left(
    processes: Processes, namespace: str, tmp_path: Path, how: str, file: str
) -> None:
    source = processes.start("-m", "tests.support.processes.source", "a", str(1 << 20))
    assert line_of(source) == "version 0\n"
    into = ("--out", str(tmp_path), "--namespace", namespace)
    signal_and_wait(source.pid, signal.SIGSTOP)
    killed = processes.engines("load", "a", "--full", *into)
    wait_until(lambda: any(tmp_path.iterdir()))
    killed.kill()
    killed.wait()
    source.send_signal(signal.SIGCONT)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    result = processes.run("load", "a", how, *into)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [file]
