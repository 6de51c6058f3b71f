"""`python -m benchmarks.scale --quick`: every part runs to its end and counts what can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.scale.__main__ import PARTS, command
from benchmarks.scale.goals import GOALS
from benchmarks.scale.sizes import QUICK
from engine_cli.exits import Exit
from tests.integration.conftest import Processes


@pytest.mark.timeout(390)
@pytest.mark.slow
def test_a_quick_run_measures_every_goal_and_its_counts_are_sane(
    processes: Processes, tmp_path: Path
) -> None:
    path = tmp_path / "scale.json"
    bench = processes.start("-m", "benchmarks.scale", "--quick", "--json", str(path))
    out, err = bench.communicate(timeout=370)
    assert bench.returncode == Exit.DONE, err
    document = json.loads(path.read_text())
    assert [goal["figure"] for goal in document["goals"]] == [goal.figure for goal in GOALS]
    assert all(goal["value"] is not None for goal in document["goals"])
    rows = {table["title"].split(":")[0]: table["rows"] for table in document["tables"]}

    _check_joins(rows["R"], "R", QUICK.ranks)
    _check_joins(rows["I"], "I", QUICK.instances)
    _check_joins(rows["N"], "N", QUICK.joiners)
    assert [row["exact"] for row in rows["N"]] == [f"{n} of {n}" for n in QUICK.joiners]
    for title in rows:
        for row in rows[title] if title.startswith("H waiters") else ():
            assert 0 <= row["events delivered"] <= row["H"] * QUICK.changes
    (serving, *_) = rows[f"A host of {QUICK.host_ranks} ranks"]
    assert serving["keepers"] <= QUICK.host_ranks
    assert 1 <= serving["sockets to etcd"] <= 3 * QUICK.host_ranks
    assert out.count("Goals") == 1


def _check_joins(rows: list[dict[str, Any]], name: str, sizes: tuple[int, ...]) -> None:
    assert [row[name] for row in rows] == list(sizes)
    for row in rows:
        # a claim and a ticket at least
        assert 5 <= row["requests a join"] <= 25
        assert row["kB a join"] > 0
        assert row["watch answers"] >= 1
        assert row["most readers"] >= 1


def test_a_part_can_be_run_alone_and_the_goals_of_others_are_not_measured() -> None:
    result = CliRunner().invoke(command, ["chain", "--quick"])
    assert result.exit_code == Exit.DONE, result.output
    assert "1,000 receivers to 8, in the model" in result.output
    assert "not measured" in result.output


def test_a_part_that_there_is_not_is_refused() -> None:
    result = CliRunner().invoke(command, ["joins"])
    assert result.exit_code == Exit.USAGE
    assert all(part in result.output for part in PARTS)
