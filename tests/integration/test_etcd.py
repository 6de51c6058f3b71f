"""The etcd adapter against a real etcd, and against what is no etcd."""

from __future__ import annotations

import gc
import http.server
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_cli.exits import Exit
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import (
    EtcdError,
    EtcdRefused,
    EtcdUnavailable,
    HistoryLost,
    LeaseNotFound,
)
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.followed import Followed
from engine_registry.etcd.library import pb
from engine_registry.etcd.local import LocalEtcd, find_binary
from engine_registry.registration.eviction import AT_ONCE, evict_all
from engine_registry.schema.keyvalue import (
    Deletion,
    KeyValue,
    Put,
    Range,
    Snapshot,
    absent,
    none_created_since,
    unchanged,
    under,
)
from engine_registry.schema.record_format import MAX_RECORD_NBYTES, encode
from tests.integration.conftest import Processes
from tests.support.builders import a_record
from tests.support.faults import DEBIAN_ETCD, a_learner, etcdctl
from tests.support.waiting import wait_until


def connect(endpoints: str, **options: object) -> Etcd:
    return Etcd(EtcdConfig(parse_endpoints(endpoints), **{"timeout_s": 60.0, **options}))  # type: ignore[arg-type]


@pytest.fixture
def etcd(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Etcd]:
    with closing(connect(shared_etcd.endpoint, namespace=namespace)) as etcd:
        yield etcd


def put(etcd: Etcd, key: str, value: bytes = b"v", lease_id: int = 0) -> int:
    return etcd.commit([], [Put(key, value, lease_id)])


def compact(etcd: Etcd, revision: int) -> None:
    """Etcd forgets the history before the revision."""
    etcd._unary("KV", "Compact", pb.CompactionRequest(revision=revision, physical=True))


def test_a_snapshot_of_more_keys_than_a_page_is_complete_and_of_one_revision(etcd: Etcd) -> None:
    for start in range(0, 2_500, 100):
        etcd.commit(
            [], [Put(f"/many/{number:05}", b"v", 0) for number in range(start, start + 100)]
        )
    snapshot = etcd.snapshot("/many/")
    assert [item.key for item in snapshot.items] == [
        f"/many/{number:05}" for number in range(2_500)
    ]
    assert snapshot.revision >= max(item.mod_revision for item in snapshot.items)


