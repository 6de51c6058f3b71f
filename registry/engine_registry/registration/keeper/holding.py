"""What a keeper does with the memory of a rank whose process has ended: it holds it, if the rank
wanted that, until somebody has it or the time is over.

Used by `keeper.main`, in its main thread. The desk closes the memory in time by itself, whatever
etcd does meanwhile.
"""

from __future__ import annotations

import queue
import time

from engine_registry.registration.hold import Hold
from engine_registry.registration.keeper.desk import Desk
from engine_registry.registration.keeper.holder import Keeper
from engine_registry.registration.keeper.protocol import SETTLE_S, Frame
from engine_registry.schema.record import RankRecord, RankState

LET_GO = Frame({"op": "let go"})  # what the desk puts into the inbox


class Memory:
    """The memory of a rank, which the desk hands out. `name` is that of the place where it does, in
    hexadecimal digits; empty where it hands out none that the record describes.
    """

    def __init__(self, desk: Desk, hold: Hold | None, record: RankRecord, name: str) -> None:
        self._desk = desk
        self._hold = hold
        self.describe(record, name)

    def describe(self, record: RankRecord, name: str) -> None:
        """What the record says now."""
        self._name = name
        self._desk.describe(
            {
                "key": record.key,
                "incarnation": record.incarnation,
                "devices": list(self._hold.devices) if self._hold else [],
                "nbytes": record.manifest.nbytes,
            }
        )

    def let_go(self) -> None:
        """The rank takes it back."""
        self._desk.let_go()

    def hold(self, keeper: Keeper, inbox: queue.Queue[Frame | None]) -> None:
        """After the end of the rank's process: returns when the memory is no longer held, at once
        where it cannot be. RegistrationLost where the registration is over already.
        """
        if self._hold is None or not self._name or keeper.record.state is not RankState.READY:
            return
        held = self._desk.hold(bytes.fromhex(self._name), self._hold.seconds)
        if held is None:
            return
        keeper.hold(held.held_until)
        _keep(keeper, inbox, held.until)


def _keep(keeper: Keeper, inbox: queue.Queue[Frame | None], until: float) -> None:
    """Keeps the record in etcd as that of a rank that is held."""
    due = 0.0
    while (now := time.monotonic()) < until:
        try:
            frame = inbox.get(timeout=max(0.0, min(due, until) - now))
        except queue.Empty:
            if time.monotonic() < until:
                due = time.monotonic() + keeper.beat()
            continue
        op = frame.message["op"] if frame is not None else "died"
        if op == "changed" and not keeper.is_quiet():
            due = min(due, time.monotonic() + SETTLE_S)
        elif op in ("end", LET_GO.message["op"]):
            return
