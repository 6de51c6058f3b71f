"""`engines release`."""

from __future__ import annotations

import click

from engine_cli.completion import instance_argument
from engine_cli.connection import Connect, etcd_options
from engine_cli.logs import log_options
from engine_cli.options import Seconds, json_option
from engine_cli.render.documents import release_json
from engine_cli.render.tables import print_json
from engine_cli.signals import raised
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.schema.record import MAX_VERSION
from engine_registry.schema.status import InstanceState


@click.command("release")
@instance_argument
@click.option(
    "--version",
    type=click.IntRange(0, MAX_VERSION - 1),
    metavar="N",
    help="The version; without it the newest that all ranks have.",
)
@click.option(
    "--rollback", is_flag=True, help="Take a version that is older than the released one, too."
)
@click.option(
    "--wait",
    "wait_s",
    type=Seconds(),
    default=0.0,
    show_default=True,
    metavar="S",
    help="How long to wait for all ranks to have the version.",
)
@json_option
@log_options
@etcd_options
def command(
    connect: Connect,
    instance: str,
    version: int | None,
    rollback: bool,
    wait_s: float,
    as_json: bool,
) -> None:
    """Release a version of INSTANCE: loads that ask for the released version take it from now on.

    All ranks have to hold it, as their present version or a retained one. If some do not, nothing
    is released, they are named, and the exit code is 4. It stays released until another version
    is, or rank 0 leaves.
    """
    with raised(), connect() as registry:
        if version is None:
            status = registry.instance(instance)
            if status.state is InstanceState.GONE:
                raise InstanceNotFound(
                    f"instance {instance!r} is not registered", "see `Registry.instances()`"
                )
            if status.version is None:
                raise InstanceIncomplete(
                    f"the ranks of {instance!r} have no version in common: {status.summary}"
                )
            version = status.version
        release = registry.rollback if rollback else registry.release
        made = release(instance, version, wait_s)
    if as_json:
        print_json(release_json(made))
    else:
        click.echo(f"{instance}: version {made.version} is released, by {made.by}")
