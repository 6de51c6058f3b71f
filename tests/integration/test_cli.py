"""The command line as users and scripts meet it: real processes, their output, exit codes and signals."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.exits import Exit
from registry import Registry
from registry.config import EtcdConfig, parse_endpoints
from registry.etcd import Etcd
from registry.kv import Put
from registry.local import LocalEtcd, free_port
from tests.integration.conftest import Processes, line_of
from tests.integration.ranks import register


@pytest.fixture
def engines(processes: Processes, namespace: str) -> Engines:
    return Engines(processes, namespace)


class Engines:
    def __init__(self, processes: Processes, namespace: str) -> None:
        self._processes = processes
        self._namespace = namespace

    def __call__(self, command: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self._processes.run(command, "--namespace", self._namespace, *args, **env)

    def start(self, command: str, *args: str) -> subprocess.Popen[str]:
        return self._processes.engines(command, "--namespace", self._namespace, *args)

    def serve(self, path: Path, *args: str) -> subprocess.Popen[str]:
        process = self.start(
            "register", "a", "--rank", "0", "--world-size", "1", "--weights", str(path), "--host", "127.0.0.1", *args
        )
        assert line_of(process).startswith("registered a/0 of 1: 3 tensors")
        return process


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {"w": torch.rand(100, 3), "b": torch.arange(7, dtype=torch.int16), "s": torch.tensor(1.5).to(torch.bfloat16)}
    save_file(tensors, path)
    return path


def assert_one_line(result: subprocess.CompletedProcess[str], code: Exit, *words: str) -> None:
    """One line on stderr that holds the words, the exit code, and no traceback."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("engines: error: ")
    for word in words:
        assert word in lines[0]


def test_a_rank_served_from_a_file_is_listed_shown_loaded_and_withdrawn(engines: Engines, weights: Path, tmp_path: Path) -> None:
    server = engines.serve(weights, "--model", "tiny", "--revision", "r1", "--topology", "tp=0/1", "--version", "3")

    listed = engines("list")
    assert listed.stdout.splitlines()[1].split()[:5] == ["a", "ready", "1/1", "tiny@r1", "3"]
    (instance,) = json.loads(engines("list", "--json").stdout)["instances"]
    assert (instance["instance"], instance["state"], instance["missing"], instance["version"]) == ("a", "ready", [], 3)

    shown = json.loads(engines("show", "a", "--tensors", "--json").stdout)
    (rank,) = shown["ranks"]
    assert (rank["pid"], rank["topology"], rank["tensors"]) == (server.pid, {"tp": [0, 1]}, 3)
    assert {entry["name"]: (entry["dtype"], entry["shape"]) for entry in rank["entries"]} == {
        "w": ("float32", [100, 3]), "b": ("int16", [7]), "s": ("bfloat16", []),
    }  # fmt: skip
    assert "bfloat16" in engines("show", "a", "--tensors").stdout

    loaded = engines("load", "a", "--rank", "0", "--out", str(tmp_path / "out"), "--host", "127.0.0.1", "--json")
    report = json.loads(loaded.stdout)
    assert (report["version"], report["tensors"], report["protocol"]) == (3, 3, "tcp")
    assert loaded.stderr == ""
    original, copy = load_file(weights), load_file(tmp_path / "out" / "rank-0.safetensors")
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[name], copy[name]) and original[name].dtype == copy[name].dtype for name in original)
    assert_one_line(engines("load", "a", "--rank", "0", "--out", str(tmp_path / "out")), Exit.USAGE, "there already", "--force")

    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=20)
    assert (server.returncode, out, err) == (0, "withdrew a/0\n", "")
    assert engines("list").stdout == "no instance is registered\n"


def test_ctrl_c_withdraws(engines: Engines, weights: Path, registry: Registry) -> None:
    server = engines.serve(weights)
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=20)[0] == "withdrew a/0\n"
    assert server.returncode == Exit.DONE
    assert registry.instances() == ()


def test_a_server_with_until_eof_ends_with_its_parent(engines: Engines, weights: Path) -> None:
    server = engines.serve(weights, "--until-eof")
    out, _ = server.communicate(timeout=20)  # closes its standard input
    assert (server.returncode, out) == (0, "withdrew a/0\n")


def test_eviction_ends_the_server_with_an_error_that_says_so(engines: Engines, weights: Path) -> None:
    server = engines.serve(weights, "--ttl", "2")
    evicted = engines("evict", "a")
    assert (evicted.returncode, evicted.stdout.startswith("evicted a/0 (host")) == (0, True)
    _, err = server.communicate(timeout=20)
    assert server.returncode == Exit.FAILED
    assert "was evicted: the registration has ended" in err
    assert_one_line(engines("evict", "a"), Exit.INSTANCE, "'a' is not registered")