def test_a_snapshot_begins_again_if_its_revision_is_compacted_between_two_pages(
    own_etcd: LocalEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(connect(own_etcd.endpoint)) as etcd:
        for start in range(0, 1_500, 100):
            etcd.commit(
                [], [Put(f"/many/{number:05}", b"v", 0) for number in range(start, start + 100)]
            )
        ask, asked = etcd._range, list[int]()

        def compacting(request: Any) -> Any:
            asked.append(request.revision)
            page = ask(request)
            if len(asked) == 1:
                compact(etcd, put(etcd, "/many/00000"))
            return page

        monkeypatch.setattr(etcd, "_range", compacting)
        snapshot = etcd.snapshot("/many/")
        assert [bool(revision) for revision in asked] == [False, True, False, True]
        assert len(snapshot.items) == 1_500
        assert max(item.mod_revision for item in snapshot.items) == snapshot.items[0].mod_revision


def test_a_namespace_hides_the_keys_of_others(etcd: Etcd, shared_etcd: LocalEtcd) -> None:
    put(etcd, "/engines/a/0")
    with closing(connect(shared_etcd.endpoint, namespace="/other")) as other:
        assert other.get("/engines/a/0") is None
        assert other.snapshot("/").items == ()


def test_guards_let_exactly_the_first_of_two_writers_through(etcd: Etcd) -> None:
    assert etcd.commit([absent("/k")], [Put("/k", b"1", 0)])
    assert not etcd.commit([absent("/k")], [Put("/k", b"2", 0)])
    first = etcd.get("/k")
    assert first is not None
    assert etcd.commit([unchanged(first)], [Put("/k", b"3", 0)])
    assert not etcd.commit([unchanged(first)], [Put("/k", b"4", 0)])


def test_a_guard_on_what_a_key_held_wants_the_revision_and_the_value(etcd: Etcd) -> None:
    put(etcd, "/k", b"1")
    now = etcd.get("/k")
    assert now is not None
    for other in (
        replace(now, value=b"2"),
        replace(now, mod_revision=now.mod_revision - 1),
        replace(now, key="/none"),
    ):
        assert not etcd.commit([unchanged(other)], [Put("/k", b"3", 0)])
    assert etcd.commit([unchanged(now)], [Put("/k", b"3", 0)])


def test_as_many_as_are_evicted_at_once_fit_into_a_transaction_even_with_the_largest_records(
    etcd: Etcd,
) -> None:
    padding = {"x": "y" * (MAX_RECORD_NBYTES - 800)}
    records = [
        a_record(
            rank=rank,
            world_size=99,
            incarnation=f"{rank:032x}",
            model=ModelIdentity("m", extra=padding),
        )
        for rank in range(AT_ONCE)
    ]
    assert MAX_RECORD_NBYTES - 200 < len(encode(records[0])) <= MAX_RECORD_NBYTES
    lease_id = etcd.grant(60)
    etcd.commit([], [Put(record.key, encode(record), lease_id) for record in records])
    assert evict_all(
        etcd, etcd.snapshot("/engines/").items, absent(a_record(rank=98, world_size=99).key)
    )
    assert len(etcd.snapshot("/evicted/").items) == AT_ONCE
    assert etcd.snapshot("/engines/").items == ()


def test_a_prefix_guard_sees_keys_created_later_but_not_those_changed(etcd: Etcd) -> None:
    revision = put(etcd, "/p/1")
    put(etcd, "/p/1", b"changed")
    assert etcd.commit([none_created_since("/p/", revision)], [Put("/q", b"", 0)])
    put(etcd, "/p/2")
    assert not etcd.commit([none_created_since("/p/", revision)], [Put("/q", b"", 0)])


def test_the_keys_of_a_revoked_lease_are_gone_and_the_lease_is_not_found(etcd: Etcd) -> None:
    lease_id = etcd.grant(5)
    put(etcd, "/leased", lease_id=lease_id)
    etcd.keep_alive(lease_id)
    etcd.revoke(lease_id)
    etcd.revoke(lease_id)
    assert etcd.get("/leased") is None
    with pytest.raises(LeaseNotFound):
        etcd.keep_alive(lease_id)
    with pytest.raises(LeaseNotFound):
        put(etcd, "/leased", lease_id=lease_id)


def test_a_request_that_is_too_large_is_refused_at_once(etcd: Etcd) -> None:
    with pytest.raises(EtcdRefused, match="too large"):
        put(etcd, "/k", os.urandom(2 << 20))


@pytest.mark.parametrize(
    "credentials", [{}, {"user": "root", "password": "secret"}], ids=["a call", "authentication"]
)
def test_closing_ends_what_waits_for_an_etcd_that_hangs(
    own_etcd: LocalEtcd, credentials: dict[str, str]
) -> None:
    raised: list[EtcdError] = []

    def call(etcd: Etcd) -> None:
        try:
            etcd.get("/k")
        except EtcdError as exc:
            raised.append(exc)

    parent = connect(own_etcd.endpoint, timeout_s=100.0, **credentials)
    callers = [threading.Thread(target=call, args=(etcd,)) for etcd in (parent, parent.sibling())]
    own_etcd.pause()
    try:
        for caller in callers:
            caller.start()
        with (
            closing(connect(own_etcd.endpoint, timeout_s=0.5)) as probe,
            pytest.raises(EtcdUnavailable),
        ):
            probe.get("/k")  # when this has found out, the others have asked
        parent.close()
        for caller in callers:
            caller.join(60)
    finally:
        own_etcd.resume()
    assert [str(exc) for exc in raised] == ["the connection to etcd is closed"] * 2
    with pytest.raises(EtcdError, match="closed"):
        parent.sibling().get("/k")


def test_a_sibling_can_be_closed_alone(etcd: Etcd) -> None:
    with closing(etcd.sibling()) as sibling:
        assert put(sibling, "/k")
    assert etcd.get("/k")


def test_a_closed_connection_says_so(etcd: Etcd) -> None:
    etcd.close()
    with pytest.raises(EtcdError, match="closed"):
        etcd.get("/k")


@pytest.mark.parametrize("call", ["get", "keep_alive", "watch"])
def test_a_connection_that_another_thread_closes_meanwhile_is_replaced(
    etcd: Etcd, call: str
) -> None:
    revision = put(etcd, "/k", lease_id=(lease_id := etcd.grant(5)))
    etcd._client.close()
    if call == "get":
        assert etcd.get("/k")
    elif call == "keep_alive":
        etcd.keep_alive(lease_id)
    else:
        stream = etcd.watch("/k", revision, timeout_s=60)
        assert next(iter(stream)).revision == revision
        stream.cancel()


def test_nothing_at_the_address_is_reported_at_once_with_the_address() -> None:
    with pytest.raises(
        EtcdUnavailable, match=r"127\.0\.0\.1:1 cannot be reached.*check the address"
    ):
        Registry.connect("127.0.0.1:1")


def test_a_host_that_does_not_exist_is_reported() -> None:
    with pytest.raises(EtcdUnavailable, match=r"nosuch\.invalid:2379 cannot be reached"):
        # the resolver of this machine may take its time
        Registry.connect("nosuch.invalid:2379", timeout_s=60)


def test_a_server_of_another_protocol_is_distinguished_from_etcd() -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(EtcdUnavailable, match="not etcd 3"):
                Registry.connect(f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_accepts_and_says_nothing_fails_within_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EtcdUnavailable, match="does not answer in time"):
            Registry.connect(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)


def test_a_dead_first_endpoint_is_passed_over(shared_etcd: LocalEtcd, dead_address: str) -> None:
    with closing(connect(f"{dead_address},{shared_etcd.endpoint}")) as etcd:
        assert etcd.status()
        assert etcd.snapshot("/nothing/").items == ()


def test_a_silent_first_endpoint_is_passed_over(shared_etcd: LocalEtcd) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with closing(
            connect(f"127.0.0.1:{silent.getsockname()[1]},{shared_etcd.endpoint}", timeout_s=6.0)
        ) as etcd:
            assert etcd.get("/nothing") is None


def test_a_learner_as_the_only_endpoint_says_that_it_is_one(own_etcd: LocalEtcd) -> None:
    with a_learner(own_etcd) as learner, closing(connect(learner.endpoint, timeout_s=3.0)) as etcd:
        for call in (lambda: etcd.get("/k"), lambda: etcd.grant(5), lambda: put(etcd, "/k")):
            with pytest.raises(EtcdUnavailable, match=r"is a learner.*name a voting member"):
                call()


def test_a_learner_is_passed_over_where_there_is_another_endpoint(own_etcd: LocalEtcd) -> None:
    with (
        a_learner(own_etcd) as learner,
        closing(connect(f"{learner.endpoint},{own_etcd.endpoint}")) as etcd,
    ):
        assert put(etcd, "/k")
        assert etcd.get("/k")


def test_a_call_survives_a_restart_of_etcd(own_etcd: LocalEtcd) -> None:
    with closing(connect(own_etcd.endpoint, timeout_s=60.0)) as etcd:
        put(etcd, "/k", b"kept")
        own_etcd.kill()
        starter = threading.Timer(0.3, own_etcd.start)
        starter.start()
        try:
            found = etcd.get("/k")
        finally:
            starter.join()
        assert found is not None
        assert found.value == b"kept"


def test_credentials_are_checked_and_explained(own_etcd: LocalEtcd, processes: Processes) -> None:
    etcdctl = Path(find_binary()).with_name("etcdctl")
    ctl = str(etcdctl) if etcdctl.exists() else shutil.which("etcdctl")
    assert ctl, "etcdctl is needed to turn authentication on"
    for command in ("user add root:secret", "user grant-role root root", "auth enable"):
        subprocess.run(
            [ctl, "--endpoints", own_etcd.endpoint, *command.split()],
            check=True,
            capture_output=True,
        )
    with closing(connect(own_etcd.endpoint, user="root", password="secret")) as etcd:
        assert put(etcd, "/k")
    with pytest.raises(EtcdRefused, match=r"refuses the credentials.*check `user`") as wrong:
        Registry.connect(own_etcd.endpoint, user="root", password="guess")
    assert "guess" not in str(wrong.value)
    with (
        Registry.connect(own_etcd.endpoint) as nobody,
        pytest.raises(EtcdRefused, match="credentials"),
    ):
        nobody.instances()
    for args, password in ((("--user", "root"), "guess"), ((), ""), (("--user", "root"), "secret")):
        result = processes.run(
            "list", *args, ENGINES_ETCD=own_etcd.endpoint, ENGINES_ETCD_PASSWORD=password
        )
        if password == "secret":
            assert (result.returncode, result.stdout) == (Exit.DONE, "no instance is registered\n")
        else:
            assert result.returncode == Exit.ETCD
            assert "refuses the credentials" in result.stderr
            assert "check --user and the password" in result.stderr
            assert "guess" not in result.stderr


@pytest.fixture(params=["embedded", pytest.param("debian", marks=pytest.mark.slow)])
def jwt_etcd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalEtcd]:
    """Checks users, with tokens that any change of users or roles makes too old."""
    if request.param == "debian" and not DEBIAN_ETCD.exists():
        pytest.skip(f"no etcd at {DEBIAN_ETCD}: the set-up could not unpack Debian's etcd-server")
    (tmp_path / "secret").write_bytes(os.urandom(32))
    token = f"jwt,sign-method=HS256,ttl=10m,priv-key={tmp_path / 'secret'}"
    binary = str(DEBIAN_ETCD) if request.param == "debian" else None
    with LocalEtcd(binary=binary, extra_args=["--auth-token", token]) as etcd:
        for command in ("user add root:secret", "user grant-role root root", "auth enable"):
            etcdctl(etcd.endpoint, *command.split())
        yield etcd


