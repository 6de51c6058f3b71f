"""The transfer engine of programs that tests start."""

from __future__ import annotations

import os

from engine_loader import open_engine
from engine_loader.engines.base import ClosableEngine


def engine_at(host: str, location: str = "") -> ClosableEngine:
    """Over the protocol and devices that the test has put into the environment, else tcp."""
    protocol, device = os.environ.get("TEST_PROTOCOL", "tcp"), os.environ.get("TEST_DEVICE", "")
    return open_engine(host, protocol, device, location=location)
