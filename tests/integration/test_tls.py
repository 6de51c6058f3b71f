"""etcd behind TLS, with a certificate of an authority of one's own: library, keeper and command
line; and all that may be wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine_cli.exits import Exit
from engine_registry import Registry
from engine_registry.errors import EtcdUnavailable
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes
from tests.integration.test_cli import assert_one_line
from tests.support.authority import Authority, options, tls_etcd
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import register
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="makes its certificates with openssl"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder, "stranger")


@pytest.fixture(scope="module")
def client(authority: Authority) -> dict[str, str]:
    return authority.client("client")


@pytest.fixture(scope="module")
def etcd(authority: Authority, client: dict[str, str]) -> Iterator[LocalEtcd]:
    """One that speaks TLS only, and only with clients that the authority knows."""
    etcd = tls_etcd(authority, authority.issue("server"))
    try:
        with closing(
            Etcd(EtcdConfig(parse_endpoints(etcd.endpoint), timeout_s=20.0, **client))
        ) as patient:
            patient.get("/health")
        yield etcd
    finally:
        etcd.__exit__(None, None, None)


@pytest.mark.parametrize("scheme", ["", "https://"])
def test_a_rank_registers_and_is_listed_over_tls(
    etcd: LocalEtcd, client: dict[str, str], processes: Processes, namespace: str, scheme: str
) -> None:
    with (
        Registry.connect(scheme + etcd.endpoint, namespace=namespace, **client) as registry,  # type: ignore[arg-type]
        register(registry),
    ):
        listed = processes.run(
            "list",
            "--json",
            "--namespace",
            namespace,
            *options(client),
            ENGINES_ETCD=scheme + etcd.endpoint,
        )
        assert [status["state"] for status in json.loads(listed.stdout)["instances"]] == [
            "ready"
        ], listed.stderr


def test_files_that_are_named_from_here_are_found_from_elsewhere(
    etcd: LocalEtcd,
    client: dict[str, str],
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read for every connection anew, by a keeper too that takes the place of another."""
    monkeypatch.chdir(Path(client["cert"]).parent)
    files: dict[str, Any] = {name: Path(path).name for name, path in client.items()}
    with Registry.connect(etcd.endpoint, namespace=namespace, **files) as registry:
        monkeypatch.chdir(tmp_path)
        with register(registry) as registration:
            first = pid_of_keeper(registration)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: registration.keeper_pid not in (None, first))
            registry._etcd._client.close()
            registration.update(version=1)
            wait_until(lambda: [record.version for record in registry.ranks("a")] == [1])


def test_https_alone_trusts_the_authorities_of_the_system(
    etcd: LocalEtcd,
    authority: Authority,
    client: dict[str, str],
    processes: Processes,
    namespace: str,
) -> None:
    """Which SSL_CERT_FILE names, as for all that uses OpenSSL. The keeper finds them too."""
    url = f"https://{etcd.endpoint}"
    certificate = options({name: client[name] for name in ("cert", "key")})
    args = ("--namespace", namespace, *certificate)
    listed = processes.run("list", *args, ENGINES_ETCD=url, SSL_CERT_FILE=authority.cert)
    assert (listed.returncode, listed.stdout) == (Exit.DONE, "no instance is registered\n"), (
        listed.stderr
    )
    unknown = processes.run("list", *args, "--etcd", url)
    assert_one_line(unknown, Exit.ETCD, "unable to get local issuer certificate", "check --cacert")


def test_a_scheme_that_contradicts_the_options_is_reported_before_etcd_is_asked(
    processes: Processes, client: dict[str, str]
) -> None:
    mixed = processes.run("list", "--etcd", "https://h:1,http://g:1")
    assert_one_line(mixed, Exit.USAGE, "some etcd endpoints are https:// and some are not")
    plain = processes.run("list", "--etcd", "http://h:1", *options(client))
    assert_one_line(plain, Exit.USAGE, "an etcd endpoint is http://", "use https://")


def test_a_server_that_the_authority_does_not_vouch_for_is_refused(
    etcd: LocalEtcd, stranger: Authority, client: dict[str, str], processes: Processes
) -> None:
    result = processes.run(
        "list", *options({**client, "cacert": stranger.cert}), ENGINES_ETCD=etcd.endpoint
    )
    assert_one_line(result, Exit.ETCD, "CERTIFICATE_VERIFY_FAILED", "check --cacert")


