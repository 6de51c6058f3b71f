"""Ranks register, disagree, die and are evicted: real keepers, real processes, a real etcd."""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_registry import (
    Event,
    InstanceGone,
    InstanceReady,
    InstanceState,
    Manifest,
    ModelIdentity,
    Place,
    RankJoined,
    RankLost,
    RankState,
    RankUpdated,
    Region,
    Registration,
    RegistrationState,
    Registry,
    TensorEntry,
    Watch,
)
from engine_registry.errors import (
    Evicted,
    InstanceIncomplete,
    InstanceMismatch,
    InstanceNotFound,
    InvalidField,
    RankConflict,
    RecordDamaged,
    SchemaUnsupported,
)
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.local import LocalEtcd
from engine_registry.holders.query import HolderQuery
from engine_registry.registration.keeper import link, process
from engine_registry.schema.keys import record_key
from engine_registry.schema.keyvalue import Put
from tests.integration.conftest import Processes, events_until, keepers_of, line_of
from tests.support.checkout import ROOT
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import MANIFEST, MODEL, register
from tests.support.waiting import wait_until


@pytest.fixture
def raw(shared_etcd: LocalEtcd, namespace: str) -> Any:
    with closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as etcd:
        yield etcd


def keys(raw: Etcd) -> list[str]:
    return [item.key for item in raw.snapshot("/").items]


def keys_once_empty(raw: Etcd) -> list[str]:
    """The keys after everything has been deleted, or what is left for good.

    Whether it was a lease's end, a loss's reason says.
    """
    for _ in Follower(raw, "/", deadline=time.monotonic() + 60):
        if not keys(raw):
            break
    return keys(raw)


def test_a_registered_rank_is_found_with_its_manifest_until_it_withdraws(
    registry: Registry, raw: Etcd
) -> None:
    with register(registry, topology={"tp": (0, 1)}, version=7) as registration:
        (record,) = registry.ranks("a")
        assert record == registration.record
        assert (record.pid, record.topology, record.version) == (os.getpid(), {"tp": (0, 1)}, 7)
        assert registry.manifest(record) == MANIFEST
        assert all(item.lease_id for item in raw.snapshot("/").items)
    assert registration.state is RegistrationState.CLOSED
    assert keys(raw) == []


def test_a_rank_of_a_model_is_found_in_whatever_instance_it_is_ready_or_still_loading(
    registry: Registry,
) -> None:
    other = ModelIdentity("other")
    with (
        register(registry, "whole"),
        register(registry, "part", 0, 2),
        register(registry, "loads", 0, 2, state=RankState.LOADING),
        register(registry, "changes", 0, 2, state=RankState.UPDATING),
        register(registry, "elsewhere", 1, 2),
        register(registry, "other", 0, 1, model=other),
    ):
        found = registry.holders(HolderQuery(MODEL, Place(0), loading=True))
        assert sorted(record.instance for record in found.ready) == ["part", "whole"]
        assert [record.instance for record in found.loading] == ["loads"]
        (elsewhere,) = registry.holders(HolderQuery(MODEL, Place(1))).ready
        assert elsewhere.instance == "elsewhere"
        nobody = registry.holders(HolderQuery(MODEL, Place(2)))
        assert [status.instance for status in nobody.instances] == ["whole"]
        (of_other,) = registry.holders(HolderQuery(other, Place(0))).ready
        assert of_other.instance == "other"
    with register(registry, "loads", state=RankState.LOADING) as loading:
        with pytest.raises(
            InstanceIncomplete, match="instance 'loads' is not ready: rank 0 loading"
        ):
            registry.holders(HolderQuery(MODEL, Place(0)))
        threading.Timer(0.1, lambda: loading.update(state=RankState.READY)).start()
        (ready,) = registry.holders(HolderQuery(MODEL, Place(0)), timeout_s=20).ready
        assert ready.state is RankState.READY
    with pytest.raises(InstanceNotFound):
        registry.holders(HolderQuery(MODEL, Place(0)))


