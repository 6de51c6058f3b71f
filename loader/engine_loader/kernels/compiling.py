"""Compiles kernels of Triton for a kind of GPU, which need not be here. All that imports Triton for
that.

A module that has kernels says in `KERNELS` how each is compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine_loader.errors import EngineFailed
from engine_loader.kernels.kept import Compiled

_ENTRY = re.compile(r"\.entry\s+[^(]*\(([^)]*)\)")  # in PTX: the parameters of a kernel


@dataclass(frozen=True)
class Source:
    """A function of Triton, all of whose parameters are addresses but for constants, of which these
    are some.
    """

    function: Any
    constants: Mapping[str, Any]
    warps: int


def can_compile() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def compile_kernel(module: str, name: str, constants: Mapping[str, Any], arch: int) -> Compiled:
    """The kernel of that name in the KERNELS of the module, with more constants, for GPUs of that
    compute capability times ten. EngineFailed.
    """
    try:
        if not _is_known(arch):
            raise ValueError("it does not know such GPUs")
        source: Source = importlib.import_module(module).KERNELS[name]
        made = _compile(source, {**source.constants, **constants}, arch)
        metadata = made.metadata
        return Compiled(
            metadata.name,
            made.asm["cubin"],
            metadata.shared,
            32 * metadata.num_warps,
            _parameters(made.asm["ptx"]),
        )
    except OSError as exc:  # Triton keeps files, too
        raise EngineFailed(
            f"Triton cannot compile {name} for sm_{arch} ({exc})",
            "make its folder writable, or name another one in TRITON_CACHE_DIR",
        ) from exc
    except Exception as exc:  # Triton has no common base of its errors
        text = getattr(exc, "error_message", None) or str(exc)  # without the lines of the source
        line = next(iter(text.splitlines()), type(exc).__name__)
        raise EngineFailed(
            f"Triton cannot compile {name} for sm_{arch} ({line})",
            "install a Triton that can, or use nvlink_intra",
        ) from exc


def _is_known(arch: int) -> bool:
    """As Triton's assembler says, asked for its version: its compiler would end the process."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool: Any = get_ptxas(arch)
    path = tool[0] if isinstance(tool, tuple) else tool.path  # a tuple before Triton 3.4
    asked = [path, "-arch", f"sm_{arch}", "-V"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def _compile(source: Source, constants: Mapping[str, Any], arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = source.function.arg_names
    signature = {name: "constexpr" if name in constants else "*i64" for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(fn=source.function, signature=signature, constexprs=values),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": source.warps},
    )


def _parameters(ptx: str) -> int:
    """How many the kernel has: behind ours, Triton puts addresses of scratch memory, which kernels
    like these have none of.
    """
    found = _ENTRY.search(ptx)
    if found is None:
        raise ValueError("no entry in the PTX")
    return found[1].count(".param")
