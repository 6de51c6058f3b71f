"""`engines demo --keep`: a fleet for trying commands on, which ends without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_cli.exits import Exit
from tests.integration.conftest import Processes, line_of
from tests.integration.test_cli import _descendants, _is_keeper, wait_for_end
from tests.support.checkout import PACKAGES


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_fleet_that_is_kept_answers_commands_and_leaves_nothing_behind(
    processes: Processes, tmp_path: Path, number: int
) -> None:
    weights = {f"layer.{number}.w": torch.rand(64, 64) for number in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    demo = processes.engines(
        "demo",
        "--keep",
        "--weights",
        str(tmp_path / "model.safetensors"),
        TMPDIR=str(scratch),
        PYTHONPATH=os.pathsep.join(PACKAGES),
    )
    said = ""
    while "engines doctor" not in said:
        said += line_of(demo)
    (endpoint,) = set(re.findall(r"--etcd (\S+)", said))
    (url,) = re.findall(r"dashboard is (\S+)", said)
    listed = json.loads(processes.run("list", "--json", "--etcd", endpoint).stdout)["instances"]
    assert [(each["instance"], each["state"]) for each in listed] == [
        ("copy-1", "ready"),
        ("copy-2", "ready"),
        ("demo", "ready"),
    ]
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  on 127.0.0.1
        assert answer.status == 200
    (victim,) = (int(pid) for pid in re.findall(r"kill -9 (\d+)", said))
    started = set(_descendants(demo.pid))
    assert victim in started

    demo.send_signal(number)
    out, err = demo.communicate(timeout=100)
    if number == signal.SIGINT:
        assert (demo.returncode, out, err) == (Exit.DONE, "the fleet has ended\n", "")
        assert list(scratch.iterdir()) == []
    for pid in sorted(started, key=_is_keeper):
        if number == signal.SIGKILL and _is_keeper(pid):
            os.kill(pid, signal.SIGKILL)  # it would wait for the etcd that was killed along
        wait_for_end(pid)
