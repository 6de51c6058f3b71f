"""How much of everything there is, in a whole run and in a quick one."""

from __future__ import annotations

from dataclasses import dataclass

from engine_registry.etcd.channel import IDLE_S


@dataclass(frozen=True)
class Sizes:
    """Series grow; the last number is what goals are about."""

    ranks: tuple[int, ...]  # of other models
    instances: tuple[int, ...]  # complete, of the model that is joined
    joiners: tuple[int, ...]  # at the same time
    complete: int  # the most joiners that go on to the end of their loads
    siblings: tuple[int, ...]  # of one instance, beside which a rank is claimed
    claims: int
    waiters: tuple[int, ...]  # for a model
    changes: int  # ranks of another model that come meanwhile
    kept: int  # ranks whose leases are renewed
    beats: int  # renewals of each
    host_ranks: int
    served_s: float  # until the sockets of those that serve are counted
    watched: tuple[int, ...]  # ranks of one instance
    replaced: int
    listed: int  # ranks
    choices: tuple[int, ...]  # complete instances
    layout_ranks: tuple[int, ...]  # of a source that is read in another layout; powers of two
    deaths: int


WHOLE = Sizes(
    ranks=(100, 1_000, 10_000, 30_000),
    instances=(1, 10, 100, 1_000, 3_000),
    joiners=(8, 32, 128, 512, 1_024),
    complete=64,
    siblings=(100, 1_000, 10_000),
    claims=100,
    waiters=(8, 32, 128),
    changes=100,
    kept=100,
    beats=20,
    host_ranks=8,
    served_s=2 * IDLE_S + 5,  # gRPC looks for idle connections at such intervals
    watched=(100, 1_000, 10_000),
    replaced=100,
    listed=10_000,
    choices=(100, 1_000, 3_000),
    layout_ranks=(8, 32, 128),
    deaths=100,
)
QUICK = Sizes(
    ranks=(16, 64, 256),
    instances=(1, 10, 40),
    joiners=(2, 4, 8),
    complete=8,
    siblings=(10, 40),
    claims=10,
    waiters=(2, 4),
    changes=10,
    kept=4,
    beats=3,
    host_ranks=2,
    served_s=0.0,
    watched=(10, 40),
    replaced=5,
    listed=100,
    choices=(5, 20),
    layout_ranks=(4, 8),
    deaths=2,
)
