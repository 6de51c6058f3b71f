"""The network between the guests: an Ethernet switch whose cables can be pulled.

Each guest's card sends its frames as datagrams to a socket here. A thread forwards them. Where a
guest takes none because it is slow, its frames wait, so none is lost by the switch itself.
"""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from pathlib import Path

_FRAME_NBYTES = 1 << 16
_BROADCAST = 1  # the bit of a MAC address
_FULL_S = 0.05  # how long a frame waits for a card that takes none


class Switch:
    def __init__(self, folder: Path, names: list[str]) -> None:
        self.names = names
        self._cards = {name: folder / f"{name}.card" for name in names}
        self._paths = {name: folder / f"{name}.port" for name in names}
        self._ports: dict[str, socket.socket] = {}
        self._learnt: dict[bytes, str] = {}
        self._cut: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self.forwarded = 0
        self._lost = threading.Event()  # a frame, at a cut
        for name in names:
            port = self._ports[name] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            port.bind(str(self._paths[name]))
            port.settimeout(_FULL_S)
            self._selector.register(port, selectors.EVENT_READ, name)
        self._wake, theirs = socket.socketpair()
        self._theirs = theirs
        self._selector.register(theirs, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="switch", daemon=True)
        self._thread.start()

    def wire(self, name: str) -> tuple[Path, Path]:
        """The sockets of a guest's card and of its port."""
        return self._cards[name], self._paths[name]

    def cut(self, name: str) -> None:
        """No frame comes from or to that guest any more. Its card notices nothing."""
        self._lost.clear()
        self._cut.add(name)

    def mend(self, name: str) -> None:
        self._cut.discard(name)

    def wait_for_loss(self, timeout_s: float = 60.0) -> None:
        """Until the cut has cost a frame."""
        if not self._lost.wait(timeout_s):
            raise AssertionError(f"no frame was lost within {timeout_s} s")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                frame = self._ports[key.data].recv(_FRAME_NBYTES)
                self._forward(key.data, frame)

    def _forward(self, source: str, frame: bytes) -> None:
        if source in self._cut:
            self._lost.set()
            return
        to, sender = frame[:6], frame[6:12]
        self._learnt[sender] = source
        known = None if to[0] & _BROADCAST else self._learnt.get(to)
        for name in [known] if known is not None else list(self._ports):
            if name in self._cut:
                self._lost.set()
            elif name != source:
                self.forwarded += 1
                # A card that does not exist yet, or a guest that stands still.
                with suppress(OSError):
                    self._ports[name].sendto(frame, str(self._cards[name]))

    def close(self) -> None:
        self._wake.send(b".")
        self._thread.join()
        for each in (*self._ports.values(), self._wake, self._theirs):
            each.close()
        self._selector.close()
