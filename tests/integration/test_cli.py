"""The command line as users and scripts meet it: real processes, their output, exit codes and
signals.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_cli.exits import Exit
from engine_loader import MooncakeEngine, find_held, publish
from engine_loader.starting.lock import lock_name
from engine_registry import ModelIdentity, RankJoined, RankState, RankUpdated, Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record import Retained
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.checkout import PACKAGES, ROOT
from tests.support.ranks import register
from tests.support.waiting import wait_until


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
            "register",
            "a",
            "--rank",
            "0",
            "--world-size",
            "1",
            "--weights",
            str(path),
            "--host",
            "127.0.0.1",
            *args,
        )
        assert line_of(process).startswith("registered a/0 of 1: 3 tensors")
        return process


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {
        "w": torch.rand(100, 3),
        "b": torch.arange(7, dtype=torch.int16),
        "s": torch.tensor(1.5).to(torch.bfloat16),
    }
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


def test_a_rank_served_from_a_file_is_listed_shown_loaded_and_withdrawn(
    engines: Engines, weights: Path, tmp_path: Path
) -> None:
    server = engines.serve(
        weights, "--model", "tiny", "--revision", "r1", "--topology", "tp=0/1", "--version", "3"
    )

    listed = engines("list")
    assert listed.stdout.splitlines()[1].split()[:5] == ["a", "ready", "1/1", "tiny@r1", "3"]
    (instance,) = json.loads(engines("list", "--json").stdout)["instances"]
    assert (instance["instance"], instance["state"], instance["missing"], instance["version"]) == (
        "a",
        "ready",
        [],
        3,
    )

    shown = json.loads(engines("show", "a", "--tensors", "--json").stdout)
    (rank,) = shown["ranks"]
    assert (rank["pid"], rank["topology"], rank["tensors"]) == (server.pid, {"tp": [0, 1]}, 3)
    assert {entry["name"]: (entry["dtype"], entry["shape"]) for entry in rank["entries"]} == {
        "w": ("float32", [100, 3]),
        "b": ("int16", [7]),
        "s": ("bfloat16", []),
    }
    assert "bfloat16" in engines("show", "a", "--tensors").stdout

    loaded = engines(
        "load", "a", "--rank", "0", "--out", str(tmp_path / "out"), "--host", "127.0.0.1", "--json"
    )
    report = json.loads(loaded.stdout)
    assert (report["version"], report["tensors"], report["protocol"]) == (3, 3, "tcp")
    assert loaded.stderr == ""
    original, copy = load_file(weights), load_file(tmp_path / "out" / "rank-0.safetensors")
    assert original.keys() == copy.keys()
    assert all(
        torch.equal(original[name], copy[name]) and original[name].dtype == copy[name].dtype
        for name in original
    )
    assert_one_line(
        engines("load", "a", "--rank", "0", "--out", str(tmp_path / "out")),
        Exit.USAGE,
        "there already",
        "--force",
    )

    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=100)
    assert (server.returncode, out, err) == (0, "withdrew a/0\n", "")
    assert engines("list").stdout == "no instance is registered\n"


def test_register_from_peers_copies_what_runs_and_else_reads_the_files(
    engines: Engines, weights: Path, tmp_path: Path
) -> None:
    def register_b(*args: str) -> list[str]:
        return [
            "b",
            "--rank",
            "0",
            "--world-size",
            "1",
            "--weights",
            str(weights),
            "--host",
            "127.0.0.1",
            "--from-peers",
            *args,
        ]

    first = engines.serve(weights, "--from-peers", "--model", "m")
    second = engines.start("register", *register_b("--model", "m"))
    assert line_of(second).endswith(" (tcp), copied from a/0; Ctrl-C withdraws\n")
    loaded = engines(
        "load",
        "b",
        "--rank",
        "0",
        "--host",
        "127.0.0.1",
        "--out",
        str(tmp_path / "out"),
        "--verify",
    )
    assert loaded.returncode == Exit.DONE, loaded.stderr
    found, wanted = load_file(tmp_path / "out" / "rank-0.safetensors"), load_file(weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for process in (first, second):
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=100)[1] == ""
    assert_one_line(engines("register", *register_b()), Exit.USAGE, "add --model NAME")


def test_register_adopts_what_a_rank_that_was_killed_has_left(
    engines: Engines, registry: Registry, weights: Path
) -> None:
    how = ("--from-peers", "--model", "m", "--hold", "60")
    engines.serve(weights, *how).kill()
    wait_until(lambda: find_held(registry, ModelIdentity("m"), rank=0, world_size=1) is not None)
    options = ("--rank", "0", "--world-size", "1", "--weights", str(weights), "--host", "127.0.0.1")
    again = engines.start("register", "a", *options, *how)
    assert line_of(again).endswith(" (tcp), adopted from a/0; Ctrl-C withdraws\n")
    again.send_signal(signal.SIGTERM)
    assert again.communicate(timeout=100) == ("withdrew a/0\n", "")
    assert registry.instances() == ()
    assert find_held(registry, ModelIdentity("m"), rank=0, world_size=1) is None


@pytest.mark.parametrize("how", [(), ("--from-peers",)], ids=["plain", "from peers"])
def test_a_folder_is_served_as_its_index_says(
    engines: Engines, tmp_path: Path, how: tuple[str, ...]
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    base = {
        "a": torch.rand(5),
        "b": torch.rand(5),
        "c": torch.arange(12).to(torch.uint8).view(torch.float4_e2m1fn_x2).view(2, 6),
    }
    overlay, adapter = {"b": torch.rand(3)}, {"lora": torch.rand(2)}
    save_file(base, folder / "base.safetensors")
    save_file(overlay, folder / "sub" / "overlay.safetensors")
    save_file(adapter, folder / "adapter_model.safetensors")
    places = {**dict.fromkeys(base, "base.safetensors"), "b": "sub/overlay.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    engines.serve(folder, "--model", "m", *how)
    options = (
        "--rank",
        "0",
        "--world-size",
        "1",
        "--weights",
        str(folder),
        "--host",
        "127.0.0.1",
        "--model",
        "m",
    )
    assert "copied from a/0" in line_of(engines.start("register", "b", *options, "--from-peers"))
    save_file({**base, **overlay}, tmp_path / "wanted.safetensors")
    for name in ("a", "b"):
        loaded = engines(
            "load", name, "--rank", "0", "--out", str(out / name), "--host", "127.0.0.1"
        )
        assert loaded.returncode == Exit.DONE, loaded.stderr
        assert contents([out / name / "rank-0.safetensors"]) == contents(
            [tmp_path / "wanted.safetensors"]
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_register_from_peers_that_waits_ends_with_a_signal(
    engines: Engines, registry: Registry, weights: Path, number: signal.Signals
) -> None:
    options = (
        "--rank",
        "0",
        "--world-size",
        "1",
        "--weights",
        str(weights),
        "--host",
        "127.0.0.1",
        "--log-level",
        "info",
    )
    with registry.election(lock_name(ModelIdentity("m"), 0, 1, {})) as election:
        wait_until(lambda: election.leading)
        process = engines.start("register", "b", *options, "--from-peers", "--model", "m")
        assert process.stderr is not None
        assert any("waits for a peer that has its weights" in line for line in process.stderr)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert registry.ranks("b") == ()


def test_ctrl_c_withdraws(engines: Engines, weights: Path, registry: Registry) -> None:
    server = engines.serve(weights)
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=100)[0] == "withdrew a/0\n"
    assert server.returncode == Exit.DONE
    assert registry.instances() == ()


def test_a_server_with_until_eof_ends_with_its_parent(engines: Engines, weights: Path) -> None:
    server = engines.serve(weights, "--until-eof")
    out, _ = server.communicate(timeout=100)  # closes its standard input
    assert (server.returncode, out) == (0, "withdrew a/0\n")


def test_eviction_ends_the_server_with_an_error_that_says_so(
    engines: Engines, weights: Path
) -> None:
    server = engines.serve(weights, "--ttl", "2")
    evicted = engines("evict", "a", "--reason", "wrong checkpoint")
    assert (evicted.returncode, evicted.stdout.startswith("evicted a/0 (host")) == (0, True)
    _, err = server.communicate(timeout=100)
    assert server.returncode == Exit.FAILED
    assert f"@{socket.gethostname()} at " in err
    assert ": wrong checkpoint: the registration has ended" in err
    assert_one_line(engines("evict", "a"), Exit.INSTANCE, "'a' is not registered")


def test_a_version_is_released_shown_and_rolled_back(engines: Engines, registry: Registry) -> None:
    with register(registry, version=4) as rank:
        assert "released" not in engines("show", "a").stdout
        done = engines("release", "a")
        assert done.stdout.startswith("a: version 4 is released, by ")
        before = Retained(4, rank.record.content, rank.record.header_addr)
        rank.switch(Retained(5, "5" * 32, rank.record.header_addr), [before])
        assert json.loads(engines("release", "a", "--json").stdout)["version"] == 5
        shown = json.loads(engines("show", "a", "--json").stdout)
        assert shown["released"]["version"] == 5
        assert "\nreleased: version 5, at 20" in engines("show", "a").stdout
        older = "is older than version 5, which is released"
        assert_one_line(engines("release", "a", "--version", "4"), Exit.USAGE, older, "--rollback")
        back = engines("release", "a", "--version", "4", "--rollback")
        assert back.stdout.startswith("a: version 4 is released, by ")
        kept_back = "it is kept back by rank 0 (versions 4 and 5)"
        assert_one_line(engines("release", "a", "--version", "3"), Exit.INSTANCE, kept_back)
    assert_one_line(engines("release", "a"), Exit.INSTANCE, "'a' is not registered")


def test_eviction_names_the_ranks_that_have_loaded_the_same_content(
    engines: Engines, weights: Path, tmp_path: Path
) -> None:
    engines.serve(weights)
    out = str(tmp_path / "copy.safetensors")
    copy = engines.start(
        "load", "a", "--rank", "0", "--out", out, "--serve", "b", "--host", "127.0.0.1"
    )
    assert line_of(copy).startswith("loaded a/0")
    assert line_of(copy).startswith("serving b/0")
    also = "the same content is still served by b/0: evict these too if the bytes are wrong"
    assert engines("evict", "a").stdout.splitlines()[1:] == [also]
    assert len(engines("evict", "b").stdout.splitlines()) == 1


def test_a_watch_prints_what_happens_until_it_is_stopped(
    engines: Engines, registry: Registry
) -> None:
    as_text, as_json = engines.start("watch", "a"), engines.start("watch", "--json")
    with register(registry):
        texts = [line_of(as_text), line_of(as_text)]
        events = [json.loads(line_of(as_json)) for _ in range(2)]
    texts += [line_of(as_text), line_of(as_text)]
    events += [json.loads(line_of(as_json)) for _ in range(2)]
    times = [line.split("  ", 1)[0] for line in texts] + [event["at"] for event in events]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at) for at in times)
    assert [line.split("  ", 1)[1].split()[:2] for line in texts] == [
        ["a/0", "joined:"],
        ["a", "ready:"],
        ["a/0", "lost:"],
        ["a", "gone"],
    ]
    assert "lost: withdrawn (host" in texts[2]
    assert [event["event"] for event in events] == [
        "rank_joined",
        "instance_ready",
        "rank_lost",
        "instance_gone",
    ]
    assert (events[2]["reason"], events[2]["pid"]) == ("withdrawn", os.getpid())
    for watch, number in ((as_text, signal.SIGINT), (as_json, signal.SIGTERM)):
        watch.send_signal(number)
        assert watch.wait(60) == Exit.DONE


def test_ranks_of_different_versions_are_shown_and_watched_as_what_they_are(
    engines: Engines, registry: Registry
) -> None:
    why = "versions differ: 0 (rank 0), 1 (rank 1); rank 1 updating"
    with (
        register(registry, rank=0, world_size=2),
        register(registry, rank=1, world_size=2, version=1) as second,
    ):
        second.update(state=RankState.UPDATING)
        shown = engines("show", "a")
        assert (shown.returncode, shown.stderr) == (Exit.DONE, "")
        assert shown.stdout.splitlines()[0].startswith("a: degraded, ")
        assert shown.stdout.splitlines()[1] == f"not ready: {why}"
        data = json.loads(engines("show", "a", "--json").stdout)
        assert (data["state"], data["version"], data["missing"], data["problems"]) == (
            "degraded",
            None,
            [],
            why.split("; "),
        )
        assert [(rank["version"], rank["state"]) for rank in data["ranks"]] == [
            (0, "ready"),
            (1, "updating"),
        ]
        watch = engines.start("watch", "a")
        assert [line_of(watch).split("  ", 1)[1] for _ in range(3)][2] == f"a degraded: {why}\n"
        second.update(version=0, state=RankState.READY)
        assert [line_of(watch).split("  ", 1)[1] for _ in range(2)] == [
            "a/1 updated: ready, version 0\n",
            "a ready: 2 ranks, 32 B, version 0\n",
        ]


def test_a_signal_stops_the_hooks_and_logs_how_many_were_not_run(
    engines: Engines, registry: Registry, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with register(registry):
        watch = engines.start(
            "watch", "a", "--exec", f"echo $ENGINES_EVENT $ENGINES_STATE >>{log}; exec sleep 1000"
        )
        assert [line_of(watch).split()[2] for _ in range(2)] == ["joined:", "ready:"]
        wait_until(lambda: log.exists() and bool(log.read_text()))
        watch.send_signal(signal.SIGTERM)
        _, err = watch.communicate(timeout=100)
    assert watch.returncode == Exit.DONE
    assert log.read_text() == "rank_joined ready\n"
    assert "hooks that were not run: 1" in err


def test_a_second_signal_ends_the_hook_that_runs_and_the_watch(
    engines: Engines, registry: Registry, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with register(registry):
        watch = engines.start("watch", "a", "--exec", f"sleep 1000 & echo $! >>{log}; wait")
        wait_until(lambda: log.exists() and bool(log.read_text()))
        watch.send_signal(signal.SIGINT)
        watch.send_signal(signal.SIGTERM)
        _, err = watch.communicate(timeout=100)
    # done where the hook's end was all that it waited for
    assert watch.returncode in (
        Exit.INTERRUPTED,
        Exit.DONE,
    )
    assert "Traceback" not in err
    (started,) = log.read_text().split()
    wait_for_end(int(started))


def test_a_watch_that_cleans_ends_at_a_signal_although_etcd_hangs(
    processes: Processes, own_etcd: LocalEtcd
) -> None:
    watch = processes.engines(
        "watch", "--cleanup", "--timeout", "100", ENGINES_ETCD=own_etcd.endpoint
    )
    with Registry.connect(own_etcd.endpoint) as registry, register(registry):
        assert line_of(watch)
        own_etcd.pause()
        try:
            watch.send_signal(signal.SIGTERM)
            _, err = watch.communicate(timeout=100)
        finally:
            own_etcd.resume()
    assert (watch.returncode, err) == (Exit.DONE, "")


def test_a_dry_run_of_a_cleanup_says_what_it_would_evict(
    engines: Engines, registry: Registry
) -> None:
    with (
        register(registry, rank=0, world_size=2),
        register(registry, rank=1, world_size=2) as second,
    ):
        watch = engines.start("watch", "a", "--cleanup", "--dry-run", "--grace", "0.2")
        while not line_of(watch).split("  ", 1)[1].startswith("a ready"):
            pass
        second.withdraw()
        said = [line_of(watch).split("  ", 1)[1] for _ in range(3)]
        assert said[2] == "a cleaned up: would evict rank 0, as rank 1 did not come back\n"
        watch.send_signal(signal.SIGTERM)
        assert watch.communicate(timeout=100) == ("", "")
        assert [record.rank for record in registry.ranks("a")] == [0]


def test_three_watches_that_clean_evict_once(engines: Engines, registry: Registry) -> None:
    with (
        register(registry, rank=0, world_size=2),
        register(registry, rank=1, world_size=2) as second,
    ):
        watches = [
            engines.start("watch", "a", "--cleanup", "--grace", "0.5", "--json") for _ in range(3)
        ]
        for watch in watches:
            read_until(watch, "instance_ready")
        second.withdraw()
        seen = [read_until(watch, "instance_gone") for watch in watches]
        for watch in watches:
            watch.send_signal(signal.SIGTERM)
            assert watch.communicate(timeout=100) == ("", "")
    cleaned = [event for events in seen for event in events if event["event"] == "instance_cleaned"]
    assert [(event["evicted"], event["lost"]["rank"]) for event in cleaned] == [([0], 1)]
    for events in seen:
        assert [event["reason"] for event in events if event["event"] == "rank_lost"] == [
            "withdrawn",
            "evicted",
        ]


def read_until(watch: subprocess.Popen[str], last: str) -> list[dict[str, Any]]:
    """The events up to the first of that name."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["event"] != last:
        events.append(json.loads(line_of(watch)))
    return events


