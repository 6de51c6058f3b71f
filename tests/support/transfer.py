"""The transfer engine of programs that tests start."""

from __future__ import annotations

import os

from engine_loader import MooncakeEngine


def engine_at(host: str) -> MooncakeEngine:
    """Over the protocol that the test has put into the environment, else tcp."""
    return MooncakeEngine(host, os.environ.get("TEST_PROTOCOL", "tcp"))
