"""`open_engine`: the transfer engine for a protocol."""

from __future__ import annotations

from engine_loader.engines.base import ClosableEngine
from engine_loader.engines.cuda_ipc.engine import CudaIpcEngine
from engine_loader.engines.mooncake.engine import MooncakeEngine
from engine_loader.engines.sockets.engine import SocketEngine
from engine_loader.errors import EngineUnavailable


def open_engine(
    host: str, protocol: str = "tcp", device: str = "", fabric: str = "", *, location: str = ""
) -> ClosableEngine:
    """Starts the transfer engine that reads over a protocol.

    Args:
        host: The address of this machine that peers connect to.
        protocol: How to read: tcp, socket, rdma, cuda_ipc or nvlink_intra. Over socket the
            credentials are those that the environment names: see `SocketCredentials`.
        device: Over rdma: as for MooncakeEngine.
        fabric: A label of the network. Engines with equal labels reach each other.
        location: Where this machine stands, as for MooncakeEngine.

    Returns:
        The engine, which the caller closes.

    Raises:
        EngineUnavailable: The engine cannot be started here, or the protocol is unknown.
        InvalidField: The location is not valid.
    """
    if protocol not in ("cuda_ipc", "socket"):
        return MooncakeEngine(host, protocol, device, fabric, location=location)
    if device:
        raise EngineUnavailable(
            f"{protocol} uses no RDMA device, and {device!r} is given", "leave `device` out"
        )
    if protocol == "socket":
        return SocketEngine(host, fabric, location=location)
    return CudaIpcEngine(host, fabric, location=location)
