"""ModelExpress's client without a server: the source's worker answers for its tensors over gRPC
(metadata backend `k8s-service`), and NIXL moves them.

It knows accelerators alone. `_HostMemory` tells it that the host's memory is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from modelexpress import p2p_pb2
from modelexpress.metadata.client_factory import create_metadata_client
from modelexpress.metadata.source_id import compute_mx_source_id
from modelexpress.metadata.worker_server import WorkerGrpcServer
from modelexpress.nixl_transfer import NixlTransferManager
from modelexpress.types import TensorDescriptor

from benchmarks.peers.sets import Tensors
from benchmarks.peers.work import Facts, Load, LoadFailed, Work, free_port

_TIMEOUT_S = 120
_SOURCE = "source"


class _HostMemory:
    name = "cpu"
    torch_device_type = "cpu"
    nixl_mem_type = "DRAM"

    def set_device(self, device_id: int) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def synchronize(self, device_id: int | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def torch_device(self, device_id: int) -> torch.device:
        return torch.device("cpu")

    def is_accel_tensor(self, tensor: object) -> bool:
        return True

    def supports_rdma_p2p(self) -> bool:
        return True

    def supports_pool_reg(self) -> bool:
        return False

    def supports_vmm(self) -> bool:
        return False

    def supports_gds(self) -> bool:
        return False


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    port = free_port(work.host)
    manager = _manager(_SOURCE, port, tensors)
    described = [
        p2p_pb2.TensorDescriptor(
            name=one.name, addr=one.addr, size=one.size, device_id=one.device_id, dtype=one.dtype
        )
        for one in manager.tensor_descriptors
    ]
    server = WorkerGrpcServer(
        described,
        compute_mx_source_id(_identity()),
        metadata_endpoint=f"{work.host}:{port}",
        agent_name=_SOURCE,
        worker_rank=0,
        accelerator="cpu",
    )
    yield {"address": f"{work.host}:{server.start()}"}
    manager.shutdown()


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    """Each load asks the source for its tensors, as a new worker does."""
    os.environ["MX_K8S_SERVICE_PATTERN"] = work.facts["address"]
    manager = _manager("reader", free_port(work.host), tensors)
    client = create_metadata_client(worker_rank=0)
    known: set[str] = set()

    def run() -> None:
        (found, *_) = client.list_sources(identity=_identity()).instances
        worker = client.get_metadata(found.mx_source_id, found.worker_id).worker
        if worker.agent_name not in known:
            host, port = worker.metadata_endpoint.rsplit(":", 1)
            manager.fetch_remote_and_wait(worker.agent_name, host, int(port))
            known.add(worker.agent_name)
        described = [
            TensorDescriptor(one.name, one.addr, one.size, one.device_id, one.dtype)
            for one in worker.tensor_source.tensors
        ]
        _, count, _ = manager.receive_from_source(
            b"", described, timeout_seconds=_TIMEOUT_S, remote_agent_name=worker.agent_name
        )
        if count != len(tensors):
            raise LoadFailed(f"{count} of {len(tensors)} tensors have come")

    yield Load(run)
    manager.shutdown()


def _manager(name: str, port: int, tensors: Tensors) -> NixlTransferManager:
    manager = NixlTransferManager(name, 0, listen_port=port, accelerator_backend=_HostMemory())
    manager.initialize()
    manager.register_tensors(tensors)
    return manager


def _identity() -> p2p_pb2.SourceIdentity:
    return p2p_pb2.SourceIdentity(model_name="peers", tensor_parallel_size=1, dtype="uint8")
