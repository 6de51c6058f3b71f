"""`engines diff`."""

from __future__ import annotations

from collections.abc import Callable

import click

from engine_cli.completion import complete_instances
from engine_cli.connection import etcd_options
from engine_cli.exits import Exit
from engine_cli.logs import log_options
from engine_cli.options import json_option
from engine_cli.render.comparisons import difference_row, summary
from engine_cli.render.documents import comparison_json
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json, print_table
from engine_cli.runtime.comparing import (
    compared,
    exit_of,
    own_host_option,
    protocol_option,
)
from engine_registry import Registry
from engine_registry.schema.keys import check_instance


@click.command("diff")
@click.argument("one", metavar="INSTANCE", shell_complete=complete_instances)
@click.argument("other", metavar="INSTANCE", shell_complete=complete_instances)
@own_host_option
@protocol_option
@json_option
@log_options
@etcd_options
def command(
    connect: Callable[[], Registry],
    one: str,
    other: str,
    host: str | None,
    protocol: str,
    as_json: bool,
) -> Exit:
    """The tensors in which two instances differ: by name, dtype, shape, or the digests of their
    bytes. No weights are copied.

    The exit code is 0 if they are proven to hold the same, and 5 if they differ, or if digests do
    not prove it.
    """
    check_instance(one)
    check_instance(other)
    comparison = compared(connect, [one, other], host, protocol)
    if as_json:
        print_json(comparison_json(comparison))
    else:
        if comparison.differences:
            rows = [difference_row(each, comparison.sides) for each in comparison.differences]
            print_table(("DIFFERS", "TENSOR", *comparison.sides), rows)
        click.echo("\n".join(map(printable, summary(comparison))))
    return exit_of(comparison)
