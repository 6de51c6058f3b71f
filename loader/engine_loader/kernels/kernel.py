"""Kernels of Triton, launched by CUDA's driver.

To import Triton takes half a second, and each of its launches a third of a millisecond of Python:
more than a load has. So it only compiles: once for each kind of GPU, into a file. See `kept`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from engine_loader.errors import EngineFailed
from engine_loader.kernels import kept
from engine_loader.kernels.compiling import can_compile, compile_kernel
from engine_loader.tensors.cuda import check, driver
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_REMEDY = "use nvlink_intra, and report this"


class _Loaded(NamedTuple):
    """On one GPU."""

    function: ctypes.c_void_p
    compiled: kept.Compiled


@dataclass(frozen=True)
class Kernel:
    """A kernel by the name of its module and its own; see `compiling`. From any thread.

    `constants` are those of its parameters whose values are known where it is launched.
    """

    module: str
    name: str
    constants: tuple[tuple[str, int], ...] = ()

    def path(self, arch: int) -> Path:
        """Where it is kept once it has been compiled for such GPUs: 90 for sm_90."""
        return kept.path_of(self.module, f"{self.name}{self.constants}", self.name, arch)

    def is_kept(self, arch: int) -> bool:
        """Whether it need not be compiled for such GPUs."""
        return kept.read(self.path(arch)) is not None

    def keep(self, arch: int) -> bool:
        """Compiles it for such GPUs, which need not be here, unless it is kept.

        Returns:
            Whether it had to be compiled.

        Raises:
            EngineFailed: It cannot be compiled, or its file cannot be written.
        """
        if self.is_kept(arch):
            return False
        path, compiled = self.path(arch), _compile(self, arch)
        try:
            kept.write(path, compiled)
        except OSError as exc:
            raise EngineFailed(
                f"{path} cannot be written ({exc.strerror or exc})",
                "make its folder writable, or name another one in XDG_CACHE_HOME",
            ) from exc
        return True

    def prepare(self, gpu: int) -> None:
        """What its first launch on that GPU does before it begins. EngineFailed."""
        with torch.cuda.device(gpu):
            torch.cuda.current_stream().synchronize()  # the context is the thread's current one
            _loaded(self, gpu)

    def launch(
        self, stream: torch.cuda.Stream, grid: tuple[int, int], *tensors: torch.Tensor
    ) -> None:
        """Begins it on a stream of the current device, which has the memory of all tensors.

        Args:
            stream: Where it is begun.
            grid: How many blocks there are along x and y.
            tensors: Whose addresses it gets, as its first parameters.

        Raises:
            EngineFailed: It can be neither found nor compiled, or not launched.
        """
        function, compiled = _loaded(self, stream.device_index)
        values = (ctypes.c_uint64 * compiled.parameters)(*[one.data_ptr() for one in tensors])
        first = ctypes.addressof(values)
        places = (ctypes.c_void_p * compiled.parameters)(
            *[first + 8 * number for number in range(compiled.parameters)]
        )
        code = driver().cuLaunchKernel(
            function,
            *[ctypes.c_uint(size) for size in (*grid, 1, compiled.threads, 1, 1)],
            ctypes.c_uint(compiled.shared_nbytes),
            ctypes.c_void_p(stream.cuda_stream),
            places,
            None,
        )
        check(code, f"{self.name} cannot be launched", _REMEDY)


def find_or_compile(kernel: Kernel, arch: int) -> kept.Compiled:
    """EngineFailed. What has been compiled is kept, if it can be."""
    path = kernel.path(arch)
    if (known := kept.read(path)) is not None:
        return known
    compiled = _compile(kernel, arch)
    try:
        kept.write(path, compiled)
    except OSError as exc:
        log.info(
            "%s is compiled anew by each process, as %s cannot be written: %s",
            kernel.name,
            path,
            exc,
            extra=fields("kernel_not_kept", path=path, error=exc),
        )
    return compiled


def _compile(kernel: Kernel, arch: int) -> kept.Compiled:
    if not can_compile():
        raise EngineFailed(
            f"{kernel.name} is not compiled for sm_{arch}, and Triton, which could, is not "
            "installed",
            "pip install triton, or run `engines warm` where it is",
        )
    return compile_kernel(kernel.module, kernel.name, dict(kernel.constants), arch)


def can_be_had(kernels: Iterable[Kernel], gpu: int) -> bool:
    """Whether all can be launched on that GPU, as far as is known before."""
    return can_compile() or all(kernel.is_kept(arch_of(gpu)) for kernel in kernels)


_LOADING = threading.Lock()


def _loaded(kernel: Kernel, gpu: int) -> _Loaded:
    with _LOADING:
        return _load(kernel, gpu)


@functools.cache
def _load(kernel: Kernel, gpu: int) -> _Loaded:
    """Into the thread's current context."""
    compiled = find_or_compile(kernel, arch_of(gpu))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    failed = f"the driver does not take {kernel.name}"
    code = driver().cuModuleLoadData(ctypes.byref(module), compiled.cubin)
    check(code, failed, _REMEDY)
    code = driver().cuModuleGetFunction(ctypes.byref(function), module, compiled.name.encode())
    check(code, failed, _REMEDY)
    return _Loaded(function, compiled)


def arch_of(gpu: int) -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(gpu)
    return 10 * major + minor
