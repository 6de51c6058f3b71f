"""Programs that the fork server starts are to tests what programs that Python starts are."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.conftest import Processes, line_of
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

Start = Callable[..., subprocess.Popen[str]]

PROGRAM = """
import json, os, signal, sys

print(json.dumps([__name__, sys.argv, os.getcwd(), os.environ["TEST_SAID"], os.getpid()]))
print("to errors", file=sys.stderr)
sys.stdout.flush()
said = sys.stdin.readline().strip()
if said == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if said == "raise":
    raise RuntimeError("no")
sys.exit(int(said or 0))
"""


@pytest.fixture(params=["start", "start_anew"])
def start(request: pytest.FixtureRequest, processes: Processes, tmp_path: Path) -> Start:
    (tmp_path / "program.py").write_text(PROGRAM)
    start: Start = getattr(processes, request.param)

    def program(*args: str) -> subprocess.Popen[str]:
        return start("-m", "program", *args, cwd=tmp_path, TEST_SAID="hallo")

    return program


@pytest.mark.parametrize(
    ("said", "status"), [("0", 0), ("3", 3), ("raise", 1), ("kill", -signal.SIGKILL)]
)
def test_it_has_its_arguments_folder_environment_pipes_and_exit_status(
    start: Start, tmp_path: Path, said: str, status: int
) -> None:
    process = start("a", "b c")
    out, err = process.communicate(f"{said}\n", timeout=30)
    program = str(tmp_path / "program.py")
    assert out == (
        f'["__main__", ["{program}", "a", "b c"], "{tmp_path}", "hallo", {process.pid}]\n'
    )
    assert err.startswith("to errors\n")
    assert ("RuntimeError: no" in err) is (said == "raise")
    assert (process.returncode, process.poll(), process.wait()) == (status, status, status)
    assert process.communicate() == (out, err)


def test_it_ends_where_its_input_ends(start: Start) -> None:
    process = start()
    line_of(process)
    process.communicate(timeout=100)
    assert process.returncode == 0


def test_it_can_be_waited_for_stopped_and_killed(start: Start) -> None:
    process = start()
    line_of(process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.1)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.kill()  # is nothing for one that has ended


def test_it_can_be_waited_for_with_more_than_a_thousand_descriptors_open(start: Start) -> None:
    with ExitStack() as stack:
        for _ in range(1030):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        process = start()
        line_of(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.communicate(timeout=100)
        assert process.returncode == 0


def test_it_gets_ctrl_c_though_the_server_does_not(start: Start) -> None:
    process = start()
    line_of(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, "KeyboardInterrupt" in err) == (-signal.SIGINT, True)


@pytest.mark.parametrize("start", ["start", "start_anew"])
def test_what_a_program_has_started_ends_with_it(start: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    )
    processes = Processes({**os.environ})
    child = int(line_of(getattr(processes, start)("-m", "parent", cwd=tmp_path)))
    processes.end()
    wait_until(lambda: not Path(f"/proc/{child}").exists())


def test_a_program_with_another_environment_for_python_imports_all_by_itself(
    processes: Processes,
) -> None:
    process = processes.start("-m", "this", cwd=ROOT, PYTHONHASHSEED="1")
    process.communicate(timeout=100)
    assert type(process) is subprocess.Popen
    assert "PYTHONHASHSEED" not in os.environ
