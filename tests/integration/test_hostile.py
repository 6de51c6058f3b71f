"""Keys that somebody wrote on purpose into a real etcd: what lists, watches and loads make of them,
and that nothing moves.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from engine_cli.exits import Exit
from engine_registry import InstanceReady, RankJoined, Registry
from engine_registry.errors import AnswerTooLarge, HistoryLost, RecordDamaged
from engine_registry.etcd.channel import CHANNEL_OPTIONS
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keys import manifest_part_key
from engine_registry.schema.keyvalue import Put, Snapshot
from engine_registry.schema.record import ManifestRef, RankRecord
from engine_registry.schema.record_format import encode
from tests.integration.conftest import Processes, events_until, line_of
from tests.integration.test_cli import Engines, assert_one_line, engines  # noqa: F401  a fixture
from tests.support.ranks import MANIFEST, MODEL, put_ranks, register

_NASTY_KEYS = [
    "/engines/",
    "/engines//0",
    "/engines/a",
    "/engines/a/",
    "/engines/a/01",
    "/engines/a/-1",
    "/engines/a/0/0",
    "/engines/a/99999999",
    "/engines/a\nb/0",
    "/engines/a\x1b[2Jb/0",
    "/engines/a/\x1b]0;title\x07",
    "/engines/\u202eevil/0",
    "/engines/$(reboot)/0",
    "/engines/'; etcdctl del --prefix ''/0",
    "/engines/\udcff\udcfe/0",
    "/engines/a/\udcff",
    "/engines/" + "x" * 2_000 + "/0",
]
_NASTY_VALUES = [
    b"",
    b"\0",
    b"\xff" * 100,
    b"null",
    b"[]",
    b"{}",
    b"[" * 10_000,
    b'{"schema":' + b"9" * 4_000 + b"}",
    b'{"schema":9}',
    b"x" * 1_000_000,
    b'{"schema":1,"incarnation":"\\u001b[2J\\ud800"}',
    b'{"schema":NaN}',
    b'{"schema":1,"schema":2}',
]


@pytest.fixture
def etcd(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Etcd]:
    with closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as etcd:
        yield etcd


def put_nasty_keys(etcd: Etcd) -> int:
    """How many."""
    values = [*_NASTY_VALUES, encode(a_record())]
    puts = [Put(key, values[number % len(values)], 0) for number, key in enumerate(_NASTY_KEYS)]
    puts += [Put(f"/engines/v/{number}", value, 0) for number, value in enumerate(values)]
    for put in puts:
        etcd.commit([], [put])
    return len(puts)


def a_record(**changes: Any) -> RankRecord:
    record = RankRecord(
        incarnation="0" * 32,
        instance="h",
        rank=0,
        world_size=1,
        model=MODEL,
        session_id="127.0.0.1:1",
        protocol="tcp",
        manifest=manifests.encode(MANIFEST)[0],
        header_addr=8192,
        registered_at="2026-01-01T00:00:00+00:00",
    )
    return replace(record, **changes)


def assert_harmless(text: str) -> None:
    """Nothing that a terminal would act on, and no mistake of ours."""
    assert text.replace("\n", "").isprintable()
    assert "Traceback" not in text
    assert "unexpected" not in text


def test_lists_show_what_is_good_and_name_what_is_not(
    engines: Engines,  # noqa: F811
    registry: Registry,
    etcd: Etcd,
) -> None:
    put_nasty_keys(etcd)
    with register(registry, "good"):
        listed = engines("list")
        assert (listed.returncode, listed.stderr) == (Exit.DONE, "")
        assert_harmless(listed.stdout)
        assert "good" in listed.stdout
        assert max(map(len, listed.stdout.splitlines())) < 20_000
        data = json.loads(engines("list", "--json").stdout)["instances"]
        assert [status["instance"] for status in data if status["state"] == "ready"] == ["good"]
        assert all(status["problems"] for status in data if status["instance"] != "good")
        for name in ("a", "v"):
            shown = engines("show", name)
            assert shown.returncode == Exit.DONE, shown.stderr
            assert_harmless(shown.stdout + shown.stderr)
            loaded = engines("load", name, "--rank", "0", "--wait", "0")
            assert loaded.returncode in (Exit.FAILED, Exit.INSTANCE)
            assert_harmless(loaded.stderr)
            assert len(loaded.stderr.splitlines()) == 1
            evicted = engines("evict", name)
            assert evicted.returncode == Exit.FAILED
            assert_harmless(evicted.stderr)
            assert len(evicted.stderr.splitlines()) == 1


def test_a_watch_goes_on_whatever_is_written(
    engines: Engines,  # noqa: F811
    registry: Registry,
    etcd: Etcd,
) -> None:
    put_nasty_keys(etcd)
    watch = engines.start("watch")
    first = line_of(watch)  # whatever could be reported of that; it follows from here on
    put_nasty_keys(etcd)
    with register(registry, "good"):
        lines = [first]
        while "good ready" not in lines[-1]:
            lines.append(line_of(watch))
        watch.send_signal(signal.SIGTERM)
        out, err = watch.communicate(timeout=100)
    assert (watch.returncode, err) == (Exit.DONE, "")
    for line in (*lines, out):
        assert_harmless(line)


def test_a_key_that_is_no_text_can_be_distinguished_read_and_deleted(etcd: Etcd) -> None:
    for key in ("/k/\udcff", "/k/\udcfe", "/k/�"):
        etcd.commit([], [Put(key, key.encode(errors="surrogateescape"), 0)])
    assert len({item.key for item in etcd.snapshot("/k/").items}) == 3
    for item in etcd.snapshot("/k/").items:
        found = etcd.get(item.key)
        assert found is not None
        assert found.value == item.key.encode(errors="surrogateescape")


def test_a_watch_whose_newest_key_is_no_text_does_not_go_in_circles(
    registry: Registry, etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at the newest key before it follows: whether this is still the same store."""
    etcd.commit([], [Put("/engines/a/\udcff", b"", 0)])
    snapshots: list[str] = []
    ask = Etcd.snapshot

    def counting(self: Etcd, prefix: str, exact: bool = False) -> Snapshot:
        snapshots.append(prefix)
        return ask(self, prefix, exact)

    monkeypatch.setattr(Etcd, "snapshot", counting)
    with registry.watch() as watch, register(registry, "good"):
        events_until(watch, lambda event: isinstance(event, InstanceReady))
    assert snapshots.count("/engines/") == 1


