"""`python -m benchmarks.adoption`, tiny: a process adopts what the one before it has left."""

from __future__ import annotations

import json

import pytest

from engine_cli.exits import Exit
from engine_registry.registration.held import keepers_here
from tests.integration.conftest import Processes


@pytest.mark.slow
def test_a_tiny_run_has_every_figure_and_leaves_no_keeper(processes: Processes) -> None:
    bench = processes.start("-m", "benchmarks.adoption", "--gib", "0.1", "--rounds", "1", "--json")
    out, err = bench.communicate(timeout=220)
    assert bench.returncode == Exit.DONE, err
    results = json.loads(out)["results"]
    assert 0 < results["map_s"] < results["adopt_s"]
    assert results["import_s"] <= results["device_s"] < results["verified_s"]
    assert results["verified_s"] < results["published_s"]
    assert not [kept for kept in keepers_here() if kept.key == "/engines/adoption/0"]
