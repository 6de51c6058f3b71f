"""The servers that are asked, each in a separate process."""

from __future__ import annotations

import json

from benchmarks.bootstrap import bootstrap_server
from benchmarks.gateway.seeds import registration_of
from benchmarks.processes import ready
from engine_registry import Registry
from engine_registry.gateway.server import Gateway

TENSORS = 2_500


def a_gateway(endpoint: str) -> None:
    with (
        Registry.connect(endpoint) as registry,
        Gateway(registry, "bench", world_size=10_000, port=0) as gateway,
    ):
        ready(gateway.port)


def a_bootstrap_server() -> None:
    info = json.loads(registration_of("10.0.0.1:15000", 0, TENSORS))["transfer_engine_info"]
    with bootstrap_server({0: [info["session_id"], info["weights_info_dict"]]}) as port:
        ready(port)
