"""How to read: of the ways that this machine has, the quickest that the sources are served over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_loader.engines.cuda_ipc.launcher import KERNELS
from engine_loader.engines.machine import this_host
from engine_loader.engines.mooncake.binding import built_transports
from engine_loader.engines.mooncake.devices import usable_devices
from engine_loader.errors import EngineUnavailable, SourceUnreachable
from engine_loader.kernels.kernel import can_be_had
from engine_registry import RankRecord
from engine_registry.schema.record import WITHIN_HOST

FALLBACK = ("cuda_ipc", "nvlink_intra", "rdma", "socket", "tcp")  # the quickest first


def device_for(protocol: str) -> torch.device:
    """Where small reads over the protocol go: a GPU, where it has no other memory."""
    return torch.device("cuda" if protocol in WITHIN_HOST else "cpu")


def usable_protocols() -> tuple[str, ...]:
    """That this machine and the installed transfer engines have, in that order."""
    transports = _transports()
    here = {
        "cuda_ipc": torch.cuda.is_available() and can_be_had(KERNELS.values(), 0),
        "nvlink_intra": torch.cuda.is_available() and "IntraNodeNvlink" in transports,
        "rdma": bool(usable_devices()) and "Rdma" in transports,
        "socket": True,
        "tcp": "Tcp" in transports,
    }
    return tuple(protocol for protocol in FALLBACK if here[protocol])


def _transports() -> Sequence[str]:
    """None where Mooncake is not installed."""
    try:
        return built_transports()
    except EngineUnavailable:
        return ()


def protocol_for(records: Sequence[RankRecord]) -> str:
    """The first that one of these ranks can be read over from here; SourceUnreachable if there is
    none.
    """
    usable = usable_protocols()
    for protocol in usable:
        served = [record for record in records if record.protocol == protocol]
        if protocol in WITHIN_HOST:
            served = [record for record in served if record.fabric in ("", this_host())]
        if served:
            return protocol
    named = "; ".join(f"{record.key} is served over {record.protocol}" for record in records)
    raise SourceUnreachable(
        f"no source can be reached from here: {named}; this machine has "
        f"{', '.join(usable) or 'no way to read'}",
        sources=[record.key for record in records],
    )
