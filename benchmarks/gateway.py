"""Figures of the HTTP gateway, in one run on one machine, clients and gateway in processes of their
own.

Beside it, the way of SGLang's bootstrap server: one process with a dict behind HTTP, which renders
every answer anew.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click

from benchmarks import figures
from benchmarks.figures import another_process, percentile
from benchmarks.registry import THREADS, a_manifest, a_record
from engine_cli.main import main
from engine_registry import RankJoined, Registry, new_incarnation
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.gateway.server import Gateway
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.record import GATEWAY

TENSORS = 2_500
_HERE = "benchmarks.gateway"
_PROCESSES = 2
_REGISTER = "/register_transfer_engine_info"
_GET, _OLD_GET = (
    "/get_transfer_engine_info?rank=",
    "/get_remote_instance_transfer_engine_info?rank=",
)
_CPU_S = 10.0  # for how long the CPU of probing is measured


def seed_says(session_id: str, rank: int, tensors: int) -> bytes:
    weights = {
        f"model.layers.{n // 9}.w{n % 9}.weight": [0x7F00_0000_0000 + n * 65536, 32768, 2]
        for n in range(tensors)
    }
    return json.dumps(
        {
            "tp_rank": rank,
            "transfer_engine_info": {"session_id": session_id, "weights_info_dict": weights},
        }
    ).encode()


# -- in separate processes
# --------------------------------------------------------------------------------------------------


def a_gateway(endpoint: str) -> None:
    with (
        Registry.connect(endpoint) as registry,
        Gateway(registry, "bench", world_size=10_000, port=0) as gateway,
    ):
        click.echo(gateway.port)
        sys.stdin.read()


def a_bootstrap_server() -> None:
    said = json.loads(seed_says("10.0.0.1:15000", 0, TENSORS))["transfer_engine_info"]
    info = (said["session_id"], said["weights_info_dict"])

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps(
                {"rank": 0, "remote_instance_transfer_engine_info": list(info)}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        click.echo(server.server_port)
        sys.stdin.read()


def clients(
    port: str, threads: str, each: str, kind: str, session_id: str = "", first_rank: str = "0"
) -> None:
    """`threads` clients that ask `each` times; prints a line when they begin and, at the end, their
    seconds and failures.
    """
    ask = _mixed if kind == "mixed" else _get
    ready = threading.Barrier(int(threads) + 1)

    def client(number: int) -> tuple[list[float], int]:
        rank = int(first_rank) + number
        with closing(HTTPConnection("127.0.0.1", int(port), timeout=30)) as connection:
            connection.connect()
            ready.wait()
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
        ready.wait()
        done = [result.result() for result in results]
    click.echo(
        json.dumps(
            {
                "took": [s for took, _ in done for s in took],
                "failures": sum(failures for _, failures in done),
            }
        )
    )
    sys.stdin.read()


def _get(connection: HTTPConnection, n: int, session_id: str, rank: int) -> bool:
    connection.request("GET", f"{_GET}0")
    answer = connection.getresponse()
    return len(answer.read()) > TENSORS and answer.status == 200


def _mixed(connection: HTTPConnection, n: int, session_id: str, rank: int) -> bool:
    """Of ten requests: six for the large rank by both paths, one for a rank that there is not, one
    health, two registrations.
    """
    method, path, body, wanted = {
        2: ("GET", f"{_GET}9999", None, 404),
        4: ("GET", "/health", None, 200),
        6: ("PUT", _REGISTER, seed_says(session_id, rank, 50), 200),
        8: ("PUT", _REGISTER, seed_says(session_id, rank, 50), 200),
    }.get(n % 10, ("GET", f"{_OLD_GET if n % 2 else _GET}0", None, 200))
    connection.request(method, path, body)
    answer = connection.getresponse()
    answer.read()
    return answer.status == wanted


# -- measuring
# --------------------------------------------------------------------------------------------------


def ask(
    port: str, number: int, each: int, kind: str, session_id: str = ""
) -> tuple[list[float], int, float]:
    """Seconds of each request, failures, and seconds of all, of `number` clients in processes."""
    threads = number // _PROCESSES
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                # rank 0 is the large one
                another_process(
                    _HERE,
                    "clients",
                    port,
                    str(threads),
                    str(each),
                    kind,
                    session_id,
                    str(1 + which * threads),
                )
            )[0]
            for which in range(_PROCESSES)
        ]
        start = time.perf_counter()
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("go\n")
                process.stdin.flush()
        lines = [process.stdout.readline() if process.stdout else "" for process in processes]
        seconds = time.perf_counter() - start
    results = [json.loads(line) for line in lines]
    return (
        [s for result in results for s in result["took"]],
        sum(result["failures"] for result in results),
        seconds,
    )


def put(port: str, body: bytes) -> float:
    with closing(HTTPConnection("127.0.0.1", int(port), timeout=30)) as connection:
        start = time.perf_counter()
        connection.request("PUT", _REGISTER, body)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"PUT: {answer.status} {answer.read().decode()}")
        return start


def joins(registry: Registry, port: str, session_id: str, tensors: int, rounds: int) -> list[float]:
    """From the beginning of a PUT to the watcher's event, a rank not seen before each time."""
    took = []
    with registry.watch("bench") as watch:
        while watch.next(0.5) is not None:
            pass
        for rank in range(5_000, 5_000 + rounds):
            body = seed_says(session_id, rank, tensors)
            seen: list[float] = []

            def see() -> None:
                for event in watch:
                    if isinstance(event, RankJoined):
                        seen.append(time.perf_counter())  # noqa: B023  joined before the next round
                        return

            thread = threading.Thread(target=see)
            thread.start()
            start = put(port, body)
            thread.join()
            took.append(seen[0] - start)
        for record in registry.ranks("bench"):
            if record.rank >= 5_000:
                registry.evict(record)
    return took


