"""`engines list`."""

from __future__ import annotations

from collections.abc import Callable

import click

from cli.options import etcd_options, json_option
from cli.output import INSTANCE_COLUMNS, instance_json, instance_row, print_json, print_table
from registry import Registry


@click.command("list")
@json_option
@etcd_options
def command(connect: Callable[[], Registry], as_json: bool) -> None:
    """All instances: state, ranks present of expected, model, version, size, and why one is not ready."""
    with connect() as registry:
        statuses = registry.instances()
    if as_json:
        print_json({"instances": [instance_json(status) for status in statuses]})
    elif statuses:
        print_table(INSTANCE_COLUMNS, [instance_row(status) for status in statuses])
    else:
        click.echo("no instance is registered")
