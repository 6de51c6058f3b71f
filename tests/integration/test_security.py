"""etcd with TLS, client certificates and users, whose roles are made by the commands of
docs/how-to/secure-etcd.md as they stand there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_cli.exits import Exit
from engine_loader import MooncakeEngine, publish
from engine_loader.starting.lock import lock_name
from engine_registry import (
    InstanceCleaned,
    InstanceReady,
    ModelIdentity,
    Place,
    RankState,
    RegistrationState,
    Registry,
)
from engine_registry.errors import EtcdRefused, Evicted
from engine_registry.etcd.local import LocalEtcd, find_binary
from engine_registry.gateway.server import Gateway
from engine_registry.holders.query import HolderQuery
from engine_registry.schema.keyvalue import Delete, Put
from tests.integration.conftest import Processes, events_until, line_of
from tests.integration.test_cli import assert_one_line
from tests.integration.test_faults import hold
from tests.support.authority import Authority, options, tls_etcd
from tests.support.checkout import ROOT
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import register
from tests.support.terminal import on_terminal
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="makes its certificates with openssl"
)

PAGE = (ROOT / "docs" / "how-to" / "secure-etcd.md").read_text()
RECIPE = [
    block
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    if "etcdctl" in block
]
PERMISSIONS = re.findall(
    r"etcdctl role grant-permission (\S+) (\S+) ((?:--prefix=true )?\S+)", "".join(RECIPE)
)
NAMESPACE = "/prod"
DENIED = "denies permission: permission denied: grant the user's role"


@dataclass
class Secured:
    """The etcd, and who may do what there."""

    etcd: LocalEtcd
    folder: Path
    authority: Authority
    client: dict[str, str]

    @property
    def url(self) -> str:
        return f"https://{self.etcd.endpoint}"

    def password(self, user: str) -> str:
        return (self.folder / f"{user}.password").read_text().strip()

    def connect(self, user: str, **changes: Any) -> Registry:
        files: dict[str, Any] = self.client
        return Registry.connect(
            self.url,
            namespace=NAMESPACE,
            user=user,
            password=self.password(user),
            **{**files, **changes},
        )

    def options(self, user: str) -> list[str]:
        return ["--namespace", NAMESPACE, "--user", user, *options(self.client)]

    def sh(self, script: str, **env: str) -> str:
        """As an administrator would run it: the options of etcdctl come from the environment."""
        files = {f"ETCDCTL_{name.upper()}": path for name, path in self.client.items()}
        path = f"{Path(find_binary()).parent}:{os.environ['PATH']}"
        env = {"PATH": path, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.url, **files, **env}
        run = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    def etcdctl(self, command: str) -> str:
        return self.sh(
            f"etcdctl {command}", ETCDCTL_USER="root", ETCDCTL_PASSWORD=self.password("root")
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder, "ours")
    etcd = tls_etcd(authority, authority.issue("server"))
    try:
        secured = Secured(etcd, folder, authority, authority.client("somebody"))
        secured.sh("\n".join(RECIPE))
        yield secured
    finally:
        etcd.__exit__(None, None, None)


class Engines:
    """The command line as one of the users, by whose password it is allowed in."""

    def __init__(self, processes: Processes, secured: Secured) -> None:
        self._processes = processes
        self._secured = secured

    def start(self, user: str, command: str, *args: str) -> subprocess.Popen[str]:
        env = {
            "ENGINES_ETCD": self._secured.url,
            "ENGINES_ETCD_PASSWORD": self._secured.password(user),
        }
        return self._processes.engines(command, *args, *self._secured.options(user), **env)

    def __call__(self, user: str, command: str, *args: str) -> subprocess.CompletedProcess[str]:
        process = self.start(user, command, *args)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def serve(self, weights: Path, instance: str = "qwen-a", *args: str) -> subprocess.Popen[str]:
        process = self.start("rank-qwen-a", "register", *serving(weights, instance), *args)
        assert line_of(process).startswith(f"registered {instance}/0 of 1")
        return process


def serving(weights: Path, instance: str) -> list[str]:
    return [
        instance,
        "--rank",
        "0",
        "--world-size",
        "1",
        "--weights",
        str(weights),
        "--host",
        "127.0.0.1",
        "--ttl",
        "2",
    ]


@pytest.fixture
def engines(processes: Processes, secured: Secured) -> Engines:
    return Engines(processes, secured)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.rand(100, 3)}, path)
    return path


def end(process: subprocess.Popen[str]) -> str:
    """What it has said on standard error."""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == Exit.DONE, err
    return err


# -- roles
# --------------------------------------------------------------------------------------------------


def test_a_rank_registers_its_own_instance_and_is_refused_anothers(
    secured: Secured, engines: Engines, weights: Path
) -> None:
    with (
        secured.connect("rank-qwen-a") as registry,
        register(registry, "qwen-a", world_size=2) as registration,
    ):
        registration.update(version=1)
        assert [record.version for record in registry.ranks("qwen-a")] == [1]
        for other in ("qwen-ab", "qwen", "other"):
            with pytest.raises(EtcdRefused, match=DENIED):
                register(registry, other)
    with secured.connect("watcher") as registry:
        assert registry.instances() == ()
    assert_one_line(
        engines("rank-qwen-a", "register", *serving(weights, "qwen-ab")), Exit.ETCD, DENIED
    )
    assert_one_line(engines("rank-qwen-a", "list"), Exit.ETCD, DENIED)


def test_a_loader_finds_and_loads_with_a_ticket_and_is_refused_to_write_a_record(
    secured: Secured, engines: Engines, weights: Path, tmp_path: Path
) -> None:
    server = engines.serve(weights)
    loaded = engines(
        "loader",
        "load",
        "qwen-a",
        "--rank",
        "0",
        "--host",
        "127.0.0.1",
        "--out",
        str(tmp_path / "out"),
    )
    # without a ticket there would be a warning
    assert (loaded.returncode, loaded.stderr) == (
        Exit.DONE,
        "",
    )
    assert torch.equal(
        load_file(tmp_path / "out" / "rank-0.safetensors")["w"], load_file(weights)["w"]
    )
    with secured.connect("loader") as registry, secured.connect("rank-qwen-a") as rank:
        (record,) = registry.resolve("qwen-a")
        ticket = registry.pull(record)
        assert ticket is not None
        with ticket:
            assert rank.pulls(record) == 1
        with pytest.raises(EtcdRefused, match=DENIED):
            registry.evict(record)
    assert_one_line(engines("loader", "register", *serving(weights, "qwen-c")), Exit.ETCD, DENIED)
    assert end(server) == ""
    assert_one_line(engines("loader", "register", *serving(weights, "qwen-a")), Exit.ETCD, DENIED)


def test_a_rank_that_loads_and_serves_has_both_roles(secured: Secured, engines: Engines) -> None:
    tensors, model = {"w": torch.rand(100, 3)}, ModelIdentity("m")
    load = ("load", "seed", "--rank", "0", "--serve", "qwen-a", "--host", "127.0.0.1")
    with (
        secured.connect("root") as registry,
        MooncakeEngine("127.0.0.1") as engine,
        publish(
            registry, engine, instance="seed", rank=0, world_size=1, tensors=tensors, model=model
        ),
    ):
        assert_one_line(engines("rank-qwen-a", *load), Exit.ETCD, DENIED)
        assert_one_line(engines("loader", *load), Exit.ETCD, DENIED)
        secured.etcdctl("user grant-role rank-qwen-a loader")
        try:
            replica = engines.start("rank-qwen-a", *load)
            assert line_of(replica).startswith("loaded seed/0")
            assert line_of(replica).startswith("serving qwen-a/0")
            assert end(replica) == ""
        finally:
            secured.etcdctl("user revoke-role rank-qwen-a loader")


def test_a_loader_without_tickets_loads_from_several_with_a_warning(
    secured: Secured, engines: Engines, weights: Path, tmp_path: Path
) -> None:
    """A watcher that may not see tickets is one: it may read manifests. With several sources it
    would like to know how many read from each.
    """
    server = engines.serve(weights)
    secured.etcdctl("role revoke-permission watcher --prefix=true /prod/pulls/")
    secured.etcdctl(
        "role grant-permission rank-qwen-a readwrite --prefix=true /prod/engines/qwen-twin/"
    )
    for permission, prefix in (("write", "manifests"), ("read", "pulls"), ("read", "evicted")):
        secured.etcdctl(
            f"role grant-permission rank-qwen-a {permission} --prefix=true "
            f"/prod/{prefix}/qwen-twin/"
        )
    twin = engines.serve(weights, "qwen-twin", "--model", "qwen-a")
    try:
        loaded = engines(
            "watcher", "load", "qwen-a", "qwen-twin", "--rank", "0", "--host", "127.0.0.1"
        )
    finally:
        secured.etcdctl("role grant-permission watcher read --prefix=true /prod/pulls/")
    assert loaded.returncode == Exit.DONE, loaded.stderr
    lines = loaded.stderr.splitlines()
    assert len(lines) == 2
    assert all(
        "without a ticket, so it may leave meanwhile" in line and DENIED in line for line in lines
    )
    for each in (server, twin):
        end(each)


@pytest.mark.parametrize("user", ["start-qwen-a", "rank-qwen-a"])
def test_a_rank_that_starts_from_peers_takes_its_turn_if_it_may_and_else_reads_its_files(
    secured: Secured, engines: Engines, weights: Path, user: str
) -> None:
    server = engines.start(
        user, "register", *serving(weights, "qwen-a"), "--from-peers", "--model", "qwen-a"
    )
    assert line_of(server).endswith("read from the files; Ctrl-C withdraws\n")
    if user == "start-qwen-a":
        server.kill()
        with secured.connect("watcher") as registry:
            wait_until(lambda: registry.ranks("qwen-a") == ())
        assert server.stderr is not None
        assert server.stderr.read() == ""
        assert secured.etcdctl("get --prefix /prod/elections/seed/") == ""
        return
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=100)
    assert server.returncode == Exit.DONE
    assert "reads its weights, although others may read them too" in err


def test_a_watcher_looks_and_is_refused_to_evict(
    secured: Secured, engines: Engines, weights: Path
) -> None:
    server = engines.serve(weights)
    assert (
        json.loads(engines("watcher", "list", "--json").stdout)["instances"][0]["state"] == "ready"
    )
    assert "100x3" in engines("watcher", "show", "qwen-a", "--tensors").stdout
    watch = engines.start("watcher", "watch", "--json")
    assert json.loads(line_of(watch))["event"] == "rank_joined"
    end(watch)
    assert_one_line(engines("watcher", "evict", "qwen-a"), Exit.ETCD, DENIED)
    assert_one_line(engines("loader", "evict", "qwen-a"), Exit.ETCD, DENIED)
    end(server)


def test_a_user_that_may_not_see_tickets_sees_the_rest(secured: Secured, engines: Engines) -> None:
    with (
        secured.connect("rank-qwen-a") as registry,
        register(registry, "qwen-a", state=RankState.LOADING),
    ):
        assert "who reads" not in engines("watcher", "show", "qwen-a").stdout
        listed = engines("operator", "list")
        assert (listed.returncode, listed.stderr) == (Exit.DONE, "")
        assert listed.stdout.splitlines()[1].split()[:2] == ["qwen-a", "loading"]
        for user in ("operator", "rank-qwen-a"):
            shown = engines(user, "show", "qwen-a")
            assert (shown.returncode, shown.stderr) == (Exit.DONE, "")
            assert DENIED in shown.stdout.splitlines()[-1]
            assert shown.stdout.splitlines()[-1].startswith("who reads from whom is not known: ")
            assert shown.stdout.splitlines()[-1].endswith("or check --user")
        data = json.loads(engines("operator", "show", "qwen-a", "--json").stdout)
        (rank,) = data["ranks"]
        assert [data["pulls"], rank["progress"], rank["reads_from"], rank["readers"]] == [None] * 4


def test_the_live_table_says_where_tickets_may_not_be_seen(secured: Secured) -> None:
    env = {"ENGINES_ETCD": secured.url, "ENGINES_ETCD_PASSWORD": secured.password("operator")}
    with (
        secured.connect("rank-qwen-a") as registry,
        register(registry, "qwen-a"),
        on_terminal("watch", *secured.options("operator"), env=env) as terminal,
    ):
        terminal.wait_for("who reads from whom is not known: ", "denies permission")
        terminal.wait_for("qwen-a", "ready")


def test_a_loader_reports_its_progress_where_others_may_see_it(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket._REPORT_S", 0.01)
    with (
        secured.connect("rank-qwen-a") as registry,
        register(registry, "qwen-a"),
        secured.connect("loader") as loader,
        secured.connect("watcher") as watcher,
    ):
        ticket = loader.pull(loader.ranks("qwen-a")[0])
        assert ticket is not None
        with ticket:
            ticket.report(5, 10)
            wait_until(lambda: [pull.fraction for pull in watcher.all_pulls()] == [0.5])


def test_an_operator_evicts_and_the_rank_learns_of_it(secured: Secured, engines: Engines) -> None:
    with secured.connect("rank-qwen-a") as registry, secured.connect("watcher") as watcher:
        registration, states = hold(registry, instance="qwen-a")
        with registration:
            assert engines("operator", "evict", "qwen-a").returncode == Exit.DONE
            states.wait_for(RegistrationState.LOST)
            assert isinstance(registration.lost, Evicted)
            assert watcher.instances() == ()


def test_a_cleaner_evicts_what_a_lost_rank_leaves(secured: Secured) -> None:
    with (
        secured.connect("rank-qwen-a") as registry,
        secured.connect("cleaner") as cleaner,
        cleaner.cleaning_watch(grace_s=0.1) as watch,
    ):
        first, second = (
            hold(registry, instance="qwen-a", rank=rank, world_size=2)[0] for rank in range(2)
        )
        with first:
            events_until(watch, lambda event: isinstance(event, InstanceReady))  # type: ignore[arg-type]
            wait_until(lambda: watch._election.leading)
            second.withdraw()
            cleaned = events_until(watch, lambda event: isinstance(event, InstanceCleaned))[-1]  # type: ignore[arg-type]
            assert [record.rank for record in cleaned.evicted] == [0]  # type: ignore[union-attr]


def test_a_stranger_cannot_end_a_lease_and_hinders_nobody_by_sharing_it(secured: Secured) -> None:
    with secured.connect("rank-qwen-a") as registry, secured.connect("loader") as loader:
        with register(registry, "qwen-a", ttl_s=60.0) as registration:
            found = registry._etcd.get(registration.record.key)
            assert found is not None
            with pytest.raises(EtcdRefused, match=DENIED):
                loader._etcd.revoke(found.lease_id)
            assert loader._etcd.commit([], [Put("/pulls/qwen-a/0/mine", b"", found.lease_id)])
            with pytest.raises(EtcdRefused, match=DENIED):
                registry._etcd.revoke(found.lease_id)
        assert registration.withdrawn
        for prefix in ("/engines/", "/manifests/"):
            assert loader._etcd.snapshot(prefix).items == ()
        loader._etcd.commit([], [Delete("/pulls/qwen-a/0/mine")])


def test_a_watch_that_may_not_clean_says_so_and_watches(secured: Secured, engines: Engines) -> None:
    watch = engines.start("watcher", "watch", "--cleanup", "--grace", "0")
    assert watch.stderr is not None
    line = watch.stderr.readline()
    assert line.startswith(
        "engines: warning: this process does not lead, and does nothing that only a leader does: "
    )
    assert DENIED in line
    with secured.connect("rank-qwen-a") as registry, register(registry, "qwen-a"):
        assert "qwen-a/0 joined" in line_of(watch)
    assert end(watch) == ""


@pytest.mark.parametrize("by", ["drain", "eviction"])
def test_a_rank_may_look_who_reads_from_it_and_whether_it_was_evicted(
    secured: Secured, by: str
) -> None:
    with (
        secured.connect("rank-qwen-a") as registry,
        secured.connect("loader") as loader,
        register(registry, "qwen-a"),
    ):
        (record,) = loader.resolve("qwen-a")
        if by == "drain":
            ticket = loader.pull(record)
            assert ticket is not None
            assert registry.wait_for_no_pulls("qwen-a", 0, timeout_s=0.1) == 1
            ticket.close()
            assert registry.wait_for_no_pulls("qwen-a", 0, timeout_s=60) == 0
        else:
            secured.etcdctl(f"put /prod/evicted/qwen-a/0/{'0' * 32} ''")
            with pytest.raises(Evicted):
                register(registry, "qwen-a", incarnation="0" * 32)


def _as_rank(secured: Secured) -> None:
    with secured.connect("rank-qwen-a") as registry, register(registry, "qwen-a") as registration:
        registration.update(version=1)
        registry.pulls(registration.record)
        registry.release("qwen-a", 1)
        if not registration.record.order:  # it was registered without an entry in the index
            raise EtcdRefused(DENIED)


def _as_loader(secured: Secured) -> None:
    with (
        secured.connect("rank-qwen-a") as registry,
        register(registry, "qwen-a"),
        secured.connect("loader") as loader,
    ):
        (record,) = loader.resolve("qwen-a")
        loader.manifest(record)
        loader.pulls(record)
        ticket = loader.pull(record)
        assert ticket is not None
        ticket.close()
        assert not loader.was_evicted(record)
        assert loader.released("qwen-a") is None
        if loader.find_holders(HolderQuery(record.model, Place(record.rank))).scanned:
            raise EtcdRefused(DENIED)  # it has read all records instead of the index


def _as_watcher(secured: Secured) -> None:
    with (
        secured.connect("rank-qwen-a") as registry,
        register(registry, "qwen-a"),
        secured.connect("watcher") as watcher,
    ):
        watcher.instances()
        watcher.manifest(watcher.ranks("qwen-a")[0])
        watcher.all_pulls()
        assert watcher.released("qwen-a") is None


def _as_operator(secured: Secured) -> None:
    with secured.connect("rank-qwen-a") as registry, secured.connect("operator") as operator:
        registration, states = hold(registry, instance="qwen-a")
        with registration:
            operator.release("qwen-a", 0)
            assert operator.evict(operator.ranks("qwen-a")[0])
            states.wait_for(RegistrationState.LOST)


def _as_seeder(secured: Secured) -> None:
    with secured.connect("start-qwen-a") as registry:
        with registry.election(lock_name(ModelIdentity("qwen-a"), 0, 1, {})) as election:
            wait_until(lambda: election.leading or election.refusal is not None)
            if election.refusal is not None:
                raise election.refusal


def _as_gateway(secured: Secured) -> None:
    """A seed registers, and a client asks for it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as engine,
        secured.connect("gateway") as registry,
        secured.connect("root") as root,
        Gateway(registry, "sglang", port=0) as gateway,
    ):
        info = {
            "session_id": f"127.0.0.1:{engine.getsockname()[1]}",
            "weights_info_dict": {"w": [4096, 4, 2]},
        }
        path = f"{gateway.url}/register_transfer_engine_info"
        try:
            for answer in (
                httpx.put(path, json={"tp_rank": 0, "transfer_engine_info": info}, timeout=20),
                httpx.get(f"{gateway.url}/get_transfer_engine_info?rank=0", timeout=20),
            ):
                if answer.status_code == 503:
                    raise EtcdRefused(answer.json()["detail"])
                assert answer.status_code == 200, answer.text
        except httpx.TransportError:  # it has ended, for a reason that this raises
            gateway.wait(60)
            raise
        finally:
            for record in root.ranks("sglang"):
                root.evict(record)


