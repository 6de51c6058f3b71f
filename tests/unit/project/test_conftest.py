"""What tests/conftest.py does for a run that goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.checkout import ROOT

FAILS_AND_HANGS = """
import time
import pytest

@pytest.fixture
def hangs():
    yield
    time.sleep(600)

def test_fails(hangs):
    assert "the reason" == ""

def test_comes_after():
    pass
"""


def test_a_teardown_that_hangs_after_a_failure_ends_its_worker_with_the_stacks(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_it.py").write_text(FAILS_AND_HANGS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", "1"]
    run = subprocess.run(
        [*command, "-o", "teardown_timeout=1", "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert "test_it.py::test_fails failed in its call:" in run.stdout
    assert 'test_it.py", line 8 in hangs' in run.stderr
    assert "crashed while running 'test_it.py::test_fails'" in run.stdout
    assert "2 failed, 1 passed" in run.stdout
