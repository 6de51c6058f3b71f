"""How a connection to one endpoint of etcd is made: the options of its gRPC channel, and TLS.

Used by `etcd.connection`. gRPC starts threads for the first connection of a process.
"""

from __future__ import annotations

import os
from typing import Any

from engine_registry.errors import EtcdRefused
from engine_registry.etcd.config import Endpoint, EtcdConfig
from engine_registry.etcd.descriptors import check_left
from engine_registry.etcd.library import etcd3

IDLE_S = 30.0  # after so long without a call, the next one takes a fresh channel

# Values that survived cut, stalled and restarted servers. Without http2.ping_timeout_ms a silent
# peer may never be noticed. etcd answers pings that come faster than every 5 s, or while no call is
# open, with GOAWAY.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # gRPC closes a connection over which no call was open for so long, and of each channel only the
    # first one (grpc/grpc#38454). By then the next call gets another channel.
    ("grpc.client_idle_timeout_ms", int(IDLE_S * 1e3) + 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    # http_proxy is for the web; etcd is in the cluster, and a proxy on this machine has no way back
    ("grpc.enable_http_proxy", 0),
)
_DESCRIPTORS = 8  # that gRPC takes for the first connection of a process
_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)


def open_client(config: EtcdConfig, endpoint: Endpoint) -> Any:
    """A client of etcd3 for the endpoint. Connects when it is first used.

    Raises OSError where too few file descriptors are left.
    """
    check_left(_DESCRIPTORS)
    return etcd3.client(
        host=f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host,
        port=endpoint.port,
        ca_cert=config.cacert or (_system_ca() if endpoint.tls else None),
        cert_cert=config.cert,
        cert_key=config.key,
        timeout=config.timeout_s,
        grpc_options=CHANNEL_OPTIONS,
    )


def _system_ca() -> str:
    import ssl  # seldom needed, and big

    # a Python from elsewhere may not know where this system has it
    paths = (ssl.get_default_verify_paths().cafile, *_CA_FILES)
    found = next((path for path in paths if path and os.path.isfile(path)), None)
    if found is None:
        raise EtcdRefused(
            "this system has no file of trusted certificates", "give etcd's CA as `cacert`"
        )
    return found