def test_ranks_are_in_the_order_in_which_they_were_registered_also_after_they_have_changed(
    registry: Registry,
) -> None:
    with register(registry, "b") as first, register(registry, "a"):
        first.update(version=7)
        wait_until(lambda: registry.ranks("b")[0].version == 7)
        assert registry.ranks("b")[0].began < registry.ranks("a")[0].began


def test_a_record_has_both_its_revisions_however_it_was_read(registry: Registry, raw: Etcd) -> None:
    with registry.watch("a") as watch, register(registry) as registration:
        registration.update(version=1)
        last = events_until(watch, lambda event: isinstance(event, RankUpdated))[-1]
        item = raw.get(registration.record.key)
        assert isinstance(last, RankUpdated)
        assert item is not None
        current = registry.current(last.record)
        assert current is not None
        (listed,) = registry.ranks("a")
        read = {
            "watch": last.record,
            "current": current,
            "ranks": listed,
            "resolve": registry.resolve("a")[0],
            "instance": registry.instance("a").records[0],
            "instances": registry.instances()[0].records[0],
            "holders": registry.holders(HolderQuery(MODEL, Place(0))).ready[0],
        }
        revisions = {way: (each.create_revision, each.mod_revision) for way, each in read.items()}
        assert revisions == dict.fromkeys(read, (item.create_revision, item.mod_revision))


def test_updates_of_the_record_are_seen_in_order(registry: Registry) -> None:
    with registry.watch("a") as watch, register(registry) as registration:
        registration.update(state=RankState.UPDATING)
        registration.update(version=1, state=RankState.READY)
        events = events_until(
            watch, lambda event: isinstance(event, RankUpdated) and event.record.version == 1
        )
    updates = [
        (event.record.state, event.record.version)
        for event in events
        if isinstance(event, RankUpdated)
    ]
    assert updates == [(RankState.UPDATING, 0), (RankState.READY, 1)]


def test_a_rank_that_drains_stays_so_while_its_version_goes_on(registry: Registry) -> None:
    with register(registry) as registration:
        registration.update(state=RankState.UPDATING)
        registration.update(state=RankState.DRAINING)
        registration.update(version=1, state=RankState.READY)
        (record,) = registry.ranks("a")
        assert (record.version, record.state) == (1, RankState.DRAINING)
        assert registration.record == record


def test_a_callback_gets_the_events_also_after_it_has_failed(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    gone = threading.Event()

    def on_event(event: Event) -> None:
        seen.append(type(event).__name__)
        if isinstance(event, InstanceGone):
            gone.set()
        if isinstance(event, RankJoined):
            raise RuntimeError("the callback has a bug")

    with registry.watch("a").call(on_event):
        register(registry).withdraw()
        assert gone.wait(60)
    assert seen == ["RankJoined", "InstanceReady", "RankLost", "InstanceGone"]
    assert "the callback for RankJoined failed" in caplog.text


def test_a_rank_that_is_taken_is_refused_with_its_holder(registry: Registry, raw: Etcd) -> None:
    with register(registry):
        before = keys(raw)
        with pytest.raises(
            RankConflict, match=rf"already registered \(host .*, pid {os.getpid()}, since 20"
        ):
            register(registry)
        assert keys(raw) == before


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("world_size", {"world_size": 3}),
        ("generation", {"generation": "launch-2"}),
        ("model.revision", {"model": ModelIdentity("tiny", "r2")}),
        ("topology sizes", {"topology": {"tp": (1, 4)}}),
    ],
)
def test_a_rank_that_disagrees_with_its_siblings_is_refused(
    registry: Registry, raw: Etcd, field: str, changes: dict[str, Any]
) -> None:
    with register(registry, world_size=2, topology={"tp": (0, 2)}):
        before = keys(raw)
        fields = {"rank": 1, "world_size": 2, "topology": {"tp": (1, 2)}, **changes}
        with pytest.raises(InstanceMismatch, match=f"has {field} ") as refused:
            register(registry, **fields)
        assert refused.value.details["field"] == field
        assert keys(raw) == before


