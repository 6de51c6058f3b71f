"""`engines list`."""

from __future__ import annotations

from collections.abc import Callable

import click

from engine_cli.connection import etcd_options
from engine_cli.options import json_option
from engine_cli.render.documents import instance_json, loading_json
from engine_cli.render.flows import Flows
from engine_cli.render.tables import print_json, print_table
from engine_cli.render.texts import INSTANCE_COLUMNS, instance_row
from engine_registry import InstanceStatus, RankState, Registry
from engine_registry.errors import EtcdRefused


@click.command("list")
@json_option
@etcd_options
def command(connect: Callable[[], Registry], as_json: bool) -> None:
    """All instances: state, ranks present of expected, model, version, size, and why one is not
    ready.
    """
    with connect() as registry:
        statuses = registry.instances()
        flows = _flows(registry, statuses)
    if as_json:
        print_json(
            {
                "instances": [
                    {**instance_json(status), "loading": loading_json(status, flows)}
                    for status in statuses
                ]
            }
        )
    elif statuses:
        print_table(
            INSTANCE_COLUMNS, [instance_row(status, flows.loaded(status)) for status in statuses]
        )
    else:
        click.echo("no instance is registered")


def _flows(registry: Registry, statuses: tuple[InstanceStatus, ...]) -> Flows:
    """Asks for tickets only where there is a rank whose progress they state.

    Who may not see them sees the rest.
    """
    records = [record for status in statuses for record in status.records]
    loading = any(record.state is RankState.LOADING for record in records)
    try:
        return Flows(records, registry.all_pulls() if loading else ())
    except EtcdRefused:
        return Flows(records, ())