def test_a_client_without_a_certificate_is_refused(
    etcd: LocalEtcd, client: dict[str, str], processes: Processes
) -> None:
    with pytest.raises(EtcdUnavailable, match="it wants a client certificate"):
        Registry.connect(etcd.endpoint, cacert=client["cacert"])
    result = processes.run("list", "--cacert", client["cacert"], ENGINES_ETCD=etcd.endpoint)
    assert_one_line(result, Exit.ETCD, "it wants a client certificate", "check --cert and --key")


@pytest.mark.parametrize("fault", ["a stranger's", "expired"])
def test_a_client_certificate_that_etcd_does_not_take_is_reported(
    etcd: LocalEtcd, authority: Authority, stranger: Authority, processes: Processes, fault: str
) -> None:
    files = (
        authority.client("late", expired=True) if fault == "expired" else stranger.client("client")
    )
    result = processes.run(
        "list", *options({**files, "cacert": authority.cert}), ENGINES_ETCD=etcd.endpoint
    )
    assert_one_line(
        result,
        Exit.ETCD,
        "it wants a client certificate that it trusts and that has not expired",
        "--cert and --key",
    )


def test_a_certificate_of_etcd_that_has_expired_is_reported(
    authority: Authority, client: dict[str, str], processes: Processes
) -> None:
    etcd = tls_etcd(authority, authority.issue("old-server", expired=True))
    try:
        result = processes.run("list", *options(client), ENGINES_ETCD=etcd.endpoint)
    finally:
        etcd.__exit__(None, None, None)
    assert_one_line(
        result,
        Exit.ETCD,
        "etcd's certificate, or the CA's in --cacert, has expired",
        "check this machine's clock",
    )


def test_a_certificate_of_etcd_for_another_host_is_reported(
    authority: Authority, client: dict[str, str], processes: Processes
) -> None:
    etcd = tls_etcd(authority, authority.issue("elsewhere", san="DNS:etcd.example"))
    try:
        result = processes.run("list", *options(client), ENGINES_ETCD=etcd.endpoint)
    finally:
        etcd.__exit__(None, None, None)
    assert_one_line(
        result, Exit.ETCD, "etcd's certificate is for other names than the one in --etcd"
    )


def test_plaintext_to_an_etcd_that_speaks_tls_says_so(
    etcd: LocalEtcd, processes: Processes
) -> None:
    for url in (etcd.endpoint, f"http://{etcd.endpoint}"):
        assert_one_line(processes.run("list", ENGINES_ETCD=url), Exit.ETCD, "--cacert", "https://")


def test_tls_to_an_etcd_that_speaks_plaintext_says_so(
    shared_etcd: LocalEtcd, authority: Authority, processes: Processes
) -> None:
    result = processes.run("list", "--cacert", authority.cert, ENGINES_ETCD=shared_etcd.endpoint)
    assert_one_line(result, Exit.ETCD, "it does not speak TLS there", "check --etcd")


@pytest.mark.parametrize("option", ["cacert", "cert", "key"])
@pytest.mark.parametrize("content", ["nothing", "text", "a folder"])
def test_a_file_that_is_no_certificate_is_reported_with_the_option(
    etcd: LocalEtcd,
    client: dict[str, str],
    processes: Processes,
    tmp_path: Path,
    option: str,
    content: str,
) -> None:
    path = tmp_path / "wrong.crt"
    if content == "text":
        path.write_text("no certificate")
    elif content == "a folder":
        path.mkdir()
    result = processes.run(
        "list", *options({**client, option: str(path)}), ENGINES_ETCD=etcd.endpoint
    )
    assert_one_line(result, Exit.ETCD, f"--{option}")


def test_a_key_of_another_certificate_is_reported(
    etcd: LocalEtcd, client: dict[str, str], stranger: Authority, processes: Processes
) -> None:
    result = processes.run(
        "list", *options({**client, "key": stranger.issue("other")[1]}), ENGINES_ETCD=etcd.endpoint
    )
    assert_one_line(result, Exit.ETCD, "another one's key: check --cacert, --cert and --key")
