"""One rank's weights to several receivers at once, each on a separate host behind a link of limited
speed.

Three ways in the same run: all read from the seed; a receiver serves others as soon as it is
complete; a receiver serves others what it has by then. Then receivers of the third way are killed
in the middle. Everybody's bytes are compared with the seed's.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.fanout.model import Fabric, all_from_one, complete_then_chain, pipelined_chain
from benchmarks.fanout.plot import svg
from benchmarks.fanout.rank import SEED, chain_pace
from benchmarks.figures import another_process, call, machine
from benchmarks.hosts import Host, Network, etcd_on
from engine_cli.render.tables import print_json, print_table

_RANK = "benchmarks.fanout.rank"
_FRACTIONS = (0.25, 0.5, 0.75)
_PAYLOAD = 1448 / 1514  # of what goes over a link: the rest are the headers of TCP, IP and Ethernet
# Of the model: not known beforehand. docs/explanation/fan-out-times.md says where they are from.
_START_S, _NOTICE_S = 0.05, 0.1


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
    multiples of the weights; how much of the machine's CPU was in use, by whomever. `killed_at`:
    one receiver was killed when that share of its weights had come, and does not count.
    """

    strategy: str
    receivers: int
    seconds: float
    seed_sent: float
    cpu: float
    exact: bool
    killed_at: float | None = None