@contextmanager
def crowded(etcd: LocalEtcd) -> Iterator[Etcd]:
    """With more under /engines/ than one answer may hold: 64 MiB."""
    with closing(Etcd(EtcdConfig(parse_endpoints(etcd.endpoint), timeout_s=20))) as raw:
        for number in range(50):
            raw.commit([], [Put(f"/engines/junk/{number}", os.urandom(1_450_000), 0)])
        yield raw


def test_more_than_one_answer_may_hold_is_fetched_in_smaller_pages(
    own_etcd: LocalEtcd, processes: Processes
) -> None:
    with crowded(own_etcd) as raw:
        put_ranks(raw, "good", 3)
        assert len(raw.snapshot("/engines/").items) == 53
        listed = json.loads(processes.run("list", "--json", ENGINES_ETCD=own_etcd.endpoint).stdout)[
            "instances"
        ]
        assert [(status["instance"], status["state"]) for status in listed] == [
            ("good", "ready"),
            ("junk", "degraded"),
        ]


@pytest.mark.parametrize("fitting", [1, 0])
def test_pages_become_as_small_as_one_key_and_no_smaller(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch, fitting: int
) -> None:
    """What one answer may hold is made small here, instead of the keys large."""
    for number in range(5):
        etcd.commit([], [Put(f"/large/{number}", bytes(100_000), 0)])
    options = [
        option for option in CHANNEL_OPTIONS if option[0] != "grpc.max_receive_message_length"
    ]
    options.append(("grpc.max_receive_message_length", 110_000 if fitting else 90_000))
    monkeypatch.setattr("engine_registry.etcd.channel.CHANNEL_OPTIONS", tuple(options))
    with closing(etcd.sibling()) as narrow:
        if fitting:
            assert len(narrow.snapshot("/large/").items) == 5
        else:
            with pytest.raises(AnswerTooLarge, match="answers more than one message may hold"):
                narrow.snapshot("/large/")


