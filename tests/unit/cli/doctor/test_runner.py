"""How `engines doctor` runs checks, and how it reports what they found, without etcd and without an
engine.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from engine_cli.commands.doctor import PROTOCOLS, summary
from engine_cli.doctor import child
from engine_cli.doctor.child import Died, Late, Probe
from engine_cli.doctor.dial import Trouble, dial
from engine_cli.doctor.finding import Finding, Status, described, duration, fail, ok, warn
from engine_cli.doctor.runner import Check, Once, Skip, at_once, run_all, within
from engine_cli.runtime.children import python
from engine_registry.errors import EtcdFull, EtcdRefused
from engine_registry.schema import record
from engine_registry.schema.address import is_loopback
from tests.support.clock import Gate
from tests.support.waiting import wait_until

HANG_S = 0.05


def check(name: str, *steps: object, limit_s: float = 10.0, tidies: bool = False) -> Check:
    """Yields findings, raises errors, waits for events."""

    def run() -> Iterator[Finding]:
        for step in steps:
            if isinstance(step, Finding):
                yield step
            elif isinstance(step, Exception):
                raise step
            elif isinstance(step, threading.Event):
                step.wait()

    return Check(name, run, limit_s, "look there", tidies)


GOOD = ok("good", "it works")


def test_findings_come_in_the_order_of_the_checks_whichever_ends_first() -> None:
    first_may_end = threading.Event()

    def last() -> Iterator[Finding]:
        first_may_end.set()
        yield ok("last", "")

    findings = run_all([check("first", first_may_end, GOOD), Check("last", last, 10.0, "")])
    assert [finding.check for finding in findings] == ["good", "last"]


@pytest.mark.parametrize(
    ("error", "status", "what", "mend"),
    [
        (Skip("there is nothing"), Status.SKIPPED, "there is nothing", ""),
        (EtcdRefused("etcd says no", "check `user`"), Status.FAIL, "etcd says no", "check --user"),
        (EtcdRefused("etcd says no"), Status.FAIL, "etcd says no", "see the other findings"),
        (
            ZeroDivisionError("by zero"),
            Status.FAIL,
            "unexpected ZeroDivisionError: by zero",
            "please report it, with this line",
        ),
    ],
)
def test_what_a_check_raises_is_a_finding(
    error: Exception, status: Status, what: str, mend: str
) -> None:
    assert run_all([check("bad", GOOD, error), check("other", GOOD)]) == [
        GOOD,
        Finding("bad", status, what, mend),
        GOOD,
    ]


def test_a_check_that_hangs_is_a_finding_beside_what_it_found_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hang = Gate()
    join = threading.Thread.join

    def join_once_it_hangs(thread: threading.Thread, timeout: float | None = None) -> None:
        wait_until(lambda: bool(hang.waiting))
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join_once_it_hangs)
    findings = run_all([check("slow", GOOD, hang, limit_s=HANG_S), check("other", GOOD)])
    hang.set()
    assert findings == [GOOD, fail("slow", "no answer within 50 ms", "look there"), GOOD]


def test_an_interruption_waits_for_what_has_to_tidy_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tidied = threading.Event()

    def run() -> Iterator[Finding]:
        tidied.set()
        yield GOOD

    join = threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([Check("tidy", run, 10.0, "", tidies=True)])
    assert tidied.is_set()


def test_a_shared_value_is_got_once_and_its_error_is_everybodys() -> None:
    got: list[int] = []

    def get() -> int:
        got.append(1)
        raise EtcdFull("no space")

    once = Once(get)
    for _ in range(2):
        with pytest.raises(EtcdFull):
            once()
    assert got == [1]
    value = Once(lambda: got.append(2) or got)  # type: ignore[func-returns-value]
    assert value() is value() is got
    assert got == [1, 2]


def test_calls_at_once_return_in_order_and_the_first_error_is_raised() -> None:
    barrier = threading.Barrier(3)

    def square(number: int) -> int:
        barrier.wait(60)
        return number * number

    assert at_once(square, [1, 2, 3]) == [1, 4, 9]
    with pytest.raises(ZeroDivisionError):
        at_once(lambda number: 1 // number, [1, 0, 2])


def test_a_call_without_a_limit_of_its_own_gets_one() -> None:
    hang = threading.Event()
    with pytest.raises(TimeoutError):
        within(HANG_S, hang.wait)
    hang.set()
    assert within(10, hang.wait) is True
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0)


# -- what is reported
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "what", "mend"),
    [
        (EtcdFull("etcd has no space", "compact it"), "etcd has no space", "compact it"),
        (EtcdRefused("it says no: ask: `user`"), "it says no: ask: --user", ""),
        (Exception("two\n lines: check them"), "two lines: check them", ""),
    ],
)
def test_an_error_is_reported_in_what_happened_and_in_what_to_do_if_it_is_ours(
    error: Exception, what: str, mend: str
) -> None:
    assert described(error) == (what, mend)


def test_an_error_without_words_is_reported_by_its_name() -> None:
    assert described(MemoryError()) == ("MemoryError", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00034, "0.3 ms"), (0.25, "250 ms"), (2.0, "2.0 s")]
)
def test_durations_have_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_last_line_names_what_failed_first_and_each_check_once() -> None:
    findings = [GOOD, warn("w", "", ""), fail("f", "", ""), fail("f", "", ""), fail("g", "", "")]
    assert summary(findings) == "failed: f, g; to look at: w"
    assert summary([GOOD]) == "all is well"


def test_protocols_are_those_of_the_registry() -> None:
    assert PROTOCOLS == record.PROTOCOLS


# -- addresses
# --------------------------------------------------------------------------------------------------


def test_a_connection_shows_whether_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert dial("127.0.0.1", port, 5).trouble is None
    assert dial("127.0.0.1", port, 5).trouble is Trouble.REFUSED


def test_a_listener_that_takes_no_connection_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    # an address needs no look-up, and none of its thread's time
    monkeypatch.setattr("engine_cli.doctor.dial.within", lambda _, look_up: look_up())
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        with closing(socket.create_connection(server.getsockname())):  # fills the queue
            assert dial("127.0.0.1", server.getsockname()[1], HANG_S).trouble is Trouble.SILENT


def test_a_name_that_leads_nowhere_is_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    dialled = dial("nosuch.invalid", 1, 5)
    assert (dialled.trouble, dialled.detail) == (Trouble.NAME, "Name or service not known")


def test_a_name_server_that_does_not_answer_does_not_hold_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hang.wait())
    dialled = dial("nosuch.invalid", 1, HANG_S)
    hang.set()
    assert (dialled.trouble, dialled.detail) == (Trouble.NAME, "no answer within 50 ms")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.1.1", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("etcd-0", False),
    ],
)
def test_loopback_addresses_are_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# -- the probe process
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Probe]]:
    probes: list[Probe] = []
    yield probes
    for probe in probes:
        probe.close()


def probe_that_runs(code: str, running: list[Probe], monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setattr(child, "python", lambda _, *args: python(code, *args))
    running.append(Probe(debug=False))
    return running[-1]


def test_a_fact_is_received_from_the_probe(
    running: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "print(json.dumps({'fact': 'said', 'line': json.loads(sys.stdin.readline())}), "
        "flush=True); sys.stdin.read()"
    )
    probe = probe_that_runs(f"import json; {code}", running, monkeypatch)
    probe.begin("h", "tcp", "")
    assert probe.fact("said", 20) == {
        "fact": "said",
        "line": {"engine": {"host": "h", "protocol": "tcp", "device": ""}},
    }
    with pytest.raises(Late):
        probe.fact("never", HANG_S)
    assert probe.facts("never", bool, HANG_S) == []


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise SystemExit(3)", "ended with code 3"),
    ],
)
def test_a_probe_that_crashes_is_reported_with_its_end(
    code: str, how: str, running: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probe_that_runs(code, running, monkeypatch)
    probe.begin("h", "tcp", "")
    with pytest.raises(Died, match=how):
        probe.fact("torch", 20)


def test_closing_ends_a_probe_that_hangs_and_may_be_repeated(
    running: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    probe = probe_that_runs("import time; time.sleep(1000)", running, monkeypatch)
    probe.close()
    probe.close()
    assert probe._process.returncode == -9
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_json_of_a_finding_has_four_fields() -> None:
    assert (
        json.dumps(warn("c", "w", "m").to_json())
        == '{"check": "c", "status": "warn", "what": "w", "mend": "m"}'
    )