_JOBS: dict[str, Callable[[Secured], None]] = {
    "gateway": _as_gateway,
    "rank-qwen-a": _as_rank,
    "loader": _as_loader,
    "seeder": _as_seeder,
    "watcher": _as_watcher,
    "operator": _as_operator,
}


def test_who_may_not_read_releases_watches_without_them(secured: Secured) -> None:
    secured.etcdctl("role revoke-permission watcher --prefix=true /prod/releases/")
    try:
        with (
            secured.connect("rank-qwen-a") as registry,
            register(registry, "qwen-a"),
            secured.connect("watcher") as watcher,
            watcher.watch() as watch,
        ):
            registry.release("qwen-a", 0)
            events_until(watch, lambda event: isinstance(event, InstanceReady))
    finally:
        secured.etcdctl("role grant-permission watcher read --prefix=true /prod/releases/")


@pytest.mark.parametrize(
    ("role", "permission", "keys"), [some for some in PERMISSIONS if some[0] in _JOBS]
)
def test_every_permission_of_the_page_is_needed(
    secured: Secured, role: str, permission: str, keys: str
) -> None:
    """And no less of it: not even of reading and writing one alone.

    (What eviction writes it reads only if an answer was lost.)
    """
    _JOBS[role](secured)
    lesser = ["read", "write"] if permission == "readwrite" and "/evicted/" not in keys else [None]
    try:
        for less in lesser:
            secured.etcdctl(f"role revoke-permission {role} {keys}")
            if less:
                secured.etcdctl(f"role grant-permission {role} {less} {keys}")
            with pytest.raises(EtcdRefused, match=DENIED):
                _JOBS[role](secured)
    finally:
        secured.etcdctl(f"role grant-permission {role} {permission} {keys}")


