"""Which kernels are compiled ahead, and for which GPUs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import engine_loader
from engine_loader.kernels.kernel import Kernel
from engine_loader.warming import KERNELS, archs_here, warm

PACKAGE = Path(engine_loader.__file__).parent
OF_DELTAS = "engine_loader.deltas."  # which Triton launches


def modules_of_kernels() -> list[str]:
    return [
        ".".join(("engine_loader", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "\nKERNELS = {" in path.read_text("utf-8") and " Source(" in path.read_text("utf-8")
    ]


def test_no_kernel_is_forgotten() -> None:
    names = {
        (module, name)
        for module in modules_of_kernels()
        if not module.startswith(OF_DELTAS)
        for name in importlib.import_module(module).KERNELS
    }
    assert names == {(kernel.module, kernel.name) for kernel in KERNELS}
    assert len(names) == len(KERNELS) >= 4


def test_each_kernel_is_kept_for_each_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[str, int]] = []

    def keep(kernel: Kernel, arch: int) -> bool:
        kept.append((kernel.name, arch))
        return arch == 90

    monkeypatch.setattr(Kernel, "keep", keep)
    warmed = list(warm([90, 100]))
    assert kept == [(kernel.name, arch) for arch in (90, 100) for kernel in KERNELS]
    assert [(each.kernel, each.arch) for each in warmed] == kept
    assert {each.compiled for each in warmed if each.arch == 90} == {True}
    assert {each.compiled for each in warmed if each.arch == 100} == {False}
    assert [each.path for each in warmed] == [
        kernel.path(arch) for arch in (90, 100) for kernel in KERNELS
    ]


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [([], []), ([(9, 0)], [90]), ([(9, 0), (8, 0), (9, 0)], [80, 90]), ([(12, 1)], [121])],
)
def test_each_kind_of_gpu_of_this_machine_counts_once(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], archs: list[int]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert archs_here() == archs
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert archs_here() == []
