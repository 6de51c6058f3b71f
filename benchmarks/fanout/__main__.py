"""`python -m benchmarks.fanout`."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks import figures
from benchmarks.fanout import run
from benchmarks.hosts import HostsUnavailable
from engine_cli.main import main
from engine_cli.signals import raised

_MOST_RECEIVERS = 64


@figures.program
@click.option(
    "--receivers",
    default="1,2,4,8",
    show_default=True,
    metavar="N[,N…]",
    help="How many load at once.",
)
@click.option(
    "--mib", type=click.IntRange(min=4), default=128, show_default=True, help="Size of the weights."
)
@click.option(
    "--mbit",
    type=click.FloatRange(min=1),
    default=200,
    show_default=True,
    help="Speed of each link, in Mbit/s.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of each measurement; the median counts.",
)
@click.option(
    "--kills",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of a receiver, at each of 25, 50, 75 %.",
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

    sizes = sorted(set(figures.numbers("--receivers", receivers)))
    if not all(1 <= size <= _MOST_RECEIVERS for size in sizes):
        raise click.UsageError(
            f"--receivers {receivers!r} is not valid: give numbers from 1 to {_MOST_RECEIVERS}"
        )
    setting = run.Setting(mib << 20, mbit)
    with raised():
        try:
            runs, killed = run.measure(sizes, setting, rounds, kills, figures.say)
        except HostsUnavailable as exc:
            raise click.ClickException(str(exc)) from exc
    run.report(runs, killed, setting, as_json)
    if plot is not None:
        Path(plot).write_text(run.plot(runs, setting))


if __name__ == "__main__":
    main(command, "benchmarks.fanout")
