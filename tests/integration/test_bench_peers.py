"""`python -m benchmarks.peers`, tiny, with the candidates that .venv has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.peers import sides
from benchmarks.peers.__main__ import command
from benchmarks.peers.candidates import CANDIDATES
from engine_cli.exits import Exit
from tests.integration.conftest import Processes
from tests.integration.test_hosts import needs_hosts

HERE = [name for name, one in CANDIDATES.items() if not one.product]
TINY = ("--scale", "0.002", "--rounds", "1", "--pairs", "1")


def turns(folder: Path, part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{part}.json").read_text())["turns"]
    return found


def sides_of_this_run() -> list[int]:
    """Processes of sides, and what they have started."""
    mark = f"TEST_RUN={os.environ['TEST_RUN']}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            environment = (process / "environ").read_bytes()
            if mark in environment and b"PEERS_SIDE=" in environment:
                found.append(int(process.name))
    return found


@pytest.mark.slow
def test_every_candidate_here_loads_exactly(processes: Processes, tmp_path: Path) -> None:
    args = ("--only", ",".join(HERE), "--set", "blocks,small", *TINY, "--results", str(tmp_path))
    bench = processes.start("-m", "benchmarks.peers", "loopback", *args)
    out, err = bench.communicate(timeout=220)
    assert bench.returncode == Exit.DONE, err
    found = turns(tmp_path, "loopback")
    assert {(one["tensor_set"], one["candidate"]) for one in found} == {
        (name, candidate) for name in ("blocks", "small") for candidate in HERE
    }
    assert [one["error"] for one in found] == [{}] * len(found)
    assert all(one["found"]["memory"]["reader"] > one["nbytes"] for one in found)
    assert out.count("### Loopback: ") == 2


@needs_hosts
@pytest.mark.slow
def test_candidates_load_between_hosts(processes: Processes, tmp_path: Path) -> None:
    args = (
        "--only",
        "ours-socket,ours-within-host,naive,gloo-flat,http",
        "--link",
        "10 Gbit/s",
        *TINY,
    )
    bench = processes.start("-m", "benchmarks.peers", "hosts", *args, "--results", str(tmp_path))
    _, err = bench.communicate(timeout=220)
    assert bench.returncode == Exit.DONE, err
    found = turns(tmp_path, "hosts")
    assert [one["error"] for one in found] == [{}] * 4


def test_a_kill_of_the_source_is_an_error_at_the_reader(
    processes: Processes, tmp_path: Path
) -> None:
    args = ("--only", "socket", "--scale", "0.1", "--rounds", "1", "--results", str(tmp_path))
    bench = processes.start("-m", "benchmarks.peers", "kills", *args)
    _, err = bench.communicate(timeout=110)
    assert bench.returncode == Exit.DONE, err
    (one,) = turns(tmp_path, "kills")
    assert one["error"] == {}
    assert one["found"].get("finished") or one["found"]["seconds"] >= 0


def test_sides_that_only_wait_take_no_cpu(processes: Processes, tmp_path: Path) -> None:
    args = ("--only", "socket", "--scale", "0.01", "--rounds", "1", "--results", str(tmp_path))
    bench = processes.start("-m", "benchmarks.peers", "idle", *args)
    out, err = bench.communicate(timeout=110)
    assert bench.returncode == Exit.DONE, err
    (one,) = turns(tmp_path, "idle")
    assert one["found"] == {"shares": {"source": 0.0, "reader": 0.0}}
    assert "| socket | 0.0 | 0.0 |  |" in out


def test_a_second_run_measures_nothing_again(tmp_path: Path) -> None:
    args = ["loopback", "--only", "socket", "--set", "small", *TINY, "--results", str(tmp_path)]
    first = CliRunner().invoke(command, args)
    assert first.exit_code == Exit.DONE, first.output
    assert "round 1: socket" in first.output
    before = (tmp_path / "loopback.json").read_bytes()
    again = CliRunner().invoke(command, args)
    assert again.exit_code == Exit.DONE, again.output
    assert "round 1: socket" not in again.output
    assert (tmp_path / "loopback.json").read_bytes() == before


def test_a_product_that_is_not_installed_is_reported_and_not_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sides, "PEERS", tmp_path)
    args = ["loopback", "--only", "ray", "--set", "small", *TINY, "--results", str(tmp_path)]
    result = CliRunner().invoke(command, args)
    assert result.exit_code == Exit.DONE, result.output
    (one,) = turns(tmp_path, "loopback")
    assert one["error"]["type"] == "not installed"
    assert "`not installed` ray: run scripts/peers_setup.sh" in result.output


def test_ctrl_c_leaves_no_process_and_keeps_what_was_found(
    processes: Processes, tmp_path: Path
) -> None:
    args = ("--only", "socket,http", "--set", "small", "--scale", "0.01", "--rounds", "500")
    bench = processes.start("-m", "benchmarks.peers", "loopback", *args, "--results", str(tmp_path))
    assert bench.stderr is not None
    for line in bench.stderr:
        if "round 1: socket" in line:
            break
    assert sides_of_this_run() != []
    bench.send_signal(signal.SIGINT)
    bench.communicate(timeout=60)
    assert bench.returncode == 128 + signal.SIGINT
    assert len(turns(tmp_path, "loopback")) >= 1
    assert sides_of_this_run() == []


@pytest.mark.parametrize("args", [["--only", "sockets"], ["--set", "x"], ["--link", "1"]])
def test_what_there_is_not_is_refused(args: list[str]) -> None:
    result = CliRunner().invoke(command, args)
    assert result.exit_code == Exit.USAGE
