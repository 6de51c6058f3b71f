"""Who may read, and how what is read is encrypted: files that all engines of a fleet have."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from engine_loader.errors import EngineUnavailable
from engine_registry.forks import closed_in_child, prevented

_LEAST_TOKEN = 16  # bytes
VARIABLES = {
    "token_file": "ENGINES_SOCKET_TOKEN_FILE",
    "cert": "ENGINES_SOCKET_CERT",
    "key": "ENGINES_SOCKET_KEY",
    "cacert": "ENGINES_SOCKET_CACERT",
}


@dataclass(frozen=True)
class SocketCredentials:
    """Files that say who may read, and that encrypt what is read. All engines that read from each
    other need the same token, and certificates of one authority. The files are read anew for each
    connection, so that they can be replaced while engines run.

    Attributes:
        token_file: A file with a secret of 16 bytes or more. Whitespace around it does not count.
            An engine with a token lets only engines with the same one read, and reads only from
            such. The token is never sent. Empty: anyone who can reach the port may read.
        cert: The certificate of this machine, in PEM, with the address in it that peers use. With
            `key` and `cacert`: all three or none. With them, connections are TLS 1.3, and both
            ends show their certificates.
        key: The key of the certificate, in PEM.
        cacert: The certificates of the authorities that sign those of peers, in PEM.
    """

    token_file: str = ""
    cert: str = ""
    key: str = ""
    cacert: str = ""

    @classmethod
    def from_environment(cls) -> SocketCredentials:
        """As ENGINES_SOCKET_TOKEN_FILE, ENGINES_SOCKET_CERT, ENGINES_SOCKET_KEY and
        ENGINES_SOCKET_CACERT name them.
        """
        return cls(**{name: os.environ.get(variable, "") for name, variable in VARIABLES.items()})

    def check(self) -> None:
        """EngineUnavailable where a file is missing or not what it should be."""
        if any(self._tls) and not all(self._tls):
            missing = [name for name in ("cert", "key", "cacert") if not getattr(self, name)]
            raise EngineUnavailable(
                f"TLS between engines needs cert, key and cacert; without {', '.join(missing)} "
                "there is none",
                f"give all three, or none ({', '.join(list(VARIABLES.values())[1:])})",
            )
        try:
            self.token()
            for server in (True, False):
                self.context(server)
        except (OSError, ssl.SSLError, ValueError) as exc:
            raise EngineUnavailable(
                f"the credentials of the protocol socket cannot be used: {exc}",
                f"look at the files that {', '.join(VARIABLES.values())} name",
            ) from exc

    @property
    def _tls(self) -> tuple[str, str, str]:
        return self.cert, self.key, self.cacert

    def token(self) -> bytes:
        """Empty where there is none. OSError, ValueError."""
        if not self.token_file:
            return b""
        token = Path(self.token_file).read_bytes().strip()
        if len(token) < _LEAST_TOKEN:
            raise ValueError(
                f"the token in {self.token_file} has {len(token)} bytes, and needs {_LEAST_TOKEN}"
            )
        return token

    def context(self, server: bool) -> ssl.SSLContext | None:
        """Of TLS, for a source or else a reader; None where there are no certificates. OSError,
        ValueError.
        """
        if not any(self._tls):
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        for file in self._tls:  # an error of OpenSSL does not name it
            Path(file).open().close()
        try:
            context.load_cert_chain(self.cert, self.key, _no_password)
        except ssl.SSLError as exc:
            raise ValueError(f"{self.cert} and {self.key} are no pair in PEM ({exc})") from exc
        try:
            context.load_verify_locations(self.cacert)
        except ssl.SSLError as exc:
            raise ValueError(f"{self.cacert} has no certificates in PEM ({exc})") from exc
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise ValueError("the key is encrypted, and nobody is asked for its password")


def secured(
    connection: socket.socket, context: ssl.SSLContext | None, host: str | None = None
) -> socket.socket:
    """The connection, for TLS if there is a context. Its handshake has not been made.

    `host` is that of the source, for a reader. OSError.
    """
    if context is None:
        return connection
    with prevented():
        wrapped = context.wrap_socket(
            connection,
            server_side=host is None,
            server_hostname=host,
            do_handshake_on_connect=False,
        )
        return closed_in_child(wrapped, socket.socket.close)
