"""No client's connections shut others out: real sockets, from several addresses of loopback."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from engine_registry import Registry
from engine_registry.gateway.limits import Limits
from engine_registry.gateway.server import Gateway
from tests.integration.conftest import Processes, line_of
from tests.support.waiting import wait_until

BAD, GOOD = "127.0.0.2", "127.0.0.3"
HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
A_HEAD = HALF_A_HEAD + b"\r\n"
PUT = b"PUT /register_transfer_engine_info HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
GET = "/get_transfer_engine_info?rank=0"
# Longer than any test: a place that comes free does so because somebody else needs it.
PATIENT = Limits(head_s=600, body_s=600, request_s=600, connections=20, connections_per_address=10)


@pytest.fixture
def gateway(registry: Registry) -> Iterator[Gateway]:
    with Gateway(registry, "q", port=0, limits=PATIENT) as gateway:
        yield gateway


def connected(port: int, client: str, sent: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 20, source_address=(client, 0))
    sock.sendall(sent)
    return sock


def ask(port: int, path: str, client: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(local_address=client), timeout=20) as asking:
        return asking.get(f"http://127.0.0.1:{port}{path}")


def answer(sock: socket.socket, end: bytes = b"OK") -> bytes:
    """What the gateway says, up to `end`; less where it closes the connection."""
    got = b""
    with suppress(ConnectionError):
        while not got.endswith(end) and (data := sock.recv(65536)):
            got += data
    return got


def begun(port: int, client: str) -> socket.socket:
    """A request whose body does not come."""
    sock = connected(port, client, PUT + b"Expect: 100-continue\r\n\r\n")
    assert answer(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
    return sock


@contextmanager
def a_gateway(processes: Processes, *args: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = processes.engines("gateway", "--instance", "q", "--port", "0", *args)
    yield process, int(line_of(process).split()[6].rstrip(";").rpartition(":")[2])


def files_of(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def test_600_half_sent_heads_of_one_client_keep_nobody_out(processes: Processes) -> None:
    with a_gateway(processes) as (process, port):
        assert ask(port, GET, GOOD).status_code == 404
        before = files_of(process)
        with ExitStack() as stack:
            heads = [stack.enter_context(connected(port, BAD, HALF_A_HEAD)) for _ in range(600)]
            for client in (GOOD, BAD):
                assert ask(port, "/health", client).status_code == 200
                assert ask(port, GET, client).status_code == 404
            heads[-1].sendall(b"\r\n")
            assert answer(heads[-1]).startswith(b"HTTP/1.1 200")
            assert answer(heads[0]) == b""
        wait_until(lambda: files_of(process) <= before)


def test_an_address_that_has_all_its_places_loses_its_oldest_head_and_no_other_address_one(
    gateway: Gateway,
) -> None:
    with ExitStack() as stack:

        def head(client: str) -> socket.socket:
            return stack.enter_context(connected(gateway.port, client, HALF_A_HEAD))

        good = head(GOOD)
        oldest, *others = [head(BAD) for _ in range(10)]
        newest = head(BAD)
        assert answer(oldest) == b""
        for each in (good, *others, newest):
            each.sendall(b"\r\n")
            assert answer(each).startswith(b"HTTP/1.1 200")


def test_when_all_places_are_taken_the_connection_that_has_waited_longest_makes_way(
    gateway: Gateway,
) -> None:
    with ExitStack() as stack:

        def connect(number: int, sent: bytes) -> socket.socket:
            return stack.enter_context(connected(gateway.port, f"127.0.0.{number}", sent))

        answered, *heads = [connect(number, HALF_A_HEAD) for number in range(10, 30)]
        # all are taken in, and wait in this order
        wait_until(lambda: len(gateway._service._limiter._connections) == 20)
        answered.sendall(b"\r\n")
        assert answer(answered).startswith(b"HTTP/1.1 200")  # it waits again, since now
        newest = connect(30, HALF_A_HEAD)
        assert answer(heads[0]) == b""
        for each in (*heads[1:], newest, answered):
            each.sendall(A_HEAD if each is answered else b"\r\n")
            assert answer(each).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("clients", [[BAD], [f"127.0.0.{number}" for number in range(10, 30)]])
def test_where_requests_hold_all_places_more_are_put_off_and_health_is_answered(
    gateway: Gateway,
    clients: list[str],
) -> None:
    count = PATIENT.connections_per_address if len(clients) == 1 else PATIENT.connections
    with ExitStack() as stack:
        for number in range(count):
            stack.enter_context(begun(gateway.port, clients[number % len(clients)]))
        for _ in range(100):  # more than there are places for those that wait
            stack.enter_context(connected(gateway.port, clients[0], HALF_A_HEAD))
        for path in (GET, "/get_remote_instance_transfer_engine_info?rank=0"):
            put_off = ask(gateway.port, path, clients[0])
            assert (put_off.status_code, put_off.headers["Retry-After"]) == (503, "1")
            assert "`connections_per_address`" in put_off.text
        assert ask(gateway.port, GET, GOOD).status_code == (404 if len(clients) == 1 else 503)
        for client in (clients[0], GOOD):
            assert ask(gateway.port, "/health", client).status_code == 200
    wait_until(lambda: ask(gateway.port, GET, clients[0]).status_code == 404)


def test_a_registration_that_is_put_off_is_answered_after_all_it_sends(gateway: Gateway) -> None:
    with ExitStack() as stack:
        for _ in range(PATIENT.connections_per_address):
            stack.enter_context(begun(gateway.port, BAD))
        transport = httpx.HTTPTransport(local_address=BAD)
        with httpx.Client(transport=transport, timeout=20) as client:
            url = f"{gateway.url}/register_transfer_engine_info"
            assert client.put(url, content=b" " * (8 << 20)).status_code == 503


def test_how_many_places_an_address_has_can_be_chosen(processes: Processes) -> None:
    with a_gateway(processes, "--connections-per-address", "1") as (_, port):
        with connected(port, BAD, HALF_A_HEAD) as first, connected(port, BAD, A_HEAD) as second:
            assert answer(second).startswith(b"HTTP/1.1 200")
            assert answer(first) == b""
    refused = processes.run("gateway", "--instance", "q", "--connections-per-address", "0")
    assert refused.returncode == 2
    assert "--connections-per-address" in refused.stderr