def test_of_ranks_that_start_at_once_and_disagree_only_one_side_gets_in(registry: Registry) -> None:
    def attempt(rank: int) -> Any:
        try:
            return register(registry, rank=rank, world_size=12 + rank % 2)
        except InstanceMismatch as exc:
            return exc

    with ThreadPoolExecutor(12) as pool, ExitStack() as stack:
        results = list(pool.map(attempt, range(12)))
        registered = [
            stack.enter_context(result)
            for result in results
            if not isinstance(result, InstanceMismatch)
        ]
        sizes = {registration.record.world_size for registration in registered}
        assert len(sizes) == 1
        assert len(registered) == 6
        assert len(registry.ranks("a")) == 6


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"instance": "no/slash"}, "instance name 'no/slash' is not valid"),
        ({"rank": 2, "world_size": 2}, "from 0 to 1"),
        ({"rank": -1}, "rank -1 is not valid"),
        ({"world_size": 0}, "world_size 0 is not valid"),
        ({"ttl_s": 0.5}, "ttl_s 0.5 is not valid"),
        ({"ttl_s": math.nan}, "ttl_s nan is not valid"),
        ({"ttl_s": math.inf}, "ttl_s inf is not valid"),
        ({"ttl_s": 86_401.0}, "from 2 to 86400"),
        ({"topology": {"tp": (2, 2)}}, "topology 'tp'"),
        (
            {"model": ModelIdentity("m", extra={"note": "x" * 5000})},
            "more than 4096: shorten 'model'",
        ),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_written(
    registry: Registry, raw: Etcd, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidField, match=complaint):
        register(registry, **fields)
    assert keys(raw) == []


def test_a_manifest_larger_than_one_request_is_stored_in_parts_and_read_back(
    registry: Registry, raw: Etcd
) -> None:
    names = [f"{os.urandom(24).hex()}.{number}" for number in range(80_000)]
    tensors = tuple(
        TensorEntry(name, "bfloat16", (8,), 64 * i, 16, (8,), (0,))
        for i, name in enumerate(names, 1)
    )
    manifest = Manifest(tensors, (Region(0, 64 * 80_001),))
    with register(registry, manifest=manifest) as registration:
        assert registration.record.manifest.parts > 2
        assert all(len(item.value) < 1_500_000 for item in raw.snapshot("/").items)
        assert registry.manifest(registry.ranks("a")[0]) == manifest


@pytest.mark.usefixtures("product_keepers")
@pytest.mark.parametrize(
    ("end", "signal_number", "reason"),
    [
        ("return", None, "process ended"),
        ("exception", None, "process ended"),
        ("os._exit", None, "process ended"),
        ("withdraw", None, "withdrawn"),
        ("return", signal.SIGTERM, "process ended"),
        ("return", signal.SIGKILL, "process ended"),
        ("with a forked child", signal.SIGKILL, "process ended"),
        # A limit of its address space, as memory for the kernel's own OOM killer cannot be had
        # here: that sends SIGKILL, as above.
        ("out of memory", None, "process ended"),
    ],
)
def test_however_a_rank_ends_its_keys_are_gone_at_once_and_the_reason_is_reported(
    registry: Registry,
    raw: Etcd,
    processes: Processes,
    end: str,
    signal_number: int | None,
    reason: str,
) -> None:
    with registry.watch("a") as watch:
        process = processes.rank("a", 0, 1, end)
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        if signal_number is None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        else:
            process.send_signal(signal_number)
        assert loss(watch) == reason
    assert keys_once_empty(raw) == []


def loss(watch: Watch) -> str:
    """Why the next rank is lost. A lease that had to expire has that reason."""
    lost = events_until(watch, lambda event: isinstance(event, RankLost))[-1]
    assert isinstance(lost, RankLost)
    return lost.reason


@pytest.mark.usefixtures("product_keepers")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_process_group_of_a_rank_ends_it_and_its_keeper_takes_it_out(
    registry: Registry, raw: Etcd, processes: Processes, sent: int
) -> None:
    process = processes.rank("a", 0, 1, "in a separate group")
    with registry.watch("a") as watch:
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        os.killpg(process.pid, sent)
        assert loss(watch) == "process ended"
    assert keys_once_empty(raw) == []


