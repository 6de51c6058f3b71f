"""The adapter without a server: no foreign error gets out, a failed call goes to the next endpoint,
prefixes are ranges.
"""

from __future__ import annotations

import errno
import queue
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import grpc
import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.errors import (
    AnswerTooLarge,
    EtcdError,
    EtcdFull,
    EtcdRefused,
    EtcdUnavailable,
    HistoryLost,
    LeaseNotFound,
)
from engine_registry.etcd import connection
from engine_registry.etcd.channel import IDLE_S
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.errors import from_cancelled_watch
from engine_registry.etcd.lease_stream import LeaseStream
from engine_registry.etcd.messages import prefix_end
from engine_registry.etcd.watch import WatchStream

Status = grpc.StatusCode
# importable since registry.etcd has been imported
client_errors = import_module("etcd3.exceptions")


class Answer(grpc.RpcError):
    """What gRPC raises where a server has said no, or nothing."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__()
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


class Client:
    """A connection, of which only the end matters here."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.closed = False
        self.metadata = None  # without a user there is no token

    def close(self) -> None:
        self.closed = True


class Unconnected(Etcd):
    """An adapter whose connections lead nowhere."""

    def __init__(self, endpoints: str = "a:1,b:2,c:3") -> None:
        super().__init__(EtcdConfig(parse_endpoints(endpoints)))
        self._next_endpoint = 0
        self.clients: list[Client] = []

    def _new_client(self) -> Client:
        endpoint = self.config.endpoints[self._next_endpoint % len(self.config.endpoints)]
        self.clients.append(Client(str(endpoint)))
        return self.clients[-1]

    def call(self, operation: Callable[[Client], Any], stop: Any = None) -> Any:
        return self._call(lambda client, _: operation(client), stop)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_registry.etcd.retry.BACK_OFF", tenacity.wait_none())


def error_of(exc: Exception) -> EtcdError:
    """What a caller gets where one try ends with `exc`."""

    def fail(_: Client) -> NoReturn:
        raise exc

    with pytest.raises(EtcdError) as caught:
        Unconnected().call(fail, stop=lambda _: True)
    assert caught.value.__cause__ is exc
    return caught.value


@pytest.mark.parametrize("code", [code for code in Status if code is not Status.OK], ids=str)
@pytest.mark.parametrize(
    "details", [None, "", "etcdserver: something new", "lease", "http2 error", "auth token"]
)
def test_no_status_of_grpc_gets_out_as_it_is(code: grpc.StatusCode, details: str | None) -> None:
    assert "etcd at a:1,b:2,c:3" in str(error_of(Answer(code, details)))


