"""Wrong ways to call `engines`: each ends with one clear line and its exit code. The pages show
these lines as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine_cli.exits import Exit
from engine_loader import MooncakeEngine, publish
from engine_registry import ModelIdentity, Registry
from tests.integration.conftest import Processes
from tests.support.checkout import ROOT
from tests.support.ranks import register

Mount = Callable[[str], Path]


@pytest.fixture
def source(registry: Registry) -> Iterator[None]:
    """`real`, of one rank with 400 kB."""
    with (
        MooncakeEngine("127.0.0.1") as engine,
        publish(
            registry,
            engine,
            instance="real",
            rank=0,
            world_size=1,
            tensors={"w": torch.rand(100_000)},
            model=ModelIdentity("real"),
        ),
    ):
        yield


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """A file system of 64 kB with more options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size=64k{options}", "none", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (",ro", "Read-only file system"),
        ("", r"No space left on device: it takes 400000 bytes, \d+ are free"),
    ],
    ids=["read-only", "full"],
)
def test_a_folder_that_takes_no_file_is_one_line(
    processes: Processes, namespace: str, mounted: Mount, options: str, reason: str
) -> None:
    folder = mounted(options)
    ran = processes.run(
        *("load", "real", "--rank", "0", "--out", str(folder), "--namespace", namespace)
    )
    assert (ran.returncode, ran.stdout) == (Exit.FAILED, "")
    assert re.fullmatch(
        rf"engines: error: cannot write {folder}/rank-0\.safetensors: {reason}: choose another "
        r"folder, or make this one take the file\n",
        ran.stderr,
    )
    assert list(folder.iterdir()) == []


def test_a_context_that_is_not_there_is_one_line(processes: Processes, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[contexts.prod]\netcd = "10.0.0.5:2379"\n')
    ran = processes.run("list", "--context", "prodd", ENGINES_CONFIG=str(config))
    assert (ran.returncode, ran.stderr) == (
        Exit.USAGE,
        f"engines: error: there is no context 'prodd' in {config}: known are prod\n",
    )


def test_a_variable_that_means_nothing_is_one_warning(processes: Processes, namespace: str) -> None:
    ran = processes.run("list", "--namespace", namespace, ENGINES_NAMSPACE="x")
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        Exit.DONE,
        "no instance is registered\n",
        "engines: warning: ENGINES_NAMSPACE means nothing to engines: did you mean "
        "ENGINES_NAMESPACE?\n",
    )


@pytest.mark.parametrize("value", ["0", "3601", "-1"])
def test_a_timeout_out_of_bounds_says_the_bounds(processes: Processes, value: str) -> None:
    ran = processes.run("list", "--timeout", value)
    assert ran.returncode == Exit.USAGE
    assert re.search(rf"'--timeout'.*: {value}\.0 is not in the range 0<x<=3600", ran.stderr)


def test_the_error_of_the_tutorial_is_the_real_one(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    page = (ROOT / "docs" / "tutorial" / "first-load.md").read_text()
    _, sample = page.split("$ engines load tiny --rank 1 --wait 1\n")
    with register(registry, "tiny", world_size=2):
        ran = processes.run(
            *("load", "tiny", "--rank", "1", "--wait", "1", "--namespace", namespace)
        )
    assert sample.startswith(f"{ran.stderr}$ echo $?\n{ran.returncode}\n")
