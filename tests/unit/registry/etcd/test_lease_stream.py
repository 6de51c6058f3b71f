"""Renewals over one stream: each answer is for who asked, in the order of asking, and a stream that
ends wakes everybody.
"""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from engine_registry.etcd import lease_stream
from engine_registry.etcd.lease_stream import LeaseStream, StreamEnded, pb
from tests.support.waiting import wait_until

HANG_S = 60.0
Status = grpc.StatusCode


class Call(grpc.RpcError):
    """The stream's call, as gRPC gives it: it iterates over answers, and is raised itself when it
    has ended.
    """

    def __init__(self, requests: Iterator[Any]) -> None:
        super().__init__()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._requests = requests
        threading.Thread(target=self._take_requests, daemon=True).start()

    def _take_requests(self) -> None:
        for request in self._requests:
            self.asked.put(request.ID)
        self.asked.put(None)

    def __iter__(self) -> Call:
        return self

    def __next__(self) -> Any:
        answer = self.answers.get()
        if answer is None:
            raise self
        return answer

    def cancel(self) -> None:
        self.answers.put(None)

    def code(self) -> grpc.StatusCode:
        return Status.CANCELLED

    def details(self) -> str:
        return "Channel closed!"


class Etcd:
    """A stub for leases.

    `left` is what a look at a lease says: its time to live of 10 s, or the status that refuses.
    """

    def __init__(self) -> None:
        self.left: int | grpc.StatusCode = Status.PERMISSION_DENIED
        self.looked_at: list[int] = []
        self.call: Any = None

    def LeaseKeepAlive(self, requests: Iterator[Any], metadata: Any) -> Call:
        self.metadata = metadata
        call = Call(requests)
        self.call = weakref.proxy(call)
        return call

    def LeaseTimeToLive(self, request: Any, timeout_s: float, metadata: Any) -> Any:
        self.looked_at.append(request.ID)
        if isinstance(self.left, grpc.StatusCode):
            raise StreamEnded(self.left, "no")
        return pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=self.left, grantedTTL=10)

    def asked(self) -> int | None:
        found: int | None = self.call.asked.get(timeout=HANG_S)
        return found

    def answers(self, lease_id: int, ttl_s: int) -> None:
        self.call.answers.put(pb.LeaseKeepAliveResponse(ID=lease_id, TTL=ttl_s))


@pytest.fixture
def etcd() -> Etcd:
    return Etcd()


@pytest.fixture
def stream(etcd: Etcd) -> Iterator[LeaseStream]:
    stream = LeaseStream(etcd, [("token", "secret")])
    yield stream
    stream.end()


@pytest.fixture
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_stream, "_PATIENCE_S", 0.0)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "etcd renewals"]


def test_each_lease_gets_its_own_answer_whatever_the_order(etcd: Etcd, stream: LeaseStream) -> None:
    with ThreadPoolExecutor(3) as pool:
        waiting = {lease_id: pool.submit(stream.renew, lease_id, HANG_S) for lease_id in (1, 2, 3)}
        assert {etcd.asked(), etcd.asked(), etcd.asked()} == {1, 2, 3}
        for lease_id in (3, 1, 2):
            etcd.answers(lease_id, 10 * lease_id)
        assert {lease_id: each.result(HANG_S) for lease_id, each in waiting.items()} == {
            1: 10,
            2: 20,
            3: 30,
        }
    assert etcd.metadata == (("token", "secret"), ("hasleader", "true"))


@pytest.mark.usefixtures("_no_patience")
def test_an_answer_that_comes_too_late_is_not_taken_for_that_of_the_next_renewal(
    etcd: Etcd, stream: LeaseStream
) -> None:
    with pytest.raises(StreamEnded, match="no renewal in time"):
        stream.renew(1, 0.0)
    etcd.answers(1, 10)  # the lease has lived then
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(stream.renew, 1, HANG_S)
        assert (etcd.asked(), etcd.asked()) == (1, 1)
        etcd.answers(1, 0)
        assert second.result(HANG_S) == 0


