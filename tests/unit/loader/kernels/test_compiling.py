"""Kernels compiled by the real Triton, for GPUs that are not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine_loader.digests import sums
from engine_loader.engines.cuda_ipc import launcher
from engine_loader.errors import EngineFailed
from engine_loader.kernels.compiling import can_compile, compile_kernel
from engine_loader.kernels.kept import Compiled
from engine_loader.kernels.kernel import Kernel

DOUBLE = """
import triton
import triton.language as tl
from engine_loader.kernels.compiling import Source

@triton.jit
def _double(numbers, TILE: tl.constexpr):
    place = numbers + tl.arange(0, TILE)
    tl.store(place, {what})

KERNELS = {{"double": Source(_double, {{}}, warps=2)}}
"""


def compiled(kernel: Kernel, arch: int) -> Compiled:
    return compile_kernel(kernel.module, kernel.name, dict(kernel.constants), arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("kernel", "function", "addresses"),
    [(launcher.KERNELS[4], "_copy_rows", 2), (sums.KERNEL, "_sum_blocks", 3)],
    ids=["copy_rows_4", "sum_blocks"],
)
def test_our_kernels_are_compiled_for_a_kind_of_gpu(
    kernel: Kernel, function: str, addresses: int, arch: int
) -> None:
    made = compiled(kernel, arch)
    assert made.name == function
    assert made.threads == 8 * 32
    assert addresses <= made.parameters <= addresses + 2  # with those of scratch memory
    assert made.cubin.startswith(b"\x7fELF")
    assert f".text.{function}\0".encode() in made.cubin
    assert re.search(rb"sm_(\d+)", made.cubin)[1] == str(arch).encode()  # type: ignore[index]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_kernel_gets_its_constants_and_as_many_threads_as_it_asks_for(modules: Path) -> None:
    (modules / "doubles.py").write_text(DOUBLE.format(what="2 * tl.load(place)"))
    made = compile_kernel("doubles", "double", {"TILE": 64}, 80)
    assert (made.name, made.threads) == ("_double", 2 * 32)
    assert made.cubin != compile_kernel("doubles", "double", {"TILE": 128}, 80).cubin


@pytest.mark.parametrize(
    ("module", "source", "what"),
    [
        ("broken", DOUBLE.format(what="nobody"), "nobody is not defined"),
        ("unwritten", None, "No module named 'unwritten'"),
        ("faulty", "1 / 0", "division by zero"),
        ("empty", "KERNELS = {}", "'double'"),
    ],
)
def test_a_kernel_that_does_not_compile_is_an_error_of_one_line(
    modules: Path, module: str, source: str | None, what: str
) -> None:
    if source is not None:
        (modules / f"{module}.py").write_text(source)
    with pytest.raises(EngineFailed) as caught:
        compile_kernel(module, "double", {"TILE": 64}, 80)
    assert caught.value.what.startswith("Triton cannot compile double for sm_80 (")
    assert what in caught.value.what
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("arch", [42, 95, 999])
def test_a_kind_of_gpu_that_triton_does_not_know_is_an_error_and_not_the_end(arch: int) -> None:
    with pytest.raises(EngineFailed, match=rf"for sm_{arch} \(it does not know such GPUs\)"):
        compiled(sums.KERNEL, arch)


def test_where_triton_can_keep_no_files_the_error_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(EngineFailed, match=f"{tmp_path}/file") as caught:
        compiled(sums.KERNEL, 80)
    assert "TRITON_CACHE_DIR" in caught.value.remedy


def test_triton_can_compile_here() -> None:
    assert can_compile()