@pytest.mark.parametrize(
    ("code", "details", "kind", "said"),
    [
        (
            Status.NOT_FOUND,
            "etcdserver: requested lease not found",
            LeaseNotFound,
            "requested lease not found",
        ),
        (
            Status.OUT_OF_RANGE,
            "etcdserver: mvcc: required revision has been compacted",
            HistoryLost,
            "compacted",
        ),
        (
            Status.RESOURCE_EXHAUSTED,
            "etcdserver: mvcc: database space exceeded",
            EtcdFull,
            "out of space",
        ),
        (Status.INVALID_ARGUMENT, "etcdserver: request is too large", EtcdRefused, "too large"),
        (
            Status.RESOURCE_EXHAUSTED,
            "trying to send message larger than max",
            EtcdRefused,
            "too large",
        ),
        (
            Status.RESOURCE_EXHAUSTED,
            "CLIENT: Received message larger than max (70000000 vs. 67108864)",
            AnswerTooLarge,
            "may hold (70000000 vs",
        ),
        (
            Status.PERMISSION_DENIED,
            "etcdserver: permission denied",
            EtcdRefused,
            "grant the user's role",
        ),
        (
            Status.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID or password",
            EtcdRefused,
            "credentials",
        ),
        (Status.INVALID_ARGUMENT, "etcdserver: user name is empty", EtcdRefused, "credentials"),
        (
            Status.FAILED_PRECONDITION,
            "etcdserver: authentication is not enabled",
            EtcdRefused,
            "leave out `user`",
        ),
        (
            Status.INVALID_ARGUMENT,
            "etcdserver: duplicate key given in txn request",
            EtcdRefused,
            "refuses the request: duplicate",
        ),
        (Status.UNAUTHENTICATED, "etcdserver: invalid auth token", EtcdUnavailable, "token"),
        (
            Status.INVALID_ARGUMENT,
            "etcdserver: revision of auth store is old",
            EtcdUnavailable,
            "token",
        ),
        (
            Status.UNAVAILABLE,
            "failed to connect to all addresses; last error: Connection refused",
            EtcdUnavailable,
            "refused",
        ),
        (Status.UNAVAILABLE, "etcdserver: no leader", EtcdUnavailable, "no leader"),
        (
            Status.UNAVAILABLE,
            "etcdserver: rpc not supported for learner",
            EtcdUnavailable,
            "is a learner",
        ),
        (Status.DEADLINE_EXCEEDED, "Deadline Exceeded", EtcdUnavailable, "does not answer in time"),
        (Status.UNIMPLEMENTED, "unknown service etcdserverpb.KV", EtcdUnavailable, "is not etcd 3"),
        (
            Status.UNKNOWN,
            "Received http2 header with status: 404",
            EtcdUnavailable,
            "is not etcd 3",
        ),
    ],
)
def test_an_answer_of_etcd_becomes_the_error_that_it_means(
    code: grpc.StatusCode, details: str, kind: type[EtcdError], said: str
) -> None:
    error = error_of(Answer(code, details))
    assert type(error) is kind
    assert said in str(error)


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (client_errors.ConnectionFailedError(), EtcdUnavailable),
        (client_errors.ConnectionTimeoutError(), EtcdUnavailable),
        (client_errors.InternalServerError(), EtcdUnavailable),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), EtcdUnavailable),
        (ValueError("Cannot invoke RPC on closed channel!"), EtcdUnavailable),  # a call
        (ValueError("Cannot invoke RPC: Channel closed!"), EtcdUnavailable),  # a stream
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "ca.pem"), EtcdRefused),
        (PermissionError(errno.EACCES, "Permission denied", "key.pem"), EtcdRefused),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "certs"), EtcdRefused),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_errors_of_the_client_library_and_the_system_become_ours(
    exc: Exception, kind: type[EtcdError]
) -> None:
    assert type(error_of(exc)) is kind


def test_a_mistake_in_our_own_code_is_not_taken_for_an_error_of_etcd() -> None:
    with pytest.raises(ValueError, match="ours"):
        Unconnected().call(lambda _: int("ours"))


@pytest.mark.parametrize(
    "reason",
    [
        "invalid auth token",
        "revision of auth store is old",
        "permission denied",
        "user name is empty",
    ],
)
def test_a_watch_that_is_denied_counts_as_one_with_an_old_token(reason: str) -> None:
    assert type(from_cancelled_watch(f"etcdserver: {reason}")) is EtcdUnavailable


def test_a_watch_that_is_cancelled_for_another_reason_is_refused() -> None:
    assert type(from_cancelled_watch("etcdserver: something new")) is EtcdRefused


# -- which endpoint
# --------------------------------------------------------------------------------------------------


def test_a_call_that_fails_in_transit_is_tried_at_the_next_endpoint_on_a_fresh_connection() -> None:
    etcd = Unconnected()

    def only_c_answers(client: Client) -> str:
        if client.endpoint != "c:3":
            raise Answer(Status.UNAVAILABLE, "gone")
        return client.endpoint

    assert etcd.call(only_c_answers) == "c:3"
    assert [(client.endpoint, client.closed) for client in etcd.clients] == [
        ("a:1", True),
        ("b:2", True),
        ("c:3", False),
    ]
    assert etcd.call(only_c_answers) == "c:3"
    assert len(etcd.clients) == 3


def test_connections_begin_with_any_endpoint_so_that_all_members_share_them() -> None:
    config = EtcdConfig(parse_endpoints("a:1,b:2,c:3"))
    assert {Etcd(config)._next_endpoint for _ in range(100)} == {0, 1, 2}


