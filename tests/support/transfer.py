"""The transfer engine of programs that tests start."""

from __future__ import annotations

import os

from engine_loader import MooncakeEngine


def engine_at(host: str) -> MooncakeEngine:
    """Over the protocol and devices that the test has put into the environment, else tcp."""
    protocol, device = os.environ.get("TEST_PROTOCOL", "tcp"), os.environ.get("TEST_DEVICE", "")
    return MooncakeEngine(host, protocol, device)
