"""One measurement of a fan-out: what was set, what was found, and what the model has for it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.fanout.model import Fabric, all_from_one, complete_then_chain, pipelined_chain
from benchmarks.fanout.rank import chain_pace

_PAYLOAD = 1448 / 1514  # of what goes over a link: the rest are the headers of TCP, IP and Ethernet
# Of the model: not known beforehand. docs/explanation/fan-out-times.md says where they are from.
_START_S, _NOTICE_S = 0.05, 0.1
# Each with the model of its time.
STRATEGIES = {
    "all_from_one": all_from_one,
    "complete_then_chain": complete_then_chain,
    "pipelined_chain": pipelined_chain,
}


@dataclass(frozen=True)
class Setting:
    nbytes: int  # of the weights
    mbit: float  # of each link, in either direction

    @property
    def fabric(self) -> Fabric:
        pace = chain_pace(self.nbytes)
        return Fabric(
            self.mbit * 1e6 / 8 * _PAYLOAD, _START_S, _NOTICE_S, pace.least * pace.chunk_nbytes
        )


@dataclass(frozen=True)
class Run:
    """Seconds until the last receiver has its weights; what the seed has sent meanwhile, in
    multiples of the weights; how much of the machine's CPU was in use, by any process. `killed_at`:
    one receiver was killed when that share of its weights had come, and does not count.
    """

    strategy: str
    receivers: int
    seconds: float
    seed_sent: float
    cpu: float
    exact: bool
    killed_at: float | None = None


def median_of(runs: Sequence[Run]) -> Run:
    def median(name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    return replace(
        runs[0],
        seconds=median("seconds"),
        seed_sent=median("seed_sent"),
        cpu=median("cpu"),
        exact=all(run.exact for run in runs),
    )


def on_paper(run: Run, setting: Setting) -> float:
    """Seconds that the model has for it."""
    return STRATEGIES[run.strategy](setting.fabric, setting.nbytes, run.receivers)
