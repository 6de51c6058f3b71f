"""One rank's weights to several receivers at once, each on a separate host behind a link of limited
speed.

Three ways in the same run: all read from the seed; a receiver serves others as soon as it is
complete; a receiver serves others what it has by then. Then receivers of the third way are killed
in the middle. The bytes of all are compared with the seed's.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.fanout import rank
from benchmarks.fanout.receiver import Receiver
from benchmarks.fanout.run import Run, Setting
from benchmarks.hosts import Host, Network, etcd_on
from benchmarks.processes import another_process


class Bench:
    """The seed, and as many receivers as are wanted at most."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        seed: Host,
        digest: str,
        receivers: Sequence[Receiver],
        nbytes: int,
    ) -> None:
        self._pool = pool
        self._seed = seed
        self._digest = digest
        self._receivers = receivers
        self._nbytes = nbytes

    def run(self, strategy: str, number: int, killed_at: float | None = None) -> Run:
        receivers = self._receivers[:number]
        self._each(receivers, Receiver.begin)
        sent, cpu, start = self._seed.sent_nbytes, _Cpu(), time.monotonic()
        if killed_at is not None:
            ended = self._in_chain(receivers, random.choice(receivers), killed_at)  # noqa: S311  nothing secret about it
        else:
            ended = _LOADS[strategy](self, receivers)
        busy = cpu.share()
        sent = self._seed.sent_nbytes - sent
        digests = [
            digest for digest in self._each(receivers, Receiver.digest) if digest is not None
        ]
        self._each(receivers, Receiver.end)
        exact = set(digests) == {self._digest} and len(digests) == len(ended) == number - (
            killed_at is not None
        )
        return Run(
            strategy, number, max(ended) - start, sent / self._nbytes, busy, exact, killed_at
        )

    def _each(self, receivers: Sequence[Receiver], action: Callable[[Receiver], Any]) -> list[Any]:
        return list(self._pool.map(action, receivers))

    def _from_one(self, receivers: Sequence[Receiver]) -> list[float]:
        return self._each(receivers, lambda receiver: receiver.load(rank.SEED))

    def _complete_then_chain(self, receivers: Sequence[Receiver]) -> list[float]:
        """Each source serves one at a time."""
        idle, waiting, ended = deque([rank.SEED]), deque(receivers), []
        running: dict[Future[float | None], tuple[str, Receiver]] = {}
        while waiting or running:
            while idle and waiting:
                source, receiver = idle.popleft(), waiting.popleft()
                running[self._pool.submit(receiver.load, source)] = source, receiver
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                source, receiver = running.pop(done)
                ended.append(done.result() or 0.0)
                idle += [source, receiver.name]
        return ended

    def _in_chain(
        self, receivers: Sequence[Receiver], victim: Receiver | None = None, at: float | None = None
    ) -> list[float]:
        ended = self._each(
            receivers, lambda receiver: receiver.load(None, at if receiver is victim else None)
        )
        return [when for when in ended if when is not None]


_LOADS: dict[str, Callable[[Bench, Sequence[Receiver]], list[float]]] = {
    "all_from_one": Bench._from_one,
    "complete_then_chain": Bench._complete_then_chain,
    "pipelined_chain": Bench._in_chain,
}


class _Cpu:
    """How much of all cores has been in use, by any process, since it was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[int, int]:
        times = [
            int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ]
        return sum(times), times[3] + times[4]

    def share(self) -> float:
        (all_before, idle_before), (all_now, idle_now) = self._before, self._now()
        return 1 - (idle_now - idle_before) / max(1, all_now - all_before)


@contextmanager
def fan_out(receivers: int, setting: Setting) -> Iterator[Bench]:
    with ThreadPoolExecutor(receivers) as pool, Network() as network, ExitStack() as stack:
        endpoint = stack.enter_context(etcd_on(network.host("control")))
        seed = network.host("seed", setting.mbit)
        command = (endpoint, seed.address, str(setting.nbytes))
        _, digest = stack.enter_context(
            another_process(rank.__name__, "seed", *command, within=seed.command)
        )
        hosts = [network.host(f"receiver-{number}", setting.mbit) for number in range(receivers)]
        loading = [Receiver(host, endpoint, setting.nbytes) for host in hosts]
        for receiver in loading:
            stack.callback(receiver.close)
        yield Bench(pool, seed, digest, loading, setting.nbytes)
