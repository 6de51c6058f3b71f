"""Which candidates there are. A new one is a module here and an entry in `CANDIDATES`.

A module has `source` and `reader`, and `service` if both need something beside them, as
`benchmarks.peers.work` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

REFERENCE = "socket"
OURS = "ours-socket"  # what the others are compared with


@dataclass(frozen=True)
class Candidate:
    """One row of the tables.

    Attributes:
        title: What it is, for people.
        module: Its module in this package.
        variant: What the module gets as `Work.variant`.
        service: Whether it has a service.
        product: Its distribution in .peers, whose Python runs it; empty for what is in .venv.
        env: Of all its processes.
        lacks: What it cannot do, which the others can.
        within_host: Whether it reads without the network, so that no link slows it.
    """

    title: str
    module: str
    variant: str = ""
    service: bool = False
    product: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    lacks: str = ""
    within_host: bool = False


_UCX_TCP = {"UCX_TLS": "tcp"}
_MOONCAKE = {"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "ERROR"}
CANDIDATES: dict[str, Candidate] = {
    OURS: Candidate(
        "`load` over `socket`, by TCP also within a host",
        "ours",
        "socket",
        service=True,
        env={"ENGINES_SOCKET_SAME_HOST": "0"},
        lacks="needs an etcd",
    ),
    "ours-within-host": Candidate(
        "`load` over `socket`, as it is by default",
        "ours",
        "socket",
        service=True,
        lacks="needs an etcd; within a host only, else it is ours-socket",
        within_host=True,
    ),
    "ours-tcp": Candidate(
        "`load` over `tcp`, which is Mooncake's",
        "ours",
        "tcp",
        service=True,
        lacks="needs an etcd",
    ),
    REFERENCE: Candidate(
        "one plain socket",
        "plain_socket",
        lacks="finds no source, checks nothing, has no names or shapes",
    ),
    "naive": Candidate(
        "naive calls of Mooncake",
        "naive",
        "tcp",
        service=True,
        lacks="the addresses must be known; checks nothing",
    ),
    "gloo-tensor": Candidate(
        "gloo, broadcast of each tensor",
        "gloo_broadcast",
        "tensor",
        lacks="both sides call in the same order; a rank that joins or dies ends the group",
    ),
    "gloo-flat": Candidate(
        "gloo, broadcast of a flat copy",
        "gloo_broadcast",
        "flat",
        lacks="as gloo-tensor; and twice the memory on both sides",
    ),
    "http": Candidate(
        "safetensors over HTTP, sendfile",
        "http_file",
        lacks="serves a file, not the memory of an engine; finds no source, checks nothing",
    ),
    "model-express": Candidate(
        "ModelExpress without a server, NIXL over UCX tcp",
        "model_express",
        product="modelexpress",
        env=_UCX_TCP | {"NIXL_UCX_TLS": "tcp", "MX_METADATA_BACKEND": "k8s-service"},
        lacks="knows accelerators alone (here a stub); needs a Kubernetes Service to find sources",
    ),
    "nixl": Candidate(
        "NIXL over UCX tcp",
        "nixl_agents",
        product="nixl",
        env=_UCX_TCP,
        lacks="the metadata of agents must be carried to them; checks nothing",
    ),
    "checkpoint-engine": Candidate(
        "checkpoint-engine's P2PStore",
        "checkpoint_engine_store",
        product="checkpoint-engine",
        env=_MOONCAKE | {"RANK": "0"},
        lacks="the addresses must be known; reads into a buffer, and the engine copies from there",
    ),
    "mooncake-store": Candidate(
        "Mooncake's store",
        "mooncake_store",
        service=True,
        env=_MOONCAKE,
        lacks="a second copy of the weights in its segment; 20,000 tensors in a call fail, "
        "so here 512",
    ),
    "ray": Candidate(
        "Ray, objects between two raylets",
        "ray_objects",
        service=True,
        product="ray",
        lacks="a copy of the weights in the store of each node",
    ),
}
