"""`engines watch`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import datetime

import click

from cli.options import etcd_options, json_option
from cli.output import event_json, event_text, print_json
from registry import Registry


@click.command("watch")
@click.argument("instance", required=False)
@json_option
@etcd_options
def command(connect: Callable[[], Registry], instance: str | None, as_json: bool) -> None:
    """Ranks and instances as they come and go, beginning with what is there now. Ends with Ctrl-C or SIGTERM.

    An etcd that is away is waited for; what changed meanwhile is shown when it is back.
    """
    with connect() as registry, registry.watch(instance) as watch:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: watch.stop())
        for event in watch:
            now = datetime.now().astimezone()
            if as_json:
                print_json({"at": now.isoformat(timespec="milliseconds"), **event_json(event)})
            else:
                click.echo(f"{now:%H:%M:%S}.{now.microsecond // 1000:03d}  {event_text(event)}")
