"""For all tests."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

_STDERR = pytest.StashKey[int]()  # ours, also while that of a test is captured


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test enters in it is left when the test ends."""
    with ExitStack() as stack:
        yield stack


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("teardown_timeout", "Seconds that the teardown of a test may take.", default="0")


@pytest.hookimpl(trylast=True)  # there is a terminal reporter then
def pytest_configure(config: pytest.Config) -> None:
    _stop_ignoring_signals()
    _forget_settings_of_the_user()
    config.stash[_STDERR] = os.dup(2)
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(terminal))


def _stop_ignoring_signals() -> None:
    """Processes that tests start inherit which signals are ignored, as Ctrl-C is under `&` and a
    hang-up under `nohup`.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def _forget_settings_of_the_user() -> None:
    """Whoever runs the tests may have an etcd, a context or a password set for `engines`."""
    for name in [name for name in os.environ if name.startswith("ENGINES_")]:
        del os.environ[name]
    os.environ["ENGINES_CONFIG"] = os.devnull


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Three for each CPU: most tests wait for an etcd, a lease or a process most of the time."""
    return 3 * len(os.sched_getaffinity(0))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays until the run is over: nearly half a million objects,
    which no collection of garbage need look at.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """End a run whose teardown hangs, with the stacks of all threads.

    pytest and pytest-timeout drop their own limits as soon as a test fails.
    """
    if limit_s := float(item.config.getini("teardown_timeout")):
        stderr = item.config.stash[_STDERR]
        faulthandler.dump_traceback_later(limit_s, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        _forget_log_options()


def _forget_log_options() -> None:
    """A command that ran in this process has set the levels of loggers, and how they are written;
    what the next test finds in the log must not depend on that.
    """
    for name in ("engine_cli", "engine_loader", "engine_registry"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.addLevelName(getattr(logging, name), name)


class _FailuresAtOnce:
    """Prints each failure when it is reported, so that even a run that is cut off shows it."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(f"{report.nodeid} failed in its {report.when}:")
            self._terminal.write_line(report.longreprtext)
