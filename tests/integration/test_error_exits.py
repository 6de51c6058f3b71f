"""However an error of ours ends a program, the process ends as Python ends it: in time, with status
1, and with a traceback.
"""

from __future__ import annotations

import signal

import pytest

from tests.integration.conftest import Processes, line_of
from tests.support.processes.error import ERRORS, NBYTES, SOURCE

NATIVE = ("E", "W")  # the lines that Mooncake logs begin with these and a date
UNDER_WAY = [
    "a source is killed",
    "a source is stopped",
    "a source drips",
    "interrupted",
    "weights that change",
]


@pytest.mark.parametrize(
    "forked", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "anew"]
)
@pytest.mark.parametrize(
    ("name", "ending"),
    [*((name, "leaving") for name in ERRORS), *((name, "closing") for name in UNDER_WAY)],
)
def test_a_process_that_an_error_ends_has_the_exit_status_of_python_and_says_which(
    processes: Processes, name: str, ending: str, forked: bool
) -> None:
    source = processes.start("-m", "tests.support.processes.source", SOURCE, str(NBYTES))
    assert line_of(source) == "version 0\n"
    start = processes.start if forked else processes.start_anew
    process = start(
        *("-m", "tests.support.processes.error", name, ending, str(source.pid)), TEST_WHOLE_END="1"
    )
    _, err = process.communicate(timeout=100)
    error, _ = ERRORS[name]
    assert process.returncode == (-signal.SIGINT if error == "KeyboardInterrupt" else 1), err
    said = [line for line in err.splitlines() if not line.startswith(NATIVE)]
    assert said[-1].partition(":")[0].endswith(error), err
