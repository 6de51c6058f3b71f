"""`python -m benchmarks.fanout`, small: it runs to the end, every byte is right, and what it prints
can be read.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import hosts
from benchmarks.fanout.__main__ import command
from engine_cli.exits import Exit
from tests.integration.conftest import Processes
from tests.integration.test_hosts import needs_hosts


@needs_hosts
@pytest.mark.slow
def test_a_small_run_has_every_strategy_all_of_it_exact(
    processes: Processes, tmp_path: Path
) -> None:
    plot = tmp_path / "plot.svg"
    args = "--receivers", "1,2", "--mib", "8", "--mbit", "200", "--json", "--plot", str(plot)
    bench = processes.start("-m", "benchmarks.fanout", *args)
    out, err = bench.communicate(timeout=110)
    assert bench.returncode == Exit.DONE, err
    report = json.loads(out)
    strategies = ("all_from_one", "complete_then_chain", "pipelined_chain")
    assert [(run["strategy"], run["receivers"]) for run in report["results"]] == [
        (s, n) for n in (1, 2) for s in strategies
    ]
    assert [run["killed_at"] for run in report["kills"]] == [0.25, 0.5, 0.75]
    assert all(run["exact"] for run in [*report["results"], *report["kills"]])
    assert all(run["seed_sent"] >= 1 for run in report["results"])
    assert report["results"][3]["seed_sent"] >= 2  # two receivers that read from nobody else
    assert plot.read_text().startswith("<svg")


def test_where_there_can_be_no_hosts_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "missing", lambda: "only root may make hosts")
    result = CliRunner().invoke(command, [])
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        Exit.FAILED,
        "Error: only root may make hosts",
    )


@pytest.mark.parametrize("receivers", ["0", "65", "two", ""])
def test_numbers_of_receivers_that_make_no_sense_are_refused(receivers: str) -> None:
    result = CliRunner().invoke(command, ["--receivers", receivers])
    assert result.exit_code == Exit.USAGE
