"""What `engines verify` and `engines diff` share: the comparison, its options and its exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from engine_cli.exits import Exit
from engine_cli.options import engine_log, host_option
from engine_cli.runtime.loading import AUTO, protocol_of
from engine_cli.signals import held_back, raised
from engine_cli.suggestions import near_instances
from engine_registry import RankRecord, Registry
from engine_registry.errors import InstanceNotFound
from engine_registry.schema.record import GATEWAY, PROTOCOLS

if TYPE_CHECKING:
    from engine_loader import Comparison

own_host_option = host_option("Address of this machine.")
protocol_option = click.option(
    "--protocol",
    type=click.Choice((AUTO, *PROTOCOLS)),
    default=AUTO,
    show_default=True,
    help="How to read the digests; auto: the quickest way that there is.",
)


def compared(
    connect: Callable[[], Registry],
    instances: Sequence[str],
    host: str | None,
    protocol: str,
    files: str | None = None,
    with_replicas: bool = False,
) -> Comparison:
    """`with_replicas`: also the instances that say that they hold the same as the first one."""
    with raised(), connect() as registry, engine_log():
        found = [record for name in instances for record in _resolved(registry, name)]
        records = [record for record in found if record.kept_by != GATEWAY]  # they have no digests
        with held_back():
            from engine_loader import MooncakeEngine, compare
            from engine_loader.comparing.compare import same_content

        names = list(instances)
        if with_replicas:
            names += same_content(registry, names[0])
        with MooncakeEngine(
            host or registry.local_address(), protocol_of(protocol, records) if records else "tcp"
        ) as engine:
            return compare(registry, engine, names, files=files)


def _resolved(registry: Registry, name: str) -> Sequence[RankRecord]:
    try:
        return registry.resolve(name)
    except InstanceNotFound as exc:
        hint = near_instances(registry, [name])
        raise InstanceNotFound(exc.what, hint or exc.remedy, **exc.details) from exc


def exit_of(comparison: Comparison) -> Exit:
    return Exit.DONE if comparison.same else Exit.WEIGHTS