def test_the_endpoints_are_gone_through_again_and_again() -> None:
    etcd = Unconnected("a:1,b:2")
    tries = iter(range(5))

    def fifth_time(client: Client) -> str:
        if next(tries) < 4:
            raise Answer(Status.UNAVAILABLE, "gone")
        return client.endpoint

    assert etcd.call(fifth_time) == "a:1"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass for connections."""
    now = [1000.0]
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_connection_that_was_not_used_for_long_gives_way_to_another_to_the_same_endpoint(
    passes: Callable[[float], None],
) -> None:
    etcd = Unconnected()
    for seconds in (0.0, IDLE_S, 1.0, IDLE_S + 1.0):
        passes(seconds)
        etcd.call(lambda client: client.endpoint)
    assert [(client.endpoint, client.closed) for client in etcd.clients] == [
        ("a:1", True),
        ("a:1", False),
    ]


@pytest.mark.parametrize("use", ["call", "watch", "renewals"])
def test_a_connection_in_use_stays_however_long_ago_its_last_call_began(
    passes: Callable[[float], None], use: str
) -> None:
    etcd = Unconnected()
    watch = WatchStream(etcd, None, Ending(Answer(Status.CANCELLED, "")), queue.SimpleQueue())

    def meanwhile(_: object) -> None:
        passes(2 * IDLE_S)
        etcd.call(lambda client: None)

    if use == "call":
        etcd.call(meanwhile)
    else:
        etcd.call(lambda client: None)
        if use == "watch":
            etcd._watches.add(watch)
        else:
            etcd._renewals = etcd.clients[0], cast(LeaseStream, SimpleNamespace(over=False))
        meanwhile(None)
    assert len(etcd.clients) == 1
    watch.cancel()
    etcd._renewals = None, None
    meanwhile(None)
    assert [client.closed for client in etcd.clients] == [True, False]


def test_a_call_that_is_refused_is_not_repeated_and_keeps_its_connection() -> None:
    etcd = Unconnected()
    tried: list[str] = []

    def refuse(client: Client) -> NoReturn:
        tried.append(client.endpoint)
        raise Answer(Status.PERMISSION_DENIED, "etcdserver: permission denied")

    with pytest.raises(EtcdRefused):
        etcd.call(refuse)
    assert tried == ["a:1"]
    assert not etcd.clients[0].closed


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("etcdserver: rpc not supported for learner", "is a learner"),
        ("etcdserver: no leader", "no leader"),
        ("failed to connect to all addresses", "does not answer in time"),
    ],
)
def test_a_last_try_that_was_too_short_does_not_hide_what_etcd_said_before(
    first: str, words: str
) -> None:
    tries = iter(
        [Answer(Status.UNAVAILABLE, first), Answer(Status.DEADLINE_EXCEEDED, "Deadline Exceeded")]
    )

    def fail(_: Client) -> NoReturn:
        raise next(tries)

    with pytest.raises(EtcdUnavailable, match=words):
        Unconnected().call(fail, stop=tenacity.stop_after_attempt(2))


def test_a_closed_connection_makes_no_call() -> None:
    etcd = Unconnected()
    etcd.call(lambda _: None)
    etcd.close()
    etcd.close()
    assert etcd.clients[0].closed
    with pytest.raises(EtcdError, match="the connection to etcd is closed"):
        etcd.call(lambda _: pytest.fail("called"))


# -- prefixes
# --------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=4), st.binary(max_size=6))
def test_the_range_of_a_prefix_holds_the_keys_that_begin_with_it_and_no_other(
    prefix: bytes, key: bytes
) -> None:
    end = prefix_end(prefix)
    neighbours = [prefix[:-1] + bytes([prefix[-1] + step & 255]) + key for step in (-1, 1)]
    for candidate in (key, prefix + key, *neighbours):
        in_range = prefix <= candidate and (end == b"\0" or candidate < end)
        assert in_range == candidate.startswith(prefix)


class Ending:
    """A watch's call that ends with an answer at once."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __iter__(self) -> Ending:
        return self

    def __next__(self) -> object:
        raise self._answer

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        Answer(Status.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        Answer(Status.UNKNOWN, "context deadline exceeded"),
    ],
)
def test_a_watch_whose_time_is_over_just_ends_whoever_noticed_first(answer: Answer) -> None:
    requests: queue.SimpleQueue[object] = queue.SimpleQueue()
    assert list(WatchStream(Unconnected(), None, Ending(answer), requests, timed=True)) == []
    with pytest.raises(EtcdUnavailable):
        list(WatchStream(Unconnected(), None, Ending(answer), requests))
