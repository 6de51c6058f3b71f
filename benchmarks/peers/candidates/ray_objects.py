"""Ray: the source puts a dict of arrays into its node's store, the reader's node fetches it from
there. Each side is a node and a driver; the service is the head, without work.

A node keeps what it has fetched, so the source puts it anew before each load.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.peers.sets import Tensors
from benchmarks.peers.side import READER, SERVICE, SOURCE
from benchmarks.peers.work import Facts, Load, Work, free_port

_LEAST_NBYTES, _OF_SET = 256 << 20, 3.3  # a node's store: an object and those about to be freed
_NAMESPACE = "peers"
# Ray takes 127.0.0.1 for the address of the machine, and a driver finds its node by the address.
_ON_LOOPBACK = {SERVICE: "127.0.0.2", SOURCE: "127.0.0.3", READER: "127.0.0.4"}


class _Weights:
    """The actor that holds them, in memory of its own."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = {name: array.copy() for name, array in arrays.items()}

    def put(self) -> list[Any]:
        return [ray.put(self._arrays)]


@contextmanager
def service(work: Work) -> Iterator[Facts]:
    host = _host(work, SERVICE)
    port = free_port(host)
    _start(work, host, "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
    yield {"address": f"{host}:{port}"}


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    _join(work, SOURCE)
    actor = ray.remote(num_cpus=0, resources={SOURCE: 0.1})(_Weights)
    kept = actor.options(name=SOURCE).remote({name: one.numpy() for name, one in tensors.items()})
    ray.get(kept.put.remote())
    tensors.clear()  # the actor holds them
    yield {}


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    _join(work, READER)
    source = ray.get_actor(SOURCE, _NAMESPACE)
    boxed: list[Any] = []

    def prepare() -> None:
        boxed.clear()
        boxed.extend(ray.get(source.put.remote()))

    def run() -> None:
        for name, array in ray.get(boxed[0]).items():
            tensors[name].copy_(torch.from_numpy(array))

    yield Load(run, prepare)


def _host(work: Work, role: str) -> str:
    return _ON_LOOPBACK[role] if work.host.startswith("127.") else work.host


def _join(work: Work, role: str) -> None:
    """This process becomes the driver of a new node, whose resource is its role."""
    host = _host(work, role)
    store = max(_LEAST_NBYTES, int(_OF_SET * sum(work.sizes)))
    address = work.facts["address"]
    _start(
        work,
        host,
        f"--address={address}",
        "--num-cpus=1",
        f"--object-store-memory={store}",
        f'--resources={{"{role}": 1}}',
    )
    ray.init(address, namespace=_NAMESPACE, _node_ip_address=host, log_to_driver=False)


def _start(work: Work, host: str, *options: str) -> None:
    """A node in the background, which the driver of the benchmark ends with this side."""
    program = Path(sys.executable).parent / "ray"
    command = [str(program), "start", f"--node-ip-address={host}", *options]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),  # workers import this module
        "RAY_TMPDIR": work.folder,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment)
