"""Loads over `socket` from real processes that die, change and refuse, within the host and not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine_loader import LoadOptions, LoadReport, Pace, Progress, SocketEngine, load
from engine_loader.errors import SourceLost
from engine_registry import Registry
from tests.integration.conftest import Processes, line_of
from tests.support.checkout import ROOT
from tests.support.processes.source import content, empty

NBYTES = 32 << 20
PACE = Pace(256 << 10, 2, check_s=0.01)
Start = Callable[..., "subprocess.Popen[str]"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=[True, False], ids=["within the host", "over connections"])
def within(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def start(processes: Processes, within: bool) -> Start:
    """Starts a rank that serves version 0 of its launch."""

    def start(instance: str, launch: int = 0, **env: str) -> subprocess.Popen[str]:
        process = processes.start(
            *("-m", "tests.support.processes.source", instance, str(NBYTES)),
            *("127.0.0.1", "2", str(launch)),
            cwd=ROOT,
            **{"TEST_PROTOCOL": "socket", "ENGINES_SOCKET_SAME_HOST": str(int(within)), **env},
        )
        assert line_of(process) == "version 0\n"
        return process

    return start


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def loaded(
    registry: Registry, instances: list[str], half_way: Callable[[], object]
) -> tuple[LoadReport, Tensors]:
    """`half_way` runs once, when half has come."""
    left = [half_way]

    def on_progress(progress: Progress) -> None:
        if 2 * progress.nbytes >= progress.total_nbytes and left:
            left.pop()()

    tensors = empty(NBYTES)
    options = LoadOptions(pace=PACE, progress=on_progress)
    with SocketEngine("127.0.0.1") as engine:
        report = load(
            registry, engine, instances, rank=0, tensors=tensors, options=options, timeout_s=60
        )
    assert not left
    return report, tensors


def assert_version(tensors: Tensors, version: int) -> None:
    assert all(torch.equal(tensors[name], one) for name, one in content(version, NBYTES).items())


def test_a_source_that_dies_is_replaced_by_the_other(
    registry: Registry, start: Start, within: bool
) -> None:
    one, _ = start("a"), start("b")

    def kill() -> None:
        one.kill()
        one.wait()

    report, tensors = loaded(registry, ["a", "b"], kill)
    assert_version(tensors, 0)
    assert "/engines/b/0" in {share.name for share in report.shares if share.nbytes}
    assert ("/engines/b/0" in report.within_host) == within


def test_weights_that_change_under_a_load_come_whole_in_the_next_version(
    registry: Registry, start: Start
) -> None:
    source = start("a")

    def change() -> None:
        say(source, "change")
        assert line_of(source) == "version 1\n"

    report, tensors = loaded(registry, ["a"], change)
    assert (report.version, report.retries) == (1, 1)
    assert_version(tensors, 1)


def test_a_load_goes_on_without_a_source_that_refuses_it(
    registry: Registry, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("the token of another fleet\n")
    start("a", ENGINES_SOCKET_TOKEN_FILE=str(tmp_path / "token"))
    start("b")
    report, tensors = loaded(registry, ["a", "b"], lambda: None)
    assert_version(tensors, 0)
    assert [share.name for share in report.shares if share.nbytes] == ["/engines/b/0"]
    with pytest.raises(SourceLost, match="it demands a token, and this engine has none"):
        loaded(registry, ["a"], lambda: None)
