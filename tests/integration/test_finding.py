"""How the command line helps to find what is meant: mistyped names, and what a load waits for."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from engine_cli.exits import Exit
from engine_registry import Registry
from tests.integration.conftest import Processes
from tests.support.ranks import register


def test_a_load_says_at_once_what_it_waits_for_and_which_names_are_near(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    with register(registry, "qwen-a"):
        load = processes.engines(
            "load", "qwen-b", "--rank", "0", "--wait", "600", "--namespace", namespace
        )
        assert load.stderr is not None
        assert load.stderr.readline() == (
            "engines: waiting up to 600 s: instance 'qwen-b' is not registered "
            "(did you mean qwen-a?)\n"
        )
        load.send_signal(signal.SIGINT)
        assert load.wait(60) == Exit.INTERRUPTED


def test_a_load_says_which_ranks_it_waits_for_also_in_json(
    processes: Processes, registry: Registry, namespace: str, tmp_path: Path
) -> None:
    with register(registry, "a", world_size=3):
        load = processes.engines(
            "load", "a", "--full", "--wait", "600", "--log-json", "--namespace", namespace
        )
        assert load.stderr is not None
        line = json.loads(load.stderr.readline())
        assert "missing ranks 1-2 of 3" in line["message"]
        assert (line["fields"]["event"], line["fields"]["timeout_s"]) == ("load_waits", 600)
        load.send_signal(signal.SIGINT)
        assert load.wait(60) == Exit.INTERRUPTED


@pytest.mark.parametrize("command", ["show", "evict"])
def test_an_instance_that_is_not_there_is_named_with_those_that_are_like_it(
    processes: Processes, registry: Registry, namespace: str, command: str
) -> None:
    with register(registry, "qwen-a"), register(registry, "qwen-b"), register(registry, "llama"):
        done = processes.run(command, "qwen", "--namespace", namespace)
    assert done.returncode == Exit.INSTANCE
    assert done.stderr.endswith(
        "instance 'qwen' is not registered: did you mean qwen-b or qwen-a?\n"
    )


def test_a_command_that_does_not_exist_is_named_with_those_that_are_like_it(
    processes: Processes,
) -> None:
    near, far = processes.run("lst"), processes.run("frobnicate")
    assert (near.returncode, far.returncode) == (Exit.USAGE, Exit.USAGE)
    assert "there is no command 'lst': did you mean list?" in near.stderr
    assert "there is no command 'frobnicate': commands are register, list, show," in far.stderr
