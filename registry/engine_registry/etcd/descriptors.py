"""File descriptors: whether as many are left as a step takes, asked before a library finds out in
its own way.

gRPC aborts the process where its first connection gets none, and Python imports nothing then.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import TypeGuard

_PIPE = 2  # descriptors


def check_left(count: int) -> None:
    """OSError unless this process can open so many more now."""
    opened: list[int] = []
    try:
        for _ in range(-(-count // _PIPE)):
            opened += os.pipe()
    finally:
        for descriptor in opened:
            os.close(descriptor)


def out_of_descriptors() -> OSError:
    """As the system says it, where a call of its own does not."""
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def is_exhausted(error: Exception) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def explain(error: OSError) -> tuple[str, str]:
    """The error in words; and what to do, where it is for want of descriptors."""
    if not is_exhausted(error):
        return str(error), ""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"no file descriptors are left (limit {limit})",
        "close some, or raise the limit (ulimit -n)",
    )