@pytest.mark.parametrize("asked_first", ["call", "watch"])
def test_a_change_of_roles_costs_nobody_the_connection_for_good(
    jwt_etcd: LocalEtcd, asked_first: str
) -> None:
    with closing(connect(jwt_etcd.endpoint, user="root", password="secret")) as etcd:
        revision = put(etcd, "/k")
        etcdctl(jwt_etcd.endpoint, "--user", "root:secret", "role", "add", "another")
        if asked_first == "watch":
            with pytest.raises(EtcdUnavailable, match="token"):
                next(iter(etcd.watch("/k", revision)))
        else:
            assert etcd.get("/k")
            assert put(etcd, "/k")
        assert next(iter(etcd.watch("/k", revision))).changes


def test_credentials_for_an_etcd_without_authentication_are_reported(
    shared_etcd: LocalEtcd,
) -> None:
    with pytest.raises(EtcdRefused, match="authentication turned off: leave out `user`"):
        Registry.connect(shared_etcd.endpoint, user="root", password="secret")


def test_following_gives_the_content_and_then_each_change_once(etcd: Etcd) -> None:
    put(etcd, "/f/1")
    follower = Follower(etcd, "/f/")
    updates = iter(follower)
    first = next(updates)
    assert [item.key for item in getattr(first, "items", ())] == ["/f/1"]
    put(etcd, "/f/2")
    etcd.revoke(_leased(etcd, "/f/3"))
    seen: list[tuple[str, type]] = []
    while len(seen) < 3:
        seen += [(change.key, type(change)) for change in getattr(next(updates), "changes", ())]
    assert seen == [("/f/2", KeyValue), ("/f/3", KeyValue), ("/f/3", Deletion)]
    follower.stop()
    assert list(updates) == []


