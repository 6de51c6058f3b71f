"""The command line without etcd: exit codes, one-line errors, options, and what is printed."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import click
import pytest

import engine_cli.main
import engine_cli.options
import engine_loader.errors
import engine_registry.errors
from engine_cli.exits import _CODES, Exit, code_of
from engine_cli.options import engine_log, nbytes_of
from engine_cli.render.documents import event_json, instance_json, rank_json, tensors_json
from engine_cli.render.printable import printable
from engine_cli.render.texts import (
    event_text,
    instance_row,
    instance_table,
    rank_row,
    rank_table,
    registration,
    tensor_rows,
)
from engine_cli.runtime.serving import Endings
from engine_cli.signals import Ended
from engine_loader import Publication
from engine_registry import (
    Event,
    Eviction,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    Location,
    RankJoined,
    RankLost,
    RankState,
    RankUpdated,
    Registry,
    VersionReleased,
)
from engine_registry.errors import EtcdUnavailable
from tests.support.assessment import assess
from tests.support.builders import a_manifest, a_record, a_release, an_entry
from tests.support.waiting import wait_until

OURS = [
    kind
    for module in (engine_registry.errors, engine_loader.errors)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, Exception) and kind.__module__ == module.__name__
]


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


class Engines:
    """`engines ARGS`, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *args: str) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["engines", *args])
        with pytest.raises(SystemExit) as ended:
            engine_cli.main.main()
        assert type(ended.value.code) is int
        return Ran(ended.value.code, *self._capsys.readouterr())

    def connecting(self, result: Any) -> list[dict[str, Any]]:
        """Makes every try to connect end with this error; returns what was asked for."""
        asked: list[dict[str, Any]] = []

        def connect(endpoints: str, **options: Any) -> Registry:
            asked.append({"endpoints": endpoints, **options})
            raise result

        self._monkeypatch.setattr(Registry, "connect", connect)
        return asked


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Engines:
    for name in (
        "addLevelName",
        "basicConfig",
    ):  # what the entry point sets up for the whole process
        monkeypatch.setattr(logging, name, lambda *_, **__: None)
    monkeypatch.setattr(engine_cli.main, "_leave", sys.exit)
    return Engines(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def _not_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cli.options, "_debug", False)


# -- exit codes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_of_ours_has_an_exit_code(kind: type[Exception]) -> None:
    assert code_of(kind("what happened")) in (
        Exit.FAILED,
        Exit.USAGE,
        Exit.ETCD,
        Exit.INSTANCE,
        Exit.WEIGHTS,
    )


@pytest.mark.parametrize("name", _CODES)
def test_every_name_in_the_table_of_exit_codes_is_an_error_of_ours(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert getattr(import_module(module), kind) in OURS


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (Exit.USAGE, {"InvalidField"}),
        (
            Exit.ETCD,
            {
                "EtcdError",
                "EtcdUnavailable",
                "EtcdRefused",
                "EtcdFull",
                "AnswerTooLarge",
                "LeaseNotFound",
                "HistoryLost",
            },
        ),
        (
            Exit.INSTANCE,
            {
                "InstanceNotFound",
                "InstanceIncomplete",
                "ReleaseIncomplete",
                "SourceLost",
                "SourceEvicted",
                "Stalled",
                "SourceUnreachable",
                "VersionUnavailable",
            },
        ),
        (
            Exit.WEIGHTS,
            {"WeightsMismatch", "TornRead", "DigestMismatch", "DigestsMissing", "DeltaDamaged"},
        ),
    ],
)
def test_codes_above_one_are_given_to_the_errors_that_they_are_documented_for(
    code: Exit, names: set[str]
) -> None:
    assert {kind.__name__ for kind in OURS if code_of(kind("x")) is code} == names


