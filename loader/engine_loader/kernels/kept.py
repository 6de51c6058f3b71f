"""Compiled kernels in files, one for each kind of GPU, under `~/.cache/engine-registry/kernels`, or
where XDG_CACHE_HOME says.

A file is named after what it was made of, so one of another release is not found. What another user
could have written is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import stat
import tempfile
from pathlib import Path

import msgspec

_FORMAT = b"1"


class Compiled(msgspec.Struct, frozen=True):
    """A kernel for one kind of GPU.

    Attributes:
        name: Of its function.
        cubin: The code.
        shared_nbytes: Of shared memory.
        threads: In a block.
        parameters: All of 8 bytes; those behind the addresses that we give are 0.
    """

    name: str
    cubin: bytes
    shared_nbytes: int
    threads: int
    parameters: int


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "engine-registry" / "kernels"


def path_of(module: str, kernel: str, name: str, arch: int) -> Path:
    """Where what is made of that kernel of the module is kept, whether it is there or not."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
    digest = hashlib.sha256(b"\0".join([_FORMAT, kernel.encode(), source])).hexdigest()
    return folder() / f"{name}-sm_{arch}-{digest[:16]}"


def read(path: Path) -> Compiled | None:
    """None where there is none that can be used."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            others_may_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if found.st_uid not in (os.geteuid(), 0) or others_may_write:
                return None
            return msgspec.msgpack.decode(file.read(), type=Compiled)
    except (OSError, msgspec.MsgspecError):
        return None


def write(path: Path, compiled: Compiled) -> None:
    """OSError. Whoever reads it meanwhile finds all of it or nothing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(file, "wb") as out:
            out.write(msgspec.msgpack.encode(compiled))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
