"""`engines dashboard`."""

from __future__ import annotations

import logging

import click

from engine_cli.connection import Connect, etcd_options
from engine_cli.logs import log_options
from engine_cli.options import TOKEN_VARIABLE, gateway_token
from engine_cli.signals import stop_on_ending
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


@click.command("dashboard")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; 0.0.0.0 for all interfaces.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=6790,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@log_options
@etcd_options
def command(connect: Connect, host: str, port: int) -> None:
    """A page for a browser, until Ctrl-C or SIGTERM: all instances and ranks, who reads from whom
    and how far each load is, and what has happened since, with the reasons.

    It changes nothing. An etcd that is away is waited for, and the page says so.

    With ENGINES_GATEWAY_TOKEN in the environment the page asks for the token. Without it, everybody
    who reaches --host sees the page.
    """
    from engine_cli.dashboard.server import Dashboard  # it needs an extra

    with (
        connect() as registry,
        Dashboard(registry, host=host, port=port, token=gateway_token()) as dashboard,
    ):
        stop_on_ending(dashboard.stop)
        if dashboard.open_to_others:
            log.warning(
                "everybody who reaches %s sees the dashboard: set %s, or listen at 127.0.0.1",
                dashboard.url,
                TOKEN_VARIABLE,
                extra=fields("dashboard_open", url=dashboard.url),
            )
        click.echo(f"dashboard is ready at {dashboard.url}; Ctrl-C ends it")
        dashboard.wait()