def test_a_watch_prints_what_happens_until_it_is_stopped(engines: Engines, registry: Registry) -> None:
    as_text, as_json = engines.start("watch", "a"), engines.start("watch", "--json")
    with register(registry):
        texts = [line_of(as_text), line_of(as_text)]
        events = [json.loads(line_of(as_json)) for _ in range(2)]
    texts += [line_of(as_text), line_of(as_text)]
    events += [json.loads(line_of(as_json)) for _ in range(2)]
    assert [line.split("  ", 1)[1].split()[:2] for line in texts] == [
        ["a/0", "joined:"], ["a", "ready:"], ["a/0", "lost:"], ["a", "gone"],
    ]  # fmt: skip
    assert "lost: withdrawn (host" in texts[2]
    assert [event["event"] for event in events] == ["rank_joined", "instance_ready", "rank_lost", "instance_gone"]
    assert (events[2]["reason"], events[2]["pid"]) == ("withdrawn", os.getpid())
    for watch, number in ((as_text, signal.SIGINT), (as_json, signal.SIGTERM)):
        watch.send_signal(number)
        assert watch.wait(10) == Exit.DONE


def test_output_into_a_closed_pipe_ends_quietly(engines: Engines, registry: Registry) -> None:
    watch = engines.start("watch")
    assert watch.stdout is not None
    assert watch.stderr is not None
    watch.stdout.close()
    with register(registry):
        assert watch.wait(20) == Exit.FAILED
    assert watch.stderr.read() == ""


@pytest.mark.parametrize(
    "args",
    [
        ("list",),
        ("show", "a"),
        ("watch",),
        ("evict", "a"),
        ("load", "a", "--rank", "0"),
        ("register", "a", "--rank", "0", "--world-size", "1", "--weights", "x"),
    ],
)
def test_without_etcd_every_command_says_where_it_looked(processes: Processes, args: tuple[str, ...]) -> None:
    port = free_port()
    result = processes.run(*args, ENGINES_ETCD=f"127.0.0.1:{port}")
    assert_one_line(result, Exit.ETCD, f"etcd at 127.0.0.1:{port} cannot be reached", "check the address")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--rank", "2", "--world-size", "2", "--weights", "x"), Exit.USAGE, ["rank 2", "from 0 to 1"]),
        (("--rank", "0", "--world-size", "1", "--weights", "nowhere"), Exit.FAILED, ["nowhere does not exist"]),
        (("--rank", "0", "--world-size", "1", "--weights", "TEXT"), Exit.FAILED, ["cannot be read as safetensors"]),
        (("--rank", "0", "--world-size", "1", "--weights", "CUT"), Exit.FAILED, ["cannot be read as safetensors"]),
        (("--rank", "0", "--world-size", "1", "--weights", "EMPTY_DIR"), Exit.FAILED, ["holds no *.safetensors"]),
        (("--rank", "0", "--world-size", "1", "--weights", "WEIGHTS", "--topology", "tp=1"), Exit.USAGE, ["AXIS=INDEX/SIZE"]),
        (("--rank", "0", "--world-size", "1", "--weights", "WEIGHTS", "--protocol", "pigeon"), Exit.FAILED, ["tcp, rdma"]),
        (("--rank", "0", "--world-size", "1", "--weights", "WEIGHTS", "--etcd", "here"), Exit.USAGE, ["use HOST:PORT"]),
    ],
)  # fmt: skip
def test_wrong_input_to_register_is_told_in_one_line(
    engines: Engines, weights: Path, tmp_path: Path, args: tuple[str, ...], code: Exit, words: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut").write_bytes(weights.read_bytes()[:-100])
    places = {"TEXT": "text", "CUT": "cut", "EMPTY_DIR": "empty", "WEIGHTS": weights.name}
    result = engines("register", "a", *(str(tmp_path / places[arg]) if arg in places else arg for arg in args))
    assert_one_line(result, code, *words)


@pytest.mark.parametrize("args", [(), ("--rank", "0"), ("--rank", "x", "--world-size", "1", "--weights", "x")])
def test_missing_and_malformed_options_are_usage_errors(engines: Engines, args: tuple[str, ...]) -> None:
    result = engines("register", "a", *args)
    assert result.returncode == Exit.USAGE
    assert result.stderr.startswith("Usage: engines register")


def test_a_taken_rank_and_a_wrong_world_size_are_refused_with_their_holder(
    engines: Engines, weights: Path, registry: Registry
) -> None:
    options = ("--weights", str(weights), "--host", "127.0.0.1", "--model", "tiny", "--revision", "r1")
    with register(registry, world_size=2):
        taken = engines("register", "a", "--rank", "0", "--world-size", "2", *options)
        assert_one_line(taken, Exit.FAILED, "already registered", f"pid {os.getpid()}", "engines evict a --rank 0")
        other = engines("register", "a", "--rank", "1", "--world-size", "4", *options)
        assert_one_line(other, Exit.FAILED, "world_size 4", "registered with 2")


def test_an_instance_that_is_missing_or_incomplete_has_its_exit_code(engines: Engines, registry: Registry) -> None:
    assert_one_line(engines("show", "a"), Exit.INSTANCE, "'a' is not registered")
    assert_one_line(engines("load", "a", "--rank", "0", "--wait", "0.1"), Exit.INSTANCE, "'a' is not registered after 0.1 s")
    with register(registry, world_size=3):
        assert_one_line(engines("load", "a", "--rank", "0", "--wait", "0.1"), Exit.INSTANCE, "missing ranks 1-2 of 3")
        assert_one_line(engines("show", "a", "--rank", "1"), Exit.INSTANCE, "rank 1 of 'a' is not registered")
        assert "missing ranks 1-2 of 3" in engines("list").stdout
    with register(registry):
        assert_one_line(engines("load", "a", "--rank", "1"), Exit.USAGE, "its ranks are 0 to 0")


def test_a_source_that_is_not_there_any_more_is_told(engines: Engines, registry: Registry) -> None:
    with register(registry):  # registers an address at which nothing listens
        assert_one_line(engines("load", "a", "--rank", "0"), Exit.INSTANCE, "source /engines/a/0 at 127.0.0.1:1 was lost")


def test_a_damaged_record_is_shown_by_list_and_an_error_for_load(
    engines: Engines, registry: Registry, shared_etcd: LocalEtcd, namespace: str
) -> None:
    etcd = Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))
    etcd.commit([], [Put("/engines/b/0", b"{}", 0)])
    etcd.close()
    listed = engines("list")
    assert listed.returncode == Exit.DONE
    assert "the record at /engines/b/0 is damaged: 'schema' is missing" in listed.stdout
    assert_one_line(engines("load", "b", "--rank", "0", "--wait", "0"), Exit.FAILED, "/engines/b/0 is damaged")


