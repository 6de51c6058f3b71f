"""The token of a connection, where etcd asks for a user and a password.

Used by `etcd.connection`, from any thread.
"""

from __future__ import annotations

import threading
from typing import Any

import grpc

from engine_registry.etcd.config import EtcdConfig
from engine_registry.etcd.errors import is_turned_off, wants_token
from engine_registry.etcd.library import pb

_NO_TOKEN = ()  # a connection's metadata while etcd has authentication turned off


class Authentication:
    """`accepted`: etcd has taken these credentials before."""

    def __init__(self, config: EtcdConfig, accepted: bool = False) -> None:
        self._config = config
        self._lock = threading.Lock()
        self.accepted = accepted

    def authenticate(self, client: Any, timeout_s: float) -> None:
        """Gives the connection a token if it has none. Raises what gRPC raises.

        The client library would ask for one before `close` knows the connection.
        """
        if self._config.user is None:
            return
        with self._lock:
            if client.metadata is not None:
                return
            request = pb.AuthenticateRequest(name=self._config.user, password=self._config.password)
            try:
                token = pb.AuthStub(client.channel).Authenticate(request, timeout_s).token
            except grpc.RpcError as exc:
                if not (self.accepted and is_turned_off(exc)):
                    raise
                # authentication that is off for a while must not end processes that run
                client.metadata = _NO_TOKEN
            else:
                client.metadata = (("token", token),)
                self.accepted = True


def is_on_again(client: Any, exc: Exception) -> bool:
    """Whether the connection has no token because authentication was off, and needs one now."""
    return client is not None and client.metadata == _NO_TOKEN and wants_token(exc)