@pytest.mark.parametrize("exc", [ValueError("x"), KeyError("x"), OSError("x"), KeyboardInterrupt()])
def test_an_error_that_is_not_ours_has_no_code(exc: BaseException) -> None:
    assert code_of(exc) is None


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line_on_stderr_and_its_exit_code(
    engines: Engines, kind: type[Exception]
) -> None:
    engines.connecting(kind("first line\n   second line"))
    ran = engines("list")
    assert (ran.code, ran.out, ran.err) == (
        code_of(kind("x")),
        "",
        "engines: error: first line second line\n",
    )


def test_a_bug_is_one_line_that_asks_for_a_report(engines: Engines) -> None:
    engines.connecting(ZeroDivisionError("by zero"))
    ran = engines("list")
    assert ran.code == Exit.FAILED
    assert ran.err == (
        "engines: error: unexpected ZeroDivisionError: by zero (--debug shows where; please "
        "report it)\n"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_output_that_cannot_be_written_is_no_bug(engines: Engines, number: int) -> None:
    engines.connecting(OSError(number, os.strerror(number)))
    ran = engines("list")
    assert ran.code == Exit.FAILED
    assert ran.err == (
        f"engines: error: cannot write: {os.strerror(number)}: look where the output goes, "
        "and at the disk\n"
    )


def test_a_command_that_needs_torch_says_what_to_install(engines: Engines) -> None:
    engines.connecting(ModuleNotFoundError("No module named 'torch'", name="torch"))
    ran = engines("list")
    assert ran.code == Exit.FAILED
    assert ran.err.startswith(
        "engines: error: torch is not installed: pip install 'engine-registry[cpu]' "
    )


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGHUP, "SIGHUP"), (signal.SIGTERM, "SIGTERM")]
)
def test_an_end_by_a_signal_has_the_code_that_a_shell_gives_it(
    engines: Engines, number: int, name: str
) -> None:
    engines.connecting(Ended(number))
    ran = engines("list")
    assert (ran.code, ran.err) == (128 + number, f"engines: ended by {name}\n")


def test_an_error_shows_control_characters_as_escapes(engines: Engines) -> None:
    engines.connecting(EtcdUnavailable("tensor \x1b[31mw\x9b is gone"))
    assert engines("list").err == "engines: error: tensor \\x1b[31mw\\x9b is gone\n"


def test_a_traceback_comes_only_with_debug(engines: Engines) -> None:
    engines.connecting(EtcdUnavailable("gone"))
    assert "Traceback" not in engines("list").err
    ran = engines("list", "--debug")
    assert ran.code == Exit.ETCD
    assert "Traceback" in ran.err
    assert ran.err.endswith("engines: error: gone\n")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), click.Abort()])
def test_an_interruption_has_a_code_of_its_own(
    engines: Engines, interruption: BaseException
) -> None:
    engines.connecting(interruption)
    ran = engines("list")
    assert (ran.code, ran.err.strip()) == (Exit.INTERRUPTED, "engines: interrupted")


# -- usage
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_and_every_exit_code(engines: Engines, flag: str) -> None:
    ran = engines(flag)
    assert (ran.code, ran.err) == (Exit.DONE, "")
    assert all(f"  {name} " in ran.out for name in engine_cli.main.COMMANDS)
    assert all(f"{code.value} " in ran.out for code in Exit)


@pytest.mark.parametrize("command", engine_cli.main.COMMANDS)
def test_every_command_has_help_and_the_name_that_it_is_found_by(
    engines: Engines, command: str
) -> None:
    ran = engines(*command.split(), "--help")
    assert ran.code == Exit.DONE
    assert ran.out.startswith(f"Usage: engines {command} ")
    assert "--debug" in ran.out


def options_with_numbers() -> Iterator[Any]:
    """Each option of each command whose value is a number."""
    for name in engine_cli.main.COMMANDS:
        command = import_module(f"engine_cli.commands.{name}").command
        for option in command.params:
            if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
                yield pytest.param(command, option, id=f"{name} {option.opts[-1]}")