def test_following_one_key_passes_over_those_whose_names_begin_with_it(etcd: Etcd) -> None:
    for key in ("/f/1", "/f/10", "/f/1/0"):
        put(etcd, key)
    follower = Follower(etcd, "/f/1", exact=True)
    updates = iter(follower)
    assert [item.key for item in getattr(next(updates), "items", ())] == ["/f/1"]
    put(etcd, "/f/10")
    put(etcd, "/f/1")
    assert [change.key for change in getattr(next(updates), "changes", ())] == ["/f/1"]
    follower.stop()


def test_following_one_key_begins_again_only_where_that_key_is_another(
    own_etcd: LocalEtcd,
) -> None:
    with (
        closing(connect(own_etcd.endpoint, timeout_s=10.0)) as etcd,
        closing(connect(own_etcd.endpoint, timeout_s=10.0)) as writer,
    ):
        put(writer, "/f/1")
        put(writer, "/f/10")
        updates = iter(Follower(etcd, "/f/1", exact=True))
        next(updates)
        own_etcd.kill()
        own_etcd.start()
        put(writer, "/f/1")
        assert [change.key for change in getattr(next(updates), "changes", ())] == ["/f/1"]
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        for number in range(20):
            put(writer, f"/f/1{number}")
            put(writer, "/f/1")
        assert [item.key for item in getattr(next(updates), "items", ())] == ["/f/1"]


