"""Certificates for tests, made with openssl: an authority, what it issues, and an etcd that speaks
TLS with them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.ports import free_port
from tests.support.faults import QUICK_PASSWORDS
from tests.support.waiting import wait_until

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
# What `openssl ca` wants to know, and is the only way to say when a certificate ends with openssl
# 3.0.
_CA = """
[ca]
default_ca = ours
[ours]
database = {folder}/index
serial = {folder}/serial
new_certs_dir = {folder}
default_md = sha256
unique_subject = no
policy = names
[names]
commonName = supplied
"""


def _openssl(*args: str | Path) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


class Authority:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self.cert, self._key = map(str, self._paths(name))
        _openssl(
            "req",
            "-x509",
            "-subj",
            f"/CN={name}",
            *_CURVE,
            "-days",
            "2",
            "-out",
            self.cert,
            "-keyout",
            self._key,
        )

    def issue(
        self, name: str, *, san: str = "IP:127.0.0.1", expired: bool = False
    ) -> tuple[str, str]:
        """A certificate for a server, or for a client called `name`, and its key."""
        cert, key = self._paths(f"{name}{'-expired' if expired else ''}")
        folder = self._folder / f"{cert.stem}-ca"
        folder.mkdir()
        (folder / "index").touch()
        (folder / "serial").write_text(f"{abs(hash(str(cert))):x}".zfill(16)[:16] + "\n")
        (folder / "config").write_text(_CA.format(folder=folder))
        (folder / "extensions").write_text(
            f"subjectAltName={san}\nbasicConstraints=critical,CA:false\n"
        )
        _openssl(
            "req",
            "-new",
            "-subj",
            f"/CN={name}",
            *_CURVE,
            "-out",
            folder / "request",
            "-keyout",
            key,
        )
        dates = (
            ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")
            if expired
            else ("-days", "2")
        )
        _openssl(
            "ca",
            "-config",
            folder / "config",
            "-batch",
            "-notext",
            "-in",
            folder / "request",
            "-out",
            cert,
            "-cert",
            self.cert,
            "-keyfile",
            self._key,
            "-extfile",
            folder / "extensions",
            *dates,
        )
        return str(cert), str(key)

    def client(self, name: str, **how: bool) -> dict[str, str]:
        """Options of `Registry.connect`."""
        cert, key = self.issue(name, **how)  # type: ignore[arg-type]
        return {"cacert": self.cert, "cert": cert, "key": key}

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self._folder / f"{self._name}-{name}.crt", self._folder / f"{self._name}-{name}.key"


def tls_etcd(
    authority: Authority,
    server: tuple[str, str],
    *,
    client_certs: bool = True,
    args: Sequence[str] = (),
) -> LocalEtcd:
    """One that speaks TLS only, and, by default, only with clients that the authority
    knows. It listens already.
    """
    cert, key = server
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    tls = ["--cert-file", cert, "--key-file", key]
    if client_certs:
        tls += ["--trusted-ca-file", authority.cert, "--client-cert-auth"]
    urls = ("--listen-client-urls", url, "--advertise-client-urls", url)
    etcd = LocalEtcd(port, extra_args=(*urls, *tls, *QUICK_PASSWORDS, *args))
    try:
        etcd.launch()
        wait_until(etcd._in_use)
    except BaseException:
        etcd.__exit__(None, None, None)
        raise
    return etcd


def options(files: dict[str, str]) -> list[str]:
    """As the command line has them."""
    return [part for name, path in files.items() for part in (f"--{name}", path)]
