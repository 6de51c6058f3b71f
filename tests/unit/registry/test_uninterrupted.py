"""Work in a separate thread: what it returns or raises comes back, and an interrupted wait does
not end it.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from engine_registry.uninterrupted import uninterrupted


def failing() -> NoReturn:
    raise ValueError("at work")


def test_what_the_work_returns_or_raises_comes_back() -> None:
    assert uninterrupted(lambda: 7, "work") == 7
    with pytest.raises(ValueError, match="at work"):
        uninterrupted(failing, "work")


def test_the_work_of_the_main_thread_is_done_in_another_that_ends_with_it() -> None:
    before = set(threading.enumerate())
    worker = uninterrupted(threading.current_thread, "work")
    worker.join(60)
    assert worker.name == "work"
    assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile


def test_work_of_another_thread_is_done_there_as_nothing_interrupts_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(
            lambda: uninterrupted(threading.current_thread, "") is threading.current_thread()
        ).result(60)


def test_work_is_done_here_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert uninterrupted(threading.current_thread, "work") is threading.main_thread()


def test_an_interrupt_ends_the_wait_and_not_the_work() -> None:
    interrupted, done = threading.Event(), threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(60)
        done.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            uninterrupted(work, "work")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not done.is_set()
    interrupted.set()
    assert done.wait(60)
