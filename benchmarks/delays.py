"""A cable with a delay, for hosts on one machine: a process that carries packets between two
interfaces, each in a network namespace, and keeps each packet for a while.

For kernels without netem. The interfaces are taps with the offloads of a network card, so that a
packet here may be 64 KiB of a TCP stream: a core carries some Gbit/s. `benchmarks.hosts` starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

import click

_NEW_NET = 0x40000000  # CLONE_NEWNET
_SET_INTERFACE, _SET_OFFLOAD = 0x400454CA, 0x400454D0  # TUNSETIFF, TUNSETOFFLOAD
_TAP, _NO_INFO, _HEADER = 0x0002, 0x1000, 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_CHECKSUM, _TCP4, _TCP6 = 0x01, 0x02, 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
_LONGEST_NBYTES = 1 << 17  # a packet, and the header of its offloads


def carry(there: str, name_there: str, here: str, name_here: str, delay_s: str) -> None:
    """Makes the interfaces in the namespaces of two processes, says that they are there, and
    carries packets in either direction until standard input ends.
    """
    one, other = _tap(there, name_there), _tap(here, name_here)
    click.echo("ready")
    targets = {one: other, other: one}
    waiting: deque[tuple[float, int, bytes]] = deque()  # when, where to, what
    stdin = sys.stdin.fileno()
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([stdin, *targets], [], [], left_s)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # that interface is down
                os.write(target, packet)
        for source in readable:
            if source == stdin:
                return
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(source, _LONGEST_NBYTES)
                    waiting.append((now + float(delay_s), targets[source], packet))


def _tap(pid: str, name: str) -> int:
    """In the network namespace of that process, which this thread enters."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if libc.setns(namespace, _NEW_NET) != 0:
            raise OSError(ctypes.get_errno(), "setns failed")
    finally:
        os.close(namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(
        tap, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TAP | _NO_INFO | _HEADER)
    )
    fcntl.ioctl(tap, _SET_OFFLOAD, _CHECKSUM | _TCP4 | _TCP6)
    return tap
