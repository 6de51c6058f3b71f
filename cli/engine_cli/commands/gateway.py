"""`engines gateway`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import click

from engine_cli.connection import Connect, etcd_options
from engine_cli.logs import log_options
from engine_cli.options import TTL, WORLD_SIZE, Seconds, gateway_token
from engine_cli.signals import stop_on_ending
from engine_registry import Registry
from engine_registry.errors import MetricsUnavailable
from engine_registry.schema.numbers import MAX_TTL_S
from engine_registry.telemetry import metrics
from engine_registry.watching.metrics import WatchMetrics


@click.command("gateway")
@click.option(
    "--instance",
    required=True,
    metavar="NAME",
    help="Which instance the paths without a name serve.",
)
@click.option(
    "--world-size",
    type=WORLD_SIZE,
    default=1,
    show_default=True,
    help="Its number of ranks, which SGLang's seeds do not state.",
)
@click.option("--model", help="Its model name. Default: the instance's name.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; 0.0.0.0 for all interfaces.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=6789,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@click.option(
    "--ttl",
    type=TTL,
    default=60.0,
    show_default=True,
    metavar="S",
    help="How long the ranks of seeds stay listed while no gateway runs.",
)
@click.option(
    "--probe-interval",
    type=Seconds(min_open=True, max=MAX_TTL_S / 3),
    default=2.0,
    show_default=True,
    metavar="S",
    help="How often each seed is looked at: at most every third of --ttl.",
)
@click.option(
    "--probe-tolerance",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help=("Looks in a row without any answer after which this gateway leaves a seed to others."),
)
@click.option(
    "--connections-per-address",
    type=click.IntRange(min=1),
    default=250,
    show_default=True,
    metavar="N",
    help="Connections, and so requests, that one client address may have at once.",
)
@click.option(
    "--allow-anonymous",
    is_flag=True,
    help="Without a token, let clients register over the network too, not only over loopback.",
)
@click.option(
    "--seed",
    metavar="URL",
    help="Register what this server of SGLang's knows of its ranks: http://HOST:PORT.",
)
@log_options
@etcd_options
def command(
    connect: Connect,
    instance: str,
    world_size: int,
    model: str | None,
    host: str,
    port: int,
    ttl: float,
    probe_interval: float,
    probe_tolerance: int,
    connections_per_address: int,
    allow_anonymous: bool,
    seed: str | None,
) -> None:
    """Speak SGLang's HTTP interface over the registry, until Ctrl-C or SIGTERM, so that its seeds
    and clients work unchanged.

    Any number of gateways serve the same ranks. A rank that registers here is kept while its
    transfer engine's port answers any gateway, and ends when that refuses connections. Every path
    is there for every instance under /instances/NAME too.

    With ENGINES_GATEWAY_TOKEN in the environment, requests need the header `Authorization: Bearer
    TOKEN`, except for /health. Without it, clients may register only if --host is a loopback
    address, or with
    --allow-anonymous: a registration makes the gateway connect to any address that it names.
    """
    from engine_registry.gateway.limits import Limits
    from engine_registry.gateway.server import Gateway  # it needs an extra

    with (
        connect() as registry,
        _counted(registry),
        Gateway(
            registry,
            instance,
            world_size=world_size,
            model=model,
            host=host,
            port=port,
            ttl_s=ttl,
            probe_interval_s=probe_interval,
            probe_tolerance=probe_tolerance,
            token=gateway_token(),
            allow_anonymous=allow_anonymous,
            seed_url=seed,
            limits=Limits(connections_per_address=connections_per_address),
        ) as gateway,
    ):
        stop_on_ending(gateway.stop)
        click.echo(f"gateway of {instance} is ready at {gateway.url}; Ctrl-C ends it")
        gateway.wait()


@contextmanager
def _counted(registry: Registry) -> Iterator[None]:
    """For /metrics, where what counts is installed: ranks and losses, of all instances."""
    with ExitStack() as stack:
        try:
            stack.enter_context(metrics.counting())
        except MetricsUnavailable:
            yield
            return
        counted = WatchMetrics()
        stack.callback(counted.close)
        watch = stack.enter_context(registry.watch())
        watch.call(counted.see)
        yield