def cpu_of_probing(etcd: Etcd, pid: int, session_id: str, ranks: int) -> float:
    """The share of a core that a gateway takes to keep `ranks` seeds."""
    ref, parts = manifests.encode(a_manifest(1))
    record = replace(
        a_record("many", 0, ranks, ref),
        session_id=session_id,
        kept_by=GATEWAY,
        host=socket.gethostname(),
    )

    def register(rank: int) -> None:
        claim(
            etcd, replace(record, rank=rank, incarnation=new_incarnation()), parts, etcd.grant(60)
        )

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(register, range(ranks)))
    time.sleep(4)  # until each has been looked at
    before, start = _cpu_s(pid), time.perf_counter()
    time.sleep(_CPU_S)
    return (_cpu_s(pid) - before) / (time.perf_counter() - start)


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _listening() -> Iterator[str]:
    """The session of a seed that is there: connections are taken and closed."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:

        def accept() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def _latencies(results: dict[str, float], name: str, took: Sequence[float]) -> None:
    results[f"{name}_p50_ms"] = statistics.median(took) * 1000
    results[f"{name}_p99_ms"] = percentile(took, 99) * 1000


def measure(number: int, requests: int, ranks: int, say: Callable[[str], None]) -> dict[str, float]:
    results: dict[str, float] = {}
    each = -(-requests // number)
    with (
        LocalEtcd() as local,
        Registry.connect(local.endpoint, timeout_s=30) as registry,
        _listening() as session_id,
    ):
        with another_process(_HERE, "a_gateway", local.endpoint) as (process, port):
            say(f"{number} clients that ask for a rank of {TENSORS:,} tensors")
            put(port, seed_says(session_id, 0, TENSORS))
            took, failures, seconds = ask(port, number, each, "get")
            _latencies(results, f"get_{number}_clients", took)
            results[f"get_{number}_clients_requests_per_s"] = len(took) / seconds
            results["get_failures"] = failures
            took, _, _ = ask(port, _PROCESSES, 200, "get")
            _latencies(results, f"get_{_PROCESSES}_clients", took)
            say(f"{each * number} mixed requests")
            took, failures, seconds = ask(port, number, each, "mixed", session_id)
            results[f"mixed_{len(took)}_requests_failures"] = failures
            _latencies(results, "mixed", took)
            results["mixed_requests_per_s"] = len(took) / seconds
            say("registrations until a watcher sees them")
            _latencies(results, "put_to_joined", joins(registry, port, session_id, 50, 100))
            _latencies(
                results,
                f"put_{TENSORS}_tensors_to_joined",
                joins(registry, port, session_id, TENSORS, 30),
            )
            say(f"the CPU of keeping {ranks} seeds")
            with closing(Etcd(EtcdConfig(parse_endpoints(local.endpoint), timeout_s=30))) as etcd:
                results[f"gateway_cpu_keeping_{ranks}_seeds"] = cpu_of_probing(
                    etcd, process.pid, session_id, ranks
                )
    say("the same questions to a server with a dict")
    with another_process(_HERE, "a_bootstrap_server") as (_, port):
        took, _, seconds = ask(port, number, each, "get")
        _latencies(results, f"dict_server_get_{number}_clients", took)
        results[f"dict_server_get_{number}_clients_requests_per_s"] = len(took) / seconds
    return results


@figures.program
@click.option(
    "--clients",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="That ask at once, in two processes.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=10),
    default=10_000,
    show_default=True,
    help="Of each kind.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Seeds that the gateway keeps.",
)
def command(clients: int, requests: int, ranks: int, as_json: bool) -> None:
    """SGLang's HTTP interface: answers, mixed requests, registrations, the cost of probing.

    Takes a minute or two.
    """
    figures.report(measure(clients, requests, ranks, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.gateway")
