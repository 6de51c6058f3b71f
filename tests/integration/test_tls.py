"""etcd behind TLS, with a certificate of an authority of one's own: library, keeper and command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cli.exits import Exit
from registry import Registry
from registry.config import EtcdConfig, parse_endpoints
from registry.errors import EtcdUnavailable
from registry.etcd import Etcd
from registry.local import LocalEtcd, free_port
from tests.integration.conftest import Processes
from tests.integration.ranks import register

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")


def _openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


class Authority:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self.cert, self._key = self._new(name, "req", "-x509", "-subj", f"/CN={name}")

    def issue(self, name: str) -> tuple[str, str]:
        """A certificate for a server on 127.0.0.1, or a client, and its key."""
        return self._new(
            name, "req", "-x509", "-subj", f"/CN={name}", "-CA", self.cert, "-CAkey", self._key,
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:false",
        )  # fmt: skip

    def _new(self, name: str, *args: str) -> tuple[str, str]:
        cert, key = (str(self._folder / f"{self._name}-{name}.{kind}") for kind in ("crt", "key"))
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        _openssl(*args, *curve, "-days", "2", "-out", cert, "-keyout", key)
        return cert, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def client(authority: Authority) -> dict[str, str]:
    cert, key = authority.issue("client")
    return {"cacert": authority.cert, "cert": cert, "key": key}


@pytest.fixture(scope="module")
def etcd(authority: Authority, client: dict[str, str]) -> Iterator[LocalEtcd]:
    """One that speaks TLS only, and only with clients that the authority knows."""
    cert, key = authority.issue("server")
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    tls = ("--cert-file", cert, "--key-file", key, "--trusted-ca-file", authority.cert, "--client-cert-auth")
    etcd = LocalEtcd(port, extra_args=("--listen-client-urls", url, "--advertise-client-urls", url, *tls))
    try:
        etcd.launch()
        with closing(Etcd(EtcdConfig(parse_endpoints(etcd.endpoint), timeout_s=20.0, **client))) as patient:
            patient.get("/health")
        yield etcd
    finally:
        etcd.__exit__(None, None, None)


def options(files: dict[str, str]) -> list[str]:
    return [part for name, path in files.items() for part in (f"--{name}", path)]


@pytest.mark.parametrize("scheme", ["", "https://"])
def test_a_rank_registers_and_is_listed_over_tls(
    etcd: LocalEtcd, client: dict[str, str], processes: Processes, namespace: str, scheme: str
) -> None:
    with Registry.connect(scheme + etcd.endpoint, namespace=namespace, **client) as registry, register(registry):  # type: ignore[arg-type]
        listed = processes.run("list", "--json", "--namespace", namespace, *options(client), ENGINES_ETCD=scheme + etcd.endpoint)
        assert [status["state"] for status in json.loads(listed.stdout)["instances"]] == ["ready"], listed.stderr


def test_a_server_that_the_authority_does_not_vouch_for_is_refused(etcd: LocalEtcd, folder: Path, processes: Processes) -> None:
    stranger = Authority(folder, "stranger")
    result = processes.run("list", "--cacert", stranger.cert, ENGINES_ETCD=etcd.endpoint)
    assert result.returncode == Exit.ETCD
    assert "CERTIFICATE_VERIFY_FAILED" in result.stderr
    assert "check --cacert" in result.stderr


def test_a_client_without_a_certificate_is_refused(etcd: LocalEtcd, client: dict[str, str]) -> None:
    with pytest.raises(EtcdUnavailable):
        Registry.connect(etcd.endpoint, cacert=client["cacert"])


def test_plaintext_to_an_etcd_that_speaks_tls_says_so(etcd: LocalEtcd, processes: Processes) -> None:
    result = processes.run("list", ENGINES_ETCD=etcd.endpoint)
    assert result.returncode == Exit.ETCD
    assert "--cacert" in result.stderr


@pytest.mark.parametrize(("name", "content"), [("missing.crt", None), ("text.crt", "no certificate")])
def test_a_file_that_is_no_certificate_is_named(
    etcd: LocalEtcd, processes: Processes, tmp_path: Path, name: str, content: str | None
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    result = processes.run("list", "--cacert", str(tmp_path / name), ENGINES_ETCD=etcd.endpoint)
    assert result.returncode == Exit.ETCD
    assert "--cacert" in result.stderr
