"""Figures of the HTTP gateway, in one run on one machine, clients and gateway in separate
processes.

Beside it, the way of SGLang's bootstrap server: one process with a dict behind HTTP, which renders
every answer anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing

import click

from benchmarks import figures, options
from benchmarks.figures import Results, percentile
from benchmarks.gateway import servers
from benchmarks.gateway.clients import PROCESSES, ask
from benchmarks.gateway.seeds import cpu_of_probing, joins, listening, put, registration_of
from benchmarks.processes import another_process
from engine_cli.main import main
from engine_registry import Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd


def measure(number: int, requests: int, ranks: int, say: Callable[[str], None]) -> Results:
    results: Results = {}
    each = -(-requests // number)
    with (
        LocalEtcd() as local,
        Registry.connect(local.endpoint, timeout_s=30) as registry,
        listening() as session_id,
    ):
        with another_process(servers.__name__, "a_gateway", local.endpoint) as (process, port):
            say(f"{number} clients that ask for a rank of {servers.TENSORS:,} tensors")
            put(port, registration_of(session_id, 0, servers.TENSORS))
            took, failures, seconds = ask(port, number, each, "get")
            _latencies(results, f"get_{number}_clients", took)
            results[f"get_{number}_clients_requests_per_s"] = len(took) / seconds
            results["get_failures"] = failures
            took, _, _ = ask(port, PROCESSES, 200, "get")
            _latencies(results, f"get_{PROCESSES}_clients", took)
            say(f"{each * number} mixed requests")
            took, failures, seconds = ask(port, number, each, "mixed", session_id)
            results[f"mixed_{len(took)}_requests_failures"] = failures
            _latencies(results, "mixed", took)
            results["mixed_requests_per_s"] = len(took) / seconds
            say("registrations until a watcher sees them")
            _latencies(results, "put_to_joined", joins(registry, port, session_id, 50, 100))
            _latencies(
                results,
                f"put_{servers.TENSORS}_tensors_to_joined",
                joins(registry, port, session_id, servers.TENSORS, 30),
            )
            say(f"the CPU of keeping {ranks} seeds")
            with closing(Etcd(EtcdConfig(parse_endpoints(local.endpoint), timeout_s=30))) as etcd:
                results[f"gateway_cpu_keeping_{ranks}_seeds"] = cpu_of_probing(
                    etcd, process.pid, session_id, ranks
                )
    say("the same questions to a server with a dict")
    with another_process(servers.__name__, "a_bootstrap_server") as (_, port):
        took, _, seconds = ask(port, number, each, "get")
        _latencies(results, f"dict_server_get_{number}_clients", took)
        results[f"dict_server_get_{number}_clients_requests_per_s"] = len(took) / seconds
    return results


def _latencies(results: Results, name: str, took: Sequence[float]) -> None:
    results[f"{name}_p50_ms"] = statistics.median(took) * 1000
    results[f"{name}_p99_ms"] = percentile(took, 99) * 1000


@options.program
@options.option(
    "--clients",
    type=click.IntRange(PROCESSES),
    default=32,
    help="That ask at once, in two processes.",
)
@options.option("--requests", type=click.IntRange(10), default=10_000, help="Of each kind.")
@options.option(
    "--ranks", type=click.IntRange(1), default=2000, help="Seeds that the gateway keeps."
)
def command(clients: int, requests: int, ranks: int, as_json: bool) -> None:
    """SGLang's HTTP interface: answers, mixed requests, registrations, the cost of probing.

    Takes a minute or two.
    """
    figures.report(measure(clients, requests, ranks, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.gateway")
