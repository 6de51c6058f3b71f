"""`python -m benchmarks.updates`, tiny: every candidate brings every byte, and what is printed can
be read.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import hosts
from benchmarks.updates.__main__ import command
from benchmarks.updates.candidates import TITLES
from engine_cli.exits import Exit
from tests.integration.conftest import Processes
from tests.integration.test_hosts import needs_hosts

TINY = ("--gib", "0.004", "--rounds", "1", "--changed", "2", "--updates", "5")


@needs_hosts
@pytest.mark.slow
def test_a_tiny_run_has_every_candidate_here_and_over_a_link(
    processes: Processes, tmp_path: Path
) -> None:
    bench = processes.start("-m", "benchmarks.updates", *TINY, "--json")
    out, err = bench.communicate(timeout=220)  # a wrong byte ends it
    assert bench.returncode == Exit.DONE, err
    document = json.loads(out)
    assert [(one["place"], one["candidate"]) for one in document["rows"]] == [
        (place, name) for place in ("loopback", "1000 Mbit/s") for name in TITLES
    ]
    for one in document["samples"]:
        assert one["reader"]["wrong"] == 0
        assert one["candidate"] != "delta" or one["reader"]["nbytes"] < one["weights_nbytes"] / 2
        assert one["place"] == "loopback" or one["sent_nbytes"] >= one["reader"]["nbytes"]
    many = document["many"]
    assert (many["updates"], many["readers"], many["wrong"], many["retries"]) == (5, 4, 0, 0)
    assert many["versions"] == [5] * 4
    assert all(goal["value"] is not None for goal in document["goals"])
    written = tmp_path / "updates.json"
    written.write_text(out)
    result = CliRunner().invoke(command, ["--report", str(written)])
    assert result.exit_code == Exit.DONE, result.output
    assert result.output.count("### ") == 6


def test_where_there_can_be_no_hosts_it_says_why_before_it_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosts, "missing", lambda: "only root may make hosts")
    result = CliRunner().invoke(command, [])
    assert (result.exit_code, result.output.splitlines()) == (
        Exit.FAILED,
        ["Error: only root may make hosts"],
    )


@pytest.mark.parametrize("changed", ["0", "100", "two", "", "-1", "nan"])
def test_shares_that_make_no_sense_are_refused(changed: str) -> None:
    result = CliRunner().invoke(command, ["--loopback", "--changed", changed])
    assert result.exit_code == Exit.USAGE