@pytest.mark.parametrize("hurried", [False, True])
def test_a_server_that_is_asked_to_end_waits_for_its_readers_until_it_is_asked_again(
    engines: Engines, weights: Path, registry: Registry, hurried: bool
) -> None:
    server = engines.serve(weights, "--drain", "1000")
    (record,) = registry.ranks("a")
    ticket = registry.pull(record)
    assert ticket is not None
    with ticket, registry.watch("a") as watch:
        server.send_signal(signal.SIGTERM)
        events_until(
            watch,
            lambda event: (
                isinstance(event, RankJoined | RankUpdated)
                and event.record.state is RankState.DRAINING
            ),
        )
        assert server.poll() is None
        if hurried:
            server.send_signal(signal.SIGTERM)
        else:
            ticket.close()
        out, _ = server.communicate(timeout=100)
        assert (server.returncode, out) == (Exit.DONE, "withdrew a/0\n")
        assert registry.instances() == ()


def test_output_into_a_closed_pipe_ends_quietly_as_its_signal_does(
    engines: Engines, registry: Registry
) -> None:
    watch = engines.start("watch")
    assert watch.stdout is not None
    assert watch.stderr is not None
    watch.stdout.close()
    with register(registry):
        assert watch.wait(60) == 128 + signal.SIGPIPE
    assert watch.stderr.read() == ""


