"""How to reach etcd: endpoints, credentials, deadlines.

Pure; only the command line reads the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine_registry.errors import InvalidField
from engine_registry.schema.printable import is_unicode

MAX_TIMEOUT_S = 3600.0
_WHERE = "the user goes into `user`, the password into `password`"
_ENDPOINT = re.compile(
    r"(?:https?://)?(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})/?"
)


@dataclass(frozen=True)
class Endpoint:
    """`tls`: what its scheme says; None where there is none, so that the CA decides."""

    host: str
    port: int
    tls: bool | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class EtcdConfig:
    """`timeout_s` bounds one call, with its retries at all endpoints.

    `namespace` is put before every key.
    """

    endpoints: tuple[Endpoint, ...]
    namespace: str = ""
    timeout_s: float = 5.0
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise InvalidField("no etcd endpoint given", "use HOST:PORT", field="endpoints")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise InvalidField(
                f"timeout {self.timeout_s} is not valid: it is more than 0 and at most "
                f"{MAX_TIMEOUT_S:g} seconds",
                field="timeout_s",
            )
        if not self.namespace.isprintable():
            raise InvalidField(
                f"namespace {self.namespace!r} is not valid: it is one line of printable text",
                field="namespace",
            )
        self._check_tls()
        self._check_credentials()

    def _check_tls(self) -> None:
        if len({bool(endpoint.tls) for endpoint in self.endpoints}) > 1:
            raise InvalidField(
                "some etcd endpoints are https:// and some are not: all members speak one of them",
                field="endpoints",
            )
        if bool(self.cert) != bool(self.key):
            raise InvalidField(
                "a client certificate needs both its file and its key's",
                "give cert and key",
                field="cert",
            )
        if self.cert and not self.tls:
            raise InvalidField(
                "a client certificate goes with TLS",
                "give the server's CA as cacert, or https://",
                field="cacert",
            )
        if self.tls and any(endpoint.tls is False for endpoint in self.endpoints):
            raise InvalidField(
                "an etcd endpoint is http://, without TLS, but cacert turns it on",
                "use https://",
                field="cacert",
            )

    def _check_credentials(self) -> None:
        """Never shows what was given: it may be the password."""
        for name, text in (("user", self.user), ("password", self.password)):
            if text is not None and not is_unicode(text):
                raise InvalidField(
                    f"the {name} for etcd is not valid: it is not UTF-8 text", field=name
                )
        check_user(self.user)
        if (self.user is None) != (self.password is None):
            raise InvalidField("etcd authentication needs both a user and a password", field="user")

    def __str__(self) -> str:
        return ",".join(map(str, self.endpoints))

    @property
    def tls(self) -> bool:
        return bool(self.cacert) or any(endpoint.tls for endpoint in self.endpoints)

    def to_wire(self) -> dict[str, Any]:
        """Includes the password: for a pipe to our own process, never for a log."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> EtcdConfig:
        return cls(
            **{**data, "endpoints": tuple(Endpoint(**endpoint) for endpoint in data["endpoints"])}
        )


def check_user(user: str | None) -> None:
    """InvalidField where it comes with a password, as etcdctl takes it; shows neither."""
    if user is not None and ":" in user:
        raise InvalidField(
            "the user for etcd is not valid: it is a name alone", _WHERE, field="user"
        )


def parse_endpoints(text: str | Sequence[str]) -> tuple[Endpoint, ...]:
    """`HOST:PORT[,HOST:PORT…]`, each with or without `http://` or, for TLS, `https://`; IPv6
    addresses in brackets.
    """
    parts = text.split(",") if isinstance(text, str) else text
    whole = ",".join(parts)
    if "@" in whole:  # what stands before it may be a password, with commas
        raise InvalidField(
            f"etcd endpoint '…{whole[whole.rindex('@') :]}' is not valid",
            _WHERE,
            field="endpoints",
        )
    return tuple(_parse_endpoint(part.strip()) for part in parts if part.strip())


def _parse_endpoint(text: str) -> Endpoint:
    match = _ENDPOINT.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise InvalidField(
            f"etcd endpoint {text!r} is not valid",
            "use HOST:PORT, for example 127.0.0.1:2379, [::1]:2379 or https://etcd:2379",
            field="endpoints",
        )
    host, port = match["v6"] or match["host"], match["port"]
    return Endpoint(host, int(port), tls=text.startswith("https://") if "://" in text else None)


def absolute(path: str | None) -> str | None:
    """The path of a certificate or key. It is read again for every connection, by keepers too,
    whatever the working directory is then.
    """
    return path and os.path.abspath(path)