def test_a_certificate_of_a_users_name_is_as_good_as_its_password(
    secured: Secured, processes: Processes, weights: Path
) -> None:
    secured.etcdctl("user grant-role rank-qwen-b rank-qwen-a")
    files: dict[str, Any] = secured.authority.client("rank-qwen-b")
    with Registry.connect(secured.url, namespace=NAMESPACE, **files) as registry:
        with register(registry, "qwen-a") as registration:
            registration.update(version=1)
            assert [record.version for record in registry.ranks("qwen-a")] == [1]
        with pytest.raises(EtcdRefused, match=DENIED):
            registry.instances()
    args = ("--etcd", secured.url, "--namespace", NAMESPACE, *options(files))
    assert_one_line(processes.run("register", *serving(weights, "other"), *args), Exit.ETCD, DENIED)


def test_a_certificate_of_no_users_name_and_a_wrong_password_are_refused(
    secured: Secured, processes: Processes
) -> None:
    args = ("--etcd", secured.url, "--namespace", NAMESPACE, *options(secured.client))
    assert_one_line(processes.run("list", *args), Exit.ETCD, DENIED, "check --user")
    wrong = processes.run("list", *args, "--user", "watcher", ENGINES_ETCD_PASSWORD="guess-4711")
    assert_one_line(wrong, Exit.ETCD, "refuses the credentials", "check --user and the password")
    assert "guess-4711" not in wrong.stderr


