"""`engines verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from engine_cli.completion import complete_instances
from engine_cli.connection import Connect
from engine_cli.exits import Exit
from engine_cli.render.comparisons import difference_line
from engine_cli.render.printable import printable
from engine_cli.runtime.comparing import compared, comparing_options, report
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance

if TYPE_CHECKING:
    from engine_loader import Comparison


@click.command("verify")
@click.argument(
    "instances",
    metavar="INSTANCE…",
    nargs=-1,
    required=True,
    shell_complete=complete_instances,
)
@click.option(
    "--against",
    "files",
    type=click.Path(),
    metavar="FILE_OR_DIR",
    help="Safetensors file, index, or folder of them: compare the first INSTANCE with these.",
)
@comparing_options
def command(
    connect: Connect,
    instances: tuple[str, ...],
    files: str | None,
    host: str | None,
    protocol: str,
    as_json: bool,
) -> Exit:
    """Whether ranks that should hold the same do, by the digests that they publish. No weights are
    copied.

    All INSTANCEs are compared with each other, and with the files of --against. One INSTANCE alone
    is compared with those that say that they hold the same content. Ranks of one instance are
    compared where several hold the same part of a tensor.

    The exit code is 0 if all of it is the same, and 5 if something differs, or if digests do not
    prove it.
    """
    for instance in instances:
        check_instance(instance)
    alone = len(instances) == 1 and files is None
    comparison = compared(connect, instances, host, protocol, files, with_replicas=alone)
    if alone and comparison.same and comparison.tensors and not comparison.compared:
        raise InvalidField(
            f"no other rank holds what {instances[0]} holds, so there is nothing to compare",
            "name another INSTANCE, or say --against FOLDER",
            field="instances",
        )
    return report(comparison, as_json, _print_lines)


def _print_lines(comparison: Comparison) -> None:
    for difference in comparison.differences:
        click.echo(printable(difference_line(difference)))
