"""For all tests."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure() -> None:
    """Processes that tests start inherit which signals are ignored, as Ctrl-C is under `&` and a
    hang-up under `nohup`.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Twice as many as there are CPUs: many tests wait for an etcd or a lease."""
    return 2 * len(os.sched_getaffinity(0))
