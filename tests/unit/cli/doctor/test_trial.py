"""What the probe process sees of the kernels of cuda_ipc."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton

from engine_cli.doctor.trial import _library_facts
from engine_loader.engines.cuda_ipc.launcher import KERNELS
from engine_loader.kernels.kept import Compiled, folder, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def _two_kinds_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 0)].__getitem__)


def keep(arch: int) -> None:
    for kernel in KERNELS.values():
        write(kernel.path(arch), Compiled("copy", b"", 0, 256, 4))


@pytest.mark.usefixtures("_two_kinds_of_gpu")
def test_kernels_that_are_kept_for_all_gpus_need_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    keep(80)
    with pytest.raises(ModuleNotFoundError):
        _library_facts("127.0.0.1", "cuda_ipc")
    keep(90)
    assert _library_facts("127.0.0.1", "cuda_ipc") == {"archs": [80, 90], "folder": str(folder())}


@pytest.mark.usefixtures("_two_kinds_of_gpu")
def test_kernels_that_are_not_kept_need_triton_and_a_folder(cache: Path) -> None:
    keep(80)
    seen = {"archs": [80, 90], "folder": str(folder()), "triton": triton.__version__}
    assert _library_facts("127.0.0.1", "cuda_ipc") == {**seen, "can_be_kept": True}
    cache.rename(cache.with_name("other"))
    cache.write_bytes(b"")
    assert _library_facts("127.0.0.1", "cuda_ipc") == {**seen, "can_be_kept": False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_no_gpu_is_triton_is_imported() -> None:
    facts = _library_facts("127.0.0.1", "cuda_ipc")
    assert (facts["archs"], facts["triton"]) == ([], triton.__version__)
