"""`engines watch --keep`, and `engines events` afterwards."""

from __future__ import annotations

import signal
from pathlib import Path

from engine_cli.exits import Exit
from engine_registry import Registry
from tests.integration.conftest import Processes, line_of
from tests.support.ranks import register


def test_what_happened_while_a_watch_ran_can_be_read_after_it(
    registry: Registry, processes: Processes, namespace: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "events.jsonl")
    with register(registry):
        watch = processes.engines("watch", "--lines", "--keep", file, "--namespace", namespace)
        said = [line_of(watch) for _ in range(2)]
        registry.evict(registry.ranks("a")[0], "wrong checkpoint")
        said += [line_of(watch) for _ in range(2)]
    watch.send_signal(signal.SIGTERM)
    assert watch.wait(60) == Exit.DONE
    printed = processes.run("events", file, "--since", "1h").stdout.splitlines()
    assert printed[0].endswith("  a watch began")
    assert printed[1:] == [line.rstrip() for line in said]
    assert ": wrong checkpoint (" in printed[3]
    other = processes.run("events", file, "aa")
    assert len(other.stdout.splitlines()) == 1
    assert other.stderr == "engines: nothing is kept of aa since then (did you mean a?)\n"
