"""Clients of a server, in separate processes."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection

import click

from benchmarks.bootstrap import GET, HOST
from benchmarks.gateway.seeds import REGISTER, registration_of
from benchmarks.gateway.servers import TENSORS
from benchmarks.processes import another_process, answer, order, ready

PROCESSES = 2
_OLD_GET = "/get_remote_instance_transfer_engine_info?rank="


def ask(
    port: str, number: int, each: int, kind: str, session_id: str = ""
) -> tuple[list[float], int, float]:
    """Seconds of each request, failures, and seconds of all, of `number` clients in processes."""
    threads = number // PROCESSES
    with ExitStack() as stack:
        processes = []
        for which in range(PROCESSES):
            first_rank = str(1 + which * threads)  # rank 0 is the large one
            args = (port, str(threads), str(each), kind, session_id, first_rank)
            client = another_process(__name__, "clients", *args)
            processes.append(stack.enter_context(client)[0])
        start = time.perf_counter()
        for process in processes:
            order(process, "go")
        results = [json.loads(answer(process, "a client")) for process in processes]
        seconds = time.perf_counter() - start
    took = [s for result in results for s in result["took"]]
    return took, sum(result["failures"] for result in results), seconds


def clients(
    port: str, threads: str, each: str, kind: str, session_id: str = "", first_rank: str = "0"
) -> None:
    """`threads` clients that ask `each` times; prints a line when they begin and, at the end, their
    seconds and failures.
    """
    ask = _mixed if kind == "mixed" else _get
    start_line = threading.Barrier(int(threads) + 1)

    def client(number: int) -> tuple[list[float], int]:
        rank = int(first_rank) + number
        with closing(HTTPConnection(HOST, int(port), timeout=30)) as connection:
            start_line.wait()
            connection.connect()  # not before: a gateway closes connections that ask nothing
            took, failures = [], 0
            for n in range(int(each)):
                start = time.perf_counter()
                failures += not ask(connection, n, session_id, rank)
                took.append(time.perf_counter() - start)
            return took, failures

    with ThreadPoolExecutor(int(threads)) as pool:
        results = [pool.submit(client, number) for number in range(int(threads))]
        click.echo("ready")
        sys.stdin.readline()
        start_line.wait()
        done = [result.result() for result in results]
    took = [s for some, _ in done for s in some]
    ready(json.dumps({"took": took, "failures": sum(failures for _, failures in done)}))


def _get(connection: HTTPConnection, n: int, session_id: str, rank: int) -> bool:
    connection.request("GET", f"{GET}0")
    answer = connection.getresponse()
    return len(answer.read()) > TENSORS and answer.status == 200


def _mixed(connection: HTTPConnection, n: int, session_id: str, rank: int) -> bool:
    """Of ten requests: six for the large rank by both paths, one for a rank that there is not, one
    health, two registrations.
    """
    method, path, body, wanted = {
        2: ("GET", f"{GET}9999", None, 404),
        4: ("GET", "/health", None, 200),
        6: ("PUT", REGISTER, registration_of(session_id, rank, 50), 200),
        8: ("PUT", REGISTER, registration_of(session_id, rank, 50), 200),
    }.get(n % 10, ("GET", f"{_OLD_GET if n % 2 else GET}0", None, 200))
    connection.request(method, path, body)
    answer = connection.getresponse()
    answer.read()
    return answer.status == wanted
