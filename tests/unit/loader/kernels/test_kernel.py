"""Kernels that are found in files or compiled into them, and how the driver launches them."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine_loader.digests import sums
from engine_loader.errors import EngineFailed
from engine_loader.kernels import kept
from engine_loader.kernels import kernel as kernels
from engine_loader.kernels.kept import Compiled
from engine_loader.kernels.kernel import Kernel, can_be_had, find_or_compile
from tests.support.checkout import PACKAGES

KERNEL, ARCH, GPU = sums.KERNEL, 80, 0
COMPILED = Compiled("_sum_blocks", b"\x7fELF", shared_nbytes=64, threads=256, parameters=5)


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # so neither found nor imported


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: divmod(ARCH, 10))


# -- found or compiled
# --------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_for_a_kind_of_gpu() -> None:
    assert not KERNEL.is_kept(ARCH)
    made = find_or_compile(KERNEL, ARCH)
    assert KERNEL.is_kept(ARCH)
    assert not KERNEL.is_kept(ARCH + 6)
    written = KERNEL.path(ARCH).stat()
    assert find_or_compile(KERNEL, ARCH) == made
    assert KERNEL.path(ARCH).stat() == written


def test_kernels_with_other_constants_are_kept_apart() -> None:
    other = Kernel(KERNEL.module, KERNEL.name, (("PARTS", 3),))
    assert KERNEL.path(ARCH) != other.path(ARCH)
    assert KERNEL.path(ARCH) != KERNEL.path(ARCH + 6)


def test_to_keep_a_kernel_says_whether_it_had_to_be_compiled() -> None:
    assert [KERNEL.keep(ARCH), KERNEL.keep(ARCH)] == [True, False]


def test_a_file_that_is_not_used_is_replaced() -> None:
    kept.write(KERNEL.path(ARCH), COMPILED)
    KERNEL.path(ARCH).chmod(0o666)
    assert KERNEL.keep(ARCH)
    assert find_or_compile(KERNEL, ARCH).cubin != COMPILED.cubin
    assert KERNEL.path(ARCH).stat().st_mode & 0o777 == 0o644


def test_a_load_goes_on_where_the_folder_cannot_be_written(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(b"")
    with caplog.at_level(logging.INFO):
        assert find_or_compile(KERNEL, ARCH).name == "_sum_blocks"
    (line,) = caplog.records
    assert line.levelno == logging.INFO
    assert line.fields == {  # type: ignore[attr-defined]
        "event": "kernel_not_kept",
        "path": KERNEL.path(ARCH),
        "error": "NotADirectoryError",
    }
    with pytest.raises(EngineFailed, match="cannot be written") as caught:
        KERNEL.keep(ARCH)
    assert "XDG_CACHE_HOME" in caught.value.remedy
    assert cache.read_bytes() == b""


@pytest.mark.usefixtures("_without_triton", "_a_gpu")
def test_without_triton_a_kernel_that_is_kept_is_used() -> None:
    kept.write(KERNEL.path(ARCH), COMPILED)
    assert find_or_compile(KERNEL, ARCH) == COMPILED
    assert not KERNEL.keep(ARCH)
    assert can_be_had([KERNEL], GPU)


@pytest.mark.usefixtures("_without_triton", "_a_gpu")
def test_without_triton_a_kernel_that_is_not_kept_cannot_be_had() -> None:
    other = Kernel(KERNEL.module, KERNEL.name, (("PARTS", 3),))
    kept.write(other.path(ARCH), COMPILED)
    assert not can_be_had([other, KERNEL], GPU)
    for call in (KERNEL.keep, lambda arch: find_or_compile(KERNEL, arch)):
        with pytest.raises(EngineFailed, match=r"not compiled for sm_80.* not installed"):
            call(ARCH)


def test_with_triton_every_kernel_can_be_had() -> None:
    assert can_be_had([KERNEL], GPU)


def test_two_processes_that_compile_at_once_leave_one_whole_file() -> None:
    program = (
        "import json, sys\n"
        "from engine_loader.digests.sums import KERNEL\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"print(json.dumps([KERNEL.keep({ARCH}), KERNEL.is_kept({ARCH})]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for each in processes:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for each in processes:
            assert each.stdin is not None
            print(file=each.stdin, flush=True)
        found = [json.loads(each.communicate()[0]) for each in processes]
    finally:
        for each in processes:
            each.kill()
            each.communicate()
    assert [is_kept for _, is_kept in found] == [True, True]
    assert any(had_to_compile for had_to_compile, _ in found)
    assert os.listdir(kept.folder()) == [KERNEL.path(ARCH).name]
    assert find_or_compile(KERNEL, ARCH).name == "_sum_blocks"


# -- launched
# --------------------------------------------------------------------------------------------------


class Driver:
    """In the place of CUDA's: keeps what it was asked for."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.launched: list[tuple[Any, ...]] = []
        self.error = 0

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        self.loaded.append(cubin)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = 7 if name == b"_sum_blocks" else 0
        return 0

    def cuLaunchKernel(self, function: ctypes.c_void_p, *rest: Any) -> int:
        *sizes, shared_nbytes, stream, places, extra = rest
        values = [ctypes.c_uint64.from_address(place).value for place in places]
        self.launched.append(
            (
                function.value,
                tuple(size.value for size in sizes),
                shared_nbytes.value,
                stream.value,
                values,
                extra,
            )
        )
        return self.error

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_LAUNCH_FAILED"
        return 0


@pytest.fixture
def driver(_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    kernels._load.cache_clear()
    monkeypatch.setattr(kernels, "driver", lambda: driver)
    monkeypatch.setattr("engine_loader.tensors.cuda.driver", lambda: driver)
    driver = Driver()
    yield driver
    kernels._load.cache_clear()


STREAM = cast("torch.cuda.Stream", SimpleNamespace(device_index=GPU, cuda_stream=12))


def test_a_launch_has_the_addresses_the_grid_and_the_stream(driver: Driver) -> None:
    kept.write(KERNEL.path(ARCH), COMPILED)
    tensors = [torch.zeros(size, dtype=torch.int64) for size in (1, 2, 3)]
    for blocks in (5, 6):
        KERNEL.launch(STREAM, (blocks, 16), *tensors)
    addresses = [each.data_ptr() for each in tensors]
    assert driver.loaded == [COMPILED.cubin]
    assert driver.launched == [
        (7, (blocks, 16, 1, 256, 1, 1), 64, 12, [*addresses, 0, 0], None) for blocks in (5, 6)
    ]


def test_a_launch_that_the_driver_refuses_is_an_error_with_its_name(driver: Driver) -> None:
    kept.write(KERNEL.path(ARCH), COMPILED)
    driver.error = 719
    with pytest.raises(EngineFailed, match=r"cannot be launched \(CUDA_ERROR_LAUNCH_FAILED\)"):
        KERNEL.launch(STREAM, (1, 1))
