"""What `engines verify` and `engines diff` share: the comparison, its options, and how it is
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from engine_cli.connection import Connect, etcd_options
from engine_cli.exits import Exit
from engine_cli.logs import log_options
from engine_cli.options import Command, engine_log, host_option, json_option
from engine_cli.render.comparisons import summary
from engine_cli.render.documents import comparison_json
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json
from engine_cli.runtime.loading import protocol_of, protocol_option
from engine_cli.signals import held_back, raised
from engine_registry.schema.record import GATEWAY

if TYPE_CHECKING:
    from engine_loader import Comparison

_OPTIONS = (
    host_option("Address of this machine."),
    protocol_option("How to read the digests; auto: the quickest way that there is."),
    json_option,
    log_options,
    etcd_options,
)


def comparing_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def compared(
    connect: Connect,
    instances: Sequence[str],
    host: str | None,
    protocol: str,
    files: str | None = None,
    with_replicas: bool = False,
) -> Comparison:
    """`with_replicas`: of one instance, also those that say that they hold the same."""
    with raised(), connect() as registry, engine_log():
        found = [record for name in instances for record in registry.resolve(name)]
        records = [record for record in found if record.kept_by != GATEWAY]  # they have no digests
        with held_back():
            from engine_loader import compare, open_engine
            from engine_loader.comparing.compare import same_content

        names = list(instances)
        if with_replicas:
            names += same_content(registry, found)
        with open_engine(
            host or registry.local_address(), protocol_of(protocol, records) if records else "tcp"
        ) as engine:
            return compare(registry, engine, names, files=files)


def report(
    comparison: Comparison, as_json: bool, show_differences: Callable[[Comparison], None]
) -> Exit:
    """Prints it; for people the differences, then what came of it. The exit code says it, too."""
    if as_json:
        print_json(comparison_json(comparison))
    else:
        show_differences(comparison)
        click.echo("\n".join(map(printable, summary(comparison))))
    return Exit.DONE if comparison.same else Exit.WEIGHTS