# -- passwords
# --------------------------------------------------------------------------------------------------


def seen_of(pid: int) -> str:
    """What others may see of a process: its command line and what it was started with."""
    return "".join(
        (Path("/proc") / str(pid) / name).read_text(errors="replace")
        for name in ("cmdline", "environ")
    )


@contextmanager
def in_environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.usefixtures("product_keepers")
def test_a_keeper_has_the_password_neither_on_its_command_line_nor_in_its_environment(
    secured: Secured, engines: Engines, weights: Path
) -> None:
    secret = secured.password("rank-qwen-a")
    with in_environment("MY_OWN_VARIABLE", secret), secured.connect("rank-qwen-a") as registry:
        with register(registry, "qwen-a") as registration:
            assert "engine-registry-keeper" in seen_of(pid_of_keeper(registration))
            assert secret not in seen_of(pid_of_keeper(registration))
            assert "PATH=" in seen_of(pid_of_keeper(registration))
            assert secret not in repr(registry) + repr(registration.record) + repr(
                vars(registry)
            ) + str(registry._config)
    server = engines.serve(weights)
    (keeper,) = [
        child for child in children_of(server.pid) if "engine-registry-keeper" in seen_of(child)
    ]
    assert secret not in seen_of(keeper)
    assert "ENGINES_ETCD=" in seen_of(keeper)
    assert "ENGINES_ETCD_PASSWORD" not in seen_of(keeper)
    assert secret not in (Path("/proc") / str(server.pid) / "cmdline").read_text()
    assert secret not in end(server)