class Receiver:
    """A host, and a process there that loads; another one if that has been killed."""

    def __init__(self, host: Host, endpoint: str, setting: Setting) -> None:
        self.name = host.name
        self._host = host
        self._command = call(
            _RANK, "receive", endpoint, host.address, host.name, str(setting.nbytes)
        )
        self._process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        if self._process is None:
            self._process = self._host.popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        if self._ask() is None:
            raise click.ClickException(f"{self.name} did not start")

    def load(self, source: str | None, die_at: float | None = None) -> float | None:
        """From the instance named, or else in the chain: when it had all, or None where it was to
        die.
        """
        answer = self._ask(source=source, die_at=die_at)
        if answer is None and die_at is None:
            raise click.ClickException(f"{self.name} has ended in the middle of a load")
        return None if answer is None else float(answer["ended"])

    def digest(self) -> str | None:
        """Of what it has; None if it has died."""
        answer = self._ask()
        return None if answer is None else str(answer["digest"])

    def end(self) -> None:
        self._ask()

    def _ask(self, **order: object) -> dict[str, Any] | None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        try:
            process.stdin.write(f"{json.dumps(order)}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process = None
            process.communicate()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """However long it would go on loading."""
        self._host.vanish()
        if self._process is not None:
            self._process.communicate()


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
            ended = _STRATEGIES[strategy](self, receivers)
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
        return self._each(receivers, lambda receiver: receiver.load(SEED))

    def _complete_then_chain(self, receivers: Sequence[Receiver]) -> list[float]:
        """Each source serves one at a time."""
        idle, waiting, ended = deque([SEED]), deque(receivers), []
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


_STRATEGIES: dict[str, Callable[[Bench, Sequence[Receiver]], list[float]]] = {
    "all_from_one": Bench._from_one,
    "complete_then_chain": Bench._complete_then_chain,
    "pipelined_chain": Bench._in_chain,
}
_MODELS = {
    "all_from_one": all_from_one,
    "complete_then_chain": complete_then_chain,
    "pipelined_chain": pipelined_chain,
}


class _Cpu:
    """How much of all cores has been in use, by whomever, since it was made."""

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
def _bench(receivers: int, setting: Setting) -> Iterator[Bench]:
    with ThreadPoolExecutor(receivers) as pool, Network() as network, ExitStack() as stack:
        endpoint = stack.enter_context(etcd_on(network.host("control")))
        seed = network.host("seed", setting.mbit)
        command = (endpoint, seed.address, str(setting.nbytes))
        _, digest = stack.enter_context(
            another_process(_RANK, "seed", *command, within=seed.command)
        )
        hosts = [network.host(f"receiver-{number}", setting.mbit) for number in range(receivers)]
        loading = [Receiver(host, endpoint, setting) for host in hosts]
        for receiver in loading:
            stack.callback(receiver.close)
        yield Bench(pool, seed, digest, loading, setting.nbytes)


def measure(
    sizes: Sequence[int], setting: Setting, rounds: int, kills: int, say: Callable[[str], None]
) -> tuple[list[Run], list[Run]]:
    """Medians of the rounds; and every one of the loads in which a receiver was killed, `kills` at
    each of three moments.

    HostsUnavailable where no hosts can be made.
    """
    runs: list[Run] = []
    killed: list[Run] = []
    with _bench(max(sizes), setting) as bench:
        for number in sizes:
            for strategy in _STRATEGIES:
                say(f"{strategy.replace('_', ' ')}, {number} receivers")
                runs.append(_middle([bench.run(strategy, number) for _ in range(rounds)]))
        for at in _FRACTIONS:
            for _ in range(kills if max(sizes) > 1 else 0):
                say(f"one of {max(sizes)} killed at {at:.0%}")
                killed.append(bench.run("pipelined_chain", max(sizes), at))
    return runs, killed


def _middle(runs: Sequence[Run]) -> Run:
    def median(name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    exact = all(run.exact for run in runs)
    return Run(
        runs[0].strategy,
        runs[0].receivers,
        median("seconds"),
        median("seed_sent"),
        median("cpu"),
        exact,
    )


def on_paper(run: Run, setting: Setting) -> float:
    """Seconds that the model has for it."""
    return _MODELS[run.strategy](setting.fabric, setting.nbytes, run.receivers)


def report(runs: Sequence[Run], killed: Sequence[Run], setting: Setting, as_json: bool) -> None:
    rows = [asdict(run) | {"seconds_on_paper": on_paper(run, setting)} for run in runs]
    undisturbed = runs[-1].seconds  # the longest chain comes last
    losses = [asdict(run) | {"added_seconds": run.seconds - undisturbed} for run in killed]
    if as_json:
        print_json(
            {
                "machine": machine(),
                "setting": asdict(setting),
                "results": _rounded(rows),
                "kills": _rounded(losses),
            }
        )
        return
    ones = {run.strategy: run.seconds for run in runs if run.receivers == 1}
    print_table(
        ("STRATEGY", "RECEIVERS", "SECONDS", "ON PAPER", "× ONE", "SEED SENT", "CPU", "EXACT"),
        [
            (
                run.strategy.replace("_", " "),
                str(run.receivers),
                f"{run.seconds:.2f}",
                f"{on_paper(run, setting):.2f}",
                f"{run.seconds / ones[run.strategy]:.2f}" if run.strategy in ones else "",
                f"{run.seed_sent:.2f} ×",
                f"{run.cpu:.0%}",
                "yes" if run.exact else "NO",
            )
            for run in runs
        ],
    )
    if not killed:
        return
    click.echo()
    print_table(
        ("ONE KILLED AT", "SECONDS", "ADDED", "SEED SENT", "EXACT"),
        [
            (
                f"{run.killed_at:.0%}",
                f"{run.seconds:.2f}",
                f"{run.seconds - undisturbed:+.2f}",
                f"{run.seed_sent:.2f} ×",
                "yes" if run.exact else "NO",
            )
            for run in killed
        ],
    )


def _rounded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def plot(runs: Sequence[Run], setting: Setting) -> str:
    """As SVG."""
    lines = {
        strategy.replace("_", " "): [
            (run.receivers, run.seconds, on_paper(run, setting))
            for run in runs
            if run.strategy == strategy
        ]
        for strategy in _STRATEGIES
    }
    return svg(
        f"{setting.nbytes / 1e6:.0f} MB to N receivers, links of {setting.mbit:g} Mbit/s", lines
    )