@pytest.mark.parametrize(
    "args", [("list",), ("list", "--json"), ("show", "a"), ("show", "a", "--tensors")], ids=" ".join
)
def test_a_table_into_a_closed_pipe_ends_quietly_as_its_signal_does(
    processes: Processes, registry: Registry, args: tuple[str, ...]
) -> None:
    with register(registry):
        process = processes.start_anew(
            *("-m", "engine_cli", *args, "--namespace", registry.config.namespace)
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


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
def test_without_etcd_every_command_says_where_it_looked(
    processes: Processes, dead_address: str, args: tuple[str, ...]
) -> None:
    result = processes.run(*args, ENGINES_ETCD=dead_address)
    assert_one_line(
        result, Exit.ETCD, f"etcd at {dead_address} cannot be reached", "check the address"
    )


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (
            ("--rank", "2", "--world-size", "2", "--weights", "x"),
            Exit.USAGE,
            ["rank 2", "from 0 to 1"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "nowhere"),
            Exit.FAILED,
            ["nowhere does not exist"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "TEXT"),
            Exit.FAILED,
            ["cannot be read as safetensors"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "CUT"),
            Exit.FAILED,
            ["cannot be read as safetensors"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "EMPTY_DIR"),
            Exit.FAILED,
            ["holds no *.safetensors"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "PART"),
            Exit.FAILED,
            ["gone.safetensors", "does not exist"],
        ),
        (
            (
                "--rank",
                "0",
                "--world-size",
                "1",
                "--weights",
                "PART",
                "--from-peers",
                "--model",
                "m",
            ),
            Exit.FAILED,
            ["gone"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "WEIGHTS", "--topology", "tp=1"),
            Exit.USAGE,
            ["AXIS=INDEX/SIZE"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "WEIGHTS", "--topology", "tp=²/3"),
            Exit.USAGE,
            ["tp=²/3"],
        ),
        (
            ("--rank", "0", "--world-size", "1", "--weights", "WEIGHTS", "--etcd", "here"),
            Exit.USAGE,
            ["use HOST:PORT"],
        ),
    ],
)
def test_wrong_input_to_register_is_reported_in_one_line(
    engines: Engines,
    weights: Path,
    tmp_path: Path,
    args: tuple[str, ...],
    code: Exit,
    words: list[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut").write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "part").mkdir()
    places_of = {"w": "gone.safetensors"}
    (tmp_path / "part" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places_of})
    )
    places = {
        "TEXT": "text",
        "CUT": "cut",
        "EMPTY_DIR": "empty",
        "WEIGHTS": weights.name,
        "PART": "part",
    }
    result = engines(
        "register", "a", *(str(tmp_path / places[arg]) if arg in places else arg for arg in args)
    )
    assert_one_line(result, code, *words)


