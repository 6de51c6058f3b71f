"""The dashboard over real HTTP and a real etcd: what browsers get, and how the command behaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_cli.dashboard.server import Dashboard
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import EtcdRefused, GatewayFailed, InvalidField
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.support.ranks import register

NO_TLS = ssl.create_default_context()  # each client would make another, which takes its time
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:"
)
FILES = ("/", "/style.css", "/app.js", "/stream.js", "/picture.js")


@pytest.fixture
def dashboard(registry: Registry) -> Iterator[Dashboard]:
    with Dashboard(registry, port=0) as dashboard:
        yield dashboard


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=60, verify=NO_TLS, **options)


class Page:
    """What a browser has made of the stream."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.entries: dict[tuple[str, str], Any] = {}
        self.messages = 0

    def take(self) -> None:
        """One message."""
        line = next(line for line in self._lines if line.startswith("data: "))
        message = json.loads(line.removeprefix("data: "))
        if message["whole"]:
            self.entries.clear()
        for kind, name, value in message["entries"]:
            self.entries[kind, name] = value
        self.messages += 1

    def until(self, reached: Callable[[Page], bool]) -> Page:
        while not reached(self):
            self.take()
        return self

    def state(self, instance: str, rank: int | None = None) -> str | None:
        key = ("instance", instance) if rank is None else ("rank", f"{instance}/{rank}")
        found = self.entries.get(key)
        return found["state"] if found else None