def _leased(etcd: Etcd, key: str) -> int:
    lease_id = etcd.grant(5)
    put(etcd, key, lease_id=lease_id)
    return lease_id


def test_following_ends_at_its_deadline_and_leaves_the_connection_to_others(
    etcd: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    put(etcd, "/f/1")
    connection = etcd._client
    with caplog.at_level(logging.WARNING):
        assert len(list(Follower(etcd, "/f/", deadline=time.monotonic() + 2))) == 1
    assert etcd._client is connection
    assert caplog.messages == []


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("how", ["cancelled", "given up", "lost"])
def test_a_watch_that_is_over_leaves_no_call_for_the_interpreters_end(
    own_etcd: LocalEtcd, how: str
) -> None:
    with closing(connect(own_etcd.endpoint)) as etcd:
        stream = etcd.watch("/w/", 1)
        call = weakref.ref(stream._call)
        put(etcd, "/w/1")
        batches = iter(stream)
        next(batches)
        if how == "cancelled":
            stream.cancel()
            assert list(batches) == []
        elif how == "lost":
            own_etcd.kill()
            with pytest.raises(EtcdUnavailable) as kept:
                list(batches)
            assert kept.value.__cause__ is None
        else:
            batches.close()  # type: ignore[attr-defined]
        wait_until(lambda: call() is None)  # a thread of gRPC may still have it for a moment
        assert list(stream) == []


def test_a_proxy_for_the_web_is_not_asked_for_etcd(processes: Processes, dead_address: str) -> None:
    nowhere = f"http://{dead_address}"
    result = processes.run(
        "list",
        http_proxy=nowhere,
        https_proxy=nowhere,
        grpc_proxy=nowhere,
        no_proxy="",
        NO_PROXY="",
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_history_that_was_compacted_is_reported(own_etcd: LocalEtcd) -> None:
    with closing(connect(own_etcd.endpoint)) as etcd:
        revision = [put(etcd, "/k", str(number).encode()) for number in range(10)][-1]
        compact(etcd, revision)
        with pytest.raises(HistoryLost):
            next(iter(etcd.watch("/k", 2)))
        with pytest.raises(HistoryLost):
            etcd.get("/k", revision + 100)


def test_following_goes_on_across_a_restart_without_a_gap(own_etcd: LocalEtcd) -> None:
    with (
        closing(connect(own_etcd.endpoint, timeout_s=60.0)) as etcd,
        closing(connect(own_etcd.endpoint, timeout_s=60.0)) as writer,
    ):
        updates = iter(Follower(etcd, "/f/"))
        next(updates)
        put(writer, "/f/before")
        assert [change.key for change in getattr(next(updates), "changes", ())] == ["/f/before"]
        own_etcd.kill()
        own_etcd.start()
        put(writer, "/f/after")
        assert [change.key for change in getattr(next(updates), "changes", ())] == ["/f/after"]


def test_several_are_followed_on_one_stream_from_where_they_were_read_across_a_restart(
    own_etcd: LocalEtcd,
) -> None:
    with (
        closing(connect(own_etcd.endpoint, timeout_s=60.0)) as etcd,
        closing(connect(own_etcd.endpoint, timeout_s=60.0)) as writer,
    ):
        for key in ("/f/1", "/f/2", "/g/1"):
            put(writer, key)
        others = [Followed("/f/2", exact=True), Followed("/g/")]
        revision, found = etcd.read([Range("/f/1"), Range("/f/2"), under("/g/")])
        start = Snapshot(revision, tuple(item for each in found for item in each.items))
        put(writer, "/f/2")  # nothing is lost between the look and the watch
        updates = iter(Follower(etcd, "/f/1", exact=True, others=others, start=start))
        assert next(updates) == start

        def next_changes(count: int) -> set[str]:
            """Of watches of their own: in any order."""
            seen: list[str] = []
            while len(seen) < count:
                seen += [change.key for change in getattr(next(updates), "changes", ())]
            assert len(seen) == count
            return set(seen)

        assert next_changes(1) == {"/f/2"}
        for key in ("/f/10", "/g/2", "/f/1"):
            put(writer, key)
        assert next_changes(2) == {"/g/2", "/f/1"}
        own_etcd.kill()
        own_etcd.start()
        for key in ("/g/1", "/f/2", "/f/3"):
            put(writer, key)
        assert next_changes(2) == {"/g/1", "/f/2"}
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        for number in range(20):
            put(writer, f"/g/{number}")
        again = getattr(next(updates), "items", ())
        assert {item.key for item in again} == {f"/g/{number}" for number in range(20)}


def test_a_transaction_reads_what_is_wanted_after_it_as_it_decides(etcd: Etcd) -> None:
    put(etcd, "/t/1")
    item = etcd.get("/t/1")
    assert item is not None
    puts, old = [Put("/t/2", b"x", 0)], Range("/t/1", keys_only=True)
    done = etcd.decide([unchanged(item)], puts, then=[old, under("/t/")])
    assert done.done
    assert [each.count for each in done.found] == [1, 2]
    (key,) = done.found[0].items
    assert (key.key, key.value, key.mod_revision) == ("/t/1", b"", item.mod_revision)
    since = replace(under("/t/", 1), created_after=item.create_revision)
    refused = etcd.decide([absent("/t/1")], puts, then=[old], otherwise=[since, old])
    assert (refused.done, refused.revision) == (False, done.revision)
    assert [[each.key for each in one.items] for one in refused.found] == [["/t/2"], ["/t/1"]]


def test_following_a_wiped_etcd_begins_again_even_if_it_has_grown_past_the_old_revision(
    own_etcd: LocalEtcd,
) -> None:
    with (
        closing(connect(own_etcd.endpoint, timeout_s=60.0)) as etcd,
        closing(connect(own_etcd.endpoint, timeout_s=60.0)) as writer,
    ):
        put(writer, "/f/old")
        updates = iter(Follower(etcd, "/f/"))
        next(updates)
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        for number in range(20):
            put(writer, f"/f/new{number}")
        again = next(updates)
        assert {item.key for item in getattr(again, "items", ())} == {
            f"/f/new{number}" for number in range(20)
        }