def test_a_debug_run_shows_the_traceback(processes: Processes) -> None:
    result = processes.run("list", "--debug", ENGINES_ETCD=f"127.0.0.1:{free_port()}")
    assert result.returncode == Exit.ETCD
    assert "Traceback" in result.stderr


def test_the_password_is_taken_from_the_environment_or_asked_for_but_never_shown(
    processes: Processes, shared_etcd: LocalEtcd
) -> None:
    missing = processes.run("list", "--user", "root")
    assert missing.returncode == Exit.USAGE
    assert "set ENGINES_ETCD_PASSWORD" in missing.stderr
    refused = processes.run("list", "--user", "root", ENGINES_ETCD_PASSWORD="hunter2")
    assert_one_line(refused, Exit.ETCD, "authentication turned off")
    assert "hunter2" not in refused.stdout + refused.stderr


def test_the_embedded_etcd_runs_until_it_is_told_to_end(processes: Processes) -> None:
    port = free_port()
    server = processes.engines("etcd", "--port", str(port))
    assert line_of(server).startswith(f"etcd is ready at 127.0.0.1:{port}")
    second = processes.run("etcd", "--port", str(port))
    assert_one_line(second, Exit.FAILED, f"port {port} on 127.0.0.1 is in use", "choose another")
    assert processes.run("list", ENGINES_ETCD=f"127.0.0.1:{port}").returncode == Exit.DONE
    server.send_signal(signal.SIGINT)
    assert server.wait(10) == Exit.DONE
    assert processes.run("list", ENGINES_ETCD=f"127.0.0.1:{port}").returncode == Exit.ETCD


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


@pytest.mark.parametrize("how", ["to its end", "killed half-way"])
def test_the_demo_leaves_no_process_and_no_file_behind(processes: Processes, tmp_path: Path, how: str) -> None:
    weights = {f"layer.{number}.w": torch.rand(64, 64) for number in range(6)} | {"embed": torch.rand(10, 64)}
    save_file(weights, tmp_path / "model.safetensors")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    demo = processes.engines("demo", "--weights", str(tmp_path / "model.safetensors"), TMPDIR=str(scratch))
    started: set[int] = set()
    lines: list[str] = []
    assert demo.stdout is not None
    for line in demo.stdout:
        started |= set(_descendants(demo.pid))
        lines.append(line)
        if how == "killed half-way" and line.startswith("registered demo/0"):
            demo.kill()
            break
    assert demo.wait(60) == (0 if how == "to its end" else -signal.SIGKILL)
    assert started
    for pid in sorted(started, key=_is_keeper):
        if how == "killed half-way" and _is_keeper(pid):
            os.kill(pid, signal.SIGKILL)  # its etcd was killed along: to it an outage like any other, which it would wait out
        _wait_for_end(pid)
    if how == "to its end":
        assert lines[-1].startswith("7 tensors, ")
        assert lines[-1].endswith("all verified\n")
        assert any("demo/1 lost: process ended" in line for line in lines)
        assert list(scratch.iterdir()) == []


def _is_keeper(pid: int) -> bool:
    try:
        return b"engine-registry-keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def _wait_for_end(pid: int) -> None:
    """Blocks until the process has ended, 30 s at most."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    ended: list[Any] = poll.poll(30_000)
    os.close(descriptor)
    assert ended, f"process {pid} still runs: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}"
