"""`engines verify`."""

from __future__ import annotations

from collections.abc import Callable

import click

from engine_cli.completion import complete_instances
from engine_cli.connection import etcd_options
from engine_cli.exits import Exit
from engine_cli.logs import log_options
from engine_cli.options import json_option
from engine_cli.render.comparisons import difference_line, summary
from engine_cli.render.documents import comparison_json
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json
from engine_cli.runtime.comparing import (
    compared,
    exit_of,
    own_host_option,
    protocol_option,
)
from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance


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
@own_host_option
@protocol_option
@json_option
@log_options
@etcd_options
def command(
    connect: Callable[[], Registry],
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
    if as_json:
        print_json(comparison_json(comparison))
    else:
        for difference in comparison.differences:
            click.echo(printable(difference_line(difference)))
        click.echo("\n".join(map(printable, summary(comparison))))
    return exit_of(comparison)