def test_a_watch_that_missed_more_than_one_answer_may_hold_begins_again_from_what_is_there(
    own_etcd: LocalEtcd,
) -> None:
    with Registry.connect(own_etcd.endpoint, timeout_s=20) as registry, registry.watch() as watch:
        with register(registry, "first"):
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            with crowded(own_etcd) as raw:
                stream = raw.watch("/engines/", 2)
                with pytest.raises(HistoryLost, match="answers more than one message may hold"):
                    list(stream)
                with register(registry, "second"), registry.watch() as late:
                    events_until(
                        late,
                        lambda event: (
                            isinstance(event, RankJoined) and event.record.instance == "second"
                        ),
                    )
                    events_until(
                        watch,
                        lambda event: (
                            isinstance(event, RankJoined) and event.record.instance == "second"
                        ),
                    )


def test_junk_beside_the_parts_of_a_manifest_is_not_fetched(
    registry: Registry, etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with register(registry, "h") as registration:
        record = registration.record
        for number in range(1, 20):
            etcd.commit(
                [],
                [
                    Put(
                        manifest_part_key("h", 0, record.incarnation, number),
                        os.urandom(1_000_000),
                        0,
                    )
                ],
            )
        answers: list[int] = []
        ask = Etcd._unary

        def counting(self: Etcd, *request: Any) -> Any:
            answer = ask(self, *request)
            answers.append(answer.ByteSize())
            return answer

        monkeypatch.setattr(Etcd, "_unary", counting)
        assert registry.manifest(record) == MANIFEST
        assert len(answers) == 1
        assert answers[0] < 10_000


# -- loads
# --------------------------------------------------------------------------------------------------

_GOOD = {
    "schema": 1,
    "name": ["w"],
    "dtype": ["float32"],
    "shape": [[4]],
    "addr": [4096],
    "nbytes": [16],
    "box": [None],
    "regions": [[4096, 16]],
    "digests": None,
    "values": {},
}
_TOP = 1 << 63


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """Where hostile records say that their weights are: nobody may come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def put_hostile(
    etcd: Etcd, peer: socket.socket, columns: dict[str, Any], nbytes: int
) -> RankRecord:
    """A rank without a process, whose manifest has these columns; all digests are right."""
    stored = zlib.compress(json.dumps({**_GOOD, **columns}).encode())
    ref = ManifestRef(
        hashlib.sha256(stored).hexdigest(), 1, len(columns.get("name", ["w"])), nbytes
    )
    record = a_record(manifest=ref, session_id=f"127.0.0.1:{peer.getsockname()[1]}")
    etcd.commit(
        [],
        [
            Put(manifest_part_key("h", 0, record.incarnation, 0), stored, 0),
            Put(record.key, encode(record), 0),
        ],
    )
    return record


def nobody_came(peer: socket.socket) -> bool:
    try:
        peer.accept()
    except BlockingIOError:
        return True
    return False


_TWO = {"name": ["w", "v"], "dtype": ["float32"] * 2, "box": [None] * 2}


@pytest.mark.parametrize(
    ("columns", "nbytes", "code", "said"),
    [
        ({"addr": [4100]}, 16, Exit.FAILED, "tensor 'w' lies outside its regions"),
        ({"regions": []}, 16, Exit.FAILED, "tensor 'w' lies outside its regions"),
        (
            {"shape": [[_TOP // 4]], "nbytes": [_TOP], "regions": [[0, _TOP]]},
            _TOP,
            Exit.FAILED,
            "lies outside its regions",
        ),
        ({"regions": [[4096, 16], [4100, 16]]}, 16, Exit.FAILED, "two of its regions overlap"),
        (
            {"regions": [[4096, 2 * _TOP - 1]]},
            16,
            Exit.FAILED,
            "reaches beyond what memory there is",
        ),
        (
            {"shape": [[1 << 50]], "nbytes": [1 << 52], "regions": [[4096, 1 << 52]]},
            1 << 52,
            Exit.FAILED,
            "there is no memory for",
        ),
        ({"shape": [[1 << 40]]}, 16, Exit.WEIGHTS, "the source has 16 bytes of it"),
        ({"dtype": ["float999"]}, 16, Exit.FAILED, "dtype 'float999' is unknown"),
        ({"dtype": ["__loader__"]}, 16, Exit.FAILED, "dtype '__loader__' is unknown"),
        ({"name": ["\ud800"]}, 16, Exit.FAILED, "name or dtype is not text"),
        (
            {
                **_TWO,
                "shape": [[1 << 40]] * 2,
                "addr": [4096] * 2,
                "nbytes": [1 << 42] * 2,
                "regions": [[4096, 1 << 42]],
            },
            1 << 43,
            Exit.FAILED,
            "there is no memory for",
        ),
    ],
)
@pytest.mark.parametrize("args", [("--rank", "0"), ("--full",)])
def test_a_load_of_what_no_memory_has_is_refused_before_anybody_is_asked(
    engines: Engines,  # noqa: F811
    etcd: Etcd,
    peer: socket.socket,
    columns: dict[str, Any],
    nbytes: int,
    code: Exit,
    said: str,
    args: tuple[str, ...],
) -> None:
    put_hostile(etcd, peer, columns, nbytes)
    result = engines("load", "h", *args, "--wait", "0", "--host", "127.0.0.1", "--json")
    if (
        args == ("--full",) and code is Exit.WEIGHTS
    ):  # a whole is what its parts say together, and then no memory is as large
        code, said = Exit.FAILED, "there is no memory for"
    assert_one_line(result, code, said)
    assert_harmless(result.stderr)
    assert nobody_came(peer)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_manifest_of_another_is_not_taken_for_this_ranks(
    registry: Registry, etcd: Etcd, rank: int
) -> None:
    """Its digest is in the record: a writer of manifests only cannot change what is loaded."""
    with register(registry, "h", rank, 2) as registration:
        key = manifest_part_key("h", rank, registration.record.incarnation, 0)
        other = replace(
            MANIFEST,
            tensors=(
                replace(MANIFEST.tensors[0], addr=4100, nbytes=4, shape=(1,), global_shape=(1,)),
            ),
        )
        etcd.commit([], [Put(key, manifests.encode(other)[1][0], None)])
        with pytest.raises(RecordDamaged, match="does not match the digest in its record"):
            registry.manifest(registration.record)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        os.urandom(4096),
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little"),
        (17).to_bytes(8, "little") + b'{"name":[[[[[[[[[',
        b"HTTP/1.1 400\r\n\r\n",
    ],
    ids=[
        "nothing",
        "noise",
        "a length without an end",
        "a terabyte",
        "half of JSON",
        "a web server",
    ],
)
def test_a_peer_that_answers_with_nonsense_is_a_lost_source(
    engines: Engines,  # noqa: F811
    registry: Registry,
    answer: bytes,
) -> None:
    """What the transfer engine makes of it: never the end of the loader's process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                with caller:
                    caller.settimeout(0.2)
                    with_answer(caller, answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with register(registry, "h", session_id=f"127.0.0.1:{listener.getsockname()[1]}"):
                result = engines("load", "h", "--rank", "0", "--wait", "0", "--host", "127.0.0.1")
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert_one_line(result, Exit.INSTANCE, "could not be read to the end")


def with_answer(caller: socket.socket, answer: bytes) -> None:
    try:
        caller.recv(65536)
        caller.sendall(answer)
    except OSError:
        return