@pytest.mark.usefixtures("product_keepers")
def test_signals_to_a_keeper_are_for_its_rank_to_obey(
    registry: Registry, processes: Processes
) -> None:
    process = processes.rank("a", 0, 1)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        (keeper,) = keepers_of(process.pid)
        os.kill(keeper, ignored)
    with registry.watch("a") as watch:
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        process.kill()
        assert loss(watch) == "process ended"


@pytest.mark.usefixtures("product_keepers")
def test_a_keeper_is_a_new_program_in_a_session_of_its_own(registry: Registry) -> None:
    with register(registry) as registration:
        keeper = pid_of_keeper(registration)
        command = Path(f"/proc/{keeper}/cmdline").read_bytes().split(b"\0")
        assert command[1:3] == [b"-I", b"-c"]  # not a fork that goes on as the rank
        assert b"from engine_registry.registration.keeper.main import run" in command[3]
        assert os.getsid(keeper) == keeper
        assert os.getpgid(keeper) == keeper


def test_a_keeper_imports_no_more_than_it_needs() -> None:
    program = "import sys, engine_registry.registration.keeper.main; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert "engine_registry.registration.keeper.holder" in modules
    heavy = {
        "engine_cli",
        "click",
        "engine_loader",
        "mooncake",
        "numpy",
        "rich",
        "safetensors",
        "torch",
    }
    assert heavy.isdisjoint(name.partition(".")[0] for name in modules)


def test_a_keeper_that_is_killed_is_replaced_and_nobody_sees_a_loss(registry: Registry) -> None:
    with registry.watch("a") as watch, register(registry) as registration:
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        first = pid_of_keeper(registration)
        os.kill(first, signal.SIGKILL)
        # The new keeper puts the record under a new lease: seen as a change of the key, but
        # of no field.
        registration.update(version=1)
        events = events_until(watch, lambda event: isinstance(event, RankUpdated))
        assert registration.keeper_pid != first
        assert registration.state is RegistrationState.REGISTERED
    assert not [event for event in events if isinstance(event, RankLost)]


def test_the_next_keeper_may_take_as_long_to_start_as_the_timeout_allows(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with register(registry) as registration:
        first = pid_of_keeper(registration)
        monkeypatch.setattr(link, "START_TIMEOUT_S", 0.0)
        monkeypatch.setattr(process, "LOOK_S", 0.01)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: registration.keeper_pid not in (None, first))
        second = pid_of_keeper(registration)
        registration.update(version=1)
        assert registration.keeper_pid == second


def test_updates_and_withdrawal_work_while_the_keeper_is_dead(
    registry: Registry, raw: Etcd
) -> None:
    with registry.watch("a") as watch:
        registration = register(registry)
        for version in range(1, 4):
            events_until(watch, lambda event: isinstance(event, (InstanceReady, RankUpdated)))
            os.kill(pid_of_keeper(registration), signal.SIGKILL)
            registration.update(version=version)
        events_until(
            watch, lambda event: isinstance(event, RankUpdated) and event.record.version == 3
        )
        os.kill(pid_of_keeper(registration), signal.SIGKILL)
        registration.withdraw()
        assert registration.withdrawn
        assert loss(watch) == "withdrawn"
    assert keys_once_empty(raw) == []


def test_a_registration_that_is_forgotten_warns_and_ends(registry: Registry) -> None:
    registration = register(registry)
    with registry.watch("a") as watch:
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        with pytest.warns(ResourceWarning, match="Registration of /engines/a/0 was never closed"):
            del registration
        assert loss(watch) == "process ended"


@contextmanager
def a_child() -> Iterator[None]:
    """It has all that our process has open, the pipe to a keeper too, as a fork of it would, for as
    long as the block takes.
    """
    ours = [int(name) for name in os.listdir("/proc/self/fd")]
    still_open = [fd for fd in ours if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}")]
    child = subprocess.Popen(["sleep", "1000"], pass_fds=still_open)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def test_a_registration_that_is_forgotten_ends_also_while_a_child_lives(registry: Registry) -> None:
    registration = register(registry)
    with registry.watch("a") as watch, a_child():
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        with pytest.warns(ResourceWarning, match="Registration of /engines/a/0 was never closed"):
            del registration
        assert loss(watch) == "process ended"