@pytest.mark.parametrize(
    "args", [(), ("--rank", "0"), ("--rank", "x", "--world-size", "1", "--weights", "x")]
)
def test_missing_and_malformed_options_are_usage_errors(
    engines: Engines, args: tuple[str, ...]
) -> None:
    result = engines("register", "a", *args)
    assert result.returncode == Exit.USAGE
    assert result.stderr.startswith("Usage: engines register")


def test_a_taken_rank_and_a_wrong_world_size_are_refused_with_their_holder(
    engines: Engines, weights: Path, registry: Registry
) -> None:
    options = (
        "--weights",
        str(weights),
        "--host",
        "127.0.0.1",
        "--model",
        "tiny",
        "--revision",
        "r1",
    )
    with register(registry, world_size=2):
        taken = engines("register", "a", "--rank", "0", "--world-size", "2", *options)
        assert_one_line(
            taken,
            Exit.FAILED,
            "already registered",
            f"pid {os.getpid()}",
            "engines evict a --rank 0",
        )
        other = engines("register", "a", "--rank", "1", "--world-size", "4", *options)
        assert_one_line(other, Exit.FAILED, "world_size 4", "registered with 2")


def test_an_instance_that_is_missing_or_incomplete_has_its_exit_code(
    engines: Engines, registry: Registry
) -> None:
    assert_one_line(engines("show", "a"), Exit.INSTANCE, "'a' is not registered")
    assert_one_line(
        engines("load", "a", "--rank", "0", "--wait", "0.1"),
        Exit.INSTANCE,
        "'a' is not registered after 0.1 s",
    )
    with register(registry, world_size=3):
        assert_one_line(
            engines("load", "a", "--rank", "0", "--wait", "0.1"),
            Exit.INSTANCE,
            "missing ranks 1-2 of 3",
        )
        assert_one_line(
            engines("show", "a", "--rank", "1"), Exit.INSTANCE, "rank 1 of 'a' is not registered"
        )
        assert "missing ranks 1-2 of 3" in engines("list").stdout
    with register(registry):
        assert_one_line(engines("load", "a", "--rank", "1"), Exit.USAGE, "its ranks are 0 to 0")


def test_a_source_that_is_not_there_any_more_is_reported(
    engines: Engines, registry: Registry
) -> None:
    with register(registry):  # registers an address at which nothing listens
        assert_one_line(
            engines("load", "a", "--rank", "0"),
            Exit.INSTANCE,
            "rank 0 of instance a could not be read to the end (cannot read from 127.0.0.1:1: ",
        )


def test_a_damaged_record_is_shown_by_list_and_an_error_for_load(
    engines: Engines, registry: Registry, shared_etcd: LocalEtcd, namespace: str
) -> None:
    etcd = Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))
    etcd.commit([], [Put("/engines/b/0", b"{}", 0)])
    etcd.close()
    listed = engines("list")
    assert listed.returncode == Exit.DONE
    assert "the record at /engines/b/0 is damaged: `$.schema` is missing" in listed.stdout
    assert_one_line(
        engines("load", "b", "--rank", "0", "--wait", "0"), Exit.FAILED, "/engines/b/0 is damaged"
    )


def test_a_key_that_cannot_be_read_is_named_by_evict_and_show_and_left(
    engines: Engines, registry: Registry, shared_etcd: LocalEtcd, namespace: str
) -> None:
    etcd = Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))
    etcd.commit([], [Put("/engines/a/1", b"{}", 0), Put("/engines/a/2", b'{"schema": 7}', 0)])
    damaged = f"etcdctl del {namespace}/engines/a/1"
    newer = f"etcdctl del {namespace}/engines/a/2"
    shown = engines("show", "a")
    assert (shown.returncode, shown.stdout.splitlines()[0]) == (
        Exit.DONE,
        "a: degraded, 0 B, model -",
    )
    assert_one_line(
        engines("evict", "a"),
        Exit.FAILED,
        "/engines/a/1 is damaged",
        damaged,
        "has schema 7",
        "upgrade",
        newer,
    )
    assert_one_line(engines("evict", "a", "--rank", "2"), Exit.FAILED, "has schema 7", newer)
    assert_one_line(
        engines("show", "a", "--rank", "1"), Exit.FAILED, "/engines/a/1 is damaged", damaged
    )
    assert_one_line(
        engines("evict", "a", "--rank", "3"), Exit.INSTANCE, "rank 3 of 'a' is not registered"
    )
    with register(registry, world_size=3):
        assert engines("evict", "a", "--rank", "0").returncode == Exit.DONE
    with register(registry, world_size=3):
        evicted = engines("evict", "a")
        assert evicted.stdout.startswith("evicted a/0 (host")
        assert_one_line(evicted, Exit.FAILED, damaged, newer)
    assert [item.key for item in etcd.snapshot("/engines/").items] == [
        "/engines/a/1",
        "/engines/a/2",
    ]
    etcd.close()


def _in_shell(command: str, shared_etcd: LocalEtcd, **env: str) -> subprocess.CompletedProcess[str]:
    """With `engines` in it, which stands for the real one."""
    script = f'engines() {{ "{sys.executable}" -m engine_cli "$@"; }}; {command}'
    env = {**os.environ, "ENGINES_ETCD": shared_etcd.endpoint, **env}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=100, cwd=ROOT, env=env
    )


