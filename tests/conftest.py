"""For all tests."""

from __future__ import annotations

import signal


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
