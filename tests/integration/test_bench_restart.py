"""`python -m benchmarks.restart`, tiny: starts from what is held, from a peer and from the disk."""

from __future__ import annotations

import json

import pytest

from benchmarks.restart import SOURCES
from engine_cli.exits import Exit
from engine_registry.registration.held import keepers_here
from tests.integration.conftest import Processes


@pytest.mark.slow
def test_a_tiny_run_has_every_figure_and_leaves_no_keeper(processes: Processes) -> None:
    bench = processes.start("-m", "benchmarks.restart", "--gib", "0.05", "--rounds", "1", "--json")
    out, err = bench.communicate(timeout=220)
    assert bench.returncode == Exit.DONE, err
    results = json.loads(out)["results"]
    for source in SOURCES:
        figures = ("import_s", "device_s", "weights_s", "token_s")
        times = [results[f"{source}_{name}"] for name in figures]
        assert times == sorted(times)
        assert results[f"{source}_second_token_s"] > 0
    assert not [kept for kept in keepers_here() if kept.key == "/engines/restart/0"]