@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        (
            "engines list >/dev/full",
            Exit.FAILED,
            "",
            "engines: error: cannot write: No space left on device: ",
        ),
        (
            "engines list --json >/dev/full",
            Exit.FAILED,
            "",
            "engines: error: cannot write: No space left on device: ",
        ),
        (
            "engines --help >/dev/full",
            Exit.FAILED,
            "",
            "engines: error: cannot write: No space left on device: ",
        ),
        ("engines show a 2>/dev/full", Exit.INSTANCE, "", ""),
        ("engines show 2>/dev/full", Exit.USAGE, "", ""),
        ("engines list >&-", Exit.DONE, "", ""),
        ("engines list 2>&-", Exit.DONE, "no instance is registered\n", ""),
        ("engines list <&- >&- 2>&-", Exit.DONE, "", ""),
        (
            "engines list --namespace $'\\xff'",
            Exit.USAGE,
            "",
            "engines: error: namespace '\\udcff' is not valid",
        ),
        ("engines list --timeout inf", Exit.USAGE, "", "Usage: engines list"),
    ],
)
def test_standard_streams_and_arguments_of_any_kind_end_in_a_line_and_a_code(
    shared_etcd: LocalEtcd, command: str, code: Exit, out: str, err: str
) -> None:
    result = _in_shell(command, shared_etcd)
    assert (result.returncode, result.stdout) == (code, out)
    assert result.stderr.startswith(err)
    assert "unexpected" not in result.stderr
    assert bool(result.stderr) == bool(err)


def test_what_the_terminals_encoding_lacks_is_shown_as_an_escape(
    engines: Engines, weights: Path, tmp_path: Path
) -> None:
    engines.serve(weights)
    options = ("load", "a", "--rank", "0", "--host", "127.0.0.1", "--out", str(tmp_path / "out"))
    loaded = engines(*options, PYTHONIOENCODING="latin-1:strict")
    assert loaded.returncode == Exit.DONE, loaded.stderr
    assert "\\u2192 " in loaded.stdout


def test_a_server_without_standard_streams_serves_and_ends(
    shared_etcd: LocalEtcd, registry: Registry, namespace: str, weights: Path
) -> None:
    args = (
        f"register a --rank 0 --world-size 1 --weights {weights} --host 127.0.0.1 --namespace "
        f"{namespace} --until-eof"
    )
    assert _in_shell(f"engines {args} <&- >&- 2>&-", shared_etcd).returncode == Exit.DONE
    assert registry.instances() == ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_withdraws_when_its_terminal_is_closed(
    engines: Engines, weights: Path, registry: Registry, number: signal.Signals
) -> None:
    server = engines.serve(weights)
    server.send_signal(number)
    assert server.communicate(timeout=100) == ("withdrew a/0\n", "")
    assert server.returncode == Exit.DONE
    assert registry.instances() == ()


_TORCH_THAT_SWALLOWS = """
import sys
try:
    print("importing", flush=True)
    sys.stdin.readline()
except KeyboardInterrupt:
    pass
raise ImportError("not the real one")
"""


@pytest.mark.parametrize("command", ["register", "demo"])
def test_ctrl_c_during_the_import_of_torch_is_not_lost(
    processes: Processes, weights: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "torch.py").write_text(_TORCH_THAT_SWALLOWS)
    path = os.pathsep.join([str(tmp_path), *PACKAGES])
    rank = ("a", "--rank", "0", "--world-size", "1") if command == "register" else ()
    process = processes.engines(command, *rank, "--weights", str(weights), PYTHONPATH=path)
    while line_of(process) != "importing\n":
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("\n", timeout=100)
    assert (process.returncode, err.strip()) == (Exit.INTERRUPTED, "engines: interrupted")


def test_a_debug_run_shows_the_traceback(processes: Processes, dead_address: str) -> None:
    result = processes.run("list", "--debug", ENGINES_ETCD=dead_address)
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


def test_the_embedded_etcd_runs_until_it_is_asked_to_end(processes: Processes) -> None:
    port = free_port()
    server = processes.engines("etcd", "--port", str(port))
    assert line_of(server).startswith(f"etcd is ready at 127.0.0.1:{port}")
    second = processes.run("etcd", "--port", str(port))
    assert_one_line(second, Exit.FAILED, f"port {port} on 127.0.0.1 is in use", "choose another")
    assert processes.run("list", ENGINES_ETCD=f"127.0.0.1:{port}").returncode == Exit.DONE
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == Exit.DONE
    assert processes.run("list", ENGINES_ETCD=f"127.0.0.1:{port}").returncode == Exit.ETCD


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


_TRAP = "raise SystemExit('the user has a file of this name')"


