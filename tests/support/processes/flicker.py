"""A source whose memory is offered only while all of its bytes are equal: `flicker NBYTES`.

It takes the memory back, fills it with zeros and then with the next byte, and offers it again for
a moment, all the time. Prints its session and the address. Ends with its input, or killed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import time

from engine_loader.engines.sockets.engine import SocketEngine
from engine_registry import Region

_OFFERED_S = 0.001


def main(nbytes: str) -> None:
    memory = ctypes.create_string_buffer(b"\1" * int(nbytes), int(nbytes))
    region = Region(ctypes.addressof(memory), int(nbytes))
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with SocketEngine("127.0.0.1") as engine:
        engine.register(region)
        print(engine.session_id, region.addr, flush=True)
        for byte in itertools.cycle(range(1, 256)):
            engine.unregister(region)
            ctypes.memset(region.addr, 0, region.nbytes)
            ctypes.memset(region.addr, byte, region.nbytes)
            engine.register(region)
            time.sleep(_OFFERED_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
