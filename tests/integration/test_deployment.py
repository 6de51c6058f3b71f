"""deploy/kubernetes/base/etcd.yaml: an etcd starts with its settings, and a watcher's options lead
to it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from engine_registry import Registry
from engine_registry.errors import EtcdUnavailable
from engine_registry.etcd.local import find_binary
from engine_registry.etcd.ports import free_port
from tests.integration.conftest import Processes, line_of
from tests.support.checkout import ROOT
from tests.support.ranks import register
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="makes its certificates with openssl"
)


def _container(file: str, kind: str) -> dict[str, object]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "base" / file).read_text())
    (manifest,) = (document for document in documents if document["kind"] == kind)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def _certificates(folder: Path) -> None:
    """As the page says: ca.crt, and tls.crt and tls.key that it has signed, here for both sides."""
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    ca, key = folder / "ca.crt", folder / "ca.key"
    _openssl(
        "req", "-x509", "-subj", "/CN=engine-registry", *curve, "-out", str(ca), "-keyout", str(key)
    )
    _openssl(
        "req",
        "-x509",
        "-subj",
        "/CN=etcd",
        "-CA",
        str(ca),
        "-CAkey",
        str(key),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:false",
        *curve,
        "-out",
        str(folder / "tls.crt"),
        "-keyout",
        str(folder / "tls.key"),
    )


def _openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


class Member:
    """The only one of its cluster, on 127.0.0.1; everything else is as the manifest says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "etcd.log"
        client, peer = (f"https://127.0.0.1:{free_port()}" for _ in range(2))
        self.endpoint = client.removeprefix("https://")
        env = {
            str(variable["name"]): str(variable.get("value", "etcd-0"))
            .replace("$(POD_NAME)", "etcd-0")
            .replace("/etc/etcd/tls", str(folder))
            for variable in _container("etcd.yaml", "StatefulSet")["env"]  # type: ignore[attr-defined]
        }
        self.settings = set(env)
        self._env = env | {
            "ETCD_DATA_DIR": str(folder / "data"),
            "ETCD_LISTEN_CLIENT_URLS": client,
            "ETCD_ADVERTISE_CLIENT_URLS": client,
            "ETCD_LISTEN_PEER_URLS": peer,
            "ETCD_INITIAL_ADVERTISE_PEER_URLS": peer,
            "ETCD_LISTEN_METRICS_URLS": f"http://127.0.0.1:{free_port()}",
            "ETCD_INITIAL_CLUSTER": f"etcd-0={peer}",
        }

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("w") as log:
            return subprocess.Popen([find_binary()], env=self._env, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    member = Member(tmp_path_factory.mktemp("etcd"))
    _certificates(member.folder)
    process = member.start()
    try:
        wait_until(lambda: process.poll() is not None or _answers(member))
        assert process.returncode is None, member.log.read_text()[-2000:]
        yield member
    finally:
        process.kill()
        process.wait()


def _answers(member: Member) -> bool:
    try:
        with _connected(member) as registry:
            return registry.instances() == ()
    except EtcdUnavailable:
        return False


def _connected(member: Member) -> Registry:
    ca, cert, key = (str(member.folder / name) for name in ("ca.crt", "tls.crt", "tls.key"))
    return Registry.connect(member.endpoint, cacert=ca, cert=cert, key=key, timeout_s=2)


def test_etcd_knows_every_setting_of_the_manifest(member: Member) -> None:
    log = member.log.read_text()
    assert "unrecognized environment variable" not in log
    for name in member.settings - {"POD_NAME"}:
        assert f'"variable-name":"{name}"' in log


def test_it_refuses_clients_without_a_certificate(member: Member) -> None:
    with pytest.raises(
        EtcdUnavailable, match=r"wants a client certificate.*check `cert` and `key`"
    ):
        Registry.connect(member.endpoint, cacert=str(member.folder / "ca.crt"), timeout_s=1).close()


def test_the_watchers_options_lead_to_it(member: Member, processes: Processes) -> None:
    args = [
        str(arg).replace("/etc/engines/tls", str(member.folder))
        for arg in _container("watcher.yaml", "Deployment")["args"]  # type: ignore[attr-defined]
    ]
    watcher = processes.engines(*args, ENGINES_ETCD=member.endpoint)
    with _connected(member) as registry:
        with register(registry, "a", 0, 1):
            assert '"event":"rank_joined"' in line_of(watcher)
