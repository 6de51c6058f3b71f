"""`engines bench`."""

from __future__ import annotations

import click

from cli.options import debug_option, engine_log, json_option


@click.group("bench")
def command() -> None:
    """Measure this machine: loading, also into other layouts, the control plane, or the gateway, beside baselines in the same run.

    Starts an etcd and processes of its own on 127.0.0.1.
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

    try:
        sizes = [int(size) for size in ranks.split(",")]
    except ValueError as exc:
        raise click.UsageError(f"--ranks {ranks!r} is not valid: give whole numbers, such as 64,1024") from exc
    figures.report(control_plane.measure(sizes, kills, leader_kills, _say), as_json)


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


def _say(what: str) -> None:
    click.echo(f"measuring: {what}", err=True)
