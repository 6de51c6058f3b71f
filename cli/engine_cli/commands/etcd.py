"""`engines etcd`."""

from __future__ import annotations

import threading

import click

from engine_cli.options import debug_option
from engine_cli.signals import on_ending, raised


@click.command("etcd")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=2379,
    show_default=True,
    help="Port on 127.0.0.1.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False),
    help="Keep the data here; without it, it goes at the end.",
)
@debug_option
def command(port: int, data_dir: str | None) -> None:
    """Run an etcd on 127.0.0.1 until Ctrl-C or SIGTERM, for trying things out.

    Not for production: use etcd 3.6 there.
    """
    from engine_registry.etcd.local import LocalEtcd

    stop = threading.Event()
    with raised(), LocalEtcd(port, data_dir) as etcd:
        on_ending(stop.set)
        click.echo(f"etcd is ready at {etcd.endpoint} (data in {etcd.data_dir}); Ctrl-C ends it")
        while not stop.wait(0.5):
            etcd.check_running()
    click.echo("etcd has ended")
