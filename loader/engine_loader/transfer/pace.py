"""How much is in flight from one source, and how long it may bring nothing, by protocol. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from engine_loader.planning.reads import Costs


@dataclass(frozen=True)
class Pace:
    """How much is in flight from one source, how often it is checked, and how long it may bring
    nothing.

    Attributes:
        chunk_nbytes: Bytes of one read, at most.
        depth: Chunks in flight, at most.
        begin: Chunks in flight at the beginning.
        least: Chunks in flight, at least, while they are slow.
        check_s: Seconds between two checks of a source. Reading of this length is lost with a
            source that goes, as it cannot be asked any more whether its weights had changed.
        slow_s: A chunk that takes more seconds has too many beside it, and fewer are begun.
        stall_s: Seconds that a source may bring nothing, if others can replace it.
        patience_s: The same for a source that no other can replace, in several tries.
        starve_s: Seconds that a source which is loading itself may have nothing new.
        costs: When it pays to read more than is wanted.
        small_depth: Chunks in flight, at most, that are so small that the time is in their number.
        hop_nbytes: Bytes that could be read while the next rank in a chain learns that a chunk has
            come.
        nap_s: Seconds between two looks: while something comes, and at most while nothing does.
    """

    chunk_nbytes: int
    depth: int
    begin: int = 2
    least: int = 1
    check_s: float = 0.25
    slow_s: float = 0.4
    stall_s: float = 1.5
    patience_s: float = 10.0
    starve_s: float = 3.0
    costs: Costs = field(default_factory=Costs)
    small_depth: int = 64
    hop_nbytes: int = 0
    nap_s: tuple[float, float] = (50e-6, 1e-3)


# cuda_ipc makes few launches of all that is in flight, so a window is as long as 40 ms of them.
# Over tcp Mooncake serves a peer's reads in four lanes, so that less than eight in flight leaves
# some idle. NVLink needs few chunks, and long ones: each costs Python some 10 µs, and so does each
# copy there; and nobody else on the way has to be spared.
_PACES = {
    "tcp": Pace(4 << 20, 8),
    "socket": Pace(4 << 20, 16, 8),
    "rdma": Pace(16 << 20, 8, hop_nbytes=4 << 30),
    "cuda_ipc": Pace(
        64 << 20, 256, 256, nap_s=(20e-6, 100e-6), hop_nbytes=8 << 30, small_depth=8192
    ),
    "nvlink_intra": Pace(
        64 << 20,
        128,
        128,
        nap_s=(20e-6, 100e-6),
        costs=Costs(read_nbytes=3 << 20, copy_nbytes=3 << 20, copied=0.3, staged_nbytes=24 << 20),
        hop_nbytes=8 << 30,
    ),
}


def pace_for(protocol: str) -> Pace:
    return _PACES.get(protocol, Pace(16 << 20, 4))


def pace_in_chain(pace: Pace, nbytes: int) -> Pace:
    """For a load of so many bytes that passes on what it has: sooner, in chunks that are a small
    part of it, and with little on its way, as looks at the marks wait behind that.
    """
    chunk_nbytes = max(min(pace.chunk_nbytes, nbytes // 256), 256 << 10)
    return replace(
        pace,
        chunk_nbytes=chunk_nbytes,
        depth=min(pace.depth, 16),
        begin=2,
        least=2,
        check_s=0.02,
        slow_s=0.03,
    )
