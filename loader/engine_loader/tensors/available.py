"""How much memory there is for a large allocation: one that is too large would succeed, and the
kernel would end the process when it is written to.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # of version 2, as a container sees it


def available_nbytes(device: torch.device) -> int | None:
    """Bytes that can be allocated now, or None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [left for left in (_of_machine(), _of_container()) if left is not None]
    return min(limits, default=None)


def _of_machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def _of_container() -> int | None:
    """Memory of files that the kernel can take back does not count as used."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        found = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # there is no limit, or it is another system
        return None
    return max(0, limit - used + (int(found[1]) if found else 0))
