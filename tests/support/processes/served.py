"""An engine that serves bytes of a known content: `served NBYTES HOST [PROTOCOL]`.

Prints its session and the address of the bytes. Ends with its input, or killed.
"""

from __future__ import annotations

import ctypes
import sys

from engine_loader import MooncakeEngine
from engine_registry import Region


def content(nbytes: int) -> bytes:
    return bytes(range(256)) * (nbytes // 256)


def main(nbytes: str, *where: str) -> None:
    memory = ctypes.create_string_buffer(content(int(nbytes)), int(nbytes))
    region = Region(ctypes.addressof(memory), int(nbytes))
    with MooncakeEngine(*where) as engine:
        engine.register(region)
        print(engine.session_id, region.addr, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
