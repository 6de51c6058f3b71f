"""`engines list`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from engine_cli.completion import complete_models
from engine_cli.connection import Connect, etcd_options
from engine_cli.options import json_option, selector_option
from engine_cli.render.documents import instance_json, loading_json
from engine_cli.render.flows import Flows
from engine_cli.render.states import UNRESPONSIVE, any_loads, state_of
from engine_cli.render.tables import print_json, print_table
from engine_cli.render.texts import instance_table
from engine_registry import InstanceStatus, Registry
from engine_registry.errors import EtcdRefused
from engine_registry.schema.labels import Selector

STATES = ("ready", "degraded", "loading", UNRESPONSIVE)
ORDERS: dict[str, Callable[[InstanceStatus], Any]] = {
    "name": lambda status: 0,  # as they come
    "model": lambda status: str(status.model),
    "version": lambda status: -1 if status.version is None else status.version,
    "size": lambda status: -status.nbytes,
}


@click.command("list")
@click.option(
    "--model",
    metavar="NAME[@REVISION]",
    shell_complete=complete_models,
    help="Instances of this model only.",
)
@selector_option
@click.option("--state", type=click.Choice(STATES), help="Instances in this state only.")
@click.option(
    "--sort",
    "order",
    type=click.Choice(list(ORDERS)),
    default="name",
    show_default=True,
    help="In which order; size: the largest first.",
)
@json_option
@etcd_options
def command(
    connect: Connect,
    model: str | None,
    selector: str,
    state: str | None,
    order: str,
    as_json: bool,
) -> None:
    """All instances: state, ranks present of expected, model, version, size, and why one is not
    ready.
    """
    chosen = Selector.parse(selector)
    with connect() as registry:
        found = registry.instances()
        statuses = tuple(
            sorted(
                [
                    status
                    for status in found
                    if chosen.matches(status.labels) and _is_wanted(status, model, state)
                ],
                key=ORDERS[order],
            )
        )
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
        print_table(*instance_table([(status, flows.loaded(status)) for status in statuses]))
    elif found:
        click.echo(f"no instance matches (registered: {len(found):,})")
    else:
        click.echo("no instance is registered")


def _is_wanted(status: InstanceStatus, model: str | None, state: str | None) -> bool:
    names = {status.model.name, str(status.model)} if status.model else set()
    is_in = state is None or state_of(status) == state
    return is_in and (model is None or model in names)


def _flows(registry: Registry, statuses: tuple[InstanceStatus, ...]) -> Flows:
    """Asks for tickets only where there is a rank whose progress they state.

    Who may not see them sees the rest.
    """
    records = [record for status in statuses for record in status.records]
    try:
        return Flows(records, registry.all_pulls() if any_loads(records) else ())
    except EtcdRefused:
        return Flows(records, ())
