"""Hands out descriptors as a keeper does: `desk NUMBER`, of the socket by which they come.

Ends with its input.
"""

from __future__ import annotations

import os
import socket
import sys

from engine_registry.registration.keeper.desk import Desk


def main(number: str) -> None:
    Desk(socket.socket(fileno=int(number))).start()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
