"""`engines diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from engine_cli.completion import complete_instances
from engine_cli.connection import Connect
from engine_cli.exits import Exit
from engine_cli.render.comparisons import difference_row
from engine_cli.render.tables import print_table
from engine_cli.runtime.comparing import compared, comparing_options, report
from engine_registry.schema.keys import check_instance

if TYPE_CHECKING:
    from engine_loader import Comparison


@click.command("diff")
@click.argument("one", metavar="INSTANCE", shell_complete=complete_instances)
@click.argument("other", metavar="INSTANCE", shell_complete=complete_instances)
@comparing_options
def command(
    connect: Connect,
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
    return report(compared(connect, [one, other], host, protocol), as_json, _print_table)


def _print_table(comparison: Comparison) -> None:
    if comparison.differences:
        rows = [difference_row(each, comparison.sides) for each in comparison.differences]
        print_table(("DIFFERS", "TENSOR", *comparison.sides), rows)
