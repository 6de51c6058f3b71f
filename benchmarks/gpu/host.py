"""From the host's memory to a GPU: load() from an arena of another process, torch's copies of
pinned memory, CUDA's call for many copies, and a file.

All but load() know their addresses and sizes beforehand, and ask nobody whether the bytes are of
one version.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file

from benchmarks import serving
from benchmarks.gpu import loads
from benchmarks.gpu.loads import Place
from benchmarks.gpu.rivals import BLOCK_NBYTES, Action
from benchmarks.gpu.rows import BATCH, COLD, FILE, FLAT_PINNED, PINNED, Row, Target, in_turns
from benchmarks.gpu.sets import Layout, Tensors, allocate, filled
from benchmarks.processes import another_process
from engine_loader import arena_of
from engine_loader.tensors.cuda import wait_for

GROUP = "host"
MODULE = "benchmarks.gpu.host"
_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream


def serve(endpoint: str, instance: str, *place: str) -> None:
    """From an arena of the host, whatever the place's device."""
    here = Place.of(*place)
    loads.use(here.device)
    tensors = filled(here.layout, "cpu")
    arena_of(tensors).close()
    serving.serve(endpoint, instance, tensors, protocol=here.protocol)


def from_host(endpoint: str, dst: Place, rounds: int) -> list[Row]:
    """A file that has just been written lies in the page cache."""
    return [*_loads(endpoint, dst, rounds), *_rivals(dst, rounds)]


def _loads(endpoint: str, dst: Place, rounds: int) -> list[Row]:
    if dst.protocol == "nvlink_intra":
        note = "not run: it does not serve memory of the host"
        return [Row(GROUP, COLD, note=note, protocol=dst.protocol)]
    with another_process(MODULE, "serve", endpoint, dst.instance, *dst.args):
        rows = loads.cold_and_warm(endpoint, [dst], rounds // 2 + 1, rounds)
    return [replace(row, group=GROUP) for row in rows]


def _rivals(dst: Place, rounds: int) -> list[Row]:
    on_gpu = dst.device.startswith("cuda")
    wanted = filled(dst.layout, dst.device)
    target = Target(allocate(dst.layout, dst.device), wanted)
    block: Layout = {"block": (torch.uint8, (min(target.nbytes, BLOCK_NBYTES),))}
    wanted_block = filled(block, dst.device)
    whole = Target(allocate(block, dst.device), wanted_block)
    pinned, flat = (allocate(some, "cpu", pinned=on_gpu) for some in (dst.layout, block))
    _copy(wanted, pinned)
    _copy(wanted_block, flat)
    wait_for([torch.device(dst.device)])
    nbytes = {FLAT_PINNED: whole.nbytes}
    with tempfile.TemporaryDirectory(prefix="engines-bench-") as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(pinned, path)
        actions: dict[str, Action] = {
            FLAT_PINNED: lambda: whole.time(FLAT_PINNED, lambda: _copy(flat, whole.tensors))[0],
            PINNED: lambda: target.time(PINNED, lambda: _copy(pinned, target.tensors))[0],
            FILE: lambda: target.time_new(FILE, lambda: load_file(path, device=dst.device)),
        }
        unrun = []
        try:
            batch = _batch(pinned, target.tensors, dst.device)
            actions[BATCH] = lambda: target.time(BATCH, batch)[0]
        except (OSError, AttributeError, RuntimeError) as exc:
            unrun = [Row(GROUP, BATCH, note=f"not run: {exc}")]
        took = in_turns(actions, rounds)
    notes = {FILE: "load_file(device=…), the file in the page cache"}
    rows = [
        Row(GROUP, what, nbytes.get(what, target.nbytes), tuple(some), notes.get(what, ""))
        for what, some in took.items()
    ]
    return rows + unrun


def _copy(some: Tensors, to: Tensors) -> None:
    for name, tensor in to.items():
        tensor.copy_(some[name], non_blocking=True)


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_: ClassVar = [
        ("order", ctypes.c_int),
        ("src_place", ctypes.c_int * 2),
        ("dst_place", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


def _batch(some: Tensors, to: Tensors, device: str) -> Callable[[], None]:
    """One call of cudaMemcpyBatchAsync, of CUDA 12.8 on, for all of them, which has worked once.

    OSError, AttributeError or RuntimeError where there is none.
    """
    if not device.startswith("cuda"):
        raise OSError("it copies to GPUs")
    runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
    call = runtime.cudaMemcpyBatchAsync
    version = ctypes.c_int()
    runtime.cudaRuntimeGetVersion(ctypes.byref(version))
    count, pointers = len(to), ctypes.c_void_p * len(to)
    attributes, first, failed = _Attributes(_STREAM_ORDER), ctypes.c_size_t(), ctypes.c_size_t()
    stream = torch.cuda.Stream(device)  # it takes no default stream
    arguments = [
        pointers(*[tensor.data_ptr() for tensor in to.values()]),
        pointers(*[some[name].data_ptr() for name in to]),
        (ctypes.c_size_t * count)(*[tensor.nbytes for tensor in to.values()]),
        ctypes.c_size_t(count),
        ctypes.byref(attributes),
        ctypes.byref(first),  # the attributes are for all from the first on
        ctypes.c_size_t(1),
        *([ctypes.byref(failed)] if version.value < 13_000 else []),
        ctypes.c_void_p(stream.cuda_stream),
    ]

    def run() -> None:
        with torch.cuda.device(device):
            code = call(*arguments)
        if code:
            raise RuntimeError(f"error {code} of CUDA {version.value}")

    run()
    wait_for([torch.device(device)])
    return run
