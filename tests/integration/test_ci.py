"""What CI makes of a failure: chance is let through once and said aloud, anything else is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
CHANCE = """
def test_{name}(pytestconfig):
    seen = pytestconfig.rootpath / "seen-{name}"
    first = not seen.exists()
    seen.touch()
    assert not first, "the machine was busy"
"""
FAULT = "def test_fault(): assert False, 'it is broken'\n"
GOOD = "def test_good(): pass\n"


@pytest.mark.parametrize(
    ("tests", "lint", "passes"),
    [
        (GOOD, "true", True),
        (GOOD + CHANCE.format(name="a") + CHANCE.format(name="b"), "true", True),
        (GOOD + "".join(CHANCE.format(name=name) for name in "abc"), "true", False),
        (GOOD + CHANCE.format(name="a") + FAULT, "true", False),
        (FAULT, "true", False),
        (GOOD, "false", False),
        ("import nothing_of_this_name\n", "true", False),
    ],
    ids=["all pass", "two by chance", "three", "chance and a fault", "a fault", "lint", "import"],
)
def test_ci_passes_where_at_most_two_tests_fail_once(
    tmp_path: Path, tests: str, lint: str, passes: bool
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    pytest_command = binaries / "pytest"
    pytest_command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pytest "$@"\n')
    pytest_command.chmod(0o755)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest]\n")
    (tmp_path / "test_it.py").write_text(tests)
    (tmp_path / "Makefile").write_text(
        f"test:\n\t{lint}\n\t.venv/bin/pytest -q\ntest-slow:\n\techo slow ones\n"
    )
    done = subprocess.run(
        [tmp_path / ".ci" / "run"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they take a second each
    )
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert ("slow ones" in done.stdout) == passes
    assert ("the machine was busy" in done.stdout) == ("busy" in tests)  # is never hidden
