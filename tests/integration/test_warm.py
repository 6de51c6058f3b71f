"""`engines warm`: kernels compiled by the real Triton, where no GPU is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from engine_cli.exits import Exit
from engine_loader.kernels.kept import read
from engine_loader.warming import KERNELS
from tests.integration.conftest import Processes
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

_WITHOUT_TRITON = (
    "import sys; sys.modules['triton'] = None; from engine_cli.main import main; main()"
)


class Engines:
    """`engines warm` with folders of its own, and no GPU."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes = processes
        self.cache = folder / "cache"
        self.env = {
            "XDG_CACHE_HOME": str(self.cache),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    @property
    def files(self) -> list[Path]:
        folder = self.cache / "engine-registry" / "kernels"
        return sorted(folder.iterdir()) if folder.exists() else []

    def start(self, *args: str) -> subprocess.Popen[str]:
        return self._processes.engines("warm", *args, **self.env)

    def warm(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self._processes.run("warm", *args, **self.env)

    def warm_without_triton(self, *args: str) -> subprocess.CompletedProcess[str]:
        process = self._processes.start_anew(
            "-c", _WITHOUT_TRITON, "warm", *args, cwd=ROOT, **self.env
        )
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(args, process.returncode, out, err)


@pytest.fixture
def engines(processes: Processes, tmp_path: Path) -> Engines:
    return Engines(processes, tmp_path)


def assert_one_line(ran: subprocess.CompletedProcess[str], code: Exit, *says: str) -> None:
    lines = [line for line in ran.stderr.splitlines() if line.startswith(("engines: ", "Error: "))]
    assert (ran.returncode, ran.stdout, len(lines)) == (code, "", 1), ran.stderr
    assert [part for part in says if part not in lines[0]] == []


def test_kernels_are_compiled_once_and_then_need_no_triton(engines: Engines) -> None:
    first = engines.warm("--arch", "8.0")
    assert first.returncode == Exit.DONE, first.stderr
    heading, *rows = [line.split() for line in first.stdout.splitlines()]
    assert heading == ["KERNEL", "GPU", "WHAT", "FILE"]
    assert [row[:3] for row in rows] == [[kernel.name, "sm_80", "compiled"] for kernel in KERNELS]
    assert sorted(row[-1] for row in rows) == list(map(str, engines.files))
    assert all(map(read, engines.files))
    before = [file.stat() for file in engines.files]
    again = engines.warm_without_triton("--arch", "sm_80", "--arch", "80", "--json")
    assert (again.returncode, again.stderr) == (Exit.DONE, "")
    document = json.loads(again.stdout)
    assert document["folder"] == str(engines.files[0].parent)
    assert [kernel["compiled"] for kernel in document["kernels"]] == [False] * len(KERNELS)
    assert [set(kernel) for kernel in document["kernels"]] == [
        {"kernel", "gpu", "compiled", "file"}
    ] * len(KERNELS)
    assert [file.stat() for file in engines.files] == before


def test_where_no_gpu_is_its_kind_must_be_named(engines: Engines) -> None:
    assert_one_line(engines.warm(), Exit.USAGE, "no GPU of CUDA is here", "--arch 9.0")


@pytest.mark.parametrize("kind", ["", "9", "hopper", "sm_9.0", "9.0a", "compute_90", "1000"])
def test_what_is_no_kind_of_gpu_is_refused(engines: Engines, kind: str) -> None:
    assert_one_line(engines.warm("--arch", kind), Exit.USAGE, repr(kind), "9.0, 90 or sm_90")


def test_a_kind_that_triton_does_not_know_is_an_error(engines: Engines) -> None:
    ran = engines.warm("--arch", "9.5")
    assert_one_line(ran, Exit.FAILED, "for sm_95 (it does not know such GPUs)")
    assert engines.files == []


def test_without_triton_nothing_is_compiled(engines: Engines) -> None:
    ran = engines.warm_without_triton("--arch", "90")
    assert_one_line(ran, Exit.FAILED, "is not compiled for sm_90", "pip install triton")
    assert engines.files == []


def test_a_folder_that_cannot_be_written_is_an_error(engines: Engines) -> None:
    engines.cache.write_bytes(b"")
    ran = engines.warm("--arch", "90")
    assert_one_line(ran, Exit.FAILED, f"{engines.cache}/", "cannot be written", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, 128 + 15)]
)
def test_a_command_that_is_interrupted_leaves_whole_files_only(
    engines: Engines, number: signal.Signals, code: int
) -> None:
    kinds = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    process = engines.start(*[word for kind in kinds for word in ("--arch", kind)])
    wait_until(lambda: bool(engines.files))
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert len(engines.files) < len(kinds) * len(KERNELS)
    assert all(map(read, engines.files))
