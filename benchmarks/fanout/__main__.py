"""`python -m benchmarks.fanout`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks import options
from benchmarks.fanout.bench import fan_out
from benchmarks.fanout.report import plot_of, report
from benchmarks.fanout.run import STRATEGIES, Run, Setting, median_of
from benchmarks.figures import say
from benchmarks.hosts import HostsUnavailable
from engine_cli.main import main
from engine_cli.signals import raised

_MOST_RECEIVERS = 64
_FRACTIONS = (0.25, 0.5, 0.75)


def measure(
    sizes: Sequence[int], setting: Setting, rounds: int, kills: int, say: Callable[[str], None]
) -> tuple[list[Run], list[Run]]:
    """Medians of the rounds; and every one of the loads in which a receiver was killed, `kills` at
    each of three moments.

    HostsUnavailable where no hosts can be made.
    """
    runs: list[Run] = []
    killed: list[Run] = []
    with fan_out(max(sizes), setting) as bench:
        for number in sizes:
            for strategy in STRATEGIES:
                say(f"{strategy.replace('_', ' ')}, {number} receivers")
                runs.append(median_of([bench.run(strategy, number) for _ in range(rounds)]))
        for at in _FRACTIONS:
            for _ in range(kills if max(sizes) > 1 else 0):
                say(f"one of {max(sizes)} killed at {at:.0%}")
                killed.append(bench.run("pipelined_chain", max(sizes), at))
    return runs, killed


@options.program
@options.numbers("--receivers", default="1,2,4,8", help="How many load at once.")
@options.option("--mib", type=click.IntRange(4), default=128, help="Size of the weights.")
@options.option(
    "--mbit", type=click.FloatRange(1), default=200, help="Speed of each link, in Mbit/s."
)
@options.rounds(1)
@options.option(
    "--kills", type=click.IntRange(0), default=1, help="Of a receiver, at each of 25, 50, 75 %."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE.svg",
    help="Draw the times, too.",
)
def command(
    receivers: str, mib: int, mbit: float, rounds: int, kills: int, plot: str | None, as_json: bool
) -> None:
    """One rank to several receivers on separate hosts: from one source, from complete ones, in
    a chain. Takes minutes.

    The hosts are network namespaces with links of limited speed: that needs root, and the programs
    ip and tc. Choose speed and size so that the CPU, which the table shows, does not limit.
    """

    sizes = sorted(set(options.list_of("--receivers", receivers)))
    if not all(1 <= size <= _MOST_RECEIVERS for size in sizes):
        raise click.UsageError(
            f"--receivers {receivers!r} is not valid: give numbers from 1 to {_MOST_RECEIVERS}"
        )
    setting = Setting(mib << 20, mbit)
    with raised():
        try:
            runs, killed = measure(sizes, setting, rounds, kills, say)
        except HostsUnavailable as exc:
            raise click.ClickException(str(exc)) from exc
    report(runs, killed, setting, as_json)
    if plot is not None:
        Path(plot).write_text(plot_of(runs, setting))


if __name__ == "__main__":
    main(command, "benchmarks.fanout")
