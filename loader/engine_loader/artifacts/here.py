"""What compiled code depends on, as far as this process and its machine say it."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton")
_CPUINFO = Path("/proc/cpuinfo")


def artifact_key_here(device: str | torch.device | None = None) -> dict[str, str]:
    """The fields of an artifact's key that this machine and this environment decide.

    They are `python`, `torch`, `triton`, `platform`, `cpu` and `device`; on a GPU also `cuda` and
    `driver`. `cpu` stands for the instructions that the CPU knows, because compilers use all of
    them for code that runs on the host. Add what else decides: the engine's version, a digest of
    its configuration and of the model's.

    Args:
        device: The device that the code is compiled for. None: the first GPU, or the CPU where
            there is none.

    Returns:
        Texts by name.

    Example:
        `artifact_key_here() | {"vllm": "0.32.0", "model": "llama", "tp": "0/2"}`
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    libc = "".join(platform.libc_ver())
    key = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{name: _version_of(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()} {libc}".lower().strip(),
        "cpu": _instructions(),
    }
    if where.type != "cuda":
        return {**key, "device": where.type}
    major, minor = torch.cuda.get_device_capability(where)
    return {
        **key,
        "device": f"{torch.cuda.get_device_name(where)} {major}.{minor}",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "driver": str(torch._C._cuda_getDriverVersion()),  # type: ignore[attr-defined]
    }


def _version_of(package: str) -> str:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return "none"


def _instructions() -> str:
    """64 bits as 16 hexadecimal digits, equal for CPUs of equal instructions."""
    try:
        lines = _CPUINFO.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    known = " ".join(sorted(flags.partition(":")[2].split())) or platform.processor()
    return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
