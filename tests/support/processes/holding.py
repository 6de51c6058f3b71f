"""A rank whose memory is held when it is killed: `holding INSTANCE RANK WORLD_SIZE SECONDS DEVICE`.

Registers memory for its keeper to hold on the device, prints `registered KEEPER_PID`, and waits for
its end.
"""

from __future__ import annotations

import os
import signal
import sys

from engine_registry import Hold
from engine_registry.registration.descriptors import DescriptorPlace, Descriptors
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import register
from tests.support.registry import connect


def main(instance: str, rank: str, world_size: str, seconds: str, device: str) -> None:
    descriptors = Descriptors(DescriptorPlace.new(), [os.memfd_create("weights")])
    hold = Hold(float(seconds), (device,))
    registration = register(
        connect(), instance, int(rank), int(world_size), descriptors=descriptors, hold=hold
    )
    print("registered", pid_of_keeper(registration), flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
