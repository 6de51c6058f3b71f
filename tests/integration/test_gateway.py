"""Gateways as SGLang meets them: real HTTP and etcd, seeds and gateways as processes that get
killed, clients that misbehave.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine_registry import RankJoined, RankLost, Registry
from engine_registry.errors import EtcdRefused, GatewayFailed, InvalidField
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.local import LocalEtcd
from engine_registry.gateway.limits import Limits
from engine_registry.gateway.probe import Answer, probe
from engine_registry.gateway.routes import _REGISTER_S
from engine_registry.gateway.server import Gateway
from engine_registry.schema.keyvalue import Batch, Put, Snapshot
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.faults import Proxy
from tests.support.ranks import register
from tests.support.waiting import wait_until

GET, OLD_GET = "/get_transfer_engine_info", "/get_remote_instance_transfer_engine_info"
REGISTER = "/register_transfer_engine_info"
NO_TLS = ssl.create_default_context()  # each client would make another, which takes its time


@pytest.fixture(autouse=True)
def _etcd_has_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is to be away: else a gateway on a busy machine may say that it is."""
    if "own_etcd" not in request.fixturenames:
        monkeypatch.setattr("engine_registry.gateway.service._ETCD_S", 60.0)
        monkeypatch.setattr("engine_registry.gateway.routes._REGISTER_S", 60.0)


