"""Seeds that register with a gateway over HTTP: how long until a watcher sees them, and what it
costs to keep them.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection

from benchmarks.bootstrap import HOST
from benchmarks.figures import cpu_s
from benchmarks.registry.ranks import THREADS, a_manifest, a_record
from engine_registry import RankJoined, Registry, new_incarnation
from engine_registry.etcd.client import Etcd
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.record import GATEWAY

REGISTER = "/register_transfer_engine_info"
_CPU_S = 10.0  # for how long the CPU of probing is measured


def registration_of(session_id: str, rank: int, tensors: int) -> bytes:
    weights = {
        f"model.layers.{n // 9}.w{n % 9}.weight": [0x7F00_0000_0000 + n * 65536, 32768, 2]
        for n in range(tensors)
    }
    info = {"session_id": session_id, "weights_info_dict": weights}
    return json.dumps({"tp_rank": rank, "transfer_engine_info": info}).encode()


def put(port: str, body: bytes) -> float:
    with closing(HTTPConnection(HOST, int(port), timeout=30)) as connection:
        start = time.perf_counter()
        connection.request("PUT", REGISTER, body)
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
            body = registration_of(session_id, rank, tensors)
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
    before, start = cpu_s(pid), time.perf_counter()
    time.sleep(_CPU_S)
    return (cpu_s(pid) - before) / (time.perf_counter() - start)


@contextmanager
def listening() -> Iterator[str]:
    """The session of a seed that is there: connections are taken and closed."""
    with socket.create_server((HOST, 0), backlog=512) as listener:

        def accept() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"{HOST}:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
