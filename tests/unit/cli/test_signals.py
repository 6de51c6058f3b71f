"""Signals that end a command: nothing is done in a handler that a lock could hold up, and none is
lost.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from engine_cli.signals import Ended, held_back, on_ending, raised

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_may_come_while_the_main_thread_holds_the_lock_that_its_answer_needs(
    number: signal.Signals,
) -> None:
    lock, answered = threading.Lock(), threading.Event()

    def answer() -> None:
        with lock:
            answered.set()

    on_ending(answer)
    with lock:
        signal.raise_signal(number)
        assert not answered.is_set()
    assert answered.wait(60)


def test_a_signal_that_another_thread_gets_is_answered_while_the_main_thread_waits() -> None:
    ready, answered = threading.Event(), threading.Event()
    on_ending(answered.set)

    def get() -> None:
        ready.wait(60)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    threading.Thread(target=get, daemon=True).start()
    ready.set()
    assert answered.wait()  # without a limit: the wait is never left between


def test_every_signal_is_answered() -> None:
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    on_ending(lambda: answers.put("again"))
    for number in ENDING:
        signal.raise_signal(number)
    assert [answers.get(timeout=60) for _ in ENDING] == ["again"] * 3


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    on_ending(lambda: None)
    with raised(), held_back():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_raises_and_those_that_follow_do_not_disturb(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    done: list[str] = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            done.append("cleaned up")

    with pytest.raises(Ended) as caught, raised():
        work()
    assert done == ["cleaned up"]
    assert caught.value.number == number
    assert str(caught.value) == f"ended by {number.name}"
    assert signal.getsignal(number) == before


class Finalised:
    """A signal comes while it is."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        with contextlib.suppress(BaseException):  # as gRPC's channels do
            signal.raise_signal(self._number)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Ended), (signal.SIGHUP, Ended)],
)
def test_a_signal_whose_exception_is_dropped_is_raised_again(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    done: list[str] = []

    def work(raise_again: Callable[[], None]) -> None:
        raise_again()
        Finalised(number)
        done.append("went on")
        raise_again()
        done.append("not this")

    def work_to_the_end() -> None:
        Finalised(number)
        done.append("the end")

    with pytest.raises(kind), raised() as raise_again:
        work(raise_again)
    with pytest.raises(kind), raised():
        work_to_the_end()
    assert done == ["went on", "the end"]


def test_a_signal_that_is_held_back_takes_effect_at_the_end_even_if_the_block_fails() -> None:
    done: list[str] = []

    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("the rest")
        raise ImportError

    with pytest.raises(KeyboardInterrupt), held_back():
        work()
    assert done == ["the rest"]


def test_without_a_signal_nothing_is_raised() -> None:
    with raised(), held_back():
        pass