@pytest.fixture
def gateway(registry: Registry) -> Iterator[Gateway]:
    with Gateway(registry, "q", port=0, probe_interval_s=0.1) as gateway:
        yield gateway


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """What a seed's transfer engine is to a gateway."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        yield listener


class Seed:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        *answer, self.session_id = line_of(process).split()
        self.answer = " ".join(answer)

    def again(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return " ".join(line_of(self.process).split()[:-1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def seed(processes: Processes) -> Callable[..., Seed]:
    def start(url: str, rank: int = 0, tensors: int = 2, port: int = 0) -> Seed:
        return Seed(
            processes.start(
                "-m", "tests.support.processes.seed", url, str(rank), str(tensors), str(port)
            )
        )

    return start


@pytest.fixture
def gateway_process(
    processes: Processes, namespace: str
) -> Callable[..., tuple[subprocess.Popen[str], str]]:
    def start(*args: str, **env: str) -> tuple[subprocess.Popen[str], str]:
        options = [
            "--instance",
            "q",
            "--port",
            "0",
            "--probe-interval",
            "0.1",
            "--namespace",
            namespace,
            *args,
        ]
        process = processes.engines("gateway", *options, **env)
        line = line_of(process)
        assert line.startswith("gateway of q is ready at http://")
        return process, line.split()[6].rstrip(";")

    return start


def session_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def says(session_id: str, rank: int = 0, **fields: Any) -> dict[str, Any]:
    info = {"session_id": session_id, "weights_info_dict": {"w": [4096, 4, 2]}}
    return {"tp_rank": rank, "transfer_engine_info": info, **fields}


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=60, verify=NO_TLS, **options)


def put(url: str, **options: Any) -> httpx.Response:
    return httpx.put(url, timeout=60, verify=NO_TLS, **options)


def asked(url: str, path: str = GET, **params: Any) -> httpx.Response:
    return get(f"{url}{path}", params={"rank": 0, **params})


# -- a seed's life
# --------------------------------------------------------------------------------------------------


def test_a_seed_that_is_killed_is_lost_to_every_watcher_and_no_longer_served(
    registry: Registry, gateway: Gateway, seed: Callable[..., Seed]
) -> None:
    with registry.watch("q") as watch:
        one = seed(gateway.url)
        assert one.answer == "200 OK"
        joined = events_until(watch, lambda event: isinstance(event, RankJoined))[-1]
        assert isinstance(joined, RankJoined)
        assert joined.record.session_id == one.session_id
        assert [entry.name for entry in registry.manifest(joined.record).tensors] == [
            "layers.0.weight",
            "layers.1.weight",
        ]
        answer = asked(gateway.url).json()
        assert answer["remote_instance_transfer_engine_info"][0] == one.session_id
        one.kill()
        lost = events_until(watch, lambda event: isinstance(event, RankLost))[-1]
        assert isinstance(lost, RankLost)
        assert lost.reason == "process ended"
    assert asked(gateway.url).status_code == 404
    assert asked(gateway.url, OLD_GET).json()["error"]["message"]


def test_a_rank_outlives_the_gateway_that_took_it_for_as_long_as_another_runs(
    registry: Registry,
    seed: Callable[..., Seed],
    gateway_process: Callable[..., tuple[subprocess.Popen[str], str]],
    shared_etcd: LocalEtcd,
    namespace: str,
) -> None:
    first, first_url = gateway_process("--ttl", "2")
    _, second_url = gateway_process("--ttl", "2")
    one = seed(first_url)
    key = registry.ranks("q")[0].key
    with (
        closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as etcd,
        registry.watch("q") as watch,
    ):
        found = etcd.get(key)
        assert found is not None
        first.kill()
        first.wait()
        # A lease that begins now, longer than the seed's, and is not renewed: when it has ended,
        # the seed's would have too.
        etcd.commit([], [Put("/marker", b"", etcd.grant(4.0))])
        wait_until(lambda: etcd.get("/marker") is None)
        assert etcd.get(key) == found
        assert asked(second_url).json()["remote_instance_transfer_engine_info"][0] == one.session_id
        one.kill()
        events = events_until(watch, lambda event: isinstance(event, RankLost))
        assert [type(event) for event in events if not isinstance(event, RankJoined)][
            -1
        ] is RankLost


def test_a_rank_stays_when_all_gateways_are_restarted_within_its_ttl(
    registry: Registry, listener: socket.socket
) -> None:
    with Gateway(registry, "q", port=0) as gateway:
        assert put(f"{gateway.url}{REGISTER}", json=says(session_of(listener))).text == "OK"
        before = registry.ranks("q")
    assert registry.ranks("q") == before
    with (
        Gateway(registry, "q", port=0, probe_interval_s=0.1) as gateway,
        registry.watch("q") as watch,
    ):
        assert asked(gateway.url).status_code == 200
        listener.close()
        events_until(
            watch, lambda event: isinstance(event, RankLost) and event.reason == "process ended"
        )


def test_a_rank_whose_gateways_are_all_gone_expires(
    registry: Registry, listener: socket.socket
) -> None:
    with Gateway(registry, "q", port=0, ttl_s=2, probe_interval_s=0.1) as gateway:
        assert put(f"{gateway.url}{REGISTER}", json=says(session_of(listener))).text == "OK"
    with registry.watch("q") as watch:
        lost = events_until(watch, lambda event: isinstance(event, RankLost))[-1]
        assert isinstance(lost, RankLost)
        assert lost.reason == "lease expired or key deleted"


def test_a_seed_registers_again_and_its_successor_takes_the_rank_at_once(
    registry: Registry, gateway: Gateway, seed: Callable[..., Seed]
) -> None:
    one = seed(gateway.url)
    first = registry.ranks("q")[0]
    assert one.again() == "200 OK"
    assert registry.ranks("q")[0].incarnation != first.incarnation
    other = seed(gateway.url)
    assert other.answer.startswith("409 ")
    assert one.session_id in other.answer
    one.kill()
    assert seed(gateway.url).answer == "200 OK"


def test_an_evicted_seed_may_register_again(
    registry: Registry, gateway: Gateway, seed: Callable[..., Seed]
) -> None:
    one = seed(gateway.url)
    assert registry.evict(registry.ranks("q")[0])
    assert asked(gateway.url).status_code == 404
    assert one.again() == "200 OK"
    assert asked(gateway.url).status_code == 200


# -- side by side with the library
# -----------------------------------------------------------------------------------------------


def test_a_rank_of_the_library_is_served_and_defended(
    registry: Registry, gateway: Gateway, listener: socket.socket
) -> None:
    with register(registry, "q"):
        assert asked(gateway.url).json() == {
            "rank": 0,
            "remote_instance_transfer_engine_info": ["127.0.0.1:1", {"w": [4096, 4, 4]}],
        }
        refused = put(f"{gateway.url}{REGISTER}", json=says(session_of(listener)))
        assert refused.status_code == 409
        assert "already registered" in refused.json()["detail"]
    assert asked(gateway.url).status_code == 404
    assert put(f"{gateway.url}{REGISTER}", json=says(session_of(listener))).text == "OK"


def test_our_loader_refuses_a_seed_in_one_line(
    processes: Processes, gateway: Gateway, namespace: str, listener: socket.socket
) -> None:
    put(f"{gateway.url}{REGISTER}", json=says(session_of(listener)))
    result = processes.run("load", "q", "--rank", "0", "--namespace", namespace)
    assert result.returncode == 4
    assert len(result.stderr.splitlines()) == 1
    assert "rank 0 of instance q is an SGLang seed" in result.stderr


def test_an_instance_of_seeds_is_ready_when_all_its_ranks_are_there(
    registry: Registry, gateway: Gateway
) -> None:
    with ExitStack() as stack:
        for rank in range(3):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            url = f"{gateway.url}/instances/llama{REGISTER}?world_size=3"
            assert put(url, json=says(session_of(listener), rank)).text == "OK"
        records = registry.resolve("llama", 60)
        assert [record.rank for record in records] == [0, 1, 2]
        assert asked(f"{gateway.url}/instances/llama", OLD_GET, rank=2).json()["rank"] == 2


@pytest.mark.parametrize("source", ["seed", "library"])
def test_sglangs_loader_reads_the_weights_of_seeds_and_of_library_ranks(
    processes: Processes, registry: Registry, gateway: Gateway, source: str
) -> None:
    size = str(1 << 20)
    if source == "seed":
        process = processes.start("-m", "tests.support.processes.sglang", "seed", gateway.url, size)
        assert line_of(process) == "200 OK\n"
    else:
        process = processes.start("-m", "tests.support.processes.source", "q", size)
        assert line_of(process) == "version 0\n"
    client = processes.start("-m", "tests.support.processes.sglang", "client", gateway.url, size)
    assert line_of(client) == "equal\n"
    with registry.watch("q") as watch:
        events_until(watch, lambda event: isinstance(event, RankJoined))
        process.kill()
        _, err = process.communicate()
        events_until(
            watch, lambda event: isinstance(event, RankLost) and event.reason == "process ended"
        )
    # what a transfer engine says of connections that do not end in order
    assert "Socket" not in err


# -- SGLang's own server
# --------------------------------------------------------------------------------------------------


@contextmanager
def bootstrap_server(infos: dict[int, tuple[str, Any]], path: str) -> Iterator[str]:
    """One that answers as SGLang's does: at node 0 of a seed, with whatever it was given, dead
    or alive.
    """

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found, _, rank = self.path.partition("?rank=")
            info = infos.get(int(rank)) if found == path else None
            answer = (
                {"rank": int(rank), "remote_instance_transfer_engine_info": list(info)}
                if info
                else {"detail": "none"}
            )
            body = json.dumps(answer).encode()
            self.send_response(200 if info else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


WEIGHTS = {"w": [4096, 4, 2]}


@pytest.mark.parametrize("path", [GET, OLD_GET])
def test_what_sglangs_own_server_knows_is_registered_as_it_comes_and_while_it_lives(
    registry: Registry, listener: socket.socket, dead_address: str, path: str
) -> None:
    infos: dict[int, tuple[str, Any]] = {1: (dead_address, WEIGHTS)}
    with (
        bootstrap_server(infos, path) as url,
        Gateway(registry, "q", world_size=2, port=0, probe_interval_s=0.05, seed_url=url),
        Gateway(
            registry, "q", world_size=2, port=0, probe_interval_s=0.05, seed_url=url
        ) as gateway,
        registry.watch("q") as watch,
    ):
        infos[0] = (session_of(listener), WEIGHTS)
        joined = events_until(watch, lambda event: isinstance(event, RankJoined))[-1]
        assert isinstance(joined, RankJoined)
        assert (joined.record.rank, joined.record.world_size, joined.record.kept_by) == (
            0,
            2,
            "gateway",
        )
        assert asked(gateway.url).json()["remote_instance_transfer_engine_info"] == list(infos[0])
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as other:
            infos[1] = (session_of(other), WEIGHTS)
            events_until(
                watch, lambda event: isinstance(event, RankJoined) and event.record.rank == 1
            )
        events_until(watch, lambda event: isinstance(event, RankLost) and event.record.rank == 1)
        assert [record.incarnation for record in registry.ranks("q")] == [joined.record.incarnation]


def test_a_mirrored_rank_that_is_evicted_stays_so_and_what_is_mirrored_twice_is_one_registration(
    registry: Registry, listener: socket.socket
) -> None:
    infos: dict[int, tuple[str, Any]] = {
        0: (session_of(listener), WEIGHTS),
        1: (session_of(listener), WEIGHTS),
    }
    with (
        bootstrap_server(infos, GET) as url,
        Gateway(registry, "q", world_size=2, port=0, probe_interval_s=0.05, seed_url=url),
        Gateway(registry, "q", world_size=2, port=0, probe_interval_s=0.05, seed_url=url),
        registry.watch("q") as watch,
    ):
        first = registry.resolve("q", 60)
        for rank in (0, 1):  # the gateways may still be writing, each the same
            wait_until(
                lambda: any(
                    registry.evict(record)
                    for record in registry.ranks("q")
                    if record.rank == rank  # noqa: B023
                )
            )
        infos[1] = (session_of(listener), {"v": [4096, 4, 2]})  # it has said something new
        seen = events_until(
            watch,
            lambda event: (
                isinstance(event, RankJoined)
                and event.record.incarnation != first[1].incarnation
                and event.record.rank == 1
            ),
        )
        assert sorted(event.record.rank for event in seen if isinstance(event, RankJoined)) == [
            0,
            1,
            1,
        ]
        assert [record.rank for record in registry.ranks("q")] == [1]


def test_a_server_that_is_away_or_speaks_nonsense_harms_nobody(
    registry: Registry, listener: socket.socket, dead_address: str
) -> None:
    for url in ("ftp://x", "x", "http://a b"):
        with pytest.raises(InvalidField, match="seed URL"):
            Gateway(registry, "q", port=0, seed_url=url)
    infos: dict[int, tuple[str, Any]] = {
        0: ("nonsense", WEIGHTS),
        1: (session_of(listener), WEIGHTS),
    }
    away = f"http://{dead_address}"
    with (
        bootstrap_server(infos, GET) as url,
        Gateway(registry, "q", world_size=2, port=0, probe_interval_s=0.05, seed_url=away),
        Gateway(registry, "q", world_size=2, port=0, probe_interval_s=0.05, seed_url=url),
    ):
        wait_until(lambda: [record.rank for record in registry.ranks("q")] == [1])


# -- probes
# --------------------------------------------------------------------------------------------------


def test_a_probe_distinguishes_addresses_that_listen_refuse_or_are_silent(
    listener: socket.socket, dead_address: str
) -> None:
    import asyncio

    port = listener.getsockname()[1]
    assert asyncio.run(probe(f"127.0.0.1:{port}")) is Answer.LISTENS
    assert asyncio.run(probe(f"localhost:{port}")) is Answer.LISTENS
    assert asyncio.run(probe(dead_address)) is Answer.REFUSES
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        for _ in range(4):  # nobody accepts them
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        assert asyncio.run(probe(session_of(full), 0.2)) is Answer.SILENT
    for nonsense in ("nonsense", "a..b:1", "no-such-host.invalid:1"):
        assert asyncio.run(probe(nonsense, 0.5)) is Answer.SILENT


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_client_from_the_network_learns_nothing_of_ports_that_it_names(
    registry: Registry,
    listener: socket.socket,
    dead_address: str,
    host: str,
) -> None:
    with Gateway(registry, "q", host=host, port=0, probe_interval_s=0.05) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        answers = []
        for rank, named in enumerate((session_of(listener), dead_address)):
            for session_id in (named, "127.0.0.1:1"):  # whether the first can be replaced shows
                body = says(session_id, rank, world_size=2)
                answer = put(f"{url}{REGISTER}", json=body)
                answers.append((answer.status_code, answer.text, asked(url, rank=rank).status_code))
        assert set(answers) == {(403, answers[0][1], 404)}
        for remedy in ("`token`", "`allow_anonymous`", "`seed_url`"):
            assert remedy in answers[0][1]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    ("options", "headers"),
    [
        ({"host": "0.0.0.0", "allow_anonymous": True}, {}),
        ({"host": "0.0.0.0", "token": "s3cret"}, {"Authorization": "Bearer s3cret"}),
        ({"host": "localhost"}, {}),
    ],
)
def test_a_client_registers_with_the_token_or_where_everybody_may_or_over_loopback(
    registry: Registry,
    listener: socket.socket,
    options: dict[str, Any],
    headers: dict[str, str],
) -> None:
    with Gateway(registry, "q", port=0, **options) as gateway:
        url = f"http://127.0.0.1:{gateway.port}{REGISTER}"
        assert put(url, json=says(session_of(listener)), headers=headers).text == "OK"


def test_a_seeds_server_is_mirrored_where_clients_may_not_register(
    registry: Registry,
    listener: socket.socket,
    gateway_process: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    infos: dict[int, tuple[str, Any]] = {0: (session_of(listener), WEIGHTS)}
    with bootstrap_server(infos, GET) as server:
        _, url = gateway_process("--host", "0.0.0.0", "--seed", server)
        port = url.rpartition(":")[2]
        wait_until(lambda: len(registry.ranks("q")) == 1)
        assert asked(f"http://127.0.0.1:{port}").status_code == 200


# -- etcd
# --------------------------------------------------------------------------------------------------


def test_an_etcd_that_goes_away_is_reported_at_once_and_ranks_are_there_when_it_is_back(
    own_etcd: LocalEtcd, listener: socket.socket
) -> None:
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        Gateway(registry, "q", port=0, probe_interval_s=0.1) as gateway,
    ):
        assert put(f"{gateway.url}{REGISTER}", json=says(session_of(listener))).text == "OK"
        own_etcd.kill()
        assert asked(gateway.url).status_code == 503
        assert asked(gateway.url, OLD_GET).status_code == 400
        assert _REGISTER_S < 5  # as long as a seed waits
        refused = put(f"{gateway.url}{REGISTER}", json=says(session_of(listener)))
        assert refused.status_code == 503
        assert "etcd" in refused.json()["detail"]
        assert get(f"{gateway.url}/health").text == "OK"
        own_etcd.start()
        assert asked(gateway.url).status_code == 200
        with registry.watch("q") as watch:
            listener.close()
            events_until(
                watch,
                lambda event: isinstance(event, RankLost) and event.reason == "process ended",
                40,
            )


def test_an_etcd_that_hangs_keeps_neither_clients_waiting_nor_the_end(
    own_etcd: LocalEtcd, listener: socket.socket
) -> None:
    with closing(Proxy(own_etcd.endpoint)) as way, Registry.connect(way.endpoint) as registry:
        with Gateway(registry, "q", port=0) as gateway:
            assert put(f"{gateway.url}{REGISTER}", json=says(session_of(listener))).text == "OK"
            way.cut()
            with ThreadPoolExecutor(50) as pool:
                answers = list(pool.map(lambda _: asked(gateway.url), range(50)))
            assert {answer.status_code for answer in answers} == {503}
            refused = put(f"{gateway.url}{REGISTER}", json=says(session_of(listener)))
            assert refused.status_code == 503
            assert get(f"{gateway.url}/health").text == "OK"


# -- clients that misbehave
# --------------------------------------------------------------------------------------------------


def rss_nbytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_200_clients_at_once_are_all_answered(gateway: Gateway, seed: Callable[..., Seed]) -> None:
    seed(gateway.url, tensors=300)
    together = threading.Barrier(200, timeout=60)

    def ask(number: int) -> int:
        together.wait()
        return asked(gateway.url, GET if number % 2 else OLD_GET).status_code

    with ThreadPoolExecutor(200) as pool:
        assert set(pool.map(ask, range(200))) == {200}


def test_bodies_of_200_mb_are_refused_and_not_kept(
    gateway_process: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    process, url = gateway_process()
    before = rss_nbytes(process.pid)
    block = b" " * (1 << 20)
    too_long = {"Content-Length": str(200 << 20)}

    def send(headers: dict[str, str]) -> httpx.Response:
        return put(f"{url}{REGISTER}", content=(block for _ in range(200)), headers=headers)

    with ThreadPoolExecutor(4) as pool:  # with and without its length
        answers = list(pool.map(send, [too_long, {}, too_long, {}]))
    assert [answer.status_code for answer in answers] == [413] * 4
    assert rss_nbytes(process.pid) - before < 400 << 20
    assert get(f"{url}/health").text == "OK"


@pytest.fixture
def impatient(registry: Registry) -> Iterator[Gateway]:
    with Gateway(
        registry, "q", port=0, limits=Limits(head_s=1.0, body_s=1.0, request_s=3.0, connections=20)
    ) as gateway:
        yield gateway


def connected(gateway: Gateway, sent: bytes = b"") -> socket.socket:
    sock = socket.create_connection((gateway.host, gateway.port), timeout=60)
    sock.sendall(sent)
    return sock


def rest_of(sock: socket.socket) -> bytes:
    """What comes until the gateway closes."""
    got = b""
    with sock, contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            got += data
    return got


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET /health HT", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he", b"HTTP/1.1 200 OK"),
        (
            b"PUT /register_transfer_engine_info HTTP/1.1\r\nHost: x\r\nContent-Length: "
            b"100\r\n\r\n{",
            b"HTTP/1.1 408 ",
        ),
        (
            b"PUT /register_transfer_engine_info HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
            b"chunked\r\n\r\n5\r\n{",
            b"HTTP/1.1 408 ",
        ),
        (
            b"PUT /register_transfer_engine_info HTTP/1.1\r\nHost: x\r\nContent-Length: "
            b"1\r\n\r\n{{{{{",
            b"HTTP/1.1 400 ",
        ),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000, b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00\x01\x00", b"HTTP/1.1 400 "),
    ],
)
def test_a_client_that_stops_half_way_or_speaks_nonsense_is_answered_if_it_can_be_and_cut_off(
    impatient: Gateway, sent: bytes, answer: bytes
) -> None:
    assert rest_of(connected(impatient, sent)).startswith(answer)
    assert get(f"{impatient.url}/health").text == "OK"


def test_a_client_that_sends_a_byte_now_and_then_is_cut_off_too(impatient: Gateway) -> None:
    with connected(
        impatient,
        b"PUT /register_transfer_engine_info HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
    ) as sock:
        sock.settimeout(0.05)

        def cut_off() -> bool:
            try:
                sock.sendall(b" ")
                return not sock.recv(65536)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until(cut_off)


def test_a_client_that_does_not_take_its_answer_is_cut_off(
    gateway: Gateway, impatient: Gateway, listener: socket.socket
) -> None:
    weights = {f"layers.{n}.{'x' * 2000}": [4096, 4, 2] for n in range(10_000)}
    info = {"session_id": session_of(listener), "weights_info_dict": weights}
    assert (
        put(f"{gateway.url}{REGISTER}", json={"rank": 0, "transfer_engine_info": info}).text == "OK"
    )
    size = len(asked(gateway.url).content)
    with connected(
        impatient, b"GET /get_transfer_engine_info?rank=0 HTTP/1.1\r\nHost: x\r\n\r\n"
    ) as sock:
        wait_until(lambda: state_of(impatient, sock) == "gone")
        assert len(rest_of(sock)) < size


def state_of(gateway: Gateway, sock: socket.socket) -> str:
    """Whether the gateway still has the other end."""
    mine = sock.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        if (
            int(local.split(":")[1], 16) == gateway.port
            and int(remote.split(":")[1], 16) == mine
            and state == "01"
        ):
            return "open"
    return "gone"


# -- start and end
# --------------------------------------------------------------------------------------------------


def test_closing_frees_the_port_and_ends_all_threads(registry: Registry) -> None:
    before = set(threading.enumerate())
    gateway = Gateway(registry, "q", port=0)
    idle = connected(gateway)
    assert get(f"{gateway.url}/health").text == "OK"
    for _ in range(2):
        gateway.close()
    assert rest_of(idle) == b""
    wait_until(lambda: {thread for thread in threading.enumerate() if thread.is_alive()} <= before)
    with Gateway(registry, "q", port=gateway.port) as successor:
        assert get(f"{successor.url}/health").text == "OK"


def test_a_gateway_that_is_forgotten_warns(registry: Registry) -> None:
    gateway = Gateway(registry, "q", port=0)
    with pytest.warns(ResourceWarning, match=f"Gateway on port {gateway.port} was never closed"):
        gateway.__del__()
    gateway.close()


def test_a_gateway_that_etcd_refuses_ends_with_the_reason(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Follower):
        def __iter__(self) -> Iterator[Snapshot | Batch]:
            raise EtcdRefused("the user may not read /engines/")

    monkeypatch.setattr("engine_registry.gateway.service.Follower", Refused)
    with (
        Gateway(registry, "q", port=0) as gateway,
        pytest.raises(EtcdRefused, match="may not read"),
    ):
        gateway.wait(60)


def test_a_gateway_is_waited_for_until_somebody_stops_it(gateway: Gateway) -> None:
    assert not gateway.wait(0.01)
    gateway.stop()
    assert gateway.wait(60)


def test_a_port_in_use_an_address_of_another_machine_and_nonsense_are_refused(
    registry: Registry, gateway: Gateway
) -> None:
    with pytest.raises(GatewayFailed, match=f"port {gateway.port} on 127.0.0.1 is in use.*`port`"):
        Gateway(registry, "q", port=gateway.port)
    with pytest.raises(GatewayFailed, match=r"cannot listen at '192\.0\.2\.1'.*`host`"):
        Gateway(registry, "q", host="192.0.2.1", port=0)
    for options in (
        {"instance": "a/b"},
        {"world_size": 0},
        {"ttl_s": 1},
        {"probe_interval_s": 0},
        {"probe_interval_s": 30},
        {"probe_tolerance": -1},
        {"token": ""},
        {"token": "two words"},
        {"model": "\n"},
    ):
        with pytest.raises(InvalidField):
            Gateway(registry, **{"instance": "q", "port": 0, **options})  # type: ignore[arg-type]


def test_the_command_reports_a_port_in_use_in_one_line_and_fails(
    processes: Processes, gateway: Gateway
) -> None:
    result = processes.run("gateway", "--instance", "q", "--port", str(gateway.port))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"port {gateway.port}" in result.stderr
    assert "--port" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_in_order_on_a_signal(
    gateway_process: Callable[..., tuple[subprocess.Popen[str], str]],
    number: signal.Signals,
    seed: Callable[..., Seed],
) -> None:
    process, url = gateway_process("--log-level", "info")
    seed(url)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert [
        line for line in err.splitlines() if "rank 0 of instance q registered: 2 tensors" in line
    ] == err.splitlines()


def test_the_token_comes_from_the_environment_and_shows_nowhere(
    gateway_process: Callable[..., tuple[subprocess.Popen[str], str]],
    processes: Processes,
) -> None:
    process, url = gateway_process(ENGINES_GATEWAY_TOKEN="s3cret")
    assert asked(url).status_code == 401
    assert put(f"{url}{REGISTER}", content=b" " * (10 << 20)).status_code == 401
    assert get(f"{url}/health").status_code == 200
    assert get(f"{url}{GET}?rank=0", headers={"Authorization": "Bearer s3cret"}).status_code == 404
    assert b"s3cret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert "s3cret" not in processes.run("gateway", "--help", ENGINES_GATEWAY_TOKEN="s3cret").stdout
    empty = processes.run("gateway", "--instance", "q", ENGINES_GATEWAY_TOKEN="")
    assert (empty.returncode, "ENGINES_GATEWAY_TOKEN is empty" in empty.stderr) == (2, True)


def test_what_is_counted_is_served_by_the_command_and_by_the_counting_process(
    gateway: Gateway,
    gateway_process: Callable[..., tuple[subprocess.Popen[str], str]],
    listener: socket.socket,
) -> None:
    assert asked(gateway.url, "/metrics").status_code == 404
    _, url = gateway_process()
    assert put(f"{url}{REGISTER}", json=says(session_of(listener))).status_code == 200

    def ranks_ready() -> float:
        answer = get(f"{url}/metrics")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        samples = (
            families["engines_registry_ranks"].samples
            if "engines_registry_ranks" in families
            else []
        )
        return sum(
            sample.value
            for sample in samples
            if sample.labels == {"engine_instance": "q", "state": "ready"}
        )

    wait_until(lambda: ranks_ready() == 1)
    _, guarded = gateway_process(ENGINES_GATEWAY_TOKEN="s3cret")
    assert get(f"{guarded}/metrics").status_code == 401


def test_without_its_extra_the_command_says_what_to_install(
    processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
    result = processes.run(
        "gateway",
        "--instance",
        "q",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == "engines: error: starlette is not installed: pip install 'engine-registry[gateway]'"
    )


def test_what_the_gateway_answers_is_what_its_json_says(
    gateway: Gateway, listener: socket.socket
) -> None:
    put(f"{gateway.url}{REGISTER}", json=says(session_of(listener)))
    answer = asked(gateway.url)
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content) == {
        "rank": 0,
        "remote_instance_transfer_engine_info": [session_of(listener), {"w": [4096, 4, 2]}],
    }