NO_UPPER_BOUND = {"probe_tolerance", "connections_per_address"}


@pytest.mark.parametrize(("command", "option"), list(options_with_numbers()))
def test_an_option_that_is_a_number_says_its_bounds_and_refuses_what_is_beyond(
    command: click.Command, option: click.Option
) -> None:
    kind, ctx = option.type, click.Context(command)
    assert isinstance(kind, click.IntRange | click.FloatRange)
    assert (kind.max is None) == (option.name in NO_UPPER_BOUND)
    _, text = option.get_help_record(ctx) or ("", "")
    for bound, step in ((kind.min, -1), (kind.max, 1)):
        if bound is not None:
            assert str(bound) in text
            with pytest.raises(click.BadParameter):
                option.type_cast_value(ctx, str(bound + step))


def test_the_version_is_that_of_the_distribution(engines: Engines) -> None:
    ran = engines("--version")
    assert ran.code == Exit.DONE
    assert ran.out.startswith("engines, version ")


REGISTER = ("register", "qwen", "--rank", "0", "--world-size", "2", "--weights", "w.safetensors")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("--nonsense",),
        ("list", "surplus"),
        ("gateway",),
        ("gateway", "--instance", "q", "--port", "65536"),
        ("gateway", "--instance", "q", "--ttl", "1"),
        ("gateway", "--instance", "q", "--probe-interval", "0"),
        ("gateway", "--instance", "q", "--world-size", "0"),
        ("list", "--timeout", "0"),
        ("list", "--timeout", "soon"),
        ("list", "--timeout", "inf"),
        ("list", "--timeout", "nan"),
        ("list", "--timeout", "1e30"),
        ("show",),
        ("show", "qwen", "--rank", "-1"),
        ("show", "qwen", "--rank", "100000"),
        ("show", "qwen", "--rank", "first"),
        ("load", "qwen"),
        ("load", "qwen", "--full", "--rank", "0"),
        ("load", "qwen", "--rank", "0", "--max-shard-size", "5GB"),
        ("load", "qwen", "--full", "--max-shard-size", "0"),
        ("load", "qwen", "--full", "--max-shard-size", "5XB"),
        ("load", "qwen", "--rank", "0", "--wait", "-1"),
        ("load", "qwen", "--rank", "0", "--wait", "nan"),
        ("load", "qwen", "--rank", "0", "--protocol", "pigeon"),
        ("watch", "--cleanup", "--grace", "inf"),
        ("evict",),
        ("register", "qwen"),
        (*REGISTER, "--ttl", "1"),
        (*REGISTER, "--ttl", "86401"),
        (*REGISTER, "--version", "-1"),
        ("register", "qwen", "--rank", "2", "--world-size", "2", "--weights", "w"),
        ("register", "a/b", "--rank", "0", "--world-size", "2", "--weights", "w"),
        (*REGISTER, "--topology", "tp"),
        (*REGISTER, "--topology", "tp=0"),
        (*REGISTER, "--topology", "=0/2"),
        (*REGISTER, "--topology", "tp=a/2"),
        (*REGISTER, "--topology", "tp=²/3"),
        (*REGISTER, "--topology", "tp=0/٢"),
        (*REGISTER, "--topology", "tp=2/2"),
        (*REGISTER, "--shard", "w"),
        (*REGISTER, "--shard", "w:0:ep"),
        (*REGISTER, "--topology", "tp=0/2", "--shard", "w:0:ep"),
        (*REGISTER, "--shards", "nowhere.json"),
        (*REGISTER, "--protocol", "pigeon"),
        (*REGISTER, "--drain", "nan"),
        ("etcd", "--port", "0"),
        ("list", "--user", "root"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_reported_before_etcd_is_asked(
    engines: Engines, args: tuple[str, ...]
) -> None:
    asked = engines.connecting(AssertionError("connected"))
    ran = engines(*args)
    assert (ran.code, ran.out, asked) == (Exit.USAGE, "", [])
    assert ran.err.strip()


def test_a_file_that_is_there_is_not_overwritten_without_being_asked(
    engines: Engines, tmp_path: Path
) -> None:
    asked = engines.connecting(EtcdUnavailable("gone"))
    (tmp_path / "rank-0.safetensors").touch()
    ran = engines("load", "qwen", "--rank", "0", "--out", str(tmp_path))
    assert (ran.code, asked) == (Exit.USAGE, [])
    assert "is there already: choose another --out, or --force" in ran.err
    assert (
        engines("load", "qwen", "--rank", "0", "--out", str(tmp_path), "--force").code == Exit.ETCD
    )


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"],
)
def test_a_model_that_is_there_is_not_overwritten_without_being_asked(
    engines: Engines, tmp_path: Path, name: str
) -> None:
    asked = engines.connecting(EtcdUnavailable("gone"))
    (tmp_path / name).touch()
    ran = engines("load", "qwen", "--full", "--out", str(tmp_path))
    assert (ran.code, asked) == (Exit.USAGE, [])
    assert (
        ran.err
        == f"engines: error: {tmp_path / name} is there already: choose another --out, or --force\n"
    )
    assert engines("load", "qwen", "--full", "--out", str(tmp_path), "--force").code == Exit.ETCD


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (),
            "nothing says what to copy: say --rank R for one rank, or --full for all as whole "
            "tensors",
        ),
        (
            ("--rank", "0", "--full"),
            "--rank and --full exclude each other: say --rank for one rank, or --full for all as "
            "whole tensors",
        ),
    ],
)
def test_a_load_is_of_one_rank_or_of_all(
    engines: Engines, args: tuple[str, ...], message: str
) -> None:
    ran = engines("load", "qwen", *args)
    assert (ran.code, ran.err) == (Exit.USAGE, f"engines: error: {message}\n")