def test_a_registration_that_is_interrupted_leaves_nothing_behind_also_while_a_child_lives(
    registry: Registry, raw: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as children:

        def interrupted(_: object) -> None:
            children.enter_context(a_child())
            raise KeyboardInterrupt

        monkeypatch.setattr(link, "_raise_error", interrupted)
        with pytest.raises(KeyboardInterrupt):
            register(registry)
        assert keys_once_empty(raw) == []


def test_a_keeper_that_ends_after_a_withdrawal_is_not_missed_though_the_rank_has_not_gone_on_yet(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registration = register(registry)
    link = registration._link
    abandon = link.abandon

    def late() -> None:
        link._listener.join(60)
        abandon()

    monkeypatch.setattr(link, "abandon", late)
    registration.withdraw()
    assert registration.withdrawn
    assert not link._listener.is_alive()
    assert "starting another" not in caplog.text


FORKS = """
import os, sys
from engine_registry import Registry, RegistryError
from tests.support.ranks import register

with (
    Registry.connect(sys.argv[1], namespace=sys.argv[2]) as registry,
    register(registry) as registration,
):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            registration.update(version=1)
        except RegistryError as exc:
            code = 0 if "this is a fork of it" in str(exc) else 2
        registration.withdraw()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status, [record.version for record in registry.ranks("a")])
    registration.update(version=2)
    print([record.version for record in registry.ranks("a")])
"""


def test_a_copy_of_the_handle_in_a_forked_child_changes_and_withdraws_nothing(
    shared_etcd: LocalEtcd, namespace: str
) -> None:
    # gRPC's own handling of a fork, which now and then crashes the process, would help a child that
    # uses gRPC.
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    forking = [sys.executable, "-c", FORKS, shared_etcd.endpoint, namespace]
    done = subprocess.run(
        forking, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines() == ["0 [0]", "[2]"], done.stderr


BECOMES_ANOTHER_PROGRAM = """
import os, signal, sys, time
from engine_registry import Registry, RegistryError
from tests.support.ranks import register

registry = Registry.connect(sys.argv[1], namespace=sys.argv[2])
if len(sys.argv) == 3:
    registration = register(registry)
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        time.sleep(1000)
    pids = [str(os.getpid()), str(child)]
    os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], *sys.argv[1:], *pids])
try:
    with registry.watch("a") as watch:
        while registry.ranks("a") and watch.next(60):
            pass
    with register(registry) as registration:
        print(str(registration.record.pid) == sys.argv[3], len(registry.resolve("a")))
finally:
    os.kill(int(sys.argv[4]), signal.SIGKILL)
"""


def test_a_rank_that_becomes_another_program_while_a_forked_child_lives_loses_its_registration(
    shared_etcd: LocalEtcd, namespace: str
) -> None:
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    command = [sys.executable, "-c", BECOMES_ANOTHER_PROGRAM, shared_etcd.endpoint, namespace]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines() == ["True 1"], done.stderr


def test_the_callback_may_change_and_end_the_registration_whose_state_it_gets(
    own_etcd: LocalEtcd,
) -> None:
    states: queue.SimpleQueue[RegistrationState] = queue.SimpleQueue()
    handle: list[Registration] = []

    def on_state(state: RegistrationState, why: str) -> None:
        if state is RegistrationState.SUSPENDED:
            handle[0].update(version=1)
        elif state is RegistrationState.REGISTERED:
            handle[0].update(version=2)
            handle[0].withdraw()
        states.put(state)  # not reached if one of the calls has failed

    with Registry.connect(own_etcd.endpoint, timeout_s=10) as registry, registry.watch() as watch:
        handle.append(register(registry, on_state=on_state))
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        own_etcd.kill()
        assert states.get(timeout=60) is RegistrationState.SUSPENDED
        own_etcd.start()
        events = events_until(watch, lambda event: isinstance(event, RankLost))
        assert [states.get(timeout=60) for _ in range(2)] == [
            RegistrationState.REGISTERED,
            RegistrationState.CLOSED,
        ]
    assert [event.record.version for event in events if isinstance(event, RankUpdated)][-1] == 2
    assert isinstance(events[-1], RankLost)
    assert events[-1].reason == "withdrawn"
    assert handle[0].withdrawn


def test_a_callback_that_waits_for_what_a_caller_holds_does_not_keep_that_caller_waiting(
    registry: Registry, raw: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    lock = threading.Lock()
    states: queue.SimpleQueue[RegistrationState] = queue.SimpleQueue()

    def on_state(state: RegistrationState, why: str) -> None:
        states.put(state)
        with lock:
            states.put(state)

    with register(registry, on_state=on_state) as registration, lock:
        registration._receive("SUSPENDED", "made up", None)
        assert states.get(timeout=60) is RegistrationState.SUSPENDED
        registration.update(version=1)
        assert [record.version for record in registry.ranks("a")] == [1]
        assert states.empty()


def test_a_callback_that_wants_to_exit_is_logged_and_the_registration_goes_on(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    states: queue.SimpleQueue[RegistrationState] = queue.SimpleQueue()

    def on_state(state: RegistrationState, why: str) -> None:
        states.put(state)
        raise SystemExit(1)

    with register(registry, on_state=on_state):
        assert registry.evict(registry.ranks("a")[0])
        assert states.get(timeout=60) is RegistrationState.LOST
    assert states.get(timeout=60) is RegistrationState.CLOSED
    assert "the on_state callback of /engines/a/0 failed" in caplog.text


def test_an_evicted_rank_learns_it_and_stays_away(registry: Registry, raw: Etcd) -> None:
    lost = threading.Event()
    registration = register(
        registry,
        on_state=lambda state, why: lost.set() if state is RegistrationState.LOST else None,
    )
    with registry.watch("a") as watch:
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        assert registry.evict(registry.ranks("a")[0], "wrong checkpoint")
        event = events_until(watch, lambda event: isinstance(event, RankLost))[-1]
    assert isinstance(event, RankLost)
    assert event.reason == "evicted"
    assert event.eviction is not None
    assert event.eviction.reason == "wrong checkpoint"
    assert lost.wait(60)
    assert registration.state is RegistrationState.LOST
    assert isinstance(registration.lost, Evicted)
    assert registration.lost.what == f"/engines/a/0 was evicted {event.eviction}"
    with pytest.raises(Evicted):
        registration.update(version=1)
    assert [key for key in keys(raw) if not key.startswith("/evicted/")] == []
    registration.withdraw()


def test_a_rank_that_was_evicted_while_its_keeper_was_cut_off_does_not_come_back(
    registry: Registry, raw: Etcd
) -> None:
    registration = register(registry)
    os.kill(pid_of_keeper(registration), signal.SIGSTOP)
    (lease_id,) = {item.lease_id for item in raw.snapshot("/").items}
    assert registry.evict(registry.ranks("a")[0])
    # as when it expires: a keeper cannot distinguish this from an expiry that nobody wanted
    raw.revoke(lease_id)
    os.kill(pid_of_keeper(registration), signal.SIGCONT)
    with pytest.raises(Evicted):
        registration.update(version=1)
    assert registry.ranks("a") == ()
    registration.withdraw()


def test_an_eviction_of_a_record_that_has_changed_does_nothing(registry: Registry) -> None:
    with register(registry) as registration:
        (old,) = registry.ranks("a")
        registration.update(version=1)
        assert not registry.evict(old)
        assert len(registry.ranks("a")) == 1


def test_a_record_of_before_a_wipe_evicts_no_rank_that_stands_at_its_revision_now(
    own_etcd: LocalEtcd,
) -> None:
    with Registry.connect(own_etcd.endpoint, timeout_s=10) as registry:
        with register(registry):
            (old,) = registry.ranks("a")
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        with register(registry) as registration:
            (now,) = registry.ranks("a")
            assert (now.mod_revision, now.incarnation == old.incarnation) == (
                old.mod_revision,
                False,
            )
            assert not registry.evict(old)
            assert registry.ranks("a") == (registration.record,)


def test_a_new_generation_can_register_after_the_old_one_was_evicted(registry: Registry) -> None:
    old = register(registry, generation="one")
    assert registry.evict(registry.ranks("a")[0])
    with register(registry, generation="two"):
        assert [record.generation for record in registry.ranks("a")] == ["two"]
        old.withdraw()
        assert [record.generation for record in registry.ranks("a")] == ["two"]


def test_a_registration_survives_a_restart_of_etcd(own_etcd: LocalEtcd) -> None:
    with Registry.connect(own_etcd.endpoint, timeout_s=10) as registry, registry.watch() as watch:
        states: list[RegistrationState] = []
        back = threading.Event()

        def on_state(state: RegistrationState, why: str) -> None:
            states.append(state)
            if state is RegistrationState.REGISTERED:
                back.set()

        with register(registry, on_state=on_state) as registration:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            own_etcd.kill()
            registration.update(version=1)  # is not lost, though it cannot be written now
            assert registration.state is RegistrationState.SUSPENDED
            own_etcd.start()
            assert back.wait(60)
            events = events_until(watch, lambda event: isinstance(event, RankUpdated))
            assert [record.version for record in registry.ranks("a")] == [1]
        assert states[:2] == [RegistrationState.SUSPENDED, RegistrationState.REGISTERED]
        assert not [event for event in events if isinstance(event, RankLost)]


def test_a_registration_comes_back_with_its_manifest_after_etcd_lost_its_data(
    own_etcd: LocalEtcd,
) -> None:
    with (
        Registry.connect(own_etcd.endpoint, timeout_s=10) as registry,
        register(registry) as registration,
    ):
        incarnation = registration.record.incarnation
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        (record,) = registry.resolve("a", timeout_s=60)
        assert record.incarnation == incarnation
        assert registry.manifest(record) == MANIFEST


def test_damaged_and_newer_records_spoil_only_their_own_instance(
    registry: Registry, raw: Etcd
) -> None:
    with register(registry), register(registry, "b", 0, 3) as sound:
        value = raw.get(record_key("b", 0))
        assert value is not None
        raw.commit([], [Put(record_key("b", 1), b"\xff not json", 0)])
        raw.commit(
            [], [Put(record_key("b", 2), value.value.replace(b'"schema":1', b'"schema":99'), 0)]
        )
        good, bad = registry.instances()
        assert good.state is InstanceState.READY
        assert bad.state is InstanceState.DEGRADED
        assert "/engines/b/1 is damaged" in bad.problems[0]
        assert "/engines/b/2 has schema 99" in bad.problems[1]
        assert registry.ranks("b") == (sound.record,)
        with pytest.raises(RecordDamaged, match="/engines/b/1"):
            registry.resolve("b")
        raw.commit([], [Put(record_key("b", 1), value.value.replace(b'"rank":0', b'"rank":1'), 0)])
        with pytest.raises(SchemaUnsupported, match="reads up to 2: upgrade"):
            registry.resolve("b")
        with pytest.raises(RankConflict, match=r"etcdctl del /.*/engines/b/2"):
            register(registry, "b", 2, 3)


def test_a_rank_lost_and_replaced_while_nobody_could_watch_is_reported_afterwards(
    own_etcd: LocalEtcd,
) -> None:
    with Registry.connect(own_etcd.endpoint, timeout_s=10) as registry, registry.watch() as watch:
        first = register(registry)
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        own_etcd.kill()
        first.withdraw()
        own_etcd.wipe()
        own_etcd.start()
        with register(registry) as second:
            events = events_until(watch, lambda event: isinstance(event, RankJoined))
        lost = [event.record.incarnation for event in events if isinstance(event, RankLost)]
        assert lost == [first.record.incarnation]
        joined = events[-1]
        assert isinstance(joined, RankJoined)
        assert joined.record.incarnation == second.record.incarnation


def test_line_of_says_why_a_process_ended(processes: Processes) -> None:
    with pytest.raises(AssertionError, match="No module named"):
        line_of(processes.start("-m", "no_such_module"))
