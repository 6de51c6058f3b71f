"""A user's function gets everything in order, whatever it does, and nobody waits for it."""

from __future__ import annotations

import gc
import queue
import threading
import weakref

import pytest

from engine_registry.registration.callback import Callback

HANG_S = 60.0


def test_what_is_put_is_passed_on_in_order_without_waiting_for_a_function_that_takes_its_time() -> (
    None
):
    passed: queue.SimpleQueue[int] = queue.SimpleQueue()
    go = threading.Event()

    def function(number: int) -> None:
        go.wait(HANG_S)
        passed.put(number)

    callback = Callback(function, "the callback")
    for number in range(100):
        callback.put(number)
    assert passed.empty()
    go.set()
    assert [passed.get(timeout=HANG_S) for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_function_that_raises_is_logged_and_called_with_the_rest(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    passed: queue.SimpleQueue[int] = queue.SimpleQueue()

    def function(number: int) -> None:
        passed.put(number)
        raise error("the callback has a bug")

    callback = Callback(function, "the callback")
    for number in range(3):
        callback.put(number)
    assert [passed.get(timeout=HANG_S) for _ in range(3)] == [0, 1, 2]
    assert "the callback failed" in caplog.text


def test_a_function_that_was_called_with_everything_keeps_nothing_alive() -> None:
    class Handle:
        def __init__(self) -> None:
            self.passed = threading.Event()
            self.callback = Callback(self.on_news, "the callback")

        def on_news(self, _: int) -> None:
            self.passed.set()

    handle = Handle()
    gone = threading.Event()
    weakref.finalize(handle, gone.set)
    handle.callback.put(1)
    assert handle.passed.wait(HANG_S)
    for thread in threading.enumerate():
        if thread.name == "the callback":
            thread.join(HANG_S)
    del handle
    gc.collect()
    assert gone.is_set()