@pytest.mark.parametrize(
    "number",
    [
        0,
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_the_demo_leaves_no_process_and_no_file_behind(
    processes: Processes, tmp_path: Path, number: int
) -> None:
    """To its end, or to a signal half-way."""
    weights = {f"layer.{number}.w": torch.rand(64, 64) for number in range(6)} | {
        "embed": torch.rand(10, 64)
    }
    save_file(weights, tmp_path / "model.safetensors")
    scratch, here, script = tmp_path / "scratch", tmp_path / "here", tmp_path / "bin" / "engines"
    for folder in (scratch, here, script.parent):
        folder.mkdir()
    for name in ("engine_cli", "json", "engine_registry"):
        (here / f"{name}.py").write_text(_TRAP)
    script.write_text("from engine_cli.main import main; main()")
    demo = processes.start(
        str(script),
        "demo",
        "--weights",
        str(tmp_path / "model.safetensors"),
        cwd=here,
        TMPDIR=str(scratch),
        PYTHONPATH=os.pathsep.join(PACKAGES),
    )
    started: set[int] = set()
    lines: list[str] = []
    assert demo.stdout is not None
    for line in demo.stdout:
        started |= set(_descendants(demo.pid))
        lines.append(line)
        if number and line.startswith("registered demo/0"):
            demo.send_signal(number)
            break
    _, err = demo.communicate(timeout=100)
    assert demo.returncode == (
        -number if number == signal.SIGKILL else 128 + number if number else 0
    ), err
    assert started
    for pid in sorted(started, key=_is_keeper):
        if number == signal.SIGKILL and _is_keeper(pid):
            # its etcd was killed along: to it an outage like any other, which it would wait out
            os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
    if number == 0:
        assert lines[-1].startswith("7 tensors, ")
        assert lines[-1].endswith("all verified\n")
        assert any("demo/1 lost: process ended" in line for line in lines)
    if number != signal.SIGKILL:
        assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("tensors", [{}, {"nothing": torch.zeros(0), "none": torch.zeros(3, 0)}])
def test_the_demo_refuses_a_file_without_weights(
    processes: Processes, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    result = processes.run("demo", "--weights", str(tmp_path / "model.safetensors"))
    assert_one_line(result, Exit.FAILED, "holds no weights", "--weights FILE")


def _is_keeper(pid: int) -> bool:
    try:
        return b"engine-registry-keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
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


@pytest.mark.parametrize(
    ("args", "figures"),
    [
        (
            ("load", "--gib", "0.01", "--rounds", "1"),
            {"ours_gb_per_s", "naive_gb_per_s", "socket_gb_per_s", "safetensors_gb_per_s"},
        ),
        (
            ("registry", "--ranks", "16", "--kills", "1", "--leader-kills", "1"),
            {"register_16_ranks_s", "death_to_event_p99_ms"},
        ),
        (
            ("gateway", "--clients", "2", "--requests", "20", "--ranks", "3"),
            {"get_2_clients_p99_ms", "put_to_joined_p99_ms"},
        ),
    ],
)
@pytest.mark.timeout(240)
@pytest.mark.slow
def test_the_benchmarks_run_and_give_their_figures_as_json(
    processes: Processes, args: tuple[str, ...], figures: set[str]
) -> None:
    bench = processes.start("-m", f"benchmarks.{args[0]}", *args[1:], "--json")
    out, err = bench.communicate(timeout=220)
    assert bench.returncode == 0, err
    assert figures <= json.loads(out)["results"].keys()


def test_a_load_from_two_instances_is_verified_by_digests_and_says_what_came_from_whom(
    processes: Processes, tmp_path: Path
) -> None:
    save_file({"w": torch.rand(4 << 20)}, tmp_path / "w.safetensors")
    for name in ("a", "b"):
        server = processes.engines(
            "register",
            name,
            "--rank",
            "0",
            "--world-size",
            "1",
            "--weights",
            str(tmp_path / "w.safetensors"),
            "--model",
            "m",
        )
        assert line_of(server).startswith(f"registered {name}/0")
    result = processes.run("load", "a", "b", "--rank", "0", "--verify", "--json")
    report = json.loads(result.stdout)
    assert {source["key"] for source in report["sources"]} == {"/engines/a/0", "/engines/b/0"}
    assert sum(source["nbytes"] for source in report["sources"]) >= report["nbytes"] == 16 << 20
    assert report["digest_s"] > 0


def test_a_file_that_is_replaced_gives_what_it_holds_already(
    processes: Processes, tmp_path: Path
) -> None:
    base = {f"layer.{number}": torch.rand(1 << 18) for number in range(3)}
    tuned = {**base, "layer.1": torch.rand(1 << 18), "head": torch.rand(7)}
    for name, tensors in {"base": base, "tuned": tuned}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        arguments = ["--rank", "0", "--world-size", "1", "--model", name]
        weights = ["--weights", str(tmp_path / f"{name}.safetensors")]
        server = processes.engines("register", name, *arguments, *weights)
        assert line_of(server).startswith(f"registered {name}/0")
    out = tmp_path / "out"
    into = ["--rank", "0", "--out", str(out)]
    processes.run("load", "base", *into)
    replaced = processes.run("load", "tuned", *into, "--force", "--reuse", "--json")
    report = json.loads(replaced.stdout)
    assert (report["skipped_nbytes"], report["read_nbytes"]) == (2 << 20, (1 << 20) + 28)
    found = load_file(out / "rank-0.safetensors")
    assert found.keys() == tuned.keys()
    assert all(torch.equal(found[name], tuned[name]) for name in tuned)
    lent = processes.run("load", "tuned", "--rank", "0", "--also-from", "base", "--json")
    keys = {source["key"] for source in json.loads(lent.stdout)["sources"]}
    assert keys == {"/engines/tuned/0", "/engines/base/0"}
    assert json.loads(lent.stdout)["lent"].keys() <= {"/engines/base/0"}
    again = processes.run("load", "tuned", *into, "--force", "--reuse")
    assert "3.1 MB in" in again.stdout
    assert "; 3.1 MB were there already → " in again.stdout
    (out / "rank-0.safetensors").write_bytes(b"no weights")
    report = json.loads(
        processes.run("load", "tuned", *into, "--force", "--reuse", "--json").stdout
    )
    assert report["skipped_nbytes"] == 0
    refused = processes.run("load", "tuned", *into, "--reuse")
    assert "--reuse goes with --rank, --out and --force" in refused.stderr


# -- shards of ranks, and whole tensors made of them
# -----------------------------------------------------------------------------

WHOLE = {
    "l.0.q.weight": torch.arange(24 * 16, dtype=torch.float32).view(24, 16),  # by rows
    "l.0.o.weight": torch.arange(16 * 24, dtype=torch.int16).view(16, 24),  # by columns
    "l.0.norm": torch.arange(16).to(torch.bfloat16),  # on every rank
    "scale": torch.tensor(2.5),
}
CUTS = ("--shard", "*.q.*:0", "--shard", "*.o.weight:-1")


class Divided:
    """Two ranks of `a` that hold WHOLE between them: rank 0 the rows and columns up to `at`, rank 1
    the others.
    """

    def __init__(self, engines: Engines, folder: Path, at: int = 12) -> None:
        self._engines = engines
        self._folder = folder
        self.places = [slice(0, at), slice(at, 24)]

    def weights(self, rank: int) -> Path:
        part = dict(WHOLE)
        part["l.0.q.weight"] = WHOLE["l.0.q.weight"][self.places[rank]].contiguous()
        part["l.0.o.weight"] = WHOLE["l.0.o.weight"][:, self.places[rank]].contiguous()
        path = self._folder / f"part-{rank}.safetensors"
        save_file(part, path)
        return path

    def boxes(self, rank: int) -> Path:
        """A file for `--shards`."""
        at = self.places[rank].start
        boxes = {
            "l.0.q.weight": {"global_shape": [24, 16], "offsets": [at, 0]},
            "l.0.o.weight": {"global_shape": [16, 24], "offsets": [0, at]},
        }
        path = self._folder / f"boxes-{rank}.json"
        path.write_text(json.dumps(boxes))
        return path

    def serve(self, rank: int, *args: str) -> subprocess.Popen[str]:
        weights = str(self.weights(rank))
        server = self._engines.start(
            "register",
            "a",
            "--rank",
            str(rank),
            "--world-size",
            "2",
            "--weights",
            weights,
            "--host",
            "127.0.0.1",
            *args,
        )
        assert line_of(server).startswith(f"registered a/{rank} of 2: 4 tensors")
        return server


def contents(paths: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor in the files, as safetensors' own reader has them."""
    found = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            found[name] = (
                str(tensor.dtype),
                tuple(tensor.shape),
                bytes(tensor.reshape(-1).view(torch.uint8).tolist()),
            )
    return found


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    path = tmp_path / "whole.safetensors"
    save_file(WHOLE, path)
    return contents([path])


def test_a_load_that_serves_is_a_source_itself_until_it_is_asked_to_end(
    engines: Engines, weights: Path, tmp_path: Path
) -> None:
    server = engines.serve(weights)
    copy = engines.start(
        "load", "a", "--rank", "0", "--serve", "copy", "--host", "127.0.0.1", "--out", str(tmp_path)
    )
    assert line_of(copy).startswith("loaded a/0 version 0: 3 tensors")
    assert line_of(copy).startswith("serving copy/0 at 127.0.0.1:")
    (listed,) = [
        one
        for one in json.loads(engines("list", "--json").stdout)["instances"]
        if one["instance"] == "copy"
    ]
    assert (listed["state"], listed["model"]["name"]) == ("ready", "a")
    server.kill()
    again = engines(
        "load",
        "copy",
        "--rank",
        "0",
        "--verify",
        "--host",
        "127.0.0.1",
        "--out",
        str(tmp_path / "again"),
    )
    assert again.returncode == Exit.DONE, again.stderr
    wanted = load_file(weights)
    for path in (tmp_path, tmp_path / "again"):
        found = load_file(path / "rank-0.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert_one_line(
        engines("load", "copy", "--rank", "0", "--serve", "copy"),
        Exit.FAILED,
        "rank 0 of 'copy' is already registered",
    )
    copy.send_signal(signal.SIGTERM)
    assert line_of(copy) == "withdrew copy/0\n"
    assert copy.wait(60) == Exit.DONE
    assert engines("list").stdout == "no instance is registered\n"


def test_a_load_that_serves_ends_when_it_is_evicted(engines: Engines, weights: Path) -> None:
    engines.serve(weights)
    copy = engines.start(
        "load", "a", "--rank", "0", "--serve", "copy", "--host", "127.0.0.1", "--json"
    )
    assert json.loads(line_of(copy))["nbytes"] > 0
    wait_until(lambda: engines("evict", "copy").returncode == Exit.DONE)
    out, err = copy.communicate(timeout=100)
    assert (copy.returncode, out) == (Exit.FAILED, "")
    assert "rank 0 of instance copy was evicted" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--full", "--serve", "b"], ["--serve goes with --rank"]),
        (["--rank", "0", "--serve", "b c"], ["instance name 'b c' is not valid"]),
        (["--rank", "0", "--until-eof"], ["--until-eof goes with --serve"]),
    ],
)
def test_a_load_that_cannot_serve_says_why(
    engines: Engines, args: list[str], words: list[str]
) -> None:
    assert_one_line(engines("load", "a", *args), Exit.USAGE, *words)


def test_the_shards_of_two_ranks_are_loaded_as_whole_tensors_into_files_that_an_index_names(
    engines: Engines, tmp_path: Path, whole: dict[str, Any]
) -> None:
    divided, out = Divided(engines, tmp_path), tmp_path / "out"
    for rank in range(2):
        divided.serve(rank, *CUTS, "--topology", f"tp={rank}/2")
    shown = engines("show", "a", "--rank", "1", "--tensors").stdout
    assert "[12:24, 0:16] of 24x16" in shown
    assert "[0:16, 12:24] of 16x24" in shown
    entries = json.loads(engines("show", "a", "--tensors", "--json").stdout)["ranks"][1]["entries"]
    boxes = {
        entry["name"]: (entry["shape"], entry["global_shape"], entry["offsets"])
        for entry in entries
    }
    assert boxes["l.0.o.weight"] == ([16, 12], [16, 24], [0, 12])
    assert boxes["l.0.norm"] == ([16], [16], [0])

    options = ("load", "a", "--full", "--out", str(out), "--host", "127.0.0.1", "--verify")
    report = json.loads(engines(*options, "--max-shard-size", "1KB", "--json").stdout)
    assert (report["instance"], report["rank"], report["version"], report["tensors"]) == (
        "a",
        None,
        0,
        4,
    )
    assert report["nbytes"] == sum(tensor.nbytes for tensor in WHOLE.values())
    assert {source["key"] for source in report["sources"]} == {"/engines/a/0", "/engines/a/1"}
    assert report["file"] is None
    *files, index = map(Path, report["files"])
    assert index.name == "model.safetensors.index.json"
    assert sorted(out.iterdir()) == sorted([*files, index])
    assert len(files) > 1
    assert contents(files) == whole
    data = json.loads(index.read_text())
    assert data["metadata"] == {"total_size": report["nbytes"]}
    assert {
        name: list(contents([out / file])).count(name) for name, file in data["weight_map"].items()
    } == dict.fromkeys(WHOLE, 1)

    assert_one_line(engines(*options), Exit.USAGE, f"{index} is there already", "--force")
    again = engines(*options, "--force")
    assert again.stdout.startswith("loaded a version 0: 4 tensors, 2.3 kB in ")
    assert again.stdout.endswith(f" → {out / 'model.safetensors'}\n")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert contents(out.iterdir()) == whole


def test_uneven_shards_are_stated_in_a_file_and_loaded_whole_and_as_they_are(
    engines: Engines, tmp_path: Path, whole: dict[str, Any]
) -> None:
    divided, out = Divided(engines, tmp_path, at=5), tmp_path / "out"
    for rank in range(2):
        divided.serve(rank, "--shards", str(divided.boxes(rank)))
    assert (
        engines("load", "a", "--full", "--out", str(out), "--host", "127.0.0.1").returncode
        == Exit.DONE
    )
    assert contents([out / "model.safetensors"]) == whole
    report = json.loads(
        engines(
            "load", "a", "--rank", "1", "--out", str(out), "--host", "127.0.0.1", "--json"
        ).stdout
    )
    assert report["files"] == [report["file"]] == [str(out / "rank-1.safetensors")]
    assert contents([out / "rank-1.safetensors"]) == contents([divided.weights(1)])


def test_pipeline_stages_that_are_whole_are_loaded_together(
    engines: Engines, tmp_path: Path, whole: dict[str, Any]
) -> None:
    for rank, names in enumerate(
        (("l.0.q.weight", "scale"), ("l.0.o.weight", "l.0.norm", "scale"))
    ):
        save_file({name: WHOLE[name] for name in names}, tmp_path / f"stage-{rank}.safetensors")
        server = engines.start(
            "register",
            "a",
            "--rank",
            str(rank),
            "--world-size",
            "2",
            "--weights",
            str(tmp_path / f"stage-{rank}.safetensors"),
            "--whole",
            "--host",
            "127.0.0.1",
        )
        assert line_of(server).startswith("registered")
    assert (
        engines(
            "load", "a", "--full", "--out", str(tmp_path / "out"), "--host", "127.0.0.1"
        ).returncode
        == Exit.DONE
    )
    assert contents((tmp_path / "out").iterdir()) == whole


def test_one_rank_that_says_nothing_of_its_tensors_is_all_there_is(
    engines: Engines, weights: Path, tmp_path: Path
) -> None:
    engines.serve(weights)
    loaded = engines(
        "load", "a", "--full", "--out", str(tmp_path / "out"), "--host", "127.0.0.1", "--verify"
    )
    assert (loaded.returncode, loaded.stderr) == (Exit.DONE, "")
    assert contents([tmp_path / "out" / "model.safetensors"]) == contents([weights])


@pytest.mark.parametrize("which", [("--rank", "0"), ("--full",)], ids=["one rank", "all ranks"])
def test_tensors_that_no_file_can_hold_are_refused_and_nothing_is_written(
    engines: Engines, registry: Registry, tmp_path: Path, which: tuple[str, ...]
) -> None:
    tensors = {"__metadata__": torch.rand(3), "w": torch.rand(3)}
    with (
        MooncakeEngine("127.0.0.1") as engine,
        publish(
            registry,
            engine,
            instance="a",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity("m"),
        ),
    ):
        refused = engines(
            "load", "a", *which, "--out", str(tmp_path / "out"), "--host", "127.0.0.1"
        )
        assert_one_line(
            refused,
            Exit.FAILED,
            f"cannot write {tmp_path / 'out'}",
            "__metadata__: the format keeps this name",
        )
        assert list(tmp_path.iterdir()) == []
        assert engines("load", "a", *which, "--host", "127.0.0.1").returncode == Exit.DONE


def test_several_ranks_that_say_nothing_of_their_tensors_are_refused_with_what_mends_it(
    engines: Engines, tmp_path: Path
) -> None:
    divided = Divided(engines, tmp_path)
    for rank in range(2):
        divided.serve(rank)
    refused = engines("load", "a", "--full", "--out", str(tmp_path / "out"), "--host", "127.0.0.1")
    assert_one_line(
        refused, Exit.WEIGHTS, "4 of 4 tensors of 'a'", "l.0.q.weight", "--shard", "--whole"
    )
    assert not (tmp_path / "out").exists()


def test_shards_that_leave_a_gap_are_refused_with_the_gap(engines: Engines, tmp_path: Path) -> None:
    divided = Divided(engines, tmp_path)
    for rank in range(2):
        divided.serve(rank, *CUTS, "--topology", "tp=0/2")  # both say that they have the first half
    refused = engines("load", "a", "--full", "--host", "127.0.0.1")
    assert_one_line(
        refused,
        Exit.WEIGHTS,
        "l.0.q.weight: no rank has the part at [12, 0] of shape [12, 16], of [24, 16]",
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--shard", "nothing*:0"), ["'nothing*:0' matches none of the 4 tensors"]),
        (("--shard", "scale:0"), ["does not fit tensor 'scale'", "no dimensions"]),
        (("--shard", "*.q.*:2"), ["does not fit tensor 'l.0.q.weight'", "DIM is from -2 to 1"]),
        (
            ("--shard", "*.q.*:0:ep", "--topology", "tp=0/2"),
            ["over the axis 'ep'", "--topology has tp"],
        ),
        (
            ("--shards", "BOXES", "--shard", "*.q.*:0"),
            ["'l.0.q.weight' is in --shards and matches --shard '*.q.*:0'"],
        ),
        (("--shards", "WEIGHTS"), ["is not as {"]),
        (("--shards", "nowhere"), ["nowhere cannot be read"]),
    ],
)
def test_shards_that_do_not_fit_are_reported_in_one_line_and_nothing_is_registered(
    engines: Engines, registry: Registry, tmp_path: Path, args: tuple[str, ...], words: list[str]
) -> None:
    divided = Divided(engines, tmp_path)
    places = {"WEIGHTS": divided.weights(0), "BOXES": divided.boxes(0)}
    options = [str(places.get(arg, arg)) for arg in args]
    result = engines(
        "register",
        "a",
        "--rank",
        "0",
        "--world-size",
        "2",
        "--weights",
        str(places["WEIGHTS"]),
        *options,
    )
    assert_one_line(result, Exit.USAGE, *words)
    assert registry.instances() == ()


@pytest.fixture
def long_load(
    engines: Engines, tmp_path: Path
) -> Callable[[], tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """Starts a source and a load of very many files, and returns both when some of these are
    written.
    """

    def start() -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
        save_file(
            {f"t{number}": torch.rand(64) for number in range(2000)}, tmp_path / "many.safetensors"
        )
        server = engines.start(
            "register",
            "a",
            "--rank",
            "0",
            "--world-size",
            "1",
            "--weights",
            str(tmp_path / "many.safetensors"),
            "--host",
            "127.0.0.1",
        )
        line_of(server)
        load = engines.start(
            "load",
            "a",
            "--full",
            "--out",
            str(tmp_path / "new" / "out"),
            "--max-shard-size",
            "256",
            "--host",
            "127.0.0.1",
            "--wait",
            "0.5",
        )
        # The load makes its folder anew at first; pathlib's own glob would stumble over that.
        wait_until(lambda: len(glob.glob(f"{tmp_path}/new/out/.*.partial/model-*")) > 1)
        return server, load

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_load_of_whole_tensors_that_is_ended_by_a_signal_leaves_no_file(
    long_load: Callable[[], tuple[subprocess.Popen[str], subprocess.Popen[str]]],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    _, load = long_load()
    load.send_signal(number)
    out, err = load.communicate(timeout=100)
    assert (load.returncode, out) == (128 + number, "")
    assert err.strip() == (
        "engines: interrupted" if number is signal.SIGINT else f"engines: ended by {number.name}"
    )
    assert not (tmp_path / "new").exists()


def test_a_load_of_whole_tensors_whose_source_is_killed_leaves_no_file(
    long_load: Callable[[], tuple[subprocess.Popen[str], subprocess.Popen[str]]], tmp_path: Path
) -> None:
    server, load = long_load()
    server.kill()
    out, err = load.communicate(timeout=100)
    assert_one_line(subprocess.CompletedProcess((), load.returncode, out, err), Exit.INSTANCE)
    assert not (tmp_path / "new").exists()
