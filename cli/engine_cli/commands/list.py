"""`engines list`."""

from __future__ import annotations

import click

from engine_cli.completion import complete_models
from engine_cli.connection import Connect, etcd_options
from engine_cli.logs import log_options
from engine_cli.options import json_option, selector_option
from engine_cli.render.documents import listed_json
from engine_cli.render.listing import ORDERS, STATES, Choice, none_text
from engine_cli.render.tables import print_json, print_table
from engine_cli.render.texts import instance_table
from engine_cli.runtime.listing import flows_of, keep_listing
from engine_registry.schema.labels import Selector


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
@click.option(
    "--watch",
    "keep",
    is_flag=True,
    help="Keep the table up to date until Ctrl-C. In a pipe, and with --json: a line for each "
    "instance, and again for each that changes.",
)
@json_option
@log_options
@etcd_options
def command(
    connect: Connect,
    model: str | None,
    selector: str,
    state: str | None,
    order: str,
    keep: bool,
    as_json: bool,
) -> None:
    """All instances: state, ranks present of expected, model, version, size, and why one is not
    ready.

    With --watch an etcd that is away is waited for. An instance that is gone, or that is not chosen
    any more, leaves the table; of lines it gets a last one, which says how it is now.
    """
    choice = Choice(Selector.parse(selector), model, state, order)
    with connect() as registry:
        if keep:
            keep_listing(registry, choice, as_json)
            return
        found = registry.instances()
        statuses = choice.of(found)
        flows = flows_of(registry, statuses)
    if as_json:
        print_json({"instances": [listed_json(status, flows) for status in statuses]})
    elif statuses:
        print_table(*instance_table([(status, flows.loaded(status)) for status in statuses]))
    else:
        click.echo(none_text(len(found)))