@pytest.mark.parametrize("failure", [None, RuntimeError("the engine has a bug")])
def test_draining_is_over_also_when_it_has_failed(failure: Exception | None) -> None:
    class Leaving:
        def drain(self, timeout_s: float) -> None:
            if failure is not None:
                raise failure

    endings = Endings()
    endings._drain(cast(Publication, Leaving()), 1.0)
    assert endings._inbox.get(timeout=60) is failure or failure is None


# -- how to reach etcd
# --------------------------------------------------------------------------------------------------

UNSET = dict.fromkeys(("cacert", "cert", "key", "user", "password"))
DEFAULTS = {"endpoints": "127.0.0.1:2379", "namespace": "", "timeout_s": 5.0, **UNSET}


@pytest.mark.parametrize(
    ("args", "environment", "wanted"),
    [
        ((), {}, {}),
        ((), {"ENGINES_ETCD": "a:1,b:2"}, {"endpoints": "a:1,b:2"}),
        (("--etcd", "c:3"), {"ENGINES_ETCD": "a:1"}, {"endpoints": "c:3"}),
        (
            ("--namespace", "/prod", "--timeout", "0.5"),
            {},
            {"namespace": "/prod", "timeout_s": 0.5},
        ),
        (
            ("--cacert", "ca", "--cert", "c", "--key", "k"),
            {},
            {"cacert": "ca", "cert": "c", "key": "k"},
        ),
        (
            ("--user", "root"),
            {"ENGINES_ETCD_PASSWORD": "hunter2"},
            {"user": "root", "password": "hunter2"},
        ),
        (("--user", "root"), {"ENGINES_ETCD_PASSWORD": ""}, {"user": "root", "password": ""}),
        ((), {"ENGINES_ETCD_PASSWORD": "hunter2"}, {}),
    ],
)
def test_options_and_environment_say_how_to_reach_etcd(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    environment: dict[str, str],
    wanted: dict[str, Any],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = engines.connecting(EtcdUnavailable("gone"))
    assert engines("list", *args).code == Exit.ETCD
    assert asked == [{**DEFAULTS, **wanted}]


def test_the_password_is_no_option(engines: Engines) -> None:
    ran = engines("list", "--user", "root", "--password", "hunter2")
    assert ran.code == Exit.USAGE
    assert "hunter2" not in ran.err


# -- the transfer engine's own log
# -----------------------------------------------------------------------------------------------


@contextmanager
def logging_to_stderr() -> Iterator[logging.StreamHandler[Any]]:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("failing", [False, True])
def test_native_code_is_silenced_and_our_own_messages_are_not(
    capfd: pytest.CaptureFixture[str], failing: bool
) -> None:
    with logging_to_stderr() as handler:
        before, were_open = (sys.stderr, handler.stream), open_descriptors()
        with pytest.raises(RuntimeError) if failing else nullcontext(), engine_log():
            os.write(2, b"native noise\n")
            click.echo("our message", err=True)
            logging.getLogger("loader").error("our log")
            if failing:
                raise RuntimeError
        assert (sys.stderr, handler.stream) == before
        # threads that other tests have left may close what is theirs
        wait_until(lambda: open_descriptors() <= were_open)
    os.write(2, b"native again\n")
    assert capfd.readouterr().err == "our message\nour log\nnative again\n"


def test_with_debug_native_code_is_heard(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cli.options, "_debug", True)
    with engine_log():
        os.write(2, b"native noise\n")
    assert capfd.readouterr().err == "native noise\n"


def test_a_message_without_an_end_of_line_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with engine_log():
        sys.stderr.write("half a line")
    assert capfd.readouterr().err == "half a line"


# -- what is printed
# --------------------------------------------------------------------------------------------------

A, B = a_record(rank=0), a_record(rank=1)
SILENT = a_record(unresponsive_since="2026-01-02T03:05:00.000Z")
READY = assess("qwen", [A, B])
EVENTS: list[tuple[Event, str, str]] = [
    (RankJoined(A), "rank_joined", "qwen/0 joined: ready, 16 B, 10.0.0.1:15000 tcp"),
    (RankUpdated(A, A), "rank_updated", "qwen/0 updated: ready, version 3"),
    (
        RankUpdated(SILENT, A),
        "rank_updated",
        "qwen/0 has not answered since 2026-01-02T03:05:00.000Z (host node-1, pid 4711)",
    ),
    (RankUpdated(A, SILENT), "rank_updated", "qwen/0 answers again (host node-1, pid 4711)"),
    (RankLost(A, "evicted"), "rank_lost", "qwen/0 lost: evicted (host node-1, pid 4711)"),
    (
        RankLost(A, "evicted", Eviction("alice@node-9", "2026-01-02T03:06:00+00:00", "bad bytes")),
        "rank_lost",
        "qwen/0 lost: evicted by alice@node-9: bad bytes (host node-1, pid 4711)",
    ),
    (
        RankLost(A, "evicted", Eviction("alice@node-9", "2026-01-02T03:06:00+00:00")),
        "rank_lost",
        "qwen/0 lost: evicted by alice@node-9 (host node-1, pid 4711)",
    ),
    (InstanceReady(READY), "instance_ready", "qwen ready: 2 ranks, 32 B, version 3"),
    (
        InstanceDegraded(assess("qwen", [B])),
        "instance_degraded",
        "qwen degraded: missing rank 0 of 2",
    ),
    (InstanceGone(assess("qwen", [])), "instance_gone", "qwen gone"),
    (
        VersionReleased(a_release(), a_release(version=2)),
        "version_released",
        "qwen released: version 3 (alice@node-9)",
    ),
    (
        VersionReleased(a_release(), a_release(version=4)),
        "version_released",
        "qwen released: version 3, back from 4 (alice@node-9)",
    ),
]


@pytest.mark.parametrize(("event", "name", "text"), EVENTS, ids=[name for _, name, _ in EVENTS])
def test_every_event_has_a_line_for_people_and_an_object_for_programs(
    event: Event, name: str, text: str
) -> None:
    assert event_text(event) == text
    data = event_json(event)
    assert data["event"] == name
    assert data["instance"] == "qwen"
    assert json.loads(json.dumps(data)) == data
    assert ("reason" in data) == isinstance(event, RankLost)


def test_the_object_of_an_instance_keeps_its_fields() -> None:
    assert instance_json(assess("qwen", [B])) == {
        "instance": "qwen",
        "state": "degraded",
        "world_size": 2,
        "present": [1],
        "missing": [0],
        "unresponsive": [],
        "held": [],
        "problems": [],
        "model": {
            "name": "qwen",
            "revision": "r1",
            "dtype": "bfloat16",
            "quantization": "none",
            "extra": {"layers": "28"},
        },
        "generation": "launch-1",
        "version": 3,
        "labels": {},
        "zones": [],
        "nbytes": 16,
    }


@pytest.mark.parametrize("ranks", [[0], [0, 1]], ids=["incomplete", "complete"])
def test_an_instance_with_a_rank_that_loads_is_loading_in_tables_and_in_json(
    ranks: list[int],
) -> None:
    records = [a_record(rank=rank, state=RankState.LOADING) for rank in ranks]
    status = assess("qwen", records)
    assert instance_row(status)[1] == "loading"
    assert instance_json(status)["state"] == "loading"
    assert event_json(InstanceDegraded(status))["state"] == "loading"


def test_an_instance_that_is_ready_but_for_a_silent_rank_is_unresponsive() -> None:
    silent = "2026-01-02T03:05:00.000Z"
    status = assess("qwen", [a_record(rank=0), a_record(rank=1, unresponsive_since=silent)])
    assert instance_row(status)[1] == "unresponsive"
    document = instance_json(status)
    assert (document["state"], document["unresponsive"]) == ("unresponsive", [1])


def test_labels_are_in_the_objects_of_the_instance_and_of_the_rank() -> None:
    record = a_record(labels={"team": "search"})
    assert instance_json(assess("qwen", [record]))["labels"] == {"team": "search"}
    assert rank_json(record)["labels"] == {"team": "search"}


def test_a_list_has_a_column_of_labels_where_an_instance_has_some() -> None:
    plain, labelled = assess("a", [A]), assess("b", [a_record(labels={"tier": "x", "team": "y"})])
    columns, rows = instance_table([(plain, None)])
    assert "LABELS" not in columns
    columns, rows = instance_table([(plain, None), (labelled, None)])
    place = columns.index("LABELS")
    assert [row[place] for row in rows] == ["-", "team=y,tier=x"]
    assert {len(row) for row in rows} == {len(columns)}


def test_tables_have_a_column_of_places_where_one_is_known() -> None:
    stands = a_record(rank=1, location=Location("eu-1a", "r17"))
    columns, rows = instance_table([(assess("a", [A]), None), (assess("b", [A, stands]), None)])
    assert [row[columns.index("ZONES")] for row in rows] == ["-", "eu-1a"]
    columns, rows = rank_table([(A, None), (stands, None)])
    assert [row[columns.index("LOCATION")] for row in rows] == ["-", "eu-1a/r17"]
    assert {len(row) for row in rows} == {len(columns)}
    assert instance_json(assess("b", [stands, replace(A, location=Location("a"))]))["zones"] == [
        "a",
        "eu-1a",
    ]
    assert rank_json(stands)["location"] == "eu-1a/r17"
    columns, rows = rank_table([(A, None)])
    assert "LOCATION" not in columns
    assert {len(row) for row in rows} == {len(columns)}
    assert "ZONES" not in instance_table([(assess("a", [A]), None)])[0]


def test_the_object_of_a_rank_keeps_its_fields() -> None:
    data = rank_json(A)
    fields = (
        "instance rank world_size state version generation topology model host pid device "
        "session_id protocol fabric rails tensors"
    )
    assert {*fields.split(), "nbytes", "registered_at", "incarnation"} <= set(data)
    assert data["topology"] == {"tp": [0, 2], "pp": [0, 1]}


def test_the_network_cards_of_a_rank_stand_beside_its_protocol() -> None:
    rails = {"mlx5_0": "10.1.0.0/24", "mlx5_1": ""}
    record = a_record(protocol="rdma", rails=rails)
    assert rank_json(record)["rails"] == rails
    assert "rdma mlx5_0, mlx5_1" in rank_row(record)
    assert "tcp" in rank_row(a_record())


def test_the_time_to_register_memory_is_printed_only_where_it_is_long() -> None:
    assert registration(0.99) == ""
    assert registration(12.34) == ", 12.3 s to register memory"


def test_a_box_is_printed_only_where_the_tensor_states_one() -> None:
    slices = (((4, 6), (1, 3)),)
    opaque, box, boxes = tensors_json(
        a_manifest(
            an_entry("a", nbytes=4),
            an_entry("b", nbytes=4, global_shape=(8,), offsets=(4,), opaque=False),
            an_entry("c", nbytes=4, global_shape=(8,), offsets=(4,), opaque=False, slices=slices),
        )
    )
    assert [opaque["slices"], box["slices"], boxes["slices"]] == [None, None, [[[4, 6], [1, 3]]]]
    assert (opaque["global_shape"], opaque["offsets"]) == (None, None)
    assert (box["global_shape"], box["offsets"]) == ([8], [4])


def test_a_box_is_shown_as_what_it_spans_of_the_whole() -> None:
    manifest = a_manifest(
        an_entry("opaque", nbytes=4),
        an_entry(
            "part", nbytes=32, shape=(4, 8), global_shape=(4, 16), offsets=(0, 8), opaque=False
        ),
        an_entry("all", nbytes=32, shape=(4, 8), global_shape=(4, 8), offsets=(0, 0), opaque=False),
        an_entry(
            "fused",
            nbytes=32,
            shape=(4, 8),
            global_shape=(4, 8),
            offsets=(2, 0),
            opaque=False,
            slices=(((2, 4), (0, 2)), ((0, 8),)),
        ),
        an_entry("scalar", nbytes=1, shape=(), global_shape=(), offsets=(), opaque=False),
        an_entry("silent scalar", nbytes=1, shape=(), global_shape=(), offsets=()),
    )
    assert [(row[0], row[2], row[4]) for row in tensor_rows(manifest)] == [
        ("opaque", "4", "-"),
        ("part", "4x8", "[0:4, 8:16] of 4x16"),
        ("all", "4x8", "whole"),
        ("fused", "4x8", "[2:4+0:2, 0:8] of 4x8"),
        ("scalar", "scalar", "whole"),
        ("silent scalar", "scalar", "-"),
    ]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("500MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("5 gb", 5_000_000_000),
        ("2k", 2000),
        ("1.5GiB", 3 << 29),
        ("1KiB", 1024),
        ("3TB", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_read_with_their_units(text: str, nbytes: int) -> None:
    assert nbytes_of(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "MB", "5XB", "5 G B", "0.1", "1e9", "inf", "\N{ARABIC-INDIC DIGIT FIVE}GB"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(
        click.BadParameter, match="is not a size: use a number of bytes, or a unit as in 500MB"
    ):
        nbytes_of(text)


@pytest.mark.parametrize("text", ["", "layer.0.w", "größe 重み", "a b"])
def test_text_without_control_characters_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("records", "version"),
    [([A, B], "3"), ([A, a_record(rank=1, version=4)], "differs"), ([], "-")],
    ids=["same", "other", "none"],
)
def test_the_row_of_an_instance_says_where_versions_differ(
    records: list[Any], version: str
) -> None:
    assert version in instance_row(assess("qwen", records))
