"""`engines bench`."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import debug_option, engine_log, json_option
from cli.signals import raised

_MOST_RECEIVERS = 64


@click.group("bench")
def command() -> None:
    """Measure this machine: loading, also into other layouts, between GPUs or to many at once, the control plane, or the gateway.

    Baselines are measured beside, in the same run. Starts an etcd and processes of its own on 127.0.0.1.
    """


@command.command("load")
@click.option("--gib", type=click.FloatRange(min=0.001), default=2.0, show_default=True, help="Size of the rank that is loaded.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of each measurement; the median counts.")
@json_option
@debug_option
def load(gib: float, rounds: int, as_json: bool) -> None:
    """Loading over tcp: one source and two, long and short tensors, faults. Takes minutes."""
    from cli.bench import figures, loading

    with engine_log():
        figures.report(loading.measure(gib, rounds, _say), as_json)


@command.command("reshard")
@click.option("--gib", type=click.FloatRange(min=0.001), default=1.0, show_default=True, help="Size of the weights.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of each measurement; the median counts.")
@json_option
@debug_option
def reshard(gib: float, rounds: int, as_json: bool) -> None:
    """Loading into another layout, and torch's distributed checkpoint. Takes minutes."""
    from cli.bench import figures, resharding

    with engine_log():
        figures.report(resharding.measure(gib, rounds, _say), as_json)


@command.command("registry")
@click.option("--ranks", default="64,1024,10000", show_default=True, metavar="N[,N…]", help="How many simulated ranks.")
@click.option("--kills", type=click.IntRange(min=1), default=100, show_default=True, help="Of processes of ranks.")
@click.option("--leader-kills", type=click.IntRange(min=1), default=20, show_default=True, help="Of the leader of three etcds.")
@json_option
@debug_option
def registry(ranks: str, kills: int, leader_kills: int, as_json: bool) -> None:
    """The control plane: register, resolve, list, watch, deaths, outages. Takes minutes."""
    from cli.bench import control_plane, figures

    figures.report(control_plane.measure(_numbers("--ranks", ranks), kills, leader_kills, _say), as_json)


@command.command("gateway")
@click.option("--clients", type=click.IntRange(min=2), default=32, show_default=True, help="That ask at once, in two processes.")
@click.option("--requests", type=click.IntRange(min=10), default=10_000, show_default=True, help="Of each kind.")
@click.option("--ranks", type=click.IntRange(min=1), default=2000, show_default=True, help="Seeds that the gateway keeps.")
@json_option
@debug_option
def gateway(clients: int, requests: int, ranks: int, as_json: bool) -> None:
    """SGLang's HTTP interface: answers, mixed requests, registrations, the cost of probing. Takes a minute or two."""
    from cli.bench import figures
    from cli.bench import gateway as gateways

    figures.report(gateways.measure(clients, requests, ranks, _say), as_json)


@command.command("gpu")
@click.option("--only", default="", metavar="PART[,…]", help="Of the parts that --help lists.")
@click.option("--scale", type=click.FloatRange(0.0001, 1), default=1.0, show_default=True, help="How many of the tensors.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Of each measurement; the median counts.")
@click.option("--profile", is_flag=True, help="Show which steps and functions of load() take how long.")
@json_option
@debug_option
def gpu(only: str, scale: float, rounds: int, profile: bool, as_json: bool) -> None:
    """From GPU to GPU of one host: needs two, and NVLink or PCIe between them. Takes minutes.

    \b
    Parts: the sets of tensors
      mixed          256 of 32 MiB and 2,000 of 8 KiB
      large          256 of 32 MiB
      llama-70b-tp8  what a rank of Llama 3 70B holds at tp=8, bf16
      small          20,000 of 16 KiB
    of which load() takes turns with torch's copies and naive calls of the transfer engine; and
      nccl           send and receive, for each set
      host           pinned memory and a safetensors file, for mixed
      failover       two sources, one of which is killed
      fan-out        several processes load from one
      reshard        tp 2→1 and 1→2, by rows and by columns
    """
    from cli.bench.gpu import run

    parts = {part for part in only.split(",") if part}
    if parts - set(run.PARTS):
        raise click.UsageError(f"--only {only!r} is not valid: it is some of {', '.join(run.PARTS)}")
    devices = run.gpus()
    results = run.Results()
    with engine_log(), raised():
        try:
            run.measure(results, devices, parts, scale, rounds, profile, _say)
        finally:  # minutes of a GPU's time are not lost with what failed after them
            if results.rows:
                run.report(results, as_json, profile)


@command.command("fanout")
@click.option("--receivers", default="1,2,4,8", show_default=True, metavar="N[,N…]", help="How many load at once.")
@click.option("--mib", type=click.IntRange(min=4), default=128, show_default=True, help="Size of the weights.")
@click.option("--mbit", type=click.FloatRange(min=1), default=200, show_default=True, help="Speed of each link, in Mbit/s.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Of each measurement; the median counts.")
@click.option("--kills", type=click.IntRange(min=0), default=1, show_default=True, help="Of a receiver, at each of 25, 50, 75 %.")
@click.option("--plot", type=click.Path(dir_okay=False, writable=True), metavar="FILE.svg", help="Draw the times, too.")
@json_option
@debug_option
def fanout(receivers: str, mib: int, mbit: float, rounds: int, kills: int, plot: str | None, as_json: bool) -> None:
    """One rank to several receivers on hosts of their own: from one source, from complete ones, in a chain. Takes minutes.

    The hosts are network namespaces with links of limited speed: that needs root, and the programs ip and tc. Choose speed and size
    so that the CPU, which the table tells, does not limit.
    """
    from cli.bench import fanout
    from cli.bench.hosts import HostsUnavailable

    sizes = sorted(set(_numbers("--receivers", receivers)))
    if not all(1 <= size <= _MOST_RECEIVERS for size in sizes):
        raise click.UsageError(f"--receivers {receivers!r} is not valid: give numbers from 1 to {_MOST_RECEIVERS}")
    setting = fanout.Setting(mib << 20, mbit)
    with raised():
        try:
            runs, killed = fanout.measure(sizes, setting, rounds, kills, _say)
        except HostsUnavailable as exc:
            raise click.ClickException(str(exc)) from exc
    fanout.report(runs, killed, setting, as_json)
    if plot is not None:
        Path(plot).write_text(fanout.plot(runs, setting))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as exc:
        raise click.UsageError(f"{option} {text!r} is not valid: give whole numbers, such as 1,2,8") from exc


def _say(what: str) -> None:
    click.echo(f"measuring: {what}", err=True)
