"""Engines whose weights are fused, quantised and transposed start from each other, in processes
with the real transfer engine: on CPUs, and on a GPU where there is one.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.integration.conftest import Processes, line_of

Start = Callable[..., subprocess.Popen[str]]
Facts = dict[str, Any]
ON_CPU = ("cpu", "tcp", "2", "64")
OVER_SOCKETS = ("cpu", "socket", "2", "64")
ON_GPU = ("cuda", "nvlink_intra", "8", "4096")


@pytest.fixture(
    params=[
        pytest.param(ON_CPU, id="cpu"),
        pytest.param(OVER_SOCKETS, id="cpu, over sockets"),
        pytest.param(
            ON_GPU,
            id="gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ]
)
def start(request: pytest.FixtureRequest, processes: Processes) -> Start:
    """Starts an engine; `seed` are the weights that its own loader would read."""
    device, protocol, *size = request.param

    def start(instance: str, stage: str, seed: int) -> subprocess.Popen[str]:
        # CUDA does not survive a fork, so no fork of the server
        launch = processes.start if device == "cpu" else processes.start_anew
        program = ("-m", "tests.support.processes.engine")
        return launch(*program, instance, stage, device, protocol, str(seed), *size)

    return start


def facts_of(process: subprocess.Popen[str]) -> Facts:
    facts: Facts = json.loads(line_of(process))
    print(facts["rank"], {name: facts[name] for name in ("source", "nbytes", "seconds")})
    return facts


def go_on(process: subprocess.Popen[str], seed: int) -> Facts:
    assert process.stdin is not None
    process.stdin.write(f"{seed}\n")
    process.stdin.flush()
    return facts_of(process)


@pytest.mark.parametrize("stage", ["loaded", "processed"])
def test_an_engine_answers_as_the_one_that_it_copied_from(start: Start, stage: str) -> None:
    first = facts_of(start("a", stage, 1))
    second = facts_of(start("b", stage, 2))
    assert first["source"] == "disk"
    third = facts_of(start("c", stage, 3))  # from one of them, or both
    for copy in (second, third):
        assert copy["source"] == "peers"
        assert copy["nbytes"] == copy["served"] == first["served"]
        assert (copy["content"], copy["answer"]) == (first["content"], first["answer"])


def test_weights_that_are_made_anew_are_copied_as_the_next_version(start: Start) -> None:
    source = start("a", "processed", 1)
    first = facts_of(source)
    changed = go_on(source, 7)
    assert changed["answer"] != first["answer"]
    assert changed["version"] == first["version"] + 1
    second = facts_of(start("b", "processed", 2))
    assert (second["source"], second["answer"]) == ("peers", changed["answer"])
    assert second["version"] == changed["version"]
