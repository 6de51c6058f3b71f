"""Read-only memory is not filled: neither what the kernel protects nor what Python relies on."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import Destination, InProcessEngine, load
from engine_loader.errors import TensorsUnusable
from engine_loader.files.disk import read_into
from engine_registry import Registry
from engine_registry.etcd.config import EtcdConfig, parse_endpoints

pytestmark = pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable", "ignore:The given NumPy array is not writable"
)
PAGE = mmap.PAGESIZE
READ_ONLY = "w: its memory is read-only"
BYTES = "w: its memory is that of a bytes object"


def mapped(folder: Path, mode: str) -> torch.Tensor:
    (folder / "w").write_bytes(bytes(3 * PAGE))
    return torch.from_numpy(np.memmap(folder / "w", np.uint8, mode))  # type: ignore[call-overload]


def from_bytes(_: Path) -> torch.Tensor:
    return torch.frombuffer(bytes(bytearray(b"never changed" * 100)), dtype=torch.uint8)


def loaded(folder: Path) -> torch.Tensor:
    """torch maps the file, and gets separate pages where it writes."""
    save_file({"w": torch.zeros(PAGE, dtype=torch.uint8)}, folder / "w.safetensors")
    return load_file(folder / "w.safetensors")["w"]


REFUSED: dict[str, tuple[Callable[[Path], torch.Tensor], str]] = {
    "read-only mapping": (lambda folder: mapped(folder, "r"), READ_ONLY),
    "its end": (lambda folder: mapped(folder, "r")[-1:], READ_ONLY),
    "bytes": (from_bytes, BYTES),
    "a part of bytes": (lambda folder: from_bytes(folder)[70:90], BYTES),
    "bytes as an array": (
        lambda _: torch.from_numpy(np.frombuffer(bytes(bytearray(b"x" * 999)), np.uint8)),
        BYTES,
    ),
}
GOOD: dict[str, Callable[[Path], torch.Tensor]] = {
    "allocated": lambda _: torch.zeros(100),
    "writable mapping": lambda folder: mapped(folder, "r+"),
    "mapping that is copied on writes": lambda folder: mapped(folder, "c"),
    "bytearray": lambda _: torch.frombuffer(bytearray(100), dtype=torch.uint8),
    "loaded from a file": loaded,
    "array": lambda _: torch.from_numpy(np.zeros(100)),
    "empty": lambda folder: mapped(folder, "r")[:0],
    "a copy": lambda folder: mapped(folder, "r").clone(),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_read_only_memory_is_not_filled(
    tmp_path: Path, make: Callable[[Path], torch.Tensor], said: str
) -> None:
    tensors = {"good": torch.zeros(3), "w": make(tmp_path)}
    with pytest.raises(
        TensorsUnusable, match=f"^1 tensor cannot be filled: {said}.*: load into a copy"
    ):
        Destination(tensors).check_writable()


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_memory_that_can_be_written_to_is_filled(
    tmp_path: Path, make: Callable[[Path], torch.Tensor]
) -> None:
    destination = Destination({"w": make(tmp_path)})
    destination.check_writable()
    assert list(destination) == ["w"]


@contextmanager
def protected(page_addr: int) -> Iterator[None]:
    mprotect = ctypes.CDLL(None).mprotect
    where = ctypes.c_void_p(page_addr), ctypes.c_size_t(PAGE)
    assert mprotect(*where, mmap.PROT_READ) == 0
    yield
    assert mprotect(*where, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_one_read_only_page_in_the_middle_counts() -> None:
    with mmap.mmap(-1, 3 * PAGE) as memory:
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        with protected(whole.data_ptr() + PAGE):
            Destination({"before": whole[:PAGE], "after": whole[2 * PAGE :]}).check_writable()
            with pytest.raises(TensorsUnusable, match=READ_ONLY):
                Destination({"w": whole[1:-1]}).check_writable()
        del whole


def test_a_load_is_refused_before_it_looks_for_sources(tmp_path: Path) -> None:
    with (
        Registry(EtcdConfig(parse_endpoints("fake:1"))) as registry,
        pytest.raises(TensorsUnusable, match=READ_ONLY),
    ):
        load(
            registry,
            InProcessEngine(),
            "nowhere",
            rank=0,
            tensors={"w": mapped(tmp_path, "r")},
        )


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_a_read_of_files_is_refused(
    tmp_path: Path, make: Callable[[Path], torch.Tensor], said: str
) -> None:
    tensor = make(tmp_path)
    before = tensor.clone()
    save_file({"w": torch.ones_like(tensor)}, tmp_path / "ones.safetensors")
    with pytest.raises(TensorsUnusable, match=said):
        read_into(tmp_path / "ones.safetensors", {"w": tensor})
    assert tensor.equal(before)
