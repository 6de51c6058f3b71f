"""`python -m benchmarks.gpu` on CPUs, over tcp: all of it but the GPUs, with real processes."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.rows import EACH_NCCL, FILE, TURN, WARM

CPUS = run.Devices(("cpu", "cpu"), ("cpu", "cpu"), protocol="tcp", backend="gloo", gpus=2)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_every_part_is_measured_and_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part for part in run.PARTS if part not in ("large", "llama-70b-tp8", "small")]
    results = run.Results()
    run.measure(results, CPUS, parts, 0.001, 1, True, lambda _: None)
    run.report(results, as_json=True, profiled=True)
    report = json.loads(capsys.readouterr().out)
    rows = {(row["group"], row["what"]): row for row in report["rows"]}
    assert {("mixed", what) for what in (WARM, TURN, EACH_NCCL, FILE)} <= rows.keys()
    assert {group for group, _ in rows} == {"mixed", "failover", "fan-out", "reshard"}
    unrun = [row for row in report["rows"] if "median_s" not in row]
    assert [row["note"] for row in unrun] == ["not run: 2 GPUs"] * 2
    assert report["steps_s"]["mixed, header"]["reads and checks"] > 0
    assert len(report["goals"]) == 8
    assert report["functions"]["mixed"]