def test_a_hook_does_not_inherit_the_password_and_can_be_given_it_anew(
    secured: Secured, engines: Engines, tmp_path: Path
) -> None:
    script = (
        f"tr '\\0' '\\n' </proc/self/environ >{tmp_path}/environ.new; mv {tmp_path}/environ.new "
        f"{tmp_path}/environ"
    )
    watch = engines.start("watcher", "watch", "--exec", script)
    with secured.connect("rank-qwen-a") as registry, register(registry, "qwen-a"):
        line_of(watch)
        wait_until((tmp_path / "environ").exists)
    end(watch)
    environ = (tmp_path / "environ").read_text()
    assert "ENGINES_EVENT=" in environ
    assert "ENGINES_ETCD=" in environ
    assert "PASSWORD" not in environ
    assert secured.password("watcher") not in environ


@pytest.mark.parametrize("args", [("--debug",), ("--help",), ("--json",), ("--json", "--debug")])
@pytest.mark.parametrize("user", ["watcher", "rank-qwen-a", "nobody"])
def test_a_password_is_in_no_output_whatever_goes_wrong(
    secured: Secured, processes: Processes, user: str, args: tuple[str, ...]
) -> None:
    secret = "hunter2-4711" if user == "nobody" else secured.password(user)
    result = processes.run(
        "list",
        *secured.options(user),
        *args,
        ENGINES_ETCD=secured.url,
        ENGINES_ETCD_PASSWORD=secret,
        GRPC_VERBOSITY="DEBUG",
    )
    assert result.returncode == (Exit.DONE if user == "watcher" or "--help" in args else Exit.ETCD)
    assert secret not in result.stdout + result.stderr
    assert ("Traceback" in result.stderr) == (result.returncode == Exit.ETCD and "--debug" in args)


@pytest.mark.parametrize(
    "args",
    [
        ("--user", "root:hunter2"),
        ("--etcd", "https://root:hunter2@h:1"),
        ("--etcd", "root:hunter2,@h:1"),
        ("--debug", "--user", "r:hunter2"),
    ],
)
def test_a_password_in_an_argument_is_refused_and_not_repeated(
    processes: Processes, args: tuple[str, ...]
) -> None:
    for environment in ({"ENGINES_ETCD_PASSWORD": "p"}, {}):
        result = processes.run("list", *args, **environment)
        assert result.returncode == Exit.USAGE
        assert "the password into ENGINES_ETCD_PASSWORD" in result.stderr.strip().splitlines()[-1]
        assert "hunter2" not in result.stdout + result.stderr
