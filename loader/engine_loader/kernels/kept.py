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
import secrets
import stat
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
    """Whether it is there or not."""
    if not (base := os.environ.get("XDG_CACHE_HOME", "")):
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # the user has no name and no home, as in some containers
            base = "/nonexistent"
    return Path(base, "engine-registry", "kernels").absolute()


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
    """OSError. Whoever reads it meanwhile finds all of it or nothing.

    All users may read it: an image has what root has compiled.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o644)) as out:
            out.write(msgspec.msgpack.encode(compiled))
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def can_be_written() -> bool:
    """Whether files can be made in the folder, or the folder be made, as far as is known before."""
    there = next(each for each in (folder(), *folder().parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
