"""`python -m benchmarks.gpu` on CPUs, over tcp: all of it but the GPUs, with real processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.report import Results, report
from benchmarks.gpu.rows import BATCH, EACH_NCCL, FILE, PINNED, TURN, WARM

CPUS = run.Devices(("cpu", "cpu"), ("cpu", "cpu"), protocols=("tcp",), backend="gloo", gpus=2)


FAULTS = ("kills", "updates")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def measured(parts: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Any:
    results = Results()
    extent = run.Extent(parts, 0.001, 1, kills=3, loads=3, profiled=True)
    run.measure(results, CPUS, extent, lambda _: None)
    report(results, as_json=True, profiled=True)
    return json.loads(capsys.readouterr().out)


def test_every_part_is_measured_and_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    without = ("large", "llama-70b-tp8", "small", *FAULTS)
    document = measured([part for part in run.PARTS if part not in without], capsys)
    rows = {(row["group"], row["what"]): row for row in document["rows"]}
    assert {("mixed", what) for what in (WARM, TURN, EACH_NCCL)} <= rows.keys()
    assert {("host", what) for what in (WARM, PINNED, BATCH, FILE)} <= rows.keys()
    assert {group for group, _ in rows} == {"mixed", "host", "failover", "fan-out", "reshard"}
    unrun = [row for row in document["rows"] if "median_s" not in row]
    notes = sorted(row["note"] for row in unrun)
    assert notes == ["not run: 2 GPUs"] * 2 + ["not run: it copies to GPUs"]
    assert document["steps_s"][f"mixed, tcp, {TURN}"]["reads and checks"] > 0
    assert document["functions"]["mixed, tcp"]


def test_loads_beside_kills_and_updates_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    document = measured(FAULTS, capsys)
    kills, updates = document["counts"]["kills"], document["counts"]["updates"]
    assert kills["kills"] == 3
    assert updates["loads"] == 3
    faults = [goal for goal in document["goals"] if goal["what"].startswith(FAULTS)]
    assert {goal["verdict"] for goal in faults} == {"met"}
    assert {goal["verdict"] for goal in document["goals"] if goal not in faults} == {"not run"}