@contextmanager
def page(url: str, **headers: str) -> Iterator[Page]:
    with httpx.stream(
        "GET", f"{url}/api/changes", timeout=60, verify=NO_TLS, headers=headers
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Page(answer.iter_lines())


@pytest.fixture
def dashboard_process(
    processes: Processes, namespace: str
) -> Callable[..., tuple[subprocess.Popen[str], str]]:
    def start(*args: str, **env: str) -> tuple[subprocess.Popen[str], str]:
        options = ("--port", "0", "--namespace", namespace, *args)
        process = processes.engines("dashboard", *options, **env)
        line = line_of(process)
        assert line.startswith("dashboard is ready at http://")
        return process, line.split()[4].rstrip(";")

    return start


def test_the_first_message_has_all_instances_and_ranks(
    registry: Registry, dashboard: Dashboard
) -> None:
    with register(registry, "a"), register(registry, "b", world_size=2):
        with page(dashboard.url) as shown:
            shown.until(lambda page: page.state("a") == "ready" and page.state("b") is not None)
        with page(dashboard.url) as shown:
            shown.take()
            assert shown.state("a", 0) == "ready"
            assert shown.state("b") == "incomplete"
            assert shown.state("b", 1) == "missing"


def test_a_rank_that_is_killed_is_told_of_with_the_reason(
    processes: Processes, dashboard: Dashboard
) -> None:
    ranks = [processes.rank("q", rank, 2) for rank in range(2)]
    with page(dashboard.url) as shown:
        shown.until(lambda page: page.state("q") == "ready")
        before = shown.messages
        ranks[1].kill()
        shown.until(lambda page: page.state("q") == "incomplete")
        assert shown.entries["rank", "q/1"]["reason"] == "process ended"
        assert shown.messages > before
        told = [value["text"] for (kind, _), value in shown.entries.items() if kind == "event"]
        assert any(text.startswith("q/1 lost: process ended") for text in told)


def test_a_load_is_drawn_from_its_source_to_its_reader(
    registry: Registry, dashboard: Dashboard
) -> None:
    with register(registry, "a"), register(registry, "b"), page(dashboard.url) as shown:
        source, reader = (registry.resolve(name)[0] for name in ("a", "b"))
        ticket = registry.pull(source, reader)
        assert ticket is not None
        with ticket:
            shown.until(lambda page: bool(page.entries.get(("picture", ""), {}).get("edges")))
            assert [each["name"] for each in shown.entries["picture", ""]["nodes"]] == [
                "a/0",
                "b/0",
            ]
        shown.until(lambda page: not page.entries["picture", ""]["nodes"])


def test_every_browser_is_told(registry: Registry, dashboard: Dashboard) -> None:
    with page(dashboard.url) as one, page(dashboard.url) as other, register(registry, "a"):
        for each in (one, other):
            each.until(lambda page: page.state("a") == "ready")


def test_a_rank_and_its_tensors_are_given_on_request(
    registry: Registry, dashboard: Dashboard
) -> None:
    with register(registry, "a", device="cuda:3"):
        with page(dashboard.url) as shown:
            shown.until(lambda page: page.state("a") == "ready")
        rank = get(f"{dashboard.url}/api/rank?instance=a&rank=0").json()
        assert (rank["device"], rank["session_id"], rank["tensors"]) == ("cuda:3", "127.0.0.1:1", 1)
        tensors = get(f"{dashboard.url}/api/tensors?instance=a&rank=0").json()
        assert tensors["tensors"] == 1
        assert tensors["rows"][0][:4] == ["w", "float32", "4", "16 B"]


@pytest.mark.parametrize("query", ["", "?instance=a&rank=7", "?instance=a&rank=x", "?rank=0"])
def test_a_rank_that_is_not_there_is_not_found(dashboard: Dashboard, query: str) -> None:
    for path in ("rank", "tensors"):
        assert get(f"{dashboard.url}/api/{path}{query}").status_code == 404


def test_with_a_token_only_the_files_of_the_page_are_open(registry: Registry) -> None:
    with Dashboard(registry, port=0, token="s3cret") as guarded:
        for path in ("/api/changes", "/api/rank", "/api/tensors"):
            for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
                refused = get(f"{guarded.url}{path}", headers=headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
        for path in (*FILES, "/health"):
            assert get(f"{guarded.url}{path}").status_code == 200
        with page(guarded.url, Authorization="Bearer s3cret") as shown:
            shown.take()


def test_a_token_that_no_header_can_carry_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidField):
        Dashboard(registry, port=0, token="two words")


@pytest.mark.parametrize("path", [*FILES, "/api/rank", "/health", "/nothing"])
def test_every_answer_has_the_content_security_policy(dashboard: Dashboard, path: str) -> None:
    headers = get(f"{dashboard.url}{path}").headers
    assert headers["content-security-policy"].startswith(POLICY)
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_has_no_script_and_no_style_of_its_own_and_nothing_from_other_hosts(
    dashboard: Dashboard,
) -> None:
    for path in FILES:
        text = get(f"{dashboard.url}{path}").text
        for namespace in ("http://www.w3.org/2000/svg",):
            text = text.replace(namespace, "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
    assert "<style" not in get(dashboard.url).text
    assert " style=" not in get(dashboard.url).text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(dashboard: Dashboard, method: str) -> None:
    for path in ("/", "/api/changes", "/api/rank"):
        assert httpx.request(method, f"{dashboard.url}{path}", verify=NO_TLS).status_code == 405


def test_a_page_of_the_web_does_not_reach_it_under_another_name(dashboard: Dashboard) -> None:
    for host in ("evil.example", f"evil.example:{dashboard.port}", "", "127.0.0.1.evil.example"):
        assert get(dashboard.url, headers={"Host": host}).status_code == 421
    for host in ("localhost", f"LOCALHOST:{dashboard.port}", "[::1]:6790", "127.0.0.1"):
        assert get(dashboard.url, headers={"Host": host}).status_code == 200


def test_a_client_that_takes_every_connection_of_its_address_keeps_nobody_from_health(
    dashboard: Dashboard,
) -> None:
    held = [socket.create_connection((dashboard.host, dashboard.port)) for _ in range(300)]
    try:
        assert get(f"{dashboard.url}/health").status_code == 200
    finally:
        for each in held:
            each.close()


def test_an_etcd_that_is_away_is_shown_and_comes_back_by_itself(own_etcd: LocalEtcd) -> None:
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        register(registry, "a"),
        Dashboard(registry, port=0) as dashboard,
        page(dashboard.url) as shown,
    ):
        shown.until(lambda page: page.state("a") == "ready")
        own_etcd.kill()
        shown.until(lambda page: page.entries["etcd", ""]["away_since"] is not None)
        assert shown.entries["etcd", ""]["reason"]
        assert shown.state("a", 0) == "ready"
        own_etcd.start()
        shown.until(lambda page: page.entries["etcd", ""]["away_since"] is None)
        with register(registry, "b"):
            shown.until(lambda page: page.state("b") == "ready")


def test_what_etcd_refuses_for_good_ends_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise EtcdRefused("permission denied")

    monkeypatch.setattr("engine_registry.watching.watch.Watch.next", refuses)
    with Dashboard(registry, port=0) as dashboard, pytest.raises(EtcdRefused):
        dashboard.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_code_0_though_browsers_listen(
    dashboard_process: Callable[..., tuple[subprocess.Popen[str], str]], number: signal.Signals
) -> None:
    process, url = dashboard_process()
    assert url.startswith("http://127.0.0.1:")
    with page(url) as shown:
        shown.take()
        process.send_signal(number)
        assert process.wait(60) == 0
    assert process.communicate()[1] == ""


def test_elsewhere_than_on_loopback_it_warns_unless_it_has_a_token(
    dashboard_process: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    for env, warned in (({}, True), ({"ENGINES_GATEWAY_TOKEN": "s3cret"}, False)):
        process, url = dashboard_process("--host", "0.0.0.0", **env)
        port = url.rpartition(":")[2]
        answer = get(f"http://127.0.0.1:{port}/api/rank", headers={"Host": "node-1"})
        assert answer.status_code == (404 if warned else 401)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        said = process.communicate()[1]
        assert ("everybody who reaches http://0.0.0.0:" in said) is warned
        assert said.count("\n") == int(warned)


def test_a_port_that_is_in_use_is_one_line_and_code_1(
    processes: Processes, namespace: str, registry: Registry
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ran = processes.run("dashboard", "--port", port, "--namespace", namespace)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr == (
            f"engines: error: port {port} on 127.0.0.1 is in use: choose another --port, "
            "or end what listens there\n"
        )
        with pytest.raises(GatewayFailed):
            Dashboard(registry, port=int(port))


def test_without_its_extra_the_command_says_what_to_install(
    processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ran = processes.run("dashboard", PYTHONPATH=path)
    assert ran.returncode == 1
    assert ran.stderr == (
        "engines: error: starlette is not installed: pip install 'engine-registry[gateway]'\n"
    )


def test_hostile_text_is_sent_as_text(registry: Registry, dashboard: Dashboard) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    with register(registry, "a", model=ModelIdentity(hostile), device="</script>"):
        with page(dashboard.url) as shown:
            shown.until(lambda page: page.state("a") == "ready")
            assert shown.entries["instance", "a"]["model"] == hostile
        rank = get(f"{dashboard.url}/api/rank?instance=a&rank=0")
        assert rank.headers["content-type"] == "application/json"
        assert rank.json()["device"] == "</script>"