def test_an_answer_that_nobody_waits_for_is_passed_over(etcd: Etcd, stream: LeaseStream) -> None:
    etcd.answers(7, 10)
    with ThreadPoolExecutor(1) as pool:
        renewal = pool.submit(stream.renew, 1, HANG_S)
        etcd.asked()
        etcd.answers(1, 5)
        assert renewal.result(HANG_S) == 5


@pytest.mark.usefixtures("_no_patience")
@pytest.mark.parametrize("left", [9, 5, -1])
def test_a_lease_whose_answer_is_late_is_looked_at(
    etcd: Etcd, stream: LeaseStream, left: int
) -> None:
    etcd.left = left
    assert stream.renew(1, HANG_S) == left
    assert etcd.looked_at == [1]


@pytest.mark.usefixtures("_no_patience")
@pytest.mark.parametrize("left", [4, 0, Status.PERMISSION_DENIED])
def test_an_answer_is_waited_for_where_a_look_says_not_that_the_lease_is_being_renewed(
    etcd: Etcd, stream: LeaseStream, left: int | grpc.StatusCode
) -> None:
    etcd.left = left
    with ThreadPoolExecutor(1) as pool:
        renewal = pool.submit(stream.renew, 1, HANG_S)
        wait_until(lambda: etcd.looked_at == [1])
        etcd.answers(1, 10)
        assert renewal.result(HANG_S) == 10


@pytest.mark.usefixtures("_no_patience")
def test_a_look_that_fails_is_the_error_of_the_renewal(etcd: Etcd, stream: LeaseStream) -> None:
    etcd.left = Status.UNAVAILABLE
    with pytest.raises(grpc.RpcError) as caught:
        stream.renew(1, HANG_S)
    assert caught.value.code() is Status.UNAVAILABLE


def test_a_stream_that_ends_fails_all_that_wait_and_all_that_come_each_with_an_error_of_its_own(
    etcd: Etcd, stream: LeaseStream
) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(stream.renew, lease_id, HANG_S) for lease_id in (1, 2)]
        assert {etcd.asked(), etcd.asked()} == {1, 2}
        etcd.call.cancel()
        errors = [each.exception(HANG_S) for each in waiting]
    assert stream.over
    with pytest.raises(StreamEnded) as late:
        stream.renew(3, HANG_S)
    errors.append(late.value)
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, StreamEnded)
        assert (error.code(), error.details()) == (Status.CANCELLED, "Channel closed!")


def test_a_stream_over_which_nothing_is_renewed_ends_but_not_while_somebody_waits(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_stream, "_IDLE_S", 0.05)
    stream = LeaseStream(etcd, ())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stream.renew, 1, HANG_S)
        assert etcd.asked() == 1
        threading.Event().wait(0.2)
        etcd.answers(1, 9)
        assert waiting.result(HANG_S) == 9
    assert etcd.asked() is None
    assert stream.over
    with pytest.raises(StreamEnded, match="nothing was renewed for long"):
        stream.renew(1, HANG_S)
    etcd.call.cancel()  # as etcd does, which hears no more


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("how", ["ended", "forgotten", "lost"])
def test_a_stream_that_is_over_leaves_neither_a_thread_nor_its_call(etcd: Etcd, how: str) -> None:
    wait_until(lambda: not threads())
    stream = LeaseStream(etcd, ())
    call, asked, answers = weakref.ref(stream._asked.call), stream._asked.call.asked, stream._asked
    if how == "ended":
        stream.end()
        stream.end()
    elif how == "lost":
        etcd.call.cancel()
        wait_until(lambda: answers.ended is not None)
    del stream
    wait_until(lambda: not threads())
    assert asked.get(timeout=HANG_S) is None  # the reader of the requests learns it as well
    wait_until(lambda: call() is None)


def test_no_call_is_left_where_there_is_no_thread_for_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Call] = []

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    class Crowded(Etcd):
        def LeaseKeepAlive(self, requests: Iterator[Any], metadata: Any) -> Call:
            calls.append(Call(requests))
            monkeypatch.setattr(threading.Thread, "start", refuse)
            return calls[0]

    with pytest.raises(RuntimeError, match="new thread"):
        LeaseStream(Crowded(), ())
    assert calls[0].answers.get(timeout=HANG_S) is None
